"""The memory of this process, as Linux counts it: what is measured where an array library keeps no books."""

import os
import re
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_peak() -> int | None:
    """Most bytes of memory that this process had resident since `reset_resident_peak`; None where that cannot be measured."""
    if not os.access(_RESET, os.W_OK):
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def reset_resident_peak() -> None:
    """Measure anew from what is resident now, where that can be measured."""
    if os.access(_RESET, os.W_OK):
        _RESET.write_text("5")
