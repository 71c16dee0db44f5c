"""Puts files of `python -m benchmarks --json`, one per machine, into the pages: `python -m benchmarks.readme FILE ...`.

The README gets what a user feels, docs/benchmarks.md everything.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import ROOT
from benchmarks.results import TITLES, Results, markdown, read_results
from mvshared.errors import ConfigError, MvError
from mvshared.files import write_atomic

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
PAGES: dict[str, Collection[str]] = {"README.md": ("help", "generate"), "docs/benchmarks.md": tuple(TITLES)}
# What readers want to know: backend and how its device's name begins.
WANTED = {"MLX on a Mac's GPU": ("mlx", "Metal"), "PyTorch on CUDA": ("torch", "CUDA"), "PyTorch on a CPU": ("torch", "cpu")}


def block(results: Sequence[Results], *, tables: Collection[str] = tuple(TITLES)) -> str:
    """These tables of all machines, and what none of them measured with the command that would."""
    results = [replace(each, tables={name: each.tables[name] for name in tables if name in each.tables}) for each in results]
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


def replace_measured(page: str, text: str) -> str:
    """The page with `text` between the two marks. Raises ConfigError unless each mark is there once, in this order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ConfigError(f"the page must have one {BEGIN} and, after it, one {END}")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def _measured(results: Sequence[Results], backend: str, device: str) -> bool:
    rows = (row for result in results for table in result.tables.values() for row in table)
    return any(row.seconds and row.backend == backend and row.device.startswith(device) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the pages")
    arguments = parser.parse_args()
    results = [read_results(path) for path in arguments.files]
    for page, tables in PAGES.items():
        path = arguments.root / page
        text = replace_measured(path.read_text(encoding="utf-8"), block(results, tables=tables))
        write_atomic(path, text.encode())


if __name__ == "__main__":
    try:
        main()
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
