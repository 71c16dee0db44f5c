"""Where MLX computes, and when: what is handed out is computed before."""

from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx


def on_device(device: str) -> AbstractContextManager[Any]:
    """A context in which MLX computes on cpu or gpu; its default device belongs to the program around this."""
    return mx.stream(mx.Device(getattr(mx, device)))


def evaluated(x: mx.array) -> mx.array:
    """The same array, computed, so that another thread may use it."""
    mx.eval(x)
    return x
