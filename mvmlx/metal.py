"""What MLX does on a Mac's GPU alone."""

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

from mvmlx.device import gpu_info
from mvshared.process_memory import resident

CACHE_BYTES = 2 * 10**9  # several times what a step frees; without a limit MLX keeps freed memory until the machine swaps


def on_metal() -> bool:
    """Whether MLX computes on Metal here and now."""
    return mx.default_device() == mx.Device(mx.gpu) and mx.metal.is_available()


def worth_compiling() -> bool:
    """Whether calls of networks are compiled: on Metal, from the M3 on. `MVMLX_COMPILE`, 1 or 0, decides otherwise.

    mflux measured a gain of about 1 % on an M2 Ultra and leaves compilation off on the M1 and M2, where it was slower, or MLX
    failed with large graphs. On the CPU it takes a minute of g++ for a U-Net, and gains nothing.
    """
    chosen = os.environ.get("MVMLX_COMPILE")
    if chosen in ("0", "1"):
        return chosen == "1"
    return mx.metal.is_available() and not re.search(r"\bM[12]\b", str(gpu_info().get("device_name", "")))


@contextmanager
def memory_limits(device: str, cache_bytes: int | None = None, memory_bytes: int | None = None) -> Iterator[None]:
    """Within the context, at most `cache_bytes` of freed memory are kept for later, None for CACHE_BYTES on Metal and all
    elsewhere. On Metal MLX waits where it would run ahead until the process takes more than `memory_bytes`, None for MLX's
    arrays as far as the system recommends; and what is in use is wired up to there, so that macOS does not page out weights
    between two steps.

    MLX's limit refuses nothing: beyond it, freed memory is given back, and an operation begins when those before it are done.
    """
    metal = device == "gpu" and mx.metal.is_available()
    with ExitStack() as stack:

        def limit(set_limit: Callable[[int], int], size: int) -> None:
            stack.callback(set_limit, set_limit(size))

        if cache_bytes is not None or metal:
            limit(mx.set_cache_limit, CACHE_BYTES if cache_bytes is None else cache_bytes)
        if metal:
            most = int(gpu_info()["max_recommended_working_set_size"])
            if memory_bytes is not None:
                most = min(most, max(0, memory_bytes - _other_bytes()))
            limit(mx.set_memory_limit, most)
            if _can_wire():
                limit(mx.set_wired_limit, most)
                # The memory of what still runs must stay wired.
                stack.callback(lambda: mx.synchronize(mx.default_stream(mx.Device(mx.gpu))))
        yield


def _other_bytes() -> int:
    """What the process takes beside MLX's arrays: Python, libraries, pictures."""
    return max(0, resident() - mx.get_active_memory() - mx.get_cache_memory())


def _can_wire() -> bool:
    """Since macOS 15."""
    return int(platform.mac_ver()[0].partition(".")[0] or 0) >= 15
