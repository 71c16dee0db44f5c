"""Where MLX computes, and when: what is handed out is computed before."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx


def on_device(device: str) -> AbstractContextManager[Any]:
    """A context in which MLX computes on cpu or gpu; its default device belongs to the program around this."""
    return mx.stream(mx.Device(getattr(mx, device)))


def gpu_info() -> dict[str, str | int]:
    """What MLX knows of the GPU, whatever the default device is."""
    return mx.device_info(mx.Device(mx.gpu))


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """A context after which MLX's random numbers go on as if nothing had been drawn; they belong to the program around this."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def evaluated(x: mx.array) -> mx.array:
    """The same array, computed, so that another thread may use it."""
    mx.eval(x)
    return x
