"""How many processors this process may use."""

import os


def usable_processors() -> int:
    """The processors that the system lets this process run on: fewer than the machine has where a scheduler shares it out."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
