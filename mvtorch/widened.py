"""Half precision on CPUs that multiply it slower than float32: weights stay as they are, and products are in float32.

Weights become float32 in pieces, where they are used, so that a network takes the memory of half precision and little more time
than in float32. Products, sums, biases and what follows a product here are float32; results have the dtype of the input.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mvshared import precision

_WEIGHTS = 1 << 21  # at a time
_FEW_ROWS = 32  # of one thread: several widen a matrix in less time
_ROWS = 1 << 13  # of tokens or pixels at a time
_PIXELS = 4096  # of a map at a time


def is_for(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies large matrices of a dtype faster as float32: float16 on all that were tried, and
    bfloat16 without fast instructions for it."""
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return dtype in (torch.bfloat16, torch.float16)
    return precision.bfloat16_instructions() in (None, precision.SLOW_AVX512)


def is_for_array(x: Tensor) -> bool:
    """Whether products with an array belong in float32, for its dtype on its device; training leaves them to PyTorch."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and is_for(x.dtype)


def product_dtype(dtype: torch.dtype, *, rows: int) -> torch.dtype:
    """What so many rows of a dtype are multiplied in with a matrix: few rows take less time than making the matrix float32."""
    few = rows * torch.get_num_threads() <= _FEW_ROWS
    has_instructions = dtype == torch.bfloat16 and precision.bfloat16_instructions() is not None
    return torch.float32 if is_for(dtype) and not (few and has_instructions) else dtype


def linear(
    x: Tensor, matrix: Tensor, bias: Tensor | None, *, activation: str = "none", factors: Tensor | None = None
) -> Tensor:
    """(..., i) through a matrix (o, i), then "none" or "gelu", then times factors (..., o), as (..., o)."""
    rows = x.numel() // x.shape[-1]
    dtype = matrix.dtype if matrix.dtype == torch.float32 else product_dtype(x.dtype, rows=rows)
    out = x.new_empty(*x.shape[:-1], len(matrix))
    # Many rows are widened in pieces, for each of which the matrix is widened anew, at little cost beside so many products.
    inputs, results = x.reshape(rows, x.shape[-1]), out.view(rows, len(matrix))
    times = None if factors is None else factors.reshape(results.shape)
    for first in range(0, rows, _ROWS):
        piece = slice(first, first + _ROWS)
        wide = inputs[piece].to(dtype)
        for some in _pieces(matrix):
            product = F.linear(wide, matrix[some].to(dtype), None if bias is None else bias[some].to(dtype))
            if activation == "gelu":
                product = F.gelu(product)
            if times is not None:
                product *= times[piece, some]
            results[piece, some] = product
    return out


def _pieces(matrix: Tensor) -> list[slice]:
    """Rows of a matrix with at most `_WEIGHTS` numbers."""
    rows = math.ceil(len(matrix) / math.ceil(matrix.numel() / _WEIGHTS))
    return [slice(first, first + rows) for first in range(0, len(matrix), rows)]


def convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, *, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Maps (n, i, h, w) through a kernel (o, i, kh, kw), some rows of them at a time, as (n, o, h', w')."""
    sizes = (x.shape[axis] + 2 * padding[axis - 2] - kernel.shape[axis] for axis in (2, 3))
    height, width = (size // step + 1 for size, step in zip(sizes, stride, strict=True))
    size = len(x), len(kernel), height, width
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    kernel, bias = kernel.float(), None if bias is None else bias.float()
    pictures = max(1, _PIXELS // (height * width))
    rows = max(1, _PIXELS // (min(len(x), pictures) * width))
    top, left = padding
    for first in range(0, len(x), pictures):
        for row in range(0, height, rows):
            into = out[first : first + pictures, :, row : row + rows]
            start = stride[0] * row - top
            end = start + stride[0] * (into.shape[2] - 1) + kernel.shape[2]
            piece = x[first : first + pictures, :, max(0, start) : end].float()
            above, below = max(0, -start), max(0, end - x.shape[2])
            piece = F.pad(piece, (left, left, above, below)) if left or above or below else piece
            into.copy_(F.conv2d(piece, kernel, bias, stride=tuple(stride)))
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention of queries (b, n, l, d) to keys and values (b, n, m, d), as (b, n, l, d)."""
    out = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=causal, attn_mask=None if mask is None else mask.float()
    )
    return out.to(q.dtype)
