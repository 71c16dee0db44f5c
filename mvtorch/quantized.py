"""Layers whose weights have few bits: made float again where they are used, one layer at a time.

PyTorch computes nothing from MLX's groups (see mvshared.quantization), and torchao holds neither four bits on a CPU nor groups
that run over a whole kernel: docs/quantization.md has the figures. A layer takes its float weight's memory for one call.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mvshared.quantization.groups import Packed, pack_sizes
from mvshared.quantization.plans import QuantizedLayer
from mvtorch import widened

_CHUNK_NUMBERS = 1 << 17  # on the CPU: what fits a core's cache in float32


class QuantizedLinear(nn.Module):
    """A linear layer with a weight of few bits; `bias` says whether it has one."""

    def __init__(self, layer: QuantizedLayer, *, bias: bool) -> None:
        super().__init__()
        self.layer = layer
        self.bias = nn.Parameter(torch.empty(layer.shape[0])) if bias else None
        _add_weights(self, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        if widened.is_for_array(x):
            return widened.linear(x, _dequantize(self, self.layer, torch.float32), self.bias)
        return F.linear(x, _dequantize(self, self.layer, x.dtype), self.bias)


class QuantizedConv2d(nn.Module):
    """A convolution with a kernel of few bits; `bias` says whether it has one."""

    def __init__(self, layer: QuantizedLayer, *, stride: tuple[int, int], padding: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.layer, self.stride, self.padding = layer, stride, padding
        self.bias = nn.Parameter(torch.empty(layer.shape[0])) if bias else None
        _add_weights(self, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(n, i, h, w) to (n, o, h, w)."""
        outputs, inputs, height, width = self.layer.shape
        widens = widened.is_for_array(x)
        matrix = _dequantize(self, self.layer, torch.float32 if widens else x.dtype)
        kernel = matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
        if widens:
            return widened.convolution(x, kernel, self.bias, stride=self.stride, padding=self.padding)
        return F.conv2d(x, kernel, self.bias, stride=self.stride, padding=self.padding)


def quantize_network(network: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Replace linear layers and convolutions, by their names, by quantised ones that wait for their weights."""
    for name, layer in layers.items():
        path, _, attribute = name.rpartition(".")
        parent, old = network.get_submodule(path), network.get_submodule(name)
        bias = old.bias is not None
        if isinstance(old, nn.Conv2d):
            assert isinstance(old.padding, tuple)
            new: nn.Module = QuantizedConv2d(
                layer, stride=(old.stride[0], old.stride[1]), padding=(old.padding[0], old.padding[1]), bias=bias
            )
        else:
            new = QuantizedLinear(layer, bias=bias)
        parent.register_module(attribute, new)


def set_layer_weight(network: nn.Module, name: str, weight: NDArray[np.float32]) -> None:
    """Overwrite the weight of a layer that is not quantised."""
    target: Any = network.get_submodule(name).weight
    with torch.no_grad():
        target.copy_(torch.from_numpy(weight))


def packed_tensors(name: str, packed: Packed, *, device: str) -> dict[str, Tensor]:
    """The three tensors of a quantised layer, by their names in the network."""
    arrays = {f"{name}.{kind}": array for kind, array in zip(Packed._fields, packed, strict=True)}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _add_weights(module: nn.Module, layer: QuantizedLayer) -> None:
    module.register_buffer("weight", torch.empty(layer.packed_shape, dtype=torch.uint32))
    for name in ("scales", "biases"):
        module.register_buffer(name, torch.empty(layer.groups_shape, dtype=torch.float16))


def _dequantize(module: Any, layer: QuantizedLayer, dtype: torch.dtype) -> Tensor:
    """The matrix (o, k) of a layer in a dtype, computed in float32."""
    outputs, groups = layer.groups_shape
    out = torch.empty((outputs, groups, layer.group_size), dtype=dtype, device=module.weight.device)
    rows = outputs if out.device.type != "cpu" else max(1, _CHUNK_NUMBERS // layer.columns)
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        q = _unpack(module.weight[part], layer.bits).view(-1, groups, layer.group_size)
        numbers = q.to(torch.float32).mul_(module.scales[part, :, None].float()).add_(module.biases[part, :, None].float())
        out[part] = numbers
    return out.view(outputs, layer.columns)


def _unpack(weight: Tensor, bits: int) -> Tensor:
    """The whole numbers uint8 (o, k) in uint32 (o, k * bits / 32)."""
    data = weight.view(torch.uint8)
    if bits == 8:
        return data
    if bits == 4:
        pairs = data.to(torch.int16)
        # The high half moves up one byte: two numbers, in their order, in the bytes of an int16.
        return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    numbers, size = pack_sizes(bits)
    places = torch.arange(size, device=data.device) * 8
    words = (data.unflatten(-1, (-1, size)).to(torch.int64) << places).sum(dim=-1, keepdim=True)
    q = (words >> torch.arange(numbers, device=data.device) * bits) & ((1 << bits) - 1)
    return q.to(torch.uint8).flatten(-2)
