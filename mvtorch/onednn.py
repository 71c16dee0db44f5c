"""oneDNN's operators on weights that were laid out for it, and what packed layers have in common.

The operators are private ones of PyTorch, those that its compiler emits.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvshared import precision
from mvshared.errors import BackendError
from mvtorch import widened


def computes_bfloat16_in_avx512() -> bool:
    """Whether oneDNN has fast instructions for bfloat16, and those are of AVX-512 and not AMX, which is eight times as fast."""
    return torch.backends.mkldnn.is_available() and precision.bfloat16_instructions() == precision.AVX512


class Packed(nn.Module):
    """A layer with a packed weight. `weight` has the shape and the dtype of the one that it had, and no memory.

    `kind` is the class that it stands for, which is what is observed.
    """

    kind: str

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.empty_like(weight, device="meta")
        self.bias = None if bias is None else bias.detach()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise BackendError(
            "a network that was packed for inference has no weights to save",
            backend="torch",
            hint="mvtorch.model.load_network reads one that has",
        )


@cache
def has_packed_linear() -> bool:
    """Whether this PyTorch has the operators of `packed_matrix` and `linear`."""
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


def packed_matrix(matrix: Tensor) -> Tensor:
    """A matrix (o, i) for `linear`; as it is where half precision is multiplied in float32."""
    if widened.is_for(matrix.dtype):
        return matrix.contiguous()
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None, *, activation: str = "none") -> Tensor:
    """(..., i) to (..., o)."""
    if not matrix.is_mkldnn:
        return widened.linear(x, matrix, bias, activation=activation)
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, activation, [], "none")


def linear_times(x: Tensor, factors: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """(..., i) to (..., o), times factors of that shape."""
    if not matrix.is_mkldnn:
        return widened.linear(x, matrix, bias, factors=factors)
    return torch.ops.mkldnn._linear_pointwise.binary(x, factors, matrix, bias, "mul")


def packed_kernel(kernel: Tensor, *, stride: list[int], padding: list[int]) -> Tensor:
    """A kernel (o, i, h, w), packed unless another layout may be wanted for maps of another size than oneDNN guesses here.

    For multiples of 48 outputs it takes blocks of 48 or of 64 of them by the map's size, and is up to fifty times as slow with
    the wrong ones; narrow layers gain nothing.
    """
    outputs, inputs = kernel.shape[:2]
    if widened.is_for(kernel.dtype) or outputs % 64 or outputs % 48 == 0 or inputs < 16:
        return kernel.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(kernel, padding, stride, [1, 1], 1)


def convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, *, stride: list[int], padding: list[int]) -> Tensor:
    """x (n, i, h, w) through a kernel of `packed_kernel`."""
    if widened.is_for(kernel.dtype):
        return widened.convolution(x, kernel, bias, stride=stride, padding=padding)
    if not kernel.is_mkldnn:
        return F.conv2d(x, kernel, bias, stride=stride, padding=padding)
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, padding, stride, [1, 1], 1, "none", [], "")
