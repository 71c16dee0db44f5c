"""Weights in the layout of checkpoints, which is PyTorch's, and in that of MLX, whose convolutions have their channels last."""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mvmlx.device import evaluated
from mvmlx.latents import to_numpy


def checkpoint_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a checkpoint of an array of this shape."""
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


def from_checkpoint(x: mx.array) -> mx.array:
    """Convolution kernels (out, in, h, w) as (out, h, w, in), evaluated; all else as it is."""
    return evaluated(mx.contiguous(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x)


def to_checkpoint(x: mx.array) -> NDArray[np.float32]:
    """A float32 copy; convolution kernels (out, h, w, in) as (out, in, h, w)."""
    return to_numpy(mx.contiguous(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x)
