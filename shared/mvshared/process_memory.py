"""The memory of this process, as Linux counts it: what is measured where an array library keeps no books."""

import ctypes
import os
import re
import sys
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_peak() -> int | None:
    """Most bytes of memory that this process had resident since `reset_resident_peak`; None where that cannot be measured."""
    if not os.access(_RESET, os.W_OK):
        return None
    return _counted("VmHWM")


def reset_resident_peak() -> None:
    """Measure anew from what is resident now, where that can be measured."""
    if os.access(_RESET, os.W_OK):
        _RESET.write_text("5")


def resident() -> int:
    """Bytes of memory that this process has resident now; where the system does not say, the most that it ever had, or 0."""
    counted = _counted("VmRSS") if _STATUS.exists() else None
    if counted is not None:
        return counted
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _counted(name: str) -> int | None:
    """A line of the kernel's account of this process, in bytes; None if there is no such line."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def trim_heap() -> None:
    """Give what was freed back to the system, where the C library keeps it (glibc); elsewhere nothing is done."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
