"""Convolutions made ready for inference on a CPU: packed kernels, and products of matrices where these are faster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvshared.process_memory import trim_heap
from mvtorch import winograd
from mvtorch.layers import Float32Conv2d, Upsample
from mvtorch.observation import is_observed
from mvtorch.onednn import Packed, convolution, linear, packed_kernel, packed_matrix

_FLOAT32_PIXELS = 4096
_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # of the rows and columns of a map that is enlarged
_UNFOLDED_PIXELS = 16  # of maps so small that oneDNN's convolutions leave most of their registers empty


class PackedConv2d(Packed):
    """A convolution with a packed kernel, or with a matrix for products where it is 1x1 or the map is small.

    It has the one or the other, made anew when the maps' size changes.
    """

    kind = "Conv2d"

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight, conv.bias)
        assert isinstance(conv.padding, tuple)
        self.stride, self.padding = list(conv.stride), list(conv.padding)
        self.pointwise = (*self.weight.shape[2:], *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)
        self.unfolds = self.pointwise
        self.packed = self._pack(conv.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(n, i, h, w) to (n, o, h, w)."""
        if self.pointwise:
            return linear(x.permute(0, 2, 3, 1), self.packed, self.bias).permute(0, 3, 1, 2)
        unfolds = self.stride == [1, 1] and x.shape[2] * x.shape[3] <= _UNFOLDED_PIXELS
        if unfolds != self.unfolds:
            self.unfolds, kernel = unfolds, self._unpack()
            self.packed = self._pack(kernel)
            del kernel
            trim_heap()  # the C library would keep what the old kernels took
        if not unfolds:
            return convolution(x, self.packed, self.bias, stride=self.stride, padding=self.padding)
        top, left = self.padding
        height, width = self.weight.shape[2:]
        padded = F.pad(x, (left, left, top, top)).permute(0, 2, 3, 1)
        patches = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)  # (n, h, w, height, width, i)
        return linear(patches.flatten(3), self.packed, self.bias).permute(0, 3, 1, 2)

    def _pack(self, kernel: Tensor) -> Tensor:
        if self.unfolds:
            return packed_matrix(kernel.permute(0, 2, 3, 1).flatten(1))
        return packed_kernel(kernel, stride=self.stride, padding=self.padding)

    def _unpack(self) -> Tensor:
        outputs, inputs, height, width = self.weight.shape
        kernel = self.packed.to_dense() if self.packed.is_mkldnn else self.packed
        return kernel.view(outputs, height, width, inputs).permute(0, 3, 1, 2) if self.unfolds else kernel


class PackedFloat32Conv2d(Packed):
    """A convolution in float32 of a map in half precision, some rows at a time: the map is never all in float32."""

    kind = "Float32Conv2d"

    def __init__(self, conv: Float32Conv2d) -> None:
        super().__init__(conv.weight, conv.bias)
        assert isinstance(conv.padding, tuple)
        self.padding, self.bias = list(conv.padding), None if self.bias is None else self.bias.float()
        self.packed = packed_kernel(conv.weight.detach().float(), stride=[1, 1], padding=[0, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (n, c, h, w); the result is float32."""
        top, left = self.padding
        padded, height = F.pad(x, (left, left, top, top)), self.weight.shape[2]
        rows = max(1, _FLOAT32_PIXELS // padded.shape[3])
        pieces = []
        for start in range(0, padded.shape[2] - height + 1, rows):
            piece = padded[:, :, start : start + rows + height - 1].float()
            pieces.append(convolution(piece, self.packed, self.bias, stride=[1, 1], padding=[0, 0]))
        return torch.cat(pieces, dim=2)


class PackedUpsampledConv2d(Packed):
    """A 3x3 convolution of a map that has every pixel four times, as four 2x2 convolutions of the map with every pixel once.

    In each direction an output pixel sees two different pixels, one of them with the sum of two weights. That is 4/9 of the
    arithmetic. The four kernels have 16 numbers for 9 weights; with `lean` each is made when it is needed.
    """

    kind = "Conv2d"

    def __init__(self, conv: nn.Conv2d, *, lean: bool = False) -> None:
        super().__init__(conv.weight, conv.bias)
        kernel = conv.weight.detach()
        self.kernel = kernel if lean else None
        phases = () if lean else _PHASES
        self.kernels = [packed_kernel(_kernel_of(kernel, *phase), stride=[1, 1], padding=[0, 0]) for phase in phases]

    def forward(self, x: Tensor) -> Tensor:
        """(n, i, 2 h, 2 w), every pixel four times, to (n, o, 2 h, 2 w)."""
        return self.upsampled(x[:, :, ::2, ::2])

    def upsampled(self, x: Tensor) -> Tensor:
        """(n, i, h, w) to (n, o, 2 h, 2 w)."""
        n, _, height, width = x.shape
        size = (n, self.weight.shape[0], 2 * height, 2 * width)
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for number, (row, column) in enumerate(_PHASES):
            kernel = self.kernels[number] if self.kernel is None else _kernel_of(self.kernel, row, column)
            padded = F.pad(x, (1 - column, column, 1 - row, row))
            out[:, :, row::2, column::2] = convolution(padded, kernel, self.bias, stride=[1, 1], padding=[0, 0])
        return out


class PackedUpsample(Upsample):
    """Upsampling that makes no map with every pixel four times, unless its convolution is observed."""

    kind = "Upsample"

    def __init__(self, upsample: Upsample, *, lean: bool = False) -> None:
        nn.Module.__init__(self)
        conv, tiled = upsample.conv, winograd.is_for(upsample.conv)  # whose matrices have 9 numbers for 9 weights
        self.conv: Any = winograd.UpsampledConv2d(conv) if tiled else PackedUpsampledConv2d(conv, lean=lean)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, 2 h, 2 w)."""
        return super().forward(x) if is_observed(self.conv) else self.conv.upsampled(x)


def _kernel_of(kernel: Tensor, row: int, column: int) -> Tensor:
    """The 2x2 kernel for the output's even (0) or odd (1) rows and columns, of a 3x3 one."""
    folded = _folded(_folded(kernel.float(), row, axis=2), column, axis=3).to(kernel.dtype)
    return folded.contiguous(memory_format=torch.channels_last)


def _folded(kernel: Tensor, phase: int, *, axis: int) -> Tensor:
    """The two weights of an axis for the output's even (0) or odd (1) pixels."""
    before, middle, after = kernel.unbind(axis)
    return torch.stack((before, middle + after) if phase == 0 else (before + middle, after), dim=axis)
