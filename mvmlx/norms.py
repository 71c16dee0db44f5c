"""Group norms in MLX's operations, with SiLU or without, and with the kernel of `mvmlx.group_norm` where that can be used."""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mvmlx.group_norm import fused_group_norm, usable
from mvmlx.observation import is_observed

_SUMMED = 1024  # pixels that are added up one after the other


def norm_silu(norm: Any, x: mx.array) -> mx.array:
    """SiLU of a GroupNorm's output, without writing that down unless somebody looks at it."""
    return nn.silu(norm(x)) if is_observed(norm) else normalised(norm, x, silu=True)


def normalised(norm: Any, x: mx.array, *, silu: bool = False) -> mx.array:
    """What a GroupNorm makes of x (n, h, w, c), then SiLU if asked for."""
    fused = not norm.training and usable(x)  # the kernel has no gradient
    function = fused_group_norm if fused else group_norm
    return function(x, norm.weight, norm.bias, groups=norm.groups, eps=norm.eps, silu=silu)


def group_norm(x: mx.array, weight: mx.array, bias: mx.array, *, groups: int, eps: float, silu: bool = False) -> mx.array:
    """Normalise (n, h, w, c), then SiLU if asked for; weight and bias are (c,), or (n, c) with one for each picture."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups).astype(mx.float32)
    weight, bias = (p.reshape(-1, 1, *grouped.shape[2:]) for p in (weight, bias))
    share = mx.array(1 / (grouped.shape[1] * grouped.shape[3]))
    shifted = grouped - grouped[:, :1, :, :1]
    total = summed(shifted)
    scale = _deviation_scale(summed(_squares(shifted, total, share)), share, mx.array(eps), weight)
    affine = _affine_silu if silu else _affine
    return affine(shifted, total, share, scale, bias).astype(x.dtype).reshape(x.shape)


def summed(grouped: mx.array) -> mx.array:
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
