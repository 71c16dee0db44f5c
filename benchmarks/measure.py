"""What every benchmark needs: the machine it ran on, timings with their spread, peak memory, a Markdown table.

Run the scripts as modules from the repository's root, `python -m benchmarks.NAME`, so that they find this file.
"""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from mvshared.errors import OptionError

PACKAGES = ("numpy", "torch", "mlx")


class Timing(NamedTuple):
    """Wall-clock seconds of the repeats of one call; `spread` is (max - min) / median."""

    median: float
    min: float
    max: float
    spread: float


def machine() -> dict[str, str | int]:
    """CPU, usable logical cores, bytes of memory, system, Python, and the versions of those PACKAGES that are installed.

    Versions come from the installed metadata: no array library is imported.
    """
    result: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def measure(fn: Callable[[], object], *, repeats: int = 5, warmup: int = 1) -> Timing:
    """Time `repeats` calls of `fn` after `warmup` calls that do not count.

    `fn` itself must wait for the device (mx.eval, torch.cuda.synchronize), or only the launch is timed. Raises OptionError.
    """
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise OptionError(name, expected=f"at least {least}", got=value)
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    median, shortest, longest = statistics.median(seconds), min(seconds), max(seconds)
    return Timing(median=median, min=shortest, max=longest, spread=(longest - shortest) / median)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started, in bytes; it never falls, so each case needs its own process.

    On Linux the kernel's VmHWM: getrusage's ru_maxrss there starts from the peak of the process that launched this one.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows as a Markdown table; columns in the order in which they first appear, floats with four digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
