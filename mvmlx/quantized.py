"""Layers whose weights have few bits, in MLX's own format; see mvshared.quantization.

Linear layers are mlx.nn's. MLX has no quantised convolution: kernels are made float again where they are used, one layer at a
time, and so are linear weights on the CPU, where the quantised matrix product is slower by far than both steps.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mvshared.quantization.groups import Packed
from mvshared.quantization.plans import QuantizedLayer


class QuantizedLinear(nn.QuantizedLinear):
    """A linear layer with a weight of few bits; `bias` says whether it has one."""

    def __init__(self, layer: QuantizedLayer, *, bias: bool) -> None:
        outputs, inputs = layer.shape
        super().__init__(inputs, outputs, bias, layer.group_size, layer.bits)
        self.layer = layer
        _add_weights(self, layer, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., i) to (..., o)."""
        if mx.default_device() == mx.Device(mx.gpu):
            # Scales stay float16, with which a bfloat16 input gives float32.
            return super().__call__(x).astype(x.dtype)
        weight = _dequantize(self, self.layer, x.dtype).T
        return mx.addmm(self["bias"], x, weight) if "bias" in self else x @ weight


class QuantizedConv2d(nn.Module):
    """A convolution with a kernel of few bits; `bias` says whether it has one."""

    def __init__(self, layer: QuantizedLayer, *, stride: tuple[int, int], padding: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.layer = layer
        self.stride = stride
        self.padding = padding
        _add_weights(self, layer, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """(n, h, w, i) to (n, h, w, o)."""
        outputs, inputs, height, width = self.layer.shape
        kernel = _dequantize(self, self.layer, x.dtype).reshape(outputs, height, width, inputs)
        y = mx.conv2d(x, kernel, self.stride, self.padding)
        return y + self["bias"] if "bias" in self else y


def quantize_network(network: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Replace linear layers and convolutions, by their names, by quantised ones that wait for their weights."""
    for name, layer in layers.items():
        path, _, attribute = name.rpartition(".")
        parent, old = _submodule(network, path), _submodule(network, name)
        bias = "bias" in old
        if isinstance(old, nn.Conv2d):
            new: nn.Module = QuantizedConv2d(layer, stride=_pair(old.stride), padding=_pair(old.padding), bias=bias)
        else:
            new = QuantizedLinear(layer, bias=bias)
        if isinstance(parent, list):
            parent[int(attribute)] = new
        else:
            setattr(parent, attribute, new)


def set_layer_weight(network: nn.Module, name: str, weight: NDArray[np.float32]) -> None:
    """Overwrite the weight of a layer that is not quantised."""
    module = _submodule(network, name)
    array = mx.array(np.ascontiguousarray(weight.transpose(0, 2, 3, 1)) if weight.ndim == 4 else weight)
    module.weight = array.astype(module.weight.dtype)


def packed_tensors(name: str, packed: Packed, *, device: str) -> dict[str, mx.array]:
    """The three tensors of a quantised layer, by their names in the network."""
    with mx.stream(mx.Device(getattr(mx, device))):
        tensors = {f"{name}.{kind}": mx.array(array) for kind, array in zip(Packed._fields, packed, strict=True)}
        mx.eval(tensors)
        return tensors


def _add_weights(module: Any, layer: QuantizedLayer, *, bias: bool) -> None:
    module.weight = mx.zeros(layer.packed_shape, mx.uint32)
    for name in ("scales", "biases"):
        module[name] = mx.zeros(layer.groups_shape, mx.float16)
    if bias:
        module.bias = mx.zeros((layer.shape[0],))
    module.freeze()


def _dequantize(module: Any, layer: QuantizedLayer, dtype: mx.Dtype) -> mx.array:
    """The matrix (o, k) of a layer in a dtype."""
    # In float16 throughout, MLX would round the product before the sum.
    scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
    return mx.dequantize(module.weight, scales, biases, layer.group_size, layer.bits).astype(dtype)


def _submodule(network: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        network = network[int(part)] if isinstance(network, list) else network[part]
    return network


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
