"""Measures this machine: `python -m benchmarks [help generate unet vae renderer training loading ...] [--json FILE]`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import compare
from benchmarks.full_size import write_random_imagedream
from benchmarks.measure import machine
from benchmarks.memory import write_random_models
from benchmarks.quantized import write_random_sd21
from benchmarks.results import ON_DEMAND, TITLES, Results, markdown, write_results
from benchmarks.suite import cases
from mvshared.backend import available_backends
from mvshared.checkpoint import find_model, read_model_config
from mvshared.errors import MvError, OptionError


def measure(names: Sequence[str], *, model: str = "demo", steps: int | None = None, repeats: int = 3) -> Results:
    """The results of these names of TITLES, of all but those ON_DEMAND for none; `steps` is by default the model's.

    The LARGE ones are of the `model`, if that is a full ImageDream's folder (or Stable Diffusion 2.1's, for `quantized`); for
    `demo` one with random weights is written, and removed in the end. Raises OptionError, and CheckpointError for a model that
    is not there.
    """
    for name, value in (("repeats", repeats), ("steps", steps)):
        if value is not None and value < 1:
            raise OptionError(name, expected="at least 1", got=value)
    folder = find_model(model).resolve()
    steps = steps or read_model_config(folder).defaults.steps
    tables = {}
    with tempfile.TemporaryDirectory(prefix="mvmlx-benchmark-") as scratch:
        written = {}
        if model == "demo":
            for writer, those in (
                (write_random_imagedream, {"loading", "imagedream"}),
                (write_random_models, {"memory"}),
                (write_random_sd21, {"quantized"}),
            ):
                if set(names) & those:
                    print("writing a model with random weights ...", file=sys.stderr)
                    written |= dict.fromkeys(those, writer(Path(scratch) / writer.__name__))
        for name in names or [name for name in TITLES if name not in ON_DEMAND]:
            rows = []
            chosen = written.get(name, folder)
            for group in cases(name, model=chosen, backends=available_backends(), steps=steps):
                print(f"{name}: {group[0].what} {group[0].arguments.get('dtype', '')} ...", file=sys.stderr)
                rows += compare(group, repeats=0 if name == "memory" else repeats)  # its peak is that of the first run
            tables[name] = rows
    return Results(machine=machine(), settings={"model": model, "repeats": repeats, "warm-up calls": 1}, tables=tables)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(TITLES)}; by default all but {', '.join(ON_DEMAND)}"
    )
    parser.add_argument("--model", default="demo", help="an embedded model's name, or a checkpoint folder")
    parser.add_argument("--steps", type=int, help="steps of a generation; by default the model's")
    parser.add_argument("--repeats", type=int, default=3, help="calls that count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, for benchmarks.readme")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in TITLES]
    if unknown:
        parser.error(f"no such benchmark: {unknown[0]}; there are {', '.join(TITLES)}")
    results = measure(arguments.names, model=arguments.model, steps=arguments.steps, repeats=arguments.repeats)
    print(markdown(results), end="")
    if arguments.json is not None:
        write_results(arguments.json, results)


if __name__ == "__main__":
    try:
        main()
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
