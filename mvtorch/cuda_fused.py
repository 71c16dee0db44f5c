"""Inference on CUDA with fewer passes over memory: when `mvtorch.cuda_kernels` runs, and what runs where it does not.

PyTorch's group norm for CUDA copies channels_last pictures, and the bias of a convolution, a shift, a SiLU and a sum are
kernels of their own. Each function here returns None where the plain layers are to run: elsewhere than on CUDA, with gradients,
for other layouts and dtypes, without Triton, and for good after a kernel that failed or, in its first call for a shape, was
wrong.
"""

import importlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvshared.errors import first_line

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # relative RMS of a first call
_MOST_NUMBERS = 1 << 31  # that the kernels' offsets reach
_LEAST_SIDE = 32  # of the maps that the kernels for large ones are checked with

_log = logging.getLogger(__name__)
_failed: set[str] = set()
_checked: set[tuple[Any, ...]] = set()


def is_for(*arrays: Tensor | None) -> bool:
    """Whether the kernels are for these arrays, of which the first is the largest."""
    given = [each for each in arrays if each is not None]
    first = given[0]
    if not _on_device(first) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled(first.device.type) or first.dtype not in _TOLERANCE or not 0 < first.numel() < _MOST_NUMBERS:
        return False
    return all(each.dtype == first.dtype and each.device == first.device for each in given)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    silu: bool = False,
    before: Tensor | None = None,
    shift: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor | None:
    """Group norm of x (n, c, h, w) plus `before` (c,) and `shift` (n, c), and its SiLU if asked for, in the memory of x with
    `overwrite`; None where the kernel is not for it."""
    if x.ndim != 4 or not is_for(x, weight, bias, before, shift) or not _is_channels_last(x):
        return None
    vectors = [each for each in (weight, bias, before) if each is not None]
    if not all(each.is_contiguous() for each in vectors):
        return None
    if shift is not None and (shift.shape != x.shape[:2] or shift.stride(1) != 1):
        return None

    def check(kernels: Any) -> tuple[Tensor, Tensor]:
        c, height, width = x.shape[1:]
        if not kernels.is_one_tile(x, groups):  # tiles of pixels, whose number changes nothing, but for one that is not full
            height, width = _large_enough(kernels, x, groups)
        some, numbers = _waves((1, c, height, width), x), _vector(c, x)
        first, last = None if before is None else numbers, None if shift is None else numbers[None]
        ours = torch.empty_like(some)
        kernels.group_norm(some, ours, groups, numbers, numbers, eps=eps, silu=silu, before=first, shift=last)
        added = some.float() + ((first is not None) + (last is not None)) * numbers.float()[:, None, None]
        plain = F.group_norm(added.contiguous(), groups, numbers.float(), numbers.float(), eps)
        return ours, F.silu(plain) if silu else plain

    def launch(kernels: Any) -> Tensor:
        out = x if overwrite else torch.empty_like(x)
        kernels.group_norm(x, out, groups, weight, bias, eps=eps, silu=silu, before=before, shift=shift)
        return out

    height, width = x.shape[2:]
    variant = (x.shape[1], groups, height * width, silu, before is None, shift is None)
    return _launched("group norm", (x.device, x.dtype, *variant), check, launch)


def add(x: Tensor, rest: Tensor, first: Tensor | None, second: Tensor | None = None) -> Tensor | None:
    """The sum, in the memory of x, of maps (n, c, h, w) and biases (c,); None where the kernel is not for it."""
    if first is None:
        first, second = second, None
    if first is None or x.shape != rest.shape or not is_for(x, rest, first, second):
        return None
    if not (_is_channels_last(x) and _is_channels_last(rest)):
        return None
    given = first

    def check(kernels: Any) -> tuple[Tensor, Tensor]:
        some, other = _waves((1, x.shape[1], 5, 27), x), _waves((1, x.shape[1], 5, 27), x).flip(2)
        other, bias = other.contiguous(memory_format=torch.channels_last), _vector(x.shape[1], x)
        expected = some.float() + other.float() + (1 if second is None else 2) * bias.float()[:, None, None]
        kernels.add(some, other, some, bias, None if second is None else bias)
        return some, expected

    def launch(kernels: Any) -> Tensor:
        kernels.add(x, rest, x, given, second)
        return x

    return _launched("sum", (x.device, x.dtype, x.shape[1], second is None), check, launch)


def layer_norm(x: Tensor, rest: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float) -> tuple[Tensor, Tensor] | None:
    """Tokens x (..., c), or their sum with the rest, and the layer norm of that; None where the kernel is not for them."""
    given = [each for each in (x, rest, weight, bias) if each is not None]
    if not is_for(*given) or not all(each.is_contiguous() for each in given) or (rest is not None and rest.shape != x.shape):
        return None
    c = x.shape[-1]

    def check(kernels: Any) -> tuple[Tensor, Tensor]:
        some, numbers = _rows(c, x), _vector(c, x)
        other = None if rest is None else some.flip(0).contiguous()
        total, ours = torch.empty_like(some), torch.empty_like(some)
        kernels.layer_norm(some, other, total, ours, numbers, numbers, eps=eps)
        exact = some.float() if other is None else some.float() + other.float()
        plain = F.layer_norm(exact, (c,), numbers.float(), numbers.float(), eps)
        return (ours, plain) if other is None else (torch.cat([ours, total]), torch.cat([plain, exact]))

    total = x if rest is None else torch.empty_like(x)

    def launch(kernels: Any) -> Tensor:
        out = torch.empty_like(x)
        kernels.layer_norm(x, rest, total, out, weight, bias, eps=eps)
        return out

    out = _launched("layer norm", (x.device, x.dtype, c, rest is None), check, launch)
    return None if out is None else (total, out)


def gated(projected: Tensor) -> Tensor | None:
    """The first half of (..., 2 hidden) times the exact GELU of its second half; None where the kernel is not for it."""
    if not is_for(projected) or not projected.is_contiguous() or projected.shape[-1] % 2:
        return None
    hidden = projected.shape[-1] // 2

    def run(kernels: Any, x: Tensor) -> Tensor:
        out = x.new_empty((*x.shape[:-1], hidden))
        kernels.gate(x.view(-1, 2 * hidden), out.view(-1, hidden))
        return out

    def check(kernels: Any) -> tuple[Tensor, Tensor]:
        some = _rows(2 * hidden, projected)
        value, gate = some.float().chunk(2, dim=-1)
        return run(kernels, some), value * F.gelu(gate)

    variant = (projected.device, projected.dtype, hidden)
    return _launched("GEGLU", variant, check, lambda kernels: run(kernels, projected))


def resnet(block: Any, x: Tensor, emb: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """A ResnetBlock nobody looks into: the biases of its convolutions, and the time embedding, go into the norm and the sum
    behind them. None where the kernels are not for it."""
    convolutions = (block.conv1, block.conv2, block.conv_shortcut)
    if not all(each is None or type(each) is nn.Conv2d for each in convolutions) or not is_for(x, block.conv1.weight):
        return None
    h = group_norm(x, block.norm1.num_groups, block.norm1.weight, block.norm1.bias, eps=block.norm1.eps, silu=True)
    if h is None or block.conv1.bias is None or block.conv2.bias is None:
        return None
    h = _without_bias(block.conv1, h)
    if emb is not None and shift is None:
        shift = block.time_emb_proj(emb)
    normed = _second_norm(block.norm2, h, block.conv1.bias, shift)
    h = _without_bias(block.conv2, normed)
    shortcut = block.conv_shortcut
    rest = x if shortcut is None else _without_bias(shortcut, x)
    biases = (block.conv2.bias, None if shortcut is None else shortcut.bias)
    out = add(h, rest, *biases)
    if out is None:
        out = h.add_(rest)
        for bias in biases:
            out = out if bias is None else out.add_(bias[:, None, None])
    return out


def _second_norm(norm: Any, h: Tensor, before: Tensor, shift: Tensor | None) -> Tensor:
    """SiLU of the norm of h and what is added to it, which is plain arithmetic where there is no kernel."""
    options: Any = {"eps": norm.eps, "silu": True, "before": before, "shift": shift, "overwrite": True}
    out = group_norm(h, norm.num_groups, norm.weight, norm.bias, **options)
    if out is not None:
        return out
    added = before[None] if shift is None else before + shift
    return F.silu(norm(h + added[..., None, None]))


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv._conv_forward(x, conv.weight, None)


def _on_device(x: Tensor) -> bool:
    return x.is_cuda


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _capturing() -> bool:
    """Whether the calls of this thread are being recorded, when nothing may wait for the device."""
    return torch.cuda.is_current_stream_capturing()


def _large_enough(kernels: Any, x: Tensor, groups: int) -> tuple[int, int]:
    """A height and a width, not more than needed, of maps that take every loop of the kernels for large ones."""
    side = _LEAST_SIDE
    while not kernels.takes_all_loops(x.new_empty((1, x.shape[1], side, side + 1), device="meta"), groups):
        side *= 2
    return side, side + 1


def _waves(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers around 1 of a dtype and a device, without a draw from the program's generators, as channels_last pictures."""
    n, c, h, w = shape
    count = torch.arange(n * c * h * w, device=like.device, dtype=torch.float32)
    numbers = 1 + 2 * torch.sin(count * 0.73 + torch.sin(count * 0.011))
    return numbers.view(n, h, w, c).to(like.dtype).permute(0, 3, 1, 2)


def _rows(width: int, like: Tensor) -> Tensor:
    """Such numbers for some tokens, contiguous (37, width)."""
    return _waves((1, width, 37, 1), like).permute(0, 2, 3, 1).reshape(37, width).contiguous()


def _vector(count: int, like: Tensor) -> Tensor:
    """Such numbers for every channel: a check is to depend on no model's weights, which may be zero or damaged."""
    return _waves((1, count, 1, 1), like).reshape(count)


def _launched(
    kind: str, variant: tuple[Any, ...], check: Callable[[Any], tuple[Tensor, Tensor]], launch: Callable[[Any], Tensor]
) -> Tensor | None:
    """What a kernel computes, after a comparison with plain arithmetic in its first call for a variant."""
    if kind in _failed:
        return None
    try:
        kernels = _kernels()
        key = (kind, *variant)
        with torch.cuda.device(variant[0]) if variant[0].type == "cuda" else nullcontext():
            if key not in _checked:
                if _capturing():
                    return None
                _compare(*check(kernels))
                _checked.add(key)
            return launch(kernels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler may raise anything; the plain layers are always there
        _failed.add(kind)
        failure = type(error).__name__, first_line(error)
        _log.warning("no fused kernel for the %s on CUDA, plain layers run (%s: %s)", kind, *failure)
        return None


def _compare(ours: Tensor, plain: Tensor) -> None:
    """Raises ValueError if a kernel's result is another one."""
    error = float((ours.float() - plain).norm() / plain.norm())
    if not error <= _TOLERANCE[ours.dtype]:
        raise ValueError(f"its relative error is {error:.2g}")


@cache
def _kernels() -> Any:
    """The module of the kernels. Raises ImportError without Triton."""
    return importlib.import_module("mvtorch.cuda_kernels")
