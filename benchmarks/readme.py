"""Puts files of `mvmlx benchmark` and `python -m benchmarks` into the pages: `python -m benchmarks.readme FILE ...`.

The README gets what a user feels, docs/benchmarks.md everything, with the plots of what grows.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.plots import plot_growth
from mvshared.benchmark.results import Results, Row, markdown, read_results
from mvshared.errors import ConfigError, MvError
from mvshared.files import make_folder, write_atomic

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
SHORT = ("start", "run", "step", "against")  # what the README shows
SHOWN = {"what", "backend", "variant", "device", "dtype", "seconds", "cpu_seconds", "made", "ratios", "cpu_ratios", "failure"}
PLOT = "docs/images/growth.png"
# What readers want to know: backend and how its device's name begins.
WANTED = {"MLX on a Mac's GPU": ("mlx", "Metal"), "PyTorch on CUDA": ("torch", "CUDA"), "PyTorch on a CPU": ("torch", "cpu")}


def block(results: Sequence[Results], *, chosen: Callable[[Results], Results] = lambda each: each) -> str:
    """What is chosen of all machines, files of one machine together, and what none of them measured with the command for it."""
    machines: dict[tuple[object, ...], list[Results]] = {}
    for each in results:
        if (kept := chosen(each)).tables:
            machines.setdefault(tuple(each.machine.items()), []).append(kept)
    parts = [markdown(those).strip() for those in machines.values()]
    missing = [name for name, (backend, device) in WANTED.items() if not _measured(results, backend, device)]
    if missing:
        parts.append(
            f"**Not in these tables: {'; '.join(missing)}.** On such a machine, with mvmlx installed, this measures it; the "
            "last line puts it here, in a clone of the repository:\n\n"
            "```sh\n"
            "mvmlx benchmark --json demo.json\n"
            "mvmlx benchmark step --model sd21 --views 1,4 --sizes 256,512 --against diffusers --json sd21.json\n"
            "python -m benchmarks.readme demo.json sd21.json   # all that stands here goes: name other machines' files, too\n"
            "```"
        )
    return "\n\n".join(parts)


def short(results: Results) -> Results:
    """The tables of SHORT, and of their rows what a user feels."""
    tables = {}
    for name in SHORT:
        if name in results.tables:
            rows = [_felt(row) for row in results.tables[name].rows]
            tables[name] = replace(results.tables[name], rows=rows)
    return replace(results, tables=tables)


def _felt(row: Row) -> Row:
    blank = Row(what=row.what)
    return replace(blank, **{name: getattr(row, name) for name in SHOWN})


def replace_measured(page: str, text: str) -> str:
    """The page with `text` between the two marks. Raises ConfigError unless each mark is there once, in this order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ConfigError(f"the page must have one {BEGIN} and, after it, one {END}")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def _measured(results: Sequence[Results], backend: str, device: str) -> bool:
    rows = (row for result in results for table in result.tables.values() for row in table.rows)
    return any(row.seconds and row.backend == backend and row.device.startswith(device) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the pages")
    arguments = parser.parse_args()
    results = [read_results(path) for path in arguments.files]
    drawn = plot_growth([table for each in results for table in each.tables.values()])
    text = block(results)
    if drawn is not None:
        path = arguments.root / PLOT
        make_folder(path.parent)
        write_atomic(path, drawn)
        text += f"\n\n![Time and memory against the arithmetic]({Path(PLOT).relative_to('docs')})"
    for page, put in {"README.md": block(results, chosen=short), "docs/benchmarks.md": text}.items():
        path = arguments.root / page
        write_atomic(path, replace_measured(path.read_text(encoding="utf-8"), put).encode())


if __name__ == "__main__":
    try:
        main()
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
