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
_PIXELS = 4096  # of a map at a time


def is_for(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies a dtype faster as float32: float16, and bfloat16 without fast instructions for it."""
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
    dtype = matrix.dtype if matrix.dtype == torch.float32 else product_dtype(x.dtype, rows=x.numel() // x.shape[-1])
    x_wide, out = x.to(dtype), x.new_empty(*x.shape[:-1], len(matrix))
    rows = math.ceil(len(matrix) / math.ceil(matrix.numel() / _WEIGHTS))
    for first in range(0, len(matrix), rows):
        some = slice(first, first + rows)
        product = F.linear(x_wide, matrix[some].to(dtype), None if bias is None else bias[some].to(dtype))
        if activation == "gelu":
            product = F.gelu(product)
        if factors is not None:
            product *= factors[..., some]
        out[..., some] = product
    return out


def convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, *, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Maps (n, i, h, w) through a kernel (o, i, kh, kw), some rows of them at a time, as (n, o, h', w')."""
    top, left = padding
    x = F.pad(x, (left, left, top, top))
    height, width = ((x.shape[axis] - kernel.shape[axis]) // stride[axis - 2] + 1 for axis in (2, 3))
    out = torch.empty((len(x), len(kernel), height, width), dtype=x.dtype, memory_format=torch.channels_last)
    kernel, bias = kernel.float(), None if bias is None else bias.float()
    pictures = max(1, _PIXELS // (height * width))
    rows = max(1, _PIXELS // (min(len(x), pictures) * width))
    for first in range(0, len(x), pictures):
        for row in range(0, height, rows):
            into = out[first : first + pictures, :, row : row + rows]
            end = stride[0] * (row + into.shape[2] - 1) + kernel.shape[2]
            piece = x[first : first + pictures, :, stride[0] * row : end]
            into.copy_(F.conv2d(piece.float(), kernel, bias, stride=tuple(stride)))
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention of queries (b, n, l, d) to keys and values (b, n, m, d), as (b, n, l, d)."""
    out = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=causal, attn_mask=None if mask is None else mask.float()
    )
    return out.to(q.dtype)
