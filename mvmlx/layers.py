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

from mvmlx.group_norm import fused_group_norm, usable
from mvshared.errors import OptionError

_SUMMED = 1024  # pixels that are added up one after the other


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
        return self._normalised(x, silu=False)

    def _normalised(self, x: mx.array, *, silu: bool) -> mx.array:
        fused = not self.training and usable(x)  # the kernel has no gradient
        norm = fused_group_norm if fused else _group_norm
        return norm(x, self.weight, self.bias, groups=self.groups, eps=self.eps, silu=silu)


class AdaGroupNorm(nn.Module):
    """Group normalisation whose scale and shift are linear in an embedding, after diffusers' class of that name."""

    def __init__(self, groups: int, channels: int, *, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.linear = nn.Linear(embed_dim, 2 * channels)

    def __call__(self, x: mx.array, emb: mx.array) -> mx.array:
        """(n, h, w, c) and embeddings (n, embed_dim) to (n, h, w, c)."""
        return _group_norm(x, *self.scale_shift(emb), groups=self.groups, eps=self.eps)

    def scale_shift(self, emb: mx.array) -> tuple[mx.array, mx.array]:
        """Factors and summands (n, c)."""
        scale, shift = mx.split(self.linear(emb), 2, axis=-1)
        return 1 + scale, shift


def _norm_silu(norm: GroupNorm, x: mx.array) -> mx.array:
    """SiLU of a norm's output, without writing that down; a norm that is observed has another class, and shows its output."""
    return norm._normalised(x, silu=True) if type(norm) is GroupNorm else nn.silu(norm(x))


def _group_norm(x: mx.array, weight: mx.array, bias: mx.array, *, groups: int, eps: float, silu: bool = False) -> mx.array:
    """Normalise (n, h, w, c), then SiLU if asked for; weight and bias are (c,), or (n, c) with one for each picture."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups).astype(mx.float32)
    weight, bias = (p.reshape(-1, 1, *grouped.shape[2:]) for p in (weight, bias))
    share = mx.array(1 / (grouped.shape[1] * grouped.shape[3]))
    shifted = grouped - grouped[:, :1, :, :1]
    total = _total(shifted)
    scale = _deviation_scale(_total(_squares(shifted, total, share)), share, mx.array(eps), weight)
    affine = _affine_silu if silu else _affine
    return affine(shifted, total, share, scale, bias).astype(x.dtype).reshape(x.shape)


def _total(grouped: mx.array) -> mx.array:
    """Sums (n, 1, groups, 1) of (n, pixels, groups, width).

    Pixels are summed first, since sums of rows are many times faster on the CPU than of all at once, and few of them at a time,
    since MLX adds one to the other, which costs float32 its digits in long sums.
    """
    n, pixels, *rest = grouped.shape
    while pixels > _SUMMED:
        together = next(count for count in range(_SUMMED, 0, -1) if pixels % count == 0)
        if together == 1:
            break
        pixels //= together
        grouped = grouped.reshape(n, pixels, together, *rest).sum(axis=2)
    return grouped.sum(axis=1, keepdims=True).sum(axis=-1, keepdims=True)


# Compiled, the feature map is written three times: shifted, squared, normalised.


@partial(mx.compile, shapeless=True)
def _squares(shifted: mx.array, total: mx.array, share: mx.array) -> mx.array:
    return (shifted - total * share).square()


@partial(mx.compile, shapeless=True)
def _deviation_scale(squares: mx.array, share: mx.array, eps: mx.array, weight: mx.array) -> mx.array:
    return mx.rsqrt(squares * share + eps) * weight


@partial(mx.compile, shapeless=True)
def _affine(shifted: mx.array, total: mx.array, share: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    return (shifted - total * share) * scale + bias


@partial(mx.compile, shapeless=True)
def _affine_silu(shifted: mx.array, total: mx.array, share: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    return nn.silu(_affine(shifted, total, share, scale, bias))


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32 whatever the dtype of its weights and input, for the last layer before pictures."""

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve x (n, h, w, c); the result is float32."""
        y = mx.conv2d(x.astype(mx.float32), self.weight.astype(mx.float32), self.stride, self.padding)
        return y + self.bias.astype(mx.float32) if "bias" in self else y


class _PointConv2d(nn.Conv2d):
    """A convolution of size 1, which is a linear layer of every pixel."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """(n, h, w, in_channels) to (n, h, w, out_channels)."""
        if x.dtype != mx.float32 and mx.default_device() == mx.Device(mx.cpu):
            return super().__call__(x)  # MLX's CPU multiplies matrices in half precision slowly, and convolves in float32
        weight = self.weight.reshape(len(self.weight), -1).T
        return mx.addmm(self.bias, x, weight) if "bias" in self else x @ weight


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
        self.conv_shortcut = _PointConv2d(in_channels, out_channels) if in_channels != out_channels else None

    def __call__(self, x: mx.array, emb: mx.array | None = None) -> mx.array:
        """x (n, h, w, in_channels) and time embeddings after SiLU (n, time_embed_dim) to (n, h, w, out_channels)."""
        h = self.conv1(_norm_silu(self.norm1, x))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, None, None, :]
        h = self.conv2(_norm_silu(self.norm2, h))
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
    """Every pixel twice in both directions, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """(n, h, w, c) to (n, 2 h, 2 w, c)."""
        n, h, w, c = x.shape
        x = mx.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c))
        return self.conv(x.reshape(n, 2 * h, 2 * w, c))


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


def _evaluated(x: mx.array) -> mx.array:
    """The same array, computed, so that another thread may use it."""
    mx.eval(x)
    return x
