"""Weights of few bits: MLX's format, which layers have how many bits, and what a weight file says of them."""

import json
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import relative_rms
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mvshared.config import MVDREAM, SD21, SD_VAE, SD_X2_UNET, CLIPTextConfig, NetworkConfig
from mvshared.errors import CheckpointError, OptionError
from mvshared.quantization.groups import BITS, GROUP_SIZES, Packed, dequantize_matrix, quantize_matrix
from mvshared.quantization.plans import (
    EXTRA_BITS,
    Quantization,
    QuantizedLayer,
    dequantize_weight,
    from_metadata,
    keep_sensitive,
    part_of,
    preset_layers,
    preset_of,
    quantizable,
    quantize_weight,
    quantized_shapes,
    stored_bytes,
    to_metadata,
    with_bits,
)
from mvtorch.model import network_shapes

GIGABYTE = 1e9
SHAPES = {
    "conv_in.weight": (64, 64, 3, 3),
    "time_embedding.linear_1.weight": (128, 64),
    "time_embedding.linear_1.bias": (128,),
    "down_blocks.0.conv.weight": (64, 32, 3, 3),
    "narrow.weight": (64, 48),
    "token_embedding.weight": (64, 64),
    "norm.weight": (64,),
}


def matrix(rows: int, columns: int, *, seed: int = 0, scale: float = 0.1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * np.float32(scale)


def mlx_quantized(x: NDArray[np.float32], bits: int, group_size: int) -> tuple[NDArray[Any], ...]:
    return tuple(np.array(part) for part in mx.quantize(mx.array(x), group_size=group_size, bits=bits))


# The format


@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-5, 1e3),
    offset=st.floats(-2, 2),
)
@settings(max_examples=60)
@example(bits=6, group_size=32, rows=1, groups=3, seed=2, scale=2.0**-14, offset=0.0)
@example(bits=4, group_size=64, rows=2, groups=4, seed=2021, scale=1e-5, offset=0.0)
def test_every_number_comes_back_within_a_step_of_its_group(
    bits: int, group_size: int, rows: int, groups: int, seed: int, scale: float, offset: float
) -> None:
    x = matrix(rows, groups * group_size, seed=seed, scale=scale) + np.float32(offset * scale)
    packed = quantize_matrix(x, bits=bits, group_size=group_size)
    back = dequantize_matrix(packed, bits=bits, group_size=group_size)
    # The range may lie up to a step off, since zero is one of the numbers, and half a per mille for what float16 rounds.
    steps = np.abs(packed.scales.astype(np.float32)).repeat(group_size, axis=1)
    largest = np.abs(x.reshape(rows, groups, group_size)).max(axis=-1).repeat(group_size, axis=1)
    assert (np.abs(back - x) <= 1.01 * steps + 2e-3 * largest + 1e-7).all()


@pytest.mark.parametrize("bits", BITS)
def test_every_number_is_the_nearest_that_the_stored_scale_and_bias_allow(bits: int) -> None:
    x = matrix(40, 256)
    packed = quantize_matrix(x, bits=bits, group_size=64)
    scales, biases = (part.astype(np.float64).repeat(64, axis=1) for part in (packed.scales, packed.biases))
    possible = np.arange(1 << bits)[:, None, None] * scales + biases
    nearest = np.abs(possible - x).min(axis=0)
    np.testing.assert_allclose(np.abs(dequantize_matrix(packed, bits=bits, group_size=64) - x), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_scales_biases_and_shapes_are_those_of_mlx(bits: int, group_size: int) -> None:
    x = matrix(40, 4 * group_size)
    x[0], x[1], x[2] = 0, 0.25, -0.25
    x[3], x[4] = np.abs(x[3]), -np.abs(x[4])
    weight, scales, biases = mlx_quantized(x, bits, group_size)
    packed = quantize_matrix(x, bits=bits, group_size=group_size)
    assert packed.weight.dtype == np.uint32 and packed.weight.shape == weight.shape
    np.testing.assert_array_equal(packed.scales, scales.astype(np.float16))
    np.testing.assert_array_equal(packed.biases, biases.astype(np.float16))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_where_float16_holds_the_scales_every_bit_is_mlx_s(bits: int, group_size: int) -> None:
    # Whole multiples of a power of two, from end to end of what the bits can tell apart.
    q = np.random.default_rng(bits).integers(0, 1 << bits, (30, 3 * group_size))
    q[:, ::group_size], q[:, 1::group_size] = 0, (1 << bits) - 1
    x = ((q - 3) * 2.0**-9).astype(np.float32)
    for ours, theirs in zip(
        quantize_matrix(x, bits=bits, group_size=group_size), mlx_quantized(x, bits, group_size), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))


@pytest.mark.parametrize("bits", BITS)
def test_mlx_reads_what_is_packed_here(bits: int) -> None:
    packed = quantize_matrix(matrix(20, 192), bits=bits, group_size=64)
    weight, scales, biases = (mx.array(part) for part in packed)
    theirs = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), 64, bits)
    np.testing.assert_allclose(np.array(theirs), dequantize_matrix(packed, bits=bits, group_size=64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [0.1, 1e-3, 1e-4])
def test_small_numbers_lose_no_more_than_with_the_exact_scales_of_mlx(scale: float) -> None:
    x = matrix(200, 256, scale=scale)
    weight, scales, biases = mlx_quantized(x, 8, 64)
    theirs = dequantize_matrix(Packed(weight, scales.astype(np.float16), biases.astype(np.float16)), bits=8, group_size=64)
    ours = dequantize_matrix(quantize_matrix(x, bits=8, group_size=64), bits=8, group_size=64)
    exact = np.array(mx.dequantize(mx.array(weight), mx.array(scales), mx.array(biases), 64, 8))
    assert relative_rms(ours, x) <= relative_rms(theirs, x)
    assert relative_rms(ours, x) < 1.3 * relative_rms(exact, x)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_numbers_that_float16_scales_cannot_stand_for_are_refused(value: float) -> None:
    x = matrix(3, 64)
    x[1, 5] = value
    with pytest.raises(CheckpointError, match="cannot be quantised"):
        quantize_matrix(x, bits=8, group_size=64)


def test_a_kernel_is_a_matrix_with_its_channels_last() -> None:
    kernel = np.random.default_rng(0).standard_normal((6, 64, 3, 3)).astype(np.float32)
    layer = QuantizedLayer(bits=8, group_size=64, shape=kernel.shape)
    packed = quantize_weight(kernel, layer)
    rows = quantize_matrix(kernel.transpose(0, 2, 3, 1).reshape(6, -1), bits=8, group_size=64)
    for ours, expected in zip(packed, rows, strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert dequantize_weight(packed, layer).shape == kernel.shape
    assert relative_rms(dequantize_weight(packed, layer), kernel) < 6e-3


# Which layers


def test_linear_layers_and_convolutions_are_quantised_but_the_first_the_last_and_embeddings() -> None:
    layers = quantizable(SHAPES)
    assert {name: layer.group_size for name, layer in layers.items()} == {
        "time_embedding.linear_1": 64,
        "down_blocks.0.conv": 32,
    }
    assert set(quantizable(SHAPES, group_size=32)) == set(layers)
    with pytest.raises(OptionError, match="group size must be one of 64, 32, got 128"):
        quantizable(SHAPES, group_size=128)


@pytest.mark.parametrize("config", [SD21, MVDREAM])
def test_stable_diffusion_2_keeps_within_the_limits_of_both_presets(config: NetworkConfig) -> None:
    shapes = network_shapes(config)
    assert sum(map(prod, shapes.values())) > 865e6
    for dense_bytes in (2, 4):
        assert stored_bytes(shapes, preset_layers(config, shapes, "q8"), dense_bytes=dense_bytes) <= 0.93 * GIGABYTE
        assert stored_bytes(shapes, preset_layers(config, shapes, "q4"), dense_bytes=dense_bytes) < 0.5 * GIGABYTE


def test_layers_kept_by_measured_errors_stay_within_the_limit_whatever_they_are() -> None:
    shapes = network_shapes(SD21)
    layers = with_bits(quantizable(shapes), 4)
    for seed in range(3):
        random = np.random.default_rng(seed)
        kept = keep_sensitive(shapes, layers, {name: float(random.exponential()) for name in layers})
        numbers = sum(map(prod, shapes.values()))
        spent = 8 * (stored_bytes(shapes, kept) - stored_bytes(shapes, layers)) / numbers
        assert 0.9 * EXTRA_BITS < spent <= EXTRA_BITS
        assert stored_bytes(shapes, kept, dense_bytes=4) < 0.5 * GIGABYTE


def test_the_layer_that_loses_most_for_its_size_is_kept_first() -> None:
    shapes = {
        f"{name}.weight": (outputs, 64) for name, outputs in (("large", 80), ("small", 16), ("harmless", 4), ("rest", 4000))
    }
    layers = with_bits(quantizable(shapes), 4)
    kept = keep_sensitive(shapes, layers, {"large": 0.2, "small": 0.15, "harmless": 0.01, "rest": 0.5})
    assert {name for name, layer in kept.items() if layer.bits == 8} == {
        "small",
        "harmless",
    }  # large no longer fits behind small


def test_encoders_have_8_bits_in_both_presets_and_a_vae_stays_as_it_is() -> None:
    text = CLIPTextConfig()
    for preset in ("q8", "q4"):
        assert {layer.bits for layer in preset_layers(text, network_shapes(text), preset).values()} == {8}
        assert preset_layers(SD_VAE, network_shapes(SD_VAE), preset) == {}
    upscaler = preset_layers(SD_X2_UNET, network_shapes(SD_X2_UNET), "q4")
    assert {layer.bits for layer in upscaler.values()} == {4, 8}
    assert not {"conv_in", "conv_out"} & set(upscaler)


def test_q4_keeps_the_end_of_the_network_and_the_embeddings() -> None:
    kept = {name for name, layer in preset_layers(SD21, network_shapes(SD21), "q4").items() if layer.bits == 8}
    assert {"time_embedding.linear_1", "up_blocks.3.resnets.2.conv2", "up_blocks.3.attentions.2.proj_out"} <= kept
    assert all(name.startswith(("up_blocks.3.", "time_embedding.")) for name in kept)


def test_a_preset_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="quantize must be one of q8, q4, got 'q5'"):
        preset_layers(SD21, {}, "q5")
    assert [preset_of(each) for each in ("q8", "q4", "stored q4", "stored 6 bits", None)] == ["q8", "q4", None, None, None]


def test_names_and_shapes_of_a_quantised_network_are_those_of_mlx_s_layers() -> None:
    layers = with_bits(quantizable(SHAPES), 4)
    shapes = quantized_shapes(SHAPES, layers)
    assert shapes["down_blocks.0.conv.weight"] == (64, 288 * 4 // 32)
    assert shapes["down_blocks.0.conv.scales"] == shapes["down_blocks.0.conv.biases"] == (64, 288 // 32)
    assert shapes["time_embedding.linear_1.bias"] == (128,)
    assert part_of("down_blocks.0.conv.scales", layers) == ("down_blocks.0.conv", "scales")
    assert part_of("time_embedding.linear_1.bias", layers) is None and part_of("conv_in.weight", layers) is None
    with pytest.raises(CheckpointError, match="the quantised layer other is not there in the model"):
        quantized_shapes(SHAPES, {"other": layers["down_blocks.0.conv"]})


@pytest.mark.parametrize(
    ("bits", "group_size", "shape"), [(7, 64, (4, 64)), (4, 128, (4, 128)), (4, 64, (4, 96)), (4, 64, (64,))]
)
def test_a_layer_that_cannot_be_is_refused(bits: int, group_size: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError):
        QuantizedLayer(bits=bits, group_size=group_size, shape=shape)


# What a file says of itself


def document() -> dict[str, Any]:
    layers = with_bits(quantizable(SHAPES), {"time_embedding.linear_1": 8, "down_blocks.0.conv": 4})
    return json.loads(to_metadata(Quantization(preset="q4", layers=layers)))


def test_metadata_come_back_as_they_were() -> None:
    quantization = Quantization(preset="6 bits", layers=with_bits(quantizable(SHAPES), 6))
    assert from_metadata(to_metadata(quantization), path=Path("x")) == quantization


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", json.dumps({"format_version": 1}), json.dumps({"format_version": 1, "preset": 4, "layers": {}})],
)
def test_malformed_metadata_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (has malformed metadata|is quantised in the format)"):
        from_metadata(text, path=Path("model.safetensors"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 7), ("bits", True), ("bits", "4"), ("group_size", 48), ("shape", [64]), ("shape", [64, 50]), ("shape", None)],
)
def test_a_malformed_layer_is_refused_by_its_name(field: str, value: Any) -> None:
    broken = document()
    broken["layers"]["down_blocks.0.conv"][field] = value
    with pytest.raises(CheckpointError, match=r"malformed metadata .*down_blocks\.0\.conv"):
        from_metadata(json.dumps(broken), path=Path("model.safetensors"))


def test_a_later_format_is_refused_by_its_version() -> None:
    with pytest.raises(CheckpointError, match=r"is quantised in the format 2, and 1 is known \(quantise it again\)"):
        from_metadata(json.dumps({**document(), "format_version": 2}), path=Path("model.safetensors"))


def test_a_group_size_of_32_is_that_of_every_layer() -> None:
    layers = quantizable({"a.weight": (8, 128), "b.weight": (8, 96)}, group_size=32)
    assert {layer.group_size for layer in layers.values()} == {32}


def test_the_squared_error_per_number_decides_which_layers_are_kept() -> None:
    shapes = {"small.weight": (64, 64), "large.weight": (256, 64), "rest.weight": (640, 1280)}
    layers = with_bits(quantizable(shapes), 4)
    kept = keep_sensitive(shapes, layers, {"small": 0.3, "large": 0.7, "rest": 0.0})
    assert (kept["large"].bits, kept["small"].bits) == (8, 4)
