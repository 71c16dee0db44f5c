"""What the benchmarks found: plain numbers, kept as JSON, shown as Markdown tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import timing_of
from mvshared.checkpoint import config_from_json
from mvshared.errors import ConfigError
from mvshared.files import read_json_object, write_json

FORMAT_VERSION = 1

TITLES = {
    "help": "Start of the command line",
    "generate": "Generation",
    "unet": "One step of the U-Net",
    "vae": "VAE",
    "renderer": "Head renderer",
    "training": "One training step, with and without gradient checkpointing",
    "loading": "Loading ImageDream at full size, random weights, from float16 files",
    "imagedream": "One guided step of ImageDream at full size, random weights",
    "memory": "A run of ImageDream at full size, random weights: loading, one step, decoding",
    "quantized": "Stable Diffusion 2.1's U-Net at full size, random weights, quantised as it is loaded from float16",
}
LARGE = ("loading", "imagedream", "quantized", "memory")  # of a full-size model, which is gigabytes on disk
ON_DEMAND = (*LARGE, "training")  # gigabytes of memory, and minutes: measured only where they are named
LIBRARIES = {"mlx": "MLX", "torch": "PyTorch", "diffusers": "diffusers on PyTorch"}
MLX_ON_CPU = "MLX's CPU backend (not Metal)"
MLX_ON_CPU_NOTE = (
    f"{MLX_ON_CPU} is there for tests, and slow where no tuned BLAS is under it: "
    "these numbers say nothing about MLX on a Mac's GPU."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing, timed in a process of its own: the seconds of every call, or the reason why there are none, `failure`.

    `views` is how many pictures a call makes, if it makes whole ones. `peak_memory_bytes` is the process's largest resident
    memory, `estimated_memory_bytes` what was expected of it, `device_memory_bytes` the largest sum of arrays on a GPU, or of
    MLX's arrays anywhere, `weights_bytes` what the loaded weights need. Where loading was watched, `load_memory_bytes` is what
    it added to the process, `load_peak_bytes` the most that it added on its way, and `peak_memory_bytes` counts from the same
    start.
    """

    what: str
    backend: str = ""
    device: str = ""
    dtype: str = ""
    threads: int | None = None
    views: int | None = None
    seconds: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    estimated_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    weights_bytes: int | None = None
    load_seconds: float | None = None
    load_memory_bytes: int | None = None
    load_peak_bytes: int | None = None
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of one machine. `settings` say how it was measured; `tables` have rows by name, of TITLES."""

    machine: Mapping[str, str | int]
    settings: Mapping[str, str | int]
    tables: Mapping[str, Sequence[Row]]


def write_results(path: Path, results: Results) -> None:
    """Write a JSON file for `read_results`. Raises OutputError."""
    write_json(path, {"format_version": FORMAT_VERSION, **asdict(results)})


def read_results(path: Path) -> Results:
    """Results of a JSON file. Raises ConfigError for a file that `write_results` did not write."""
    document = read_json_object(path)
    if document.pop("format_version", None) != FORMAT_VERSION:
        raise ConfigError(f"format_version must be {FORMAT_VERSION}", path=path, hint="write it again: make bench")
    for name in ("machine", "settings", "tables"):
        if not isinstance(document.get(name), dict):
            raise ConfigError(f"{name} must be an object, got {document.get(name)!r}", path=path)
    tables = {}
    for name, rows in document["tables"].items():
        if name not in TITLES or not isinstance(rows, list):
            raise ConfigError(f"tables must be lists of rows with names of {', '.join(TITLES)}, got {name!r}", path=path)
        tables[name] = [config_from_json(Row, row, path=path, error=ConfigError) for row in rows]
    return Results(machine=document["machine"], settings=document["settings"], tables=tables)


def markdown(results: Results) -> str:
    """Machine, settings and all tables."""
    parts = [f"{_line(results.machine)}.", f"{_line(results.settings)}. Spread is (longest - shortest) / median."]
    for name, rows in results.tables.items():
        parts += [f"### {TITLES[name]}", format_table([_cells(row) for row in rows])]
    if any(_library(row) == MLX_ON_CPU for rows in results.tables.values() for row in rows):
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


def _cells(row: Row) -> dict[str, str]:
    cells = {"what": row.what, "backend": _library(row), "device": row.device, "dtype": row.dtype}
    cells["threads"] = _text(row.threads)
    if row.seconds:
        timing = timing_of(row.seconds)
        cells["median (s)"] = f"{timing.median:.3g}"
        cells["spread"] = f"{100 * timing.spread:.0f} %" if len(row.seconds) > 1 else ""
        cells["repeats"] = _text(len(row.seconds))
        cells["views/s"] = f"{row.views / timing.median:.3g}" if row.views else ""
    cells["load (s)"] = "" if row.load_seconds is None else f"{row.load_seconds:.3g}"
    cells["loaded (MB)"] = _megabytes(row.load_memory_bytes)
    cells["peak of loading (MB)"] = _megabytes(row.load_peak_bytes)
    cells["peak memory (MB)"] = _megabytes(row.peak_memory_bytes)
    cells["estimated (MB)"] = _megabytes(row.estimated_memory_bytes)
    if row.estimated_memory_bytes and row.peak_memory_bytes:
        cells["off by"] = f"{100 * (row.estimated_memory_bytes / row.peak_memory_bytes - 1):+.0f} %"
    cells["weights (MB)"] = _megabytes(row.weights_bytes)
    if row.weights_bytes and row.peak_memory_bytes:
        cells["peak / weights"] = f"{row.peak_memory_bytes / row.weights_bytes:.2f}"
    cells["arrays (MB)"] = _megabytes(row.device_memory_bytes)
    cells["not measured because"] = row.failure
    return cells


def _library(row: Row) -> str:
    return MLX_ON_CPU if (row.backend, row.device) == ("mlx", "cpu") else LIBRARIES.get(row.backend, "")


def _line(values: Mapping[str, str | int]) -> str:
    parts = ((name, f"{int(value) / 2**30:.1f} GiB" if name.endswith("_bytes") else value) for name, value in values.items())
    return ", ".join(f"{name.removesuffix('_bytes')} {value}" for name, value in parts)


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def _text(number: int | None) -> str:
    return "" if number is None else str(number)
