"""Networks made ready for inference on a CPU: weights in the layout that oneDNN computes in, made once and not on every call.

`pack_network` exchanges layers of a network that has its weights. The operators are private ones of PyTorch, those that its
compiler emits; where they are missing or refuse, layers stay as they are. docs/speed.md has what each part brings.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvshared.errors import BackendError
from mvshared.process_memory import trim_heap
from mvtorch.cpu_norms import is_observed
from mvtorch.layers import FeedForward, Float32Conv2d, Upsample

_DTYPES = (torch.float32, torch.bfloat16)
_FREED_BYTES = 128_000_000
_FEED_FORWARD_ROWS = 1024  # tokens at a time: their hidden states stay in the cache
_FLOAT32_PIXELS = 4096
_UNFOLDED_PIXELS = 16  # of maps so small that oneDNN's convolutions leave most of their registers empty

_log = logging.getLogger(__name__)
_told: set[str] = set()


class _Packed(nn.Module):
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


class PackedLinear(_Packed):
    """A linear layer with a packed weight."""

    kind = "Linear"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight, linear.bias)
        self.matrix = _packed_matrix(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        return _linear(x, self.matrix, self.bias)


class PackedConv2d(_Packed):
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
            return _linear(x.permute(0, 2, 3, 1), self.packed, self.bias).permute(0, 3, 1, 2)
        unfolds = self.stride == [1, 1] and x.shape[2] * x.shape[3] <= _UNFOLDED_PIXELS
        if unfolds != self.unfolds:
            kernel = self._unpack()
            self.unfolds = unfolds
            self.packed = self._pack(kernel)
        if not unfolds:
            return _convolution(x, self.packed, self.bias, stride=self.stride, padding=self.padding)
        top, left = self.padding
        height, width = self.weight.shape[2:]
        padded = F.pad(x, (left, left, top, top)).permute(0, 2, 3, 1)
        patches = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)  # (n, h, w, height, width, i)
        return _linear(patches.flatten(3), self.packed, self.bias).permute(0, 3, 1, 2)

    def _pack(self, kernel: Tensor) -> Tensor:
        if self.unfolds:
            return _packed_matrix(kernel.permute(0, 2, 3, 1).flatten(1))
        return _packed_kernel(kernel, stride=self.stride, padding=self.padding)

    def _unpack(self) -> Tensor:
        outputs, inputs, height, width = self.weight.shape
        kernel = self.packed.to_dense() if self.packed.is_mkldnn else self.packed
        return kernel.view(outputs, height, width, inputs).permute(0, 3, 1, 2) if self.unfolds else kernel


class PackedFloat32Conv2d(_Packed):
    """A convolution in float32 of a map in half precision, some rows at a time: the map is never all in float32."""

    kind = "Float32Conv2d"

    def __init__(self, conv: Float32Conv2d) -> None:
        super().__init__(conv.weight, conv.bias)
        assert isinstance(conv.padding, tuple)
        self.padding, self.bias = list(conv.padding), None if self.bias is None else self.bias.float()
        self.packed = _packed_kernel(conv.weight.detach().float(), stride=[1, 1], padding=[0, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (n, c, h, w); the result is float32."""
        top, left = self.padding
        padded, height = F.pad(x, (left, left, top, top)), self.weight.shape[2]
        rows = max(1, _FLOAT32_PIXELS // padded.shape[3])
        pieces = []
        for start in range(0, padded.shape[2] - height + 1, rows):
            piece = padded[:, :, start : start + rows + height - 1].float()
            pieces.append(_convolution(piece, self.packed, self.bias, stride=[1, 1], padding=[0, 0]))
        return torch.cat(pieces, dim=2)


class PackedUpsampledConv2d(_Packed):
    """A 3x3 convolution of a map that has every pixel four times, as four 2x2 convolutions of the map with every pixel once.

    In each direction an output pixel sees two different pixels, one of them with the sum of two weights. That is 4/9 of the
    arithmetic.
    """

    kind = "Conv2d"

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight, conv.bias)
        kernel = conv.weight.detach().float()
        self.phases: list[tuple[int, int, Tensor]] = []  # of the output's rows and columns, even or odd
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            folded = _folded(_folded(kernel, row, axis=2), column, axis=3).to(conv.weight.dtype)
            self.phases.append((row, column, _packed_kernel(folded, stride=[1, 1], padding=[0, 0])))

    def forward(self, x: Tensor) -> Tensor:
        """(n, i, 2 h, 2 w), every pixel four times, to (n, o, 2 h, 2 w)."""
        return self.upsampled(x[:, :, ::2, ::2])

    def upsampled(self, x: Tensor) -> Tensor:
        """(n, i, h, w) to (n, o, 2 h, 2 w)."""
        n, _, height, width = x.shape
        size = (n, self.weight.shape[0], 2 * height, 2 * width)
        out = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        for row, column, kernel in self.phases:
            padded = F.pad(x, (1 - column, column, 1 - row, row))
            out[:, :, row::2, column::2] = _convolution(padded, kernel, self.bias, stride=[1, 1], padding=[0, 0])
        return out


class PackedUpsample(Upsample):
    """Upsampling that makes no map with every pixel four times, unless its convolution is observed."""

    kind = "Upsample"

    def __init__(self, upsample: Upsample) -> None:
        nn.Module.__init__(self)
        self.conv: Any = PackedUpsampledConv2d(upsample.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, 2 h, 2 w)."""
        return super().forward(x) if is_observed(self.conv) else self.conv.upsampled(x)


class PackedHalves(_Packed):
    """A linear layer in two halves: values, and the gates that they are multiplied with."""

    kind = "Linear"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight, linear.bias)
        self.values, self.gates = (_packed_matrix(half) for half in linear.weight.detach().chunk(2))
        self.value_bias, self.gate_bias = (None, None) if self.bias is None else self.bias.chunk(2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        return torch.cat([_linear(x, self.values, self.value_bias), _linear(x, self.gates, self.gate_bias)], dim=-1)

    def gated(self, x: Tensor) -> Tensor:
        """Values times the GELU of the gates, (..., o / 2)."""
        gates = _linear(x, self.gates, self.gate_bias, activation="gelu")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gates, self.values, self.value_bias, "mul")


class PackedFeedForward(FeedForward):
    """GEGLU and a linear layer, some tokens at a time, with GELU and product inside of the products of matrices.

    Layer by layer while one of them is observed.
    """

    kind = "FeedForward"

    def __init__(self, feed_forward: FeedForward) -> None:
        nn.Module.__init__(self)
        self.net = feed_forward.net
        gate: Any = self.net[0]
        gate.proj = PackedHalves(gate.proj)
        self.net[2] = PackedLinear(self.net[2])  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to (..., channels)."""
        gate, last = self.net[0], self.net[2]
        proj: Any = gate.proj
        if any(map(is_observed, (gate, proj, last))):
            return super().forward(x)
        parts = [last(proj.gated(rows)) for rows in x.flatten(0, -2).split(_FEED_FORWARD_ROWS)]
        return torch.cat(parts).view(x.shape)


def pack_network(network: nn.Module) -> None:
    """Exchange the layers of a network on a CPU, one after the other: there is never a second copy of all weights.

    A packed network is for inference, it has no weights to save or to train. Other devices, dtypes and layers stay as they
    are, and so does all that PyTorch cannot pack, which is logged once per process.
    """
    freed = 0
    try:
        for size in _exchange(network):
            freed += size
            if freed > _FREED_BYTES:  # which the C library would keep until the network is packed
                trim_heap()
                freed = 0
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        _tell_once(f"this PyTorch packs no weights for the CPU, and networks are slower: {str(error).splitlines()[0]}")


def _exchange(module: nn.Module) -> Iterator[int]:
    """Bytes of the weights of every layer that was exchanged. Nothing here keeps weights of layers that are gone."""
    for name, child in module.named_children():
        kind: Any = _KINDS.get(type(child))
        if kind is None or not _can_pack(child):
            yield from _exchange(child)
        else:
            size = sum(weight.nbytes for weight in child.parameters())
            module._modules[name] = kind(child)
            del child
            yield size


_KINDS = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    Float32Conv2d: PackedFloat32Conv2d,
    Upsample: PackedUpsample,
    FeedForward: PackedFeedForward,
}


def _can_pack(module: nn.Module) -> bool:
    """Whether a layer is on the CPU in a dtype that can be packed, and nothing inside is quantised."""
    if any(weight.device.type != "cpu" or weight.dtype not in _DTYPES for weight in module.parameters()):
        return False
    return all(type(child) in (nn.Linear, nn.Conv2d, Float32Conv2d) for child in module.modules() if hasattr(child, "weight"))


def _tell_once(message: str) -> None:
    """Log a warning, once in this process."""
    if message not in _told:
        _told.add(message)
        _log.warning(message)


def _packed_matrix(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())


def _packed_kernel(kernel: Tensor, *, stride: list[int], padding: list[int]) -> Tensor:
    """A kernel (o, i, h, w), packed unless another layout may be wanted for maps of another size than oneDNN guesses here.

    For multiples of 48 outputs it takes blocks of 48 or of 64 of them by the map's size, and is up to fifty times as slow with
    the wrong ones; narrow layers gain nothing.
    """
    outputs, inputs = kernel.shape[:2]
    if outputs % 64 or outputs % 48 == 0 or inputs < 16:
        return kernel.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(kernel, padding, stride, [1, 1], 1)


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None, *, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, activation, [], "none")


def _convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, *, stride: list[int], padding: list[int]) -> Tensor:
    if not kernel.is_mkldnn:
        return F.conv2d(x, kernel, bias, stride=stride, padding=padding)
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, padding, stride, [1, 1], 1, "none", [], "")


def _folded(kernel: Tensor, phase: int, *, axis: int) -> Tensor:
    """The two weights of an axis for the output's even (0) or odd (1) pixels."""
    before, middle, after = kernel.unbind(axis)
    return torch.stack((before, middle + after) if phase == 0 else (before + middle, after), dim=axis)
