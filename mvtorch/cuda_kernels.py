"""Triton's kernels for CUDA, on pictures in channels_last memory and on tokens; `mvtorch.cuda_fused` calls them.

Importing this needs Triton, which comes with PyTorch's CUDA wheels. Tiles have fixed sizes: searching for the best ones would
wait for the device, which a call that is being recorded must not. What varies at run time is no constant, to compile little.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ONE_TILE = 1 << 15  # numbers of a group that one program holds in registers
_PIXELS, _CHANNELS = 128, 64
_HIDDEN = 128
_TOKENS = 4096  # numbers of the rows that one program normalises together
_FLAGS = ["silu", "has_before", "has_shift", "has_second", "has_rest", "shift_stride"]


@triton.jit(do_not_specialize=_FLAGS)
def _norm_of_group(
    x,
    out,
    weight,
    bias,
    before,
    shift,
    pixels,
    channels,
    eps,
    silu,
    has_before,
    has_shift,
    shift_stride,
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A whole group of a picture: read once, moments in two passes over registers, written once."""
    group, picture = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = c < GROUP
    channel = group * GROUP + c
    there = (p < pixels)[:, None] & inside[None, :]
    at = p[:, None] * channels + channel[None, :]
    base = picture.to(tl.int64) * pixels * channels
    added = tl.load(before + channel, mask=inside, other=0.0).to(tl.float32) * has_before
    added += tl.load(shift + picture * shift_stride + channel, mask=inside, other=0.0).to(tl.float32) * has_shift
    values = tl.load(x + base + at, mask=there, other=0.0).to(tl.float32) + added[None, :]
    values = tl.where(there, values, 0.0)
    count = pixels * GROUP
    mean = tl.sum(tl.sum(values, axis=1), axis=0) / count
    values = tl.where(there, values - mean, 0.0)
    deviation = tl.sqrt(tl.sum(tl.sum(values * values, axis=1), axis=0) / count + eps)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) / deviation
    y = values * scale[None, :] + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if silu != 0:
        y = y / (1.0 + tl.exp(-tl.maximum(y, -80.0)))  # beyond which it is 0 in any dtype
    tl.store(out + base + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _moments(x, means, squares, pixels, channels, tiles, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of every channel in a tile of pixels, its mean and the sum of squares around it."""
    tile, picture = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    there = (p < pixels)[:, None] & (channel < channels)[None, :]
    base = picture.to(tl.int64) * pixels * channels
    values = tl.load(x + base + p[:, None] * channels + channel[None, :], mask=there, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - tile * BLOCK_P, BLOCK_P)
    mean = tl.sum(values, axis=0) / count
    centred = tl.where(there, values - mean[None, :], 0.0)
    at = (picture * tiles + tile) * channels + channel
    tl.store(means + at, mean, mask=channel < channels)
    tl.store(squares + at, tl.sum(centred * centred, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=_FLAGS)
def _combine(
    means,
    squares,
    weight,
    before,
    shift,
    centre,
    scale,
    pixels,
    channels,
    tiles,
    eps,
    has_before,
    has_shift,
    shift_stride,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The moments of a group from those of its channels in all tiles (Chan, Golub, LeVeque 1979): what to subtract from a
    channel, and what to multiply it with."""
    group, picture = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    inside = c < GROUP
    channel = group * GROUP + c
    added = tl.load(before + channel, mask=inside, other=0.0).to(tl.float32) * has_before
    added += tl.load(shift + picture * shift_stride + channel, mask=inside, other=0.0).to(tl.float32) * has_shift
    total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = (t < tiles)[:, None] & inside[None, :]
        at = (picture * tiles + t)[:, None] * channels + channel[None, :]
        count = tl.minimum(pixels - t * TILE, TILE).to(tl.float32)[:, None]
        total += tl.where(there, count * (tl.load(means + at, mask=there, other=0.0) + added[None, :]), 0.0)
    numbers = pixels * 1.0 * GROUP
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / numbers
    total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = (t < tiles)[:, None] & inside[None, :]
        at = (picture * tiles + t)[:, None] * channels + channel[None, :]
        count = tl.minimum(pixels - t * TILE, TILE).to(tl.float32)[:, None]
        away = tl.load(means + at, mask=there, other=0.0) + added[None, :] - mean
        total += tl.where(there, tl.load(squares + at, mask=there, other=0.0) + count * away * away, 0.0)
    deviation = tl.sqrt(tl.sum(tl.sum(total, axis=1), axis=0) / numbers + eps)
    at_channel = picture * channels + channel
    tl.store(centre + at_channel, mean - added, mask=inside)
    tl.store(scale + at_channel, tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) / deviation, mask=inside)


@triton.jit(do_not_specialize=_FLAGS)
def _apply(x, out, centre, scale, bias, pixels, channels, silu, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The norm of a tile, whose channels' centres and factors are known."""
    picture = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = channel < channels
    there = (p < pixels)[:, None] & inside[None, :]
    at = p[:, None] * channels + channel[None, :]
    base = picture.to(tl.int64) * pixels * channels
    middle = tl.load(centre + picture * channels + channel, mask=inside, other=0.0)
    factor = tl.load(scale + picture * channels + channel, mask=inside, other=0.0)
    summand = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + base + at, mask=there, other=0.0).to(tl.float32)
    y = (values - middle[None, :]) * factor[None, :] + summand[None, :]
    if silu != 0:
        y = y / (1.0 + tl.exp(-tl.maximum(y, -80.0)))  # beyond which it is 0 in any dtype
    tl.store(out + base + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_FLAGS)
def _add(x, rest, out, first, second, pixels, channels, has_second, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of two maps and of one or two numbers per channel."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = channel < channels
    there = (p < pixels)[:, None] & inside[None, :]
    at = p[:, None] * channels + channel[None, :]
    added = tl.load(first + channel, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(second + channel, mask=inside, other=0.0).to(tl.float32) * has_second
    total = tl.load(x + at, mask=there, other=0.0).to(tl.float32) + tl.load(rest + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, (total + added[None, :]).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_FLAGS)
def _layer_norm(x, rest, total, out, weight, bias, rows, channels, eps, has_rest, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The norm of some rows, or of their sums with the rest, which are stored as well."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    there = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * channels + c[None, :]
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if has_rest != 0:
        values += tl.load(rest + at, mask=there, other=0.0).to(tl.float32)
        tl.store(total + at, values.to(total.dtype.element_ty), mask=there)
    mean = tl.sum(values, axis=1) / channels
    values = tl.where(there, values - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(values * values, axis=1) / channels + eps)
    y = values / deviation[:, None] * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    y += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _gate(x, out, rows, hidden, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The first half of every row times the exact GELU of its second half."""
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = (row < rows)[:, None] & (column < hidden)[None, :]
    at = row[:, None] * (2 * hidden) + column[None, :]
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    gating = tl.load(x + at + hidden, mask=there, other=0.0).to(tl.float32)
    y = value * 0.5 * gating * (1.0 + tl.erf(gating * 0.7071067811865476))
    tl.store(out + row[:, None] * hidden + column[None, :], y.to(out.dtype.element_ty), mask=there)


def group_norm(
    x: Tensor,
    out: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    silu: bool,
    before: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """Group norm of x (n, c, h, w) plus `before` (c,) and `shift` (n, c), and its SiLU if asked for; `out` may be x.

    Pictures are channels_last, everything else is contiguous but for the rows of `shift`, statistics are float32.
    """
    n, channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    given = (weight if before is None else before, weight if shift is None else shift)
    flags = (before is not None, shift is not None, 0 if shift is None else shift.stride(0))
    size = (pixels, channels)
    if is_one_tile(x, groups):
        sides = (_power(pixels), _power(group))
        warps = _warps(sides[0] * sides[1])
        numbers = (*size, eps, silu, *flags, group, *sides)
        _launch(_norm_of_group, (groups, n), x, out, weight, bias, *given, *numbers, warps=warps)
        return
    tiles, block = triton.cdiv(pixels, _PIXELS), min(_CHANNELS, _power(channels))
    moments = torch.empty((2, n, tiles, channels), dtype=torch.float32, device=x.device)
    affine = torch.empty((2, n, channels), dtype=torch.float32, device=x.device)
    grid, warps, wide = (tiles, triton.cdiv(channels, block), n), _warps(_PIXELS * block), _power(group)
    _launch(_moments, grid, x, *moments, *size, tiles, _PIXELS, block, warps=warps)
    numbers = (*size, tiles, eps, *flags, group, _PIXELS, _tiles_together(wide), wide)
    _launch(_combine, (groups, n), *moments, weight, *given, *affine, *numbers, warps=4)
    _launch(_apply, grid, x, out, *affine, bias, *size, silu, _PIXELS, block, warps=warps)


def is_one_tile(x: Tensor, groups: int) -> bool:
    """Whether a group of x (n, c, h, w) is small enough to be held by one program."""
    _, channels, height, width = x.shape
    return _power(height * width) * _power(channels // groups) <= ONE_TILE


def takes_all_loops(x: Tensor, groups: int) -> bool:
    """Whether x (n, c, h, w) is so large that what is compiled for large maps runs all of its loops more than once."""
    _, channels, height, width = x.shape
    return not is_one_tile(x, groups) and height * width > _PIXELS * _tiles_together(_power(channels // groups))


def add(x: Tensor, rest: Tensor, out: Tensor, first: Tensor, second: Tensor | None) -> None:
    """x + rest + first + second of maps (n, c, h, w) in channels_last memory and biases (c,); `out` may be x."""
    n, channels, height, width = x.shape
    pixels, block = n * height * width, min(_CHANNELS, _power(channels))
    grid = (triton.cdiv(pixels, _PIXELS), triton.cdiv(channels, block))
    other = first if second is None else second
    numbers = (pixels, channels, second is not None, _PIXELS, block)
    _launch(_add, grid, x, rest, out, first, other, *numbers, warps=_warps(_PIXELS * block))


def layer_norm(x: Tensor, rest: Tensor | None, total: Tensor, out: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> None:
    """Layer norm of tokens x (..., c), or of x + rest, which goes into `total`, into `out`. All of them are contiguous."""
    channels = x.shape[-1]
    rows, width = x.numel() // channels, _power(channels)
    together = max(1, _TOKENS // width)
    numbers = (rows, channels, eps, rest is not None, together, width)
    given = x if rest is None else rest
    _launch(_layer_norm, (triton.cdiv(rows, together),), x, given, total, out, weight, bias, *numbers, warps=4)


def gate(x: Tensor, out: Tensor) -> None:
    """The first half of x (rows, 2 hidden) times the GELU of its second half, into `out` (rows, hidden)."""
    rows, hidden = out.shape
    block = min(_HIDDEN, _power(hidden))
    grid = (triton.cdiv(rows, 32), triton.cdiv(hidden, block))
    _launch(_gate, grid, x, out, rows, hidden, 32, block, warps=_warps(32 * block))


def _tiles_together(width: int) -> int:
    """How many tiles' moments a program combines at once, of groups of so many channels: whatever the map, to compile once."""
    return max(1, min(128, 4096 // width))


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int) -> None:
    """Booleans go as numbers, which are not compiled for each of their values."""
    kernel[grid](*(int(each) if isinstance(each, bool) else each for each in arguments), num_warps=warps)


def _power(number: int) -> int:
    return int(triton.next_power_of_2(number))


def _warps(numbers: int) -> int:
    """So many that a thread has 32 numbers, as far as possible."""
    return max(1, min(16, numbers // 1024))
