"""The memory of this process, as its system counts it: what is measured where an array library keeps no books."""

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
    """Bytes of memory that this process takes now; where the system does not say, the most that it ever had, or 0."""
    counted = _counted("VmRSS") if _STATUS.exists() else None
    if sys.platform == "darwin":
        counted = _footprint()
    if counted is not None:
        return counted
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _footprint() -> int | None:
    """What macOS counts as this process's memory, a GPU's buffers with it; None if it does not say."""
    ask = getattr(ctypes.CDLL(None), "proc_pid_rusage", None)
    # rusage_info_v0 of Apple's sys/resource.h, as numbers of 64 bits: two of uuid, user_time, system_time, pkg_idle_wkups,
    # interrupt_wkups, pageins, wired_size, resident_size, phys_footprint, proc_start_abstime, proc_exit_abstime. The footprint
    # counts, as the system ends processes by it: with what was compressed, without pages of files.
    usage = (ctypes.c_uint64 * 12)()
    return usage[9] if ask is not None and ask(os.getpid(), 0, usage) == 0 else None


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
