"""Convolutional blocks of the U-Net and the VAE, and the timestep embedding, after diffusers' resnet.py and embeddings.py.

Inside the networks pictures are (n, h, w, c), where n counts the views of all objects.
"""

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.utils import checkpoint

from mvmlx.convolutions import WINOGRAD_LARGEST, PointConv2d
from mvmlx.metal import on_metal
from mvmlx.norms import group_norm, norm_silu, normalised
from mvshared.errors import OptionError


class GroupNorm(nn.Module):
    """Group normalisation of (n, h, w, c) with statistics in float32.

    MLX's own, with `pytorch_compatible`, loses digits on the CPU where the mean is large, and rounds before the affine part.
    A group that is constant, as an empty reference frame makes them, must come out as zero: what the mean's rounding left of it
    would grow by 1 / sqrt(eps). So every group's first value is subtracted before the mean.
    """

    def __init__(self, groups: int, channels: int, *, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """(n, h, w, c) to (n, h, w, c)."""
        return normalised(self, x)


class AdaGroupNorm(nn.Module):
    """Group normalisation whose scale and shift are linear in an embedding, after diffusers' class of that name."""

    def __init__(self, groups: int, channels: int, *, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.linear = nn.Linear(embed_dim, 2 * channels)

    def __call__(self, x: mx.array, emb: mx.array) -> mx.array:
        """(n, h, w, c) and embeddings (n, embed_dim) to (n, h, w, c)."""
        return group_norm(x, *self.scale_shift(emb), groups=self.groups, eps=self.eps)

    def scale_shift(self, emb: mx.array) -> tuple[mx.array, mx.array]:
        """Factors and summands (n, c)."""
        scale, shift = mx.split(self.linear(emb), 2, axis=-1)
        return 1 + scale, shift


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32 whatever the dtype of its weights and input, for the last layer before pictures."""

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve x (n, h, w, c); the result is float32."""
        y = mx.conv2d(x.astype(mx.float32), self.weight.astype(mx.float32), self.stride, self.padding)
        return y + self.bias.astype(mx.float32) if "bias" in self else y


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut; the projected time embedding is added in between.

    `time_embed_dim` None leaves the time embedding out, as in the VAE.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_embed_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_embed_dim is not None:
            self.time_emb_proj = nn.Linear(time_embed_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = PointConv2d(in_channels, out_channels) if in_channels != out_channels else None

    def __call__(self, x: mx.array, emb: mx.array | None = None) -> mx.array:
        """x (n, h, w, in_channels) and time embeddings after SiLU (n, time_embed_dim) to (n, h, w, out_channels)."""
        h = self.conv1(norm_silu(self.norm1, x))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, None, None, :]
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """A convolution of stride 2. `pad_after` pads below and to the right only, as the VAE does."""

    def __init__(self, channels: int, *, pad_after: bool = False) -> None:
        super().__init__()
        self.pad_after = pad_after
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_after else 1)

    def __call__(self, x: mx.array) -> mx.array:
        """(n, h, w, c) to (n, h / 2, w / 2, c)."""
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]) if self.pad_after else x)


class Upsample(nn.Module):
    """Every pixel twice in both directions, then a convolution.

    No norm is before it, and on Metal wide convolutions of large maps are Winograd's: of inputs beyond WINOGRAD_LARGEST it has
    sums that float16 has no room for. So those are divided by a number first, and the result is multiplied by it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """(n, h, w, c) to (n, 2 h, 2 w, c)."""
        if x.dtype != mx.float16 or not on_metal():
            return self.conv(_twice(x))
        factor = mx.stop_gradient(mx.maximum(mx.maximum(x.max(), -x.min()) / WINOGRAD_LARGEST, 1))
        return self.conv(_twice(x / factor)) * factor - (factor - 1) * self.conv["bias"]


def _twice(x: mx.array) -> mx.array:
    n, h, w, c = x.shape
    return mx.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear: of the sinusoidal timestep and of the camera vector."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in_channels) to (..., time_embed_dim)."""
        return self.linear_2(nn.silu(self.linear_1(x)))


class GEGLU(nn.Module):
    """A linear layer whose first half is gated by the exact GELU of its second half."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., channels) to (..., hidden)."""
        return _gated(*mx.split(self.proj(x), 2, axis=-1))


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; `net.1` is diffusers' dropout, which has no weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = [GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        """(..., channels) to (..., channels)."""
        return self.net[2](self.net[0](x))


def gelu(x: mx.array) -> mx.array:
    """The exact GELU, computed in float32: MLX's own doubles x in its dtype, and beyond 32752 float16 has no room for that."""
    return _gelu(x)


@partial(mx.compile, shapeless=True)  # one kernel, which reads and writes the dtype of x
def _gelu(x: mx.array) -> mx.array:
    return nn.gelu(x.astype(mx.float32)).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _gated(x: mx.array, gate: mx.array) -> mx.array:
    return x * gelu(gate)


def timestep_embedding(timesteps: mx.array, channels: int) -> mx.array:
    """Sinusoids float32 (b, channels) of timesteps (b,), cosines first: diffusers' flip_sin_to_cos with freq_shift 0.

    Raises OptionError for an odd number of channels.
    """
    if channels % 2:
        raise OptionError("channels", expected="even for a timestep embedding", got=channels)
    half = channels // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / half).astype(np.float32)
    angles = timesteps.astype(mx.float32)[:, None] * mx.array(frequencies)
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def repeat_objects(x: mx.array, n: int) -> mx.array:
    """x (m, ...) as often as gives (n, ...): what objects have in common, for each of them."""
    return x if len(x) == n else mx.concatenate([x] * (n // len(x)))


def run_block(block: nn.Module, *inputs: Any, recompute: bool, **static: Any) -> mx.array:
    """Call a module; with `recompute`, keep its inputs only and compute it again for the gradient (gradient checkpointing).

    `inputs` are arrays, lists and tuples of them, or None; `static` holds arguments that are none of these.
    """
    if not recompute:
        return block(*inputs, **static)
    return checkpoint(block, lambda *arrays: block(*arrays, **static))(*inputs)
