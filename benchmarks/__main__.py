"""Measures this machine: `python -m benchmarks [help generate unet vae renderer] [--json FILE]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import compare
from benchmarks.measure import machine
from benchmarks.results import TITLES, Results, markdown, write_results
from benchmarks.suite import cases
from mvshared.backend import available_backends
from mvshared.checkpoint import find_model, read_model_config
from mvshared.errors import MvError, OptionError


def measure(names: Sequence[str], *, model: str = "demo", steps: int | None = None, repeats: int = 3) -> Results:
    """The results of these names of TITLES, of all of them for none; `steps` is by default the model's.

    Raises OptionError, and CheckpointError for a model that is not there.
    """
    for name, value in (("repeats", repeats), ("steps", steps)):
        if value is not None and value < 1:
            raise OptionError(name, expected="at least 1", got=value)
    folder = find_model(model).resolve()
    steps = steps or read_model_config(folder).defaults.steps
    tables = {}
    for name in names or TITLES:
        rows = []
        for group in cases(name, model=folder, backends=available_backends(), steps=steps):
            print(f"{name}: {group[0].what} {group[0].arguments.get('dtype', '')} ...", file=sys.stderr)
            rows += compare(group, repeats=repeats)
        tables[name] = rows
    return Results(machine=machine(), settings={"model": model, "repeats": repeats, "warm-up calls": 1}, tables=tables)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TITLES)}; all of them by default")
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
