"""Convolutions that MLX computes faster as something else."""

import mlx.core as mx
import mlx.nn as nn

# Inputs up to which Winograd's method on Metal has room in float16: its transform makes them up to 225 times as large (MLX's
# backend/metal/kernels/conv.metal).
WINOGRAD_LARGEST = 256.0


class PointConv2d(nn.Conv2d):
    """A convolution of size 1, which is a linear layer of every pixel."""

    kind = "Conv2d"  # as which it is observed

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """(n, h, w, in_channels) to (n, h, w, out_channels)."""
        if x.dtype != mx.float32 and mx.default_device() == mx.Device(mx.cpu):
            return super().__call__(x)  # MLX's CPU multiplies matrices in half precision slowly, and convolves in float32
        weight = self.weight.reshape(len(self.weight), -1).T
        return mx.addmm(self.bias, x, weight) if "bias" in self else x @ weight
