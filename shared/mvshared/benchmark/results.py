"""What the benchmarks found: plain numbers, kept as JSON, shown as Markdown tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mvshared.benchmark.measure import timing_of
from mvshared.checkpoint import config_from_json
from mvshared.errors import ConfigError
from mvshared.files import read_json_object, write_json

FORMAT_VERSION = 2

LIBRARIES = {"mlx": "MLX", "torch": "PyTorch", "diffusers": "diffusers on PyTorch"}
MLX_ON_CPU = "MLX's CPU backend (not Metal)"
MLX_ON_CPU_NOTE = (
    f"{MLX_ON_CPU} is there for tests, and slow where no tuned BLAS is under it: "
    "these numbers say nothing about MLX on a Mac's GPU."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing, timed in a process of its own: the seconds of every call, or the reason why there are none, `failure`.

    `cpu_seconds` are of all threads. `variant` is how a library was asked to do it. `made` is how many pictures a call makes,
    if it makes whole ones; `views`, `size_px` and `steps` are what it works on. `flops` are those of a call, `peak_flops` how
    many a second the same device reaches in products of matrices of the same dtype, `peak_cpu_flops` in a second of CPU time.
    `ratios` are the seconds over those of the best eager diffusers, turn by turn, `cpu_ratios` those of the CPU seconds.

    `peak_memory_bytes` is the process's largest resident memory, `estimated_memory_bytes` what was expected of it,
    `device_memory_bytes` the largest sum of arrays on a GPU, or of MLX's arrays anywhere, `activation_bytes` what a call takes
    on top of what was there before it, `weights_bytes` what the loaded weights need. Where loading was watched,
    `load_memory_bytes` is what it added to the process, `load_peak_bytes` the most that it added on its way, and
    `peak_memory_bytes` counts from the same start.

    `work` is what the kinds of work of a call took when its blocks were watched: name, seconds, flops.
    """

    what: str
    backend: str = ""
    device: str = ""
    dtype: str = ""
    variant: str = ""
    threads: int | None = None
    made: int | None = None
    views: int | None = None
    size_px: int | None = None
    steps: int | None = None
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    flops: int | None = None
    peak_flops: float | None = None
    peak_cpu_flops: float | None = None
    ratios: tuple[float, ...] = ()
    cpu_ratios: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    estimated_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    activation_bytes: int | None = None
    weights_bytes: int | None = None
    load_seconds: float | None = None
    load_memory_bytes: int | None = None
    load_peak_bytes: int | None = None
    work: tuple[tuple[str, float, int], ...] = ()
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one kind. `notes` are sentences that are shown under them."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of one machine. `settings` say how it was measured; tables have names that pages choose them by."""

    machine: Mapping[str, str | int]
    settings: Mapping[str, str | int]
    tables: Mapping[str, Table]


def write_results(path: Path, results: Results) -> None:
    """Write a JSON file for `read_results`. Raises OutputError."""
    write_json(path, document(results))


def document(results: Results) -> dict[str, object]:
    """The JSON object of results."""
    return {"format_version": FORMAT_VERSION, **asdict(results)}


def read_results(path: Path) -> Results:
    """Results of a JSON file. Raises ConfigError for a file that `write_results` did not write."""
    found = read_json_object(path)
    if found.pop("format_version", None) != FORMAT_VERSION:
        raise ConfigError(
            f"format_version must be {FORMAT_VERSION}", path=path, hint="write it again: mvmlx benchmark --json FILE"
        )
    for name in ("machine", "settings", "tables"):
        if not isinstance(found.get(name), dict):
            raise ConfigError(f"{name} must be an object, got {found.get(name)!r}", path=path)
    tables = {}
    for name, table in found["tables"].items():
        if not isinstance(table, dict) or not isinstance(table.get("rows"), list):
            raise ConfigError(f"the table {name!r} must be an object with a list of rows", path=path)
        rows = [config_from_json(Row, row, path=path, error=ConfigError) for row in table["rows"]]
        notes = tuple(str(note) for note in table.get("notes", ()))
        tables[name] = Table(title=str(table.get("title", name)), rows=rows, notes=notes)
    return Results(machine=found["machine"], settings=found["settings"], tables=tables)


def markdown(results: Sequence[Results]) -> str:
    """The machine of these results, which they share, and all tables under the settings that they were measured with."""
    parts = [f"{_line(results[0].machine)}. Spread is (longest - shortest) / median."]
    for each in results:
        if each.tables:
            parts.append(f"{_line(each.settings)}.")
        for table in each.tables.values():
            parts += [f"### {table.title}", format_table([cells(row) for row in table.rows]), *table.notes]
    if any(_library(row) == MLX_ON_CPU for each in results for table in each.tables.values() for row in table.rows):
        parts.append(MLX_ON_CPU_NOTE)
    return "\n\n".join(parts) + "\n"


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table; columns in the order in which they first appear, without those that are empty everywhere."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if any(row.get(name) for row in rows)]
    cells = [columns, *([row.get(name, "").replace("|", "\\|") for name in columns] for row in rows)]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    )


def cells(row: Row) -> dict[str, str]:
    """What a row shows, by the name of the column."""
    shown = {"what": row.what, "backend": _library(row), "variant": row.variant, "device": row.device, "dtype": row.dtype}
    shown["threads"] = _text(row.threads)
    if row.seconds:
        median = timing_of(row.seconds).median
        shown["median (s)"] = f"{median:.3g}"
        shown["spread"] = f"{100 * timing_of(row.seconds).spread:.0f} %" if len(row.seconds) > 1 else ""
        shown["repeats"] = _text(len(row.seconds))
        shown["CPU time (s)"] = ""
        if row.cpu_seconds and row.device == "cpu":  # on a GPU it is that of waiting
            shown["CPU time (s)"] = f"{timing_of(row.cpu_seconds).median:.3g}"
        shown["views/s"] = f"{row.made / median:.3g}" if row.made else ""
        shown["TFLOP/s"] = f"{row.flops / median / 1e12:.3g}" if row.flops else ""
        shown["of peak"] = _share(row.flops, median, row.peak_flops)
        if row.device == "cpu" and row.cpu_seconds:
            shown["of peak, CPU time"] = _share(row.flops, timing_of(row.cpu_seconds).median, row.peak_cpu_flops)
    shown["x diffusers"] = _ratio(row.ratios)
    shown["x diffusers, CPU time"] = _ratio(row.cpu_ratios) if row.device == "cpu" else ""
    shown["load (s)"] = "" if row.load_seconds is None else f"{row.load_seconds:.3g}"
    shown["loaded (MB)"] = _megabytes(row.load_memory_bytes)
    shown["peak of loading (MB)"] = _megabytes(row.load_peak_bytes)
    shown["peak memory (MB)"] = _megabytes(row.peak_memory_bytes)
    shown["activations (MB)"] = _megabytes(row.activation_bytes)
    shown["estimated (MB)"] = _megabytes(row.estimated_memory_bytes)
    if row.estimated_memory_bytes and row.peak_memory_bytes:
        shown["off by"] = f"{100 * (row.estimated_memory_bytes / row.peak_memory_bytes - 1):+.0f} %"
    shown["weights (MB)"] = _megabytes(row.weights_bytes)
    if row.weights_bytes and row.peak_memory_bytes:
        shown["peak / weights"] = f"{row.peak_memory_bytes / row.weights_bytes:.2f}"
    shown["arrays (MB)"] = _megabytes(row.device_memory_bytes)
    shown["not measured because"] = row.failure
    return shown


def _library(row: Row) -> str:
    return MLX_ON_CPU if (row.backend, row.device) == ("mlx", "cpu") else LIBRARIES.get(row.backend, "")


def _line(values: Mapping[str, str | int]) -> str:
    parts = ((name, f"{int(value) / 2**30:.1f} GiB" if name.endswith("_bytes") else value) for name, value in values.items())
    return ", ".join(f"{name.removesuffix('_bytes')} {value}" for name, value in parts)


def _share(flops: int | None, seconds: float, peak: float | None) -> str:
    return f"{100 * flops / seconds / peak:.0f} %" if flops and peak and seconds else ""


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    timing = timing_of(ratios)
    return f"{timing.median:.2f} ({timing.min:.2f} to {timing.max:.2f})" if len(ratios) > 1 else f"{timing.median:.2f}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def _text(number: int | None) -> str:
    return "" if number is None else str(number)
