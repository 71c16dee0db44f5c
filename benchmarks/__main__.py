"""What only the repository measures: `python -m benchmarks [renderer training loading memory quantized] [--json FILE]`.

What users measure is `mvmlx benchmark`.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.full_size import write_random_imagedream
from benchmarks.memory import write_random_models
from benchmarks.quantized import write_random_sd21
from benchmarks.suite import TITLES, cases
from mvshared.backend import available_backends
from mvshared.benchmark.compare import compare
from mvshared.benchmark.measure import machine
from mvshared.benchmark.results import Results, Table, markdown, write_results
from mvshared.checkpoint import find_model
from mvshared.errors import MvError, OptionError

WRITERS = {"loading": write_random_imagedream, "memory": write_random_models, "quantized": write_random_sd21}


def measure(names: Sequence[str], *, model: str = "demo", repeats: int = 3) -> Results:
    """The results of these names of TITLES.

    Those of WRITERS are of the `model`, if that is a full ImageDream's folder (or Stable Diffusion 2.1's, for `quantized`); for
    `demo` one with random weights is written, and removed in the end. Raises OptionError, and CheckpointError for a model that
    is not there.
    """
    if repeats < 1:
        raise OptionError("repeats", expected="at least 1", got=repeats)
    folder = find_model(model).resolve()
    tables = {}
    with tempfile.TemporaryDirectory(prefix="mvmlx-benchmark-") as scratch:
        for name in names:
            chosen = folder
            if model == "demo" and name in WRITERS:
                print("writing a model with random weights ...", file=sys.stderr)
                chosen = WRITERS[name](Path(scratch) / name)
            rows = []
            for group in cases(name, model=chosen, backends=available_backends()):
                print(f"{name}: {group[0].what} {group[0].arguments.get('dtype', '')} ...", file=sys.stderr)
                rows += compare(group, repeats=0 if name == "memory" else repeats)  # its peak is that of the first run
            tables[name] = Table(title=TITLES[name], rows=rows)
    return Results(machine=machine(), settings={"model": model, "repeats": repeats}, tables=tables)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=TITLES, help=f"of {', '.join(TITLES)}")
    parser.add_argument("--model", default="demo", help="a checkpoint folder, instead of one with random weights")
    parser.add_argument("--repeats", type=int, default=3, help="calls that count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, for benchmarks.readme")
    arguments = parser.parse_args()
    results = measure(arguments.names, model=arguments.model, repeats=arguments.repeats)
    print(markdown([results]), end="")
    if arguments.json is not None:
        write_results(arguments.json, results)


if __name__ == "__main__":
    try:
        main()
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
