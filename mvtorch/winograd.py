"""3x3 convolutions with fewer multiplications, as products of matrices with packed weights.

Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308): a tile of 2x2 outputs takes 16 products of numbers
instead of 36. Sums of inputs, weights and outputs around the products cost little, as they are shared by all channels of the
other side. Of a map that had every pixel four times the same idea needs 9 products for 2x2 outputs, where four 2x2
convolutions need 16. All factors are 1, -1 or, of weights, 1/2: float32 stays as exact as it was; bfloat16
rounds sums of inputs and weights, and products. docs/speed.md has the errors and the times.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvtorch import widened
from mvtorch.onednn import Packed, computes_bfloat16_in_avx512, linear, packed_matrix

_TILES = 512  # at a time and thread: what is made of them stays in the cache
_TRANSFORMED = 32  # outputs of a kernel at a time, for the same reason
_LEAST_CHANNELS = 256  # with fewer, the sums take as long as what they save


def is_for(conv: nn.Conv2d) -> bool:
    """Whether a convolution is faster so: one of 3x3 with stride and padding 1, and many channels.

    In bfloat16 that does not hold where a processor has AMX, whose products are so fast that sums would take longer.
    """
    known = (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    fast = conv.weight.dtype == torch.float32 or computes_bfloat16_in_avx512() or widened.is_for(conv.weight.dtype)
    return known and fast and min(conv.in_channels, conv.out_channels) >= _LEAST_CHANNELS


class _Scheme(NamedTuple):
    """How two outputs of a row, or of a column, come from products of sums of inputs with sums of a kernel's three weights.

    `sums` are those of a tile's inputs: the first, a sign, and the second or None. Tiles begin `stride` inputs apart. `kernel`
    (k, 3) and `outputs` (2, k) are the factors of the weights and of the products.
    """

    sums: tuple[tuple[int, int, int | None], ...]
    stride: int
    kernel: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]


_WINOGRAD = _Scheme(
    sums=((0, -1, 2), (1, 1, 2), (2, -1, 1), (1, -1, 3)),
    stride=2,
    kernel=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    outputs=((1, 1, 1, 0), (0, 1, -1, -1)),
)
# Every input is the middle of one tile: w1 + w2 and w0 + w1 of it are the sum of all less w0 and w2.
_UPSAMPLED = _Scheme(
    sums=((1, 0, None), (0, -1, 1), (2, -1, 1)),
    stride=1,
    kernel=((1, 1, 1), (1, 0, 0), (0, 0, 1)),
    outputs=((1, 1, 0), (1, 0, 1)),
)


class _TiledConv2d(Packed):
    """A 3x3 convolution of stride and padding 1 by one of the schemes in both directions."""

    kind = "Conv2d"
    scheme: _Scheme

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight, conv.bias)
        factors, outputs = (torch.tensor(each, dtype=torch.float32) for each in (self.scheme.kernel, self.scheme.outputs))
        self.matrices = [packed_matrix(each) for each in _transformed(conv.weight.detach(), torch.kron(factors, factors))]
        self.outputs = torch.kron(outputs, outputs)  # (4, k k)
        self.biased = int((self.outputs == 1).all(dim=0).nonzero()[0, 0])  # the product that is part of all four outputs

    def convolved(self, x: Tensor, height: int, width: int) -> Tensor:
        """Maps padded to (n, h, w, i) to (n, o, 2 height, 2 width)."""
        n, stride, taps = x.shape[0], self.scheme.stride, 2 + self.scheme.stride
        out = x.new_empty(n, height, 2, width, 2, self.weight.shape[0])
        tiles = _TILES * torch.get_num_threads()
        pictures = max(1, tiles // (height * width))
        rows = max(1, tiles // (min(n, pictures) * width))
        for first in range(0, n, pictures):
            for top in range(0, height, rows):
                into = out[first : first + pictures, top : top + rows]
                piece = x[first : first + pictures, stride * top : stride * (top + into.shape[1] - 1) + taps]
                into.permute(2, 4, 0, 1, 3, 5).copy_(self._outputs(piece, into.shape[1], width))
        return out.view(n, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)

    def _outputs(self, x: Tensor, height: int, width: int) -> Tensor:
        """Maps (n, h, w, i) to the four outputs of every tile, (2, 2, n, height, width, o)."""
        count, n, channels = len(self.scheme.sums), x.shape[0], x.shape[3]
        x = x.to(widened.product_dtype(x.dtype, rows=n * height * width))
        rows = x.new_empty(count, n, x.shape[1], width, channels)  # sums along every row
        self._sum(x, width, axis=2, out=rows)
        sums = x.new_empty(count, count, n, height, width, channels)  # of columns of sums of rows
        self._sum(rows, height, axis=2, out=sums)
        products = [
            linear(each, matrix, self.bias if at == self.biased else None)
            for at, (each, matrix) in enumerate(zip(sums.view(count**2, -1, channels), self.matrices, strict=True))
        ]
        return (self.outputs.to(x.dtype) @ torch.stack(products).flatten(1)).view(2, 2, n, height, width, -1)

    def _sum(self, x: Tensor, tiles: int, *, axis: int, out: Tensor) -> None:
        """The sums of the inputs of tiles along an axis of x, each in one of `out`."""
        stride = self.scheme.stride
        steps = (slice(None),) * axis
        parts = [x[*steps, start : start + stride * (tiles - 1) + 1 : stride] for start in range(2 + stride)]
        for target, (first, sign, last) in zip(out, self.scheme.sums, strict=True):
            if last is None:
                target.copy_(parts[first])
            else:
                torch.add(parts[first], parts[last], alpha=sign, out=target)


class WinogradConv2d(_TiledConv2d):
    """A 3x3 convolution of stride and padding 1."""

    scheme = _WINOGRAD

    def forward(self, x: Tensor) -> Tensor:
        """(n, i, h, w) to (n, o, h, w)."""
        height, width = x.shape[2:]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
        return self.convolved(padded, (height + 1) // 2, (width + 1) // 2)[:, :, :height, :width]


class UpsampledConv2d(_TiledConv2d):
    """A 3x3 convolution of stride and padding 1 of a map that has every pixel four times."""

    scheme = _UPSAMPLED

    def forward(self, x: Tensor) -> Tensor:
        """(n, i, 2 h, 2 w), every pixel four times, to (n, o, 2 h, 2 w)."""
        return self.upsampled(x[:, :, ::2, ::2])

    def upsampled(self, x: Tensor) -> Tensor:
        """(n, i, h, w) to (n, o, 2 h, 2 w)."""
        return self.convolved(F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)), *x.shape[2:])


def _transformed(kernel: Tensor, factors: Tensor) -> Tensor:
    """The matrices (k k, o, i) of a kernel (o, i, 3, 3), which are sums of its weights times factors (k k, 9)."""
    matrices = kernel.new_empty(len(factors), *kernel.shape[:2])
    for outputs in range(0, len(kernel), _TRANSFORMED):
        some = slice(outputs, outputs + _TRANSFORMED)
        weights = kernel[some].permute(0, 2, 3, 1).float().flatten(1, 2)  # (some, 9, i)
        matrices[:, some] = (factors @ weights).transpose(0, 1)
    return matrices
