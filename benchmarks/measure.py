"""What every benchmark needs: the machine it ran on, timings with their spread, peak memory."""

import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("numpy", "torch", "mlx")


class Timing(NamedTuple):
    """Wall-clock seconds of the repeats of one call; `spread` is (max - min) / median."""

    median: float
    min: float
    max: float
    spread: float


def timing_of(seconds: Sequence[float]) -> Timing:
    """The Timing of at least one repeat."""
    median, shortest, longest = statistics.median(seconds), min(seconds), max(seconds)
    return Timing(median=median, min=shortest, max=longest, spread=(longest - shortest) / median)


def machine() -> dict[str, str | int]:
    """CPU, usable logical cores, OMP_NUM_THREADS, bytes of memory, system, Python, and those of PACKAGES that are installed.

    Versions come from the installed metadata: no array library is imported.
    """
    result: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started, in bytes; it never falls, so each case needs its own process.

    On Linux the kernel's VmHWM: getrusage's ru_maxrss there starts from the peak of the process that launched this one.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def children_peak_rss_bytes() -> int:
    """Largest resident memory of any process that this one started and waited for, in bytes.

    On Linux at least the memory that this process itself had when it started them: call it from a small one.
    """
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
