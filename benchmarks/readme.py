"""Puts files of `python -m benchmarks --json` into the README, one per machine: `python -m benchmarks.readme FILE ...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import ROOT
from benchmarks.results import Results, markdown, read_results
from mvshared.errors import ConfigError, MvError
from mvshared.files import write_atomic

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
# What readers want to know: backend and how its device's name begins.
WANTED = {"MLX on a Mac's GPU": ("mlx", "Metal"), "PyTorch on CUDA": ("torch", "CUDA"), "PyTorch on a CPU": ("torch", "cpu")}


def block(results: Sequence[Results]) -> str:
    """The tables of all machines, and what none of them measured with the command that would."""
    missing = [name for name, (backend, device) in WANTED.items() if not _measured(results, backend, device)]
    parts = [markdown(result).strip() for result in results]
    if missing:
        parts.append(
            f"**Not measured: {'; '.join(missing)}.** On such a machine, this measures it and puts it here:\n\n"
            "```sh\n"
            'make bench BENCH_ARGS="--json FILE"\n'
            ".venv/bin/python -m benchmarks.readme FILE   # one file per machine\n"
            "```"
        )
    return "\n\n".join(parts)


def replace_measured(readme: str, text: str) -> str:
    """The README with `text` between the two marks. Raises ConfigError unless each mark is there once, in this order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ConfigError(f"the README must have one {BEGIN} and, after it, one {END}")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def _measured(results: Sequence[Results], backend: str, device: str) -> bool:
    rows = (row for result in results for table in result.tables.values() for row in table)
    return any(row.seconds and row.backend == backend and row.device.startswith(device) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    text = block([read_results(path) for path in arguments.files])
    readme = arguments.readme.read_text(encoding="utf-8")
    write_atomic(arguments.readme, replace_measured(readme, text).encode())


if __name__ == "__main__":
    try:
        main()
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
