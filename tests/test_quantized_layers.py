"""Layers of few bits in both backends: the same numbers as float layers with the weights that the bits stand for."""

from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    BFLOAT16_RMS,
    FLOAT16_RMS,
    FLOAT32_RMS,
    TINY_UNET,
    Backend,
    assert_close,
    assert_different,
    denoise,
    make_unet,
    make_upscaler,
    parameter_names,
    to_numpy,
    unet_inputs,
)
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from upscalers import TINY, run_upscaler, upscaler_inputs

import mvmlx.model
import mvmlx.quantized
import mvtorch.model
import mvtorch.quantized
from mvshared.quantization.groups import BITS
from mvshared.quantization.plans import QuantizedLayer, dequantize_weight, quantizable, quantize_weight, with_bits

RMS = {"float32": FLOAT32_RMS, "float16": FLOAT16_RMS, "bfloat16": BFLOAT16_RMS}


def modules(backend: Backend) -> tuple[Any, Any]:
    """The package's `quantized` and `model`."""
    return (mvtorch.quantized, mvtorch.model) if backend == "torch" else (mvmlx.quantized, mvmlx.model)


def load(network: Any, tensors: dict[str, Any]) -> None:
    """Give a network some of its tensors; those of a quantised layer keep their dtypes."""
    if isinstance(network, torch.nn.Module):
        network.load_state_dict(tensors, strict=False, assign=True)
    else:
        network.load_weights(list(tensors.items()), strict=False)


def quantize(network: Any, backend: Backend, bits: Any) -> dict[str, QuantizedLayer]:
    """Quantise a network with its own weights; returns its layers."""
    quantized, model = modules(backend)
    layers = with_bits(quantizable(model.weight_shapes(network)), bits)
    weights = model.get_weights(network)
    quantized.quantize_network(network, layers)
    array: Any = torch.from_numpy if backend == "torch" else mx.array
    for name, layer in layers.items():
        packed = quantize_weight(weights[f"{name}.weight"], layer)
        load(network, quantized.packed_tensors(name, packed, device="cpu"))
        if f"{name}.bias" in weights:
            load(network, {f"{name}.bias": array(weights[f"{name}.bias"])})
    return layers


def rounded(network: Any, backend: Backend, bits: Any) -> Any:
    """The network with float weights that few bits can stand for."""
    quantized, model = modules(backend)
    layers = with_bits(quantizable(model.weight_shapes(network)), bits)
    weights = model.get_weights(network)
    for name, layer in layers.items():
        packed = quantize_weight(weights[f"{name}.weight"], layer)
        quantized.set_layer_weight(network, name, dequantize_weight(packed, layer))
    return network


def apply(layer: Any, x: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """What a layer makes of pictures (n, h, w, c) or tokens (..., c), in a dtype, channels last."""
    if isinstance(layer, torch.nn.Module):
        given = torch.from_numpy(x).to(getattr(torch, dtype))
        with torch.no_grad():
            out = layer(given.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if x.ndim == 4 else layer(given)
        assert out.dtype == given.dtype
        return to_numpy(out)
    given = mx.array(x).astype(getattr(mx, dtype))
    out = layer(given)
    assert out.dtype == given.dtype
    return to_numpy(out)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantised_linear_layer_is_the_float_layer_with_what_its_bits_stand_for(
    backend: Backend, bits: int, bias: bool, dtype: str
) -> None:
    random = np.random.default_rng(0)
    weight, offset = random.standard_normal((24, 96)).astype(np.float32), random.standard_normal(24).astype(np.float32)
    layer = QuantizedLayer(bits=bits, group_size=32, shape=(24, 96))
    quantized, _ = modules(backend)
    module = quantized.QuantizedLinear(layer, bias=bias)
    packed = quantize_weight(weight, layer)
    holder: Any = torch.nn.Module() if backend == "torch" else mlx.nn.Module()
    holder.inner = module
    load(holder, quantized.packed_tensors("inner", packed, device="cpu"))
    if bias:
        kind = getattr(torch if backend == "torch" else mx, dtype)
        load(holder, {"inner.bias": torch.from_numpy(offset).to(kind) if backend == "torch" else mx.array(offset).astype(kind)})
    x = random.standard_normal((2, 5, 96)).astype(np.float32)
    expected = x @ dequantize_weight(packed, layer).T + (offset if bias else 0)
    assert_close(apply(module, x, dtype), expected, rms=RMS[dtype])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_quantised_weights_are_rounded_to_half_precision_once(dtype: str) -> None:
    """In PyTorch, where they are made floats first: each is the nearest to what its bits stand for."""
    weight = np.random.default_rng(2).standard_normal((24, 96)).astype(np.float32)
    layer, kind = QuantizedLayer(bits=8, group_size=32, shape=(24, 96)), getattr(torch, dtype)
    module, packed = mvtorch.quantized.QuantizedLinear(layer, bias=False), quantize_weight(weight, layer)
    holder = torch.nn.Module()
    holder.inner = module
    load(holder, mvtorch.quantized.packed_tensors("inner", packed, device="cpu"))
    each = module(torch.eye(96, dtype=kind))  # products with 1 and 0 are exact
    assert torch.equal(each.T, torch.from_numpy(dequantize_weight(packed, layer)).to(kind))


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0)), ((1, 1), (1, 1), (0, 0))]
)
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantised_convolution_is_the_float_one_with_what_its_bits_stand_for(
    backend: Backend, bits: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dtype: str
) -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((12, 32, *kernel)).astype(np.float32)
    layer = QuantizedLayer(bits=bits, group_size=32, shape=weight.shape)
    quantized, _ = modules(backend)
    module = quantized.QuantizedConv2d(layer, stride=stride, padding=padding, bias=False)
    packed = quantize_weight(weight, layer)
    holder: Any = torch.nn.Module() if backend == "torch" else mlx.nn.Module()
    holder.inner = module
    load(holder, quantized.packed_tensors("inner", packed, device="cpu"))
    x = random.standard_normal((2, 6, 8, 32)).astype(np.float32)
    float_weight = torch.from_numpy(dequantize_weight(packed, layer))
    pictures = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(pictures, float_weight, stride=stride, padding=padding).permute(0, 2, 3, 1)
    assert_close(apply(module, x, dtype), expected, rms=RMS[dtype])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantised_u_net_computes_what_the_rounded_weights_do(backend: Backend, bits: int) -> None:
    inputs = unet_inputs(TINY_UNET)
    expected = denoise(rounded(make_unet(TINY_UNET, backend), backend, bits), inputs)
    network = make_unet(TINY_UNET, backend)
    plain = denoise(network, inputs)
    layers = quantize(network, backend, bits)
    assert len(layers) > 30
    assert_close(denoise(network, inputs), expected, rms=FLOAT32_RMS)
    assert_different(plain, expected, rms=1e-3 if bits == 8 else 1e-2)


def test_both_backends_quantise_the_same_layers_to_the_same_tensors() -> None:
    ours, twin = make_unet(TINY_UNET, "mlx"), make_unet(TINY_UNET, "torch")
    assert quantize(ours, "mlx", 4) == quantize(twin, "torch", 4)
    theirs = {name: to_numpy(tensor) for name, tensor in twin.state_dict().items()}
    found = dict(mvmlx.model._weights(ours))
    assert found.keys() == theirs.keys()
    for name in theirs:
        if name.endswith((".scales", ".biases")) or theirs[name].dtype == np.uint32:
            np.testing.assert_array_equal(np.array(found[name]), theirs[name])


def test_an_upscaler_s_network_is_quantised_the_same_way() -> None:
    inputs = upscaler_inputs(TINY, batch=1, views=1, size=(16, 16))
    ours, twin = make_upscaler(TINY, "mlx"), make_upscaler(TINY, "torch")
    plain = run_upscaler(twin, inputs)
    assert quantize(ours, "mlx", 4) == quantize(twin, "torch", 4)
    assert_close(run_upscaler(ours, inputs), run_upscaler(twin, inputs), rms=FLOAT32_RMS)
    assert_different(run_upscaler(twin, inputs), plain, rms=1e-2)


def test_quantised_weights_are_no_parameters_to_train() -> None:
    network = make_unet(TINY_UNET, "torch")
    layers = quantize(network, "torch", 8)
    assert not {f"{name}.weight" for name in layers} & parameter_names(network)
    ours = make_unet(TINY_UNET, "mlx")
    quantize(ours, "mlx", 8)
    flat: Any = tree_flatten(ours.trainable_parameters())
    assert not {f"{name}.weight" for name in layers} & {name for name, _ in flat}


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_gpu_s_quantised_product_gives_the_same_in_the_input_s_dtype(
    monkeypatch: pytest.MonkeyPatch, bits: int, dtype: str
) -> None:
    random = np.random.default_rng(0)
    layer = QuantizedLayer(bits=bits, group_size=32, shape=(24, 96))
    packed = quantize_weight(random.standard_normal(layer.shape).astype(np.float32), layer)
    module = mvmlx.quantized.QuantizedLinear(layer, bias=False)
    module.load_weights([(kind, mx.array(array)) for kind, array in packed._asdict().items()])
    x = random.standard_normal((2, 5, 96)).astype(np.float32)
    expected = apply(module, x, dtype)
    calls = []
    own = mlx.nn.QuantizedLinear.__call__
    monkeypatch.setattr(mlx.nn.QuantizedLinear, "__call__", lambda self, x: calls.append(0) or own(self, x))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert_close(apply(module, x, dtype), expected, rms=RMS[dtype])
    assert calls
