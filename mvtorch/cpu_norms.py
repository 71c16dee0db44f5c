"""Group norms in inference on a CPU, with fewer passes over the map than PyTorch's own and no digits lost to large means.

PyTorch's kernel for channels_last takes the variance as E[x^2] - E[x]^2, so that the mean must be subtracted before: eight
passes in all. Its kernels for batch norm take a channel's variance around its mean, and write the result in one pass. Maps of
a few pixels take PyTorch's kernel as it is, unless their means turn out to be too large for it: there the calls count, each of
which hands work to all threads and waits for them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvtorch import cuda_fused
from mvtorch.observation import is_observed

_LEAST_NUMBERS = 1 << 15  # of a piece: with fewer, the many calls take longer than what they save
# Pixels whose numbers are added up one after the other, which costs float32 its last digits.
_PIECE_PIXELS = {torch.float32: 256, torch.bfloat16: 4096, torch.float16: 4096}
_PIECE_NUMBERS = 1 << 18  # of what is looked at twice, by each thread, so that it is still in its cache
_MOST_PIXELS = 1024  # that PyTorch's kernel adds up one after the other
_CACHED_PIXELS = 4096  # likewise, or as many as have _PIECE_NUMBERS, if those are more
# In deviations, each of which costs float32 half a unit of its last digit. Half precision has thousands to spare, and would
# round what is left once more.
_LARGEST_MEAN = {torch.float32: 8, torch.bfloat16: 64, torch.float16: 64}
_FEW_PIXELS = 256  # of which PyTorch's kernel, in float32, is as exact as the others for means of up to a deviation


def may_overwrite(*modules: nn.Module) -> bool:
    """Whether what these modules return may be written to: without gradients, and unless someone looks at it."""
    return not torch.is_grad_enabled() and not any(map(is_observed, modules))


def norm_silu(norm: Any, x: Tensor, *, overwrite: bool = False) -> Tensor:
    """SiLU of x (n, c, h, w) after a GroupNorm, in the memory of x with `overwrite`."""
    if not may_overwrite(norm):
        return F.silu(norm(x))
    if is_for(x):
        target = x if overwrite else None
        return normalised(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=True, out=target)
    out = cuda_fused.group_norm(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=True, overwrite=overwrite)
    return F.silu(norm(x), inplace=True) if out is None else out


def is_for(x: Tensor) -> bool:
    """Whether `normalised` is for pictures x (n, c, h, w)."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.dtype not in _PIECE_PIXELS:
        return False
    pixels = x.shape[2] * x.shape[3]
    if x.dtype == torch.float32 and pixels <= _FEW_PIXELS:
        return True
    return pixels > _MOST_PIXELS or x.shape[1] * min(pixels, _PIECE_PIXELS[x.dtype]) >= _LEAST_NUMBERS


def normalised(
    x: Tensor, groups: int, scale: Tensor, shift: Tensor, *, eps: float, silu: bool = False, out: Tensor | None = None
) -> Tensor:
    """Group norm of x (n, c, h, w) with factors and summands (c,) or (n, c), and its SiLU if asked for.

    It may be in the memory of `out`, which may be x. A mean that is so large beside the deviation that float32 would lose
    digits is subtracted first.
    """
    n, c, height, width = x.shape
    if x.dtype == torch.float32 and height * width <= _FEW_PIXELS:
        small = _of_few_pixels(x, groups, scale, shift, eps=eps)
        if small is not None:
            return F.silu(small, inplace=True) if silu else small
    mean, variance = _statistics(x, groups)
    if bool((mean.square() > _LARGEST_MEAN[x.dtype] ** 2 * (variance + eps)).any()):
        x = x - mean.to(x.dtype)[..., None, None]
        mean, variance = _statistics(x, groups)
    scale, shift = (each.float().expand(n, c) for each in (scale, shift))
    out, unused = torch.empty_like(x) if out is None else out, torch.empty(0, dtype=torch.float32, device=x.device)
    rows = max(1, max(_CACHED_PIXELS, _PIECE_NUMBERS // c) * torch.get_num_threads() // width)
    for number in range(n):
        weight, bias, at, spread = scale[number], shift[number], mean[number], variance[number]
        picture, of_picture = (each[number : number + 1].split(rows, dim=2) for each in (x, out))
        for piece, of_piece in zip(picture, of_picture, strict=True):
            torch.native_batch_norm(piece, weight, bias, at, spread, False, 0.0, eps, out=(of_piece, unused, unused))
            if silu:
                F.silu(of_piece, inplace=True)
    return out


def _of_few_pixels(x: Tensor, groups: int, scale: Tensor, shift: Tensor, *, eps: float) -> Tensor | None:
    """What `normalised` returns without SiLU, by PyTorch's kernel; None where a mean costs that digits."""
    n, c, height, width = x.shape
    scale, shift = scale.float(), shift.float()
    factors = (scale, shift) if scale.ndim == 1 else (None, None)
    # The kernel asks for the strides of whole memory, in dimensions of 1 too, where slices have others.
    x = x.permute(0, 2, 3, 1).contiguous().view(-1).view(n, height, width, c).permute(0, 3, 1, 2)
    out, mean, inverse = torch.native_group_norm(x, *factors, n, c, height * width, groups, eps)
    if not bool((mean * inverse).abs().amax() <= 1):  # squares that overflow make NaN of it
        return None
    if scale.ndim == 1:
        return out
    return torch.addcmul(shift[:, :, None, None], out, scale[:, :, None, None], out=out)


def _statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, float32 (n, c), of the group of every channel of x (n, c, h, w).

    A group's variance is the mean of its channels' and of the squares of their means around its own. Pieces of a picture are
    put together in the same way, and so are `beside` parts of each, whose numbers lie side by side like more channels: few
    channels would make many short calls.
    """
    n, c, height, width = x.shape
    most = _PIECE_PIXELS[x.dtype]
    limit = max(1, most * max(1, _PIECE_NUMBERS * torch.get_num_threads() // (most * c)) // width)
    rows = next(rows for rows in range(min(limit, height), 0, -1) if height % rows == 0)
    beside = next((count for count in range(1, rows + 1) if rows % count == 0 and rows * width <= most * count), rows)
    # Left as they are: statistics of half precision are float32 only beside them.
    zeros = torch.zeros(beside * c, dtype=torch.float32, device=x.device)
    pieces = (piece for picture in x.split(1) for piece in picture.split(rows, dim=2))
    found = [torch.batch_norm_update_stats(_beside(piece, beside), zeros, zeros, 0.0) for piece in pieces]
    means, variances = (torch.stack(each).view(n, -1, groups, c // groups).double() for each in zip(*found, strict=True))
    mean = means.mean(dim=(1, 3), keepdim=True)
    variance = variances.add_((means - mean).square_()).mean(dim=(1, 3), keepdim=True)
    mean, variance = (each.float().expand(n, 1, groups, c // groups).reshape(n, c) for each in (mean, variance))
    return mean, variance


def _beside(x: Tensor, count: int) -> Tensor:
    """Pixels of (1, c, h, w) in turns as channels of `count` parts, (1, count * c, h * w / count, 1), in the same memory."""
    return x if count == 1 else x.permute(0, 2, 3, 1).reshape(1, -1, 1, count * x.shape[1]).permute(0, 3, 1, 2)
