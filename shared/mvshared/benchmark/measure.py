"""What every benchmark needs: the machine it ran on, timings with their spread, time and memory of a process."""

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from mvshared.processors import usable_processors

PACKAGES = ("mvmlx", "numpy", "torch", "mlx", "diffusers")
MEMINFO = Path("/proc/meminfo")
FREE_SHARE = 0.8  # of the memory, where the system does not say what is free


class Timing(NamedTuple):
    """Of the repeats of one call: seconds, or ratios of them; `spread` is (max - min) / median."""

    median: float
    min: float
    max: float
    spread: float


def timing_of(values: Sequence[float]) -> Timing:
    """The Timing of at least one repeat."""
    median, shortest, longest = statistics.median(values), min(values), max(values)
    return Timing(median=median, min=shortest, max=longest, spread=(longest - shortest) / median if median else 0.0)


def machine() -> dict[str, str | int]:
    """CPU, usable logical cores, OMP_NUM_THREADS, bytes of memory, system, Python, and those of PACKAGES that are installed.

    Versions come from the installed metadata: no array library is imported.
    """
    result: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": usable_processors(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "ram_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def cpu_seconds() -> float:
    """CPU time of all threads of this process, and of the processes that it started and waited for."""
    import resource  # not on Windows

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started, in bytes; it never falls, so each case needs its own process.

    On Linux the kernel's VmHWM: getrusage's ru_maxrss there starts from the peak of the process that launched this one.
    """
    import resource  # not on Windows

    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def children_peak_rss_bytes() -> int:
    """Largest resident memory of any process that this one started and waited for, in bytes.

    On Linux at least the memory that this process itself had when it started them: call it from a small one.
    """
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory_bytes() -> int:
    """Memory that processes can still take without swapping; where the system does not say, a share of all of it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE) if MEMINFO.exists() else None
    return 1024 * int(found[1]) if found else round(FREE_SHARE * _memory_bytes())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
