"""What MLX does on a Mac's GPU alone."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

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
    return mx.metal.is_available() and not re.search(r"\bM[12]\b", str(mx.device_info().get("device_name", "")))


@contextmanager
def memory_limits(device: str, cache_bytes: int | None) -> Iterator[None]:
    """Within the context, at most `cache_bytes` of freed memory are kept for later, None for CACHE_BYTES on Metal and all
    elsewhere; and on Metal what is in use is wired, so that macOS does not page out weights between two steps."""
    metal = device == "gpu" and mx.metal.is_available()
    if cache_bytes is None and metal:
        cache_bytes = CACHE_BYTES
    cache = None if cache_bytes is None else mx.set_cache_limit(cache_bytes)
    wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"])) if metal and _can_wire() else None
    try:
        yield
    finally:
        if wired is not None:
            mx.synchronize(mx.default_stream(mx.Device(mx.gpu)))  # the memory of what still runs must stay wired
            mx.set_wired_limit(wired)
        if cache is not None:
            mx.set_cache_limit(cache)


def _can_wire() -> bool:
    """Since macOS 15."""
    return int(platform.mac_ver()[0].partition(".")[0] or 0) >= 15
