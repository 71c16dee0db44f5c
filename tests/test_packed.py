"""Networks that are packed for inference on a CPU: the same results as the plain ones and as diffusers', and the way back."""

import copy
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BFLOAT16_RMS,
    FLOAT32_RMS,
    TINY_UNET,
    TINY_VAE,
    assert_close,
    denoise,
    make_unet,
    make_vae,
    multiplied,
    packs_bfloat16,
    unet_inputs,
)
from test_reference_unet import CONFIGS, denoise_with_diffusers
from test_reference_vae import diffusers_vae
from torch import Tensor, nn

import mvtorch
import mvtorch.packed
import mvtorch.packed_convolutions
from mvshared.attention import FUSED
from mvshared.backend import Dtype, load
from mvshared.checkpoint import read_model_config, weight_files
from mvshared.config import VAEConfig
from mvshared.errors import BackendError
from mvshared.memory.plan import PLAIN, MemoryPlan
from mvshared.precision import SLOW_AVX512
from mvtorch import cpu_attention, cpu_norms, widened, winograd
from mvtorch.attention import attention
from mvtorch.layers import AdaGroupNorm, FeedForward, Float32Conv2d, GroupNorm, ResnetBlock, Upsample
from mvtorch.model import load_network, packing_bytes
from mvtorch.packed import PackedFeedForward, PackedLinear, pack_network
from mvtorch.packed_convolutions import PackedConv2d, PackedUpsample
from mvtorch.upscaling import load_latent_model

FIXTURES = Path(__file__).parent / "fixtures"
LAYERS = multiplied({torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3})  # a few roundings
NETWORKS = multiplied({torch.float32: FLOAT32_RMS, torch.bfloat16: BFLOAT16_RMS, torch.float16: BFLOAT16_RMS / 8})
# Widths that are no multiples of 16, beside one whose kernels are packed.
NAMES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WIDE = replace(TINY_UNET, block_out_channels=(40, 64), layers_per_block=(1, 2))
WIDE_VAE = replace(TINY_VAE, block_out_channels=(24, 40, 64))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=[winograd._LEAST_CHANNELS, 1], ids=["plain", "winograd"])
def convolutions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How networks that are narrower than real ones are packed: as they are, and as wide ones on a CPU with AVX512-BF16."""
    monkeypatch.setattr(winograd, "_LEAST_CHANNELS", request.param)
    monkeypatch.setattr(winograd, "computes_bfloat16_in_avx512", lambda: True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape: int) -> Tensor:
    return normal(*shape).contiguous(memory_format=torch.channels_last)


def packed(module: Any, dtype: torch.dtype) -> Any:
    """A packed copy of one layer in a dtype."""
    holder = nn.ModuleList([copy.deepcopy(module).to(dtype)])
    pack_network(holder)
    assert type(holder[0]) is not type(module)
    return holder[0]


def assert_same(module: nn.Module, x: Tensor, *, dtype: torch.dtype, rms: float) -> None:
    """A packed copy of a layer computes what the layer does in float32 with its rounded weights."""
    exact = copy.deepcopy(module).to(dtype).float()
    assert_close(packed(module, dtype)(x.to(dtype)), exact(x.to(dtype).float()), rms=rms)


@LAYERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 20), (2, 77, 20), (1, 3, 5, 20)])
def test_a_packed_linear_layer_computes_what_it_did(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, rms: float) -> None:
    assert_same(nn.Linear(20, 33, bias=bias), normal(*shape), dtype=dtype, rms=rms)


@LAYERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (2, 8), (3, 5), (9, 14)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (1, 1, 1), (5, 1, 2)])
def test_a_packed_convolution_computes_what_it_did(
    kernel: int, stride: int, padding: int, size: tuple[int, int], bias: bool, dtype: torch.dtype, rms: float
) -> None:
    height, width = (max(each, kernel - 2 * padding) for each in size)
    for inputs, outputs in ((12, 20), (24, 64)):  # the first ones' kernel is not packed
        conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=bias)
        assert_same(conv, pictures(3, inputs, height, width), dtype=dtype, rms=rms)


@LAYERS
def test_a_packed_convolution_takes_maps_of_changing_size(dtype: torch.dtype, rms: float) -> None:
    for outputs in (24, 64):
        conv = nn.Conv2d(24, outputs, 3, padding=1)
        layer, exact = packed(conv, dtype), copy.deepcopy(conv).to(dtype).float()
        assert layer.packed.is_mkldnn == (outputs == 64 and not widened.is_for(dtype))
        for batch, side in ((1, 8), (10, 4), (2, 16), (2, 3), (1, 9)):
            x = pictures(batch, 24, side, side).to(dtype)
            assert_close(layer(x), exact(x.float()), rms=rms)


@LAYERS
@pytest.mark.parametrize("shape", [(1, 24, 1, 1), (2, 64, 5, 7), (10, 24, 4, 8), (1, 128, 4, 4)])
def test_packed_upsampling_computes_what_it_did(shape: tuple[int, ...], dtype: torch.dtype, rms: float) -> None:
    assert_same(Upsample(shape[1]), pictures(*shape), dtype=dtype, rms=rms)


@LAYERS
@pytest.mark.parametrize("tokens", [1, 1024, 1500])
def test_a_packed_feed_forward_computes_what_it_did(tokens: int, dtype: torch.dtype, rms: float) -> None:
    assert_same(FeedForward(24), normal(2, tokens, 24), dtype=dtype, rms=rms)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """A name for every call of a module's function from now on."""
    called, function = list[str](), getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **options: (called.append(name), function(*given, **options))[1])
    return called


def test_packed_layers_take_the_fast_way_unless_they_are_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, enlarged = counted(monkeypatch, mvtorch.packed, "linear_times"), counted(monkeypatch, nn.functional, "interpolate")
    layers = {"ff": (FeedForward(24), normal(2, 5, 24)), "up": (Upsample(64), pictures(1, 64, 3, 3))}
    for observed in (False, True):
        for name, (layer, x) in layers.items():
            network = nn.ModuleDict({name: packed(layer, torch.float32)})
            with mvtorch.observe(network, lambda *_: None) if observed else nullcontext():
                network[name](x)
        assert (len(fused), len(enlarged)) == (1, observed)


@pytest.mark.parametrize("channels", [64, winograd._LEAST_CHANNELS])
def test_upsampling_makes_no_map_with_every_pixel_four_times(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, enlarged = packed(Upsample(channels), torch.float32), counted(monkeypatch, nn.functional, "interpolate")
    assert layer(pictures(1, channels, 3, 3)).shape == (1, channels, 6, 6)
    assert not enlarged


def test_small_maps_and_convolutions_of_points_are_products_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    products = counted(monkeypatch, mvtorch.packed_convolutions, "linear")
    for kernel, stride, side, expected in ((3, 1, 4, 1), (3, 1, 5, 0), (3, 2, 4, 0), (1, 1, 20, 1)):
        layer = packed(nn.Conv2d(24, 64, kernel, stride=stride, padding=kernel // 2), torch.float32)
        layer(pictures(2, 24, side, side))
        assert len(products) == expected
        products.clear()


def test_kernels_are_not_packed_where_another_layout_may_be_wanted_for_other_maps() -> None:
    widths = {64: True, 128: True, 192: False, 320: True, 384: False, 48: False}
    assert {width: packed(nn.Conv2d(16, width, 3, padding=1), torch.float32).packed.is_mkldnn for width in widths} == widths


def test_a_norm_writes_over_its_input_only_if_it_may() -> None:
    norm, x = GroupNorm(8, 128, eps=1e-5), pictures(1, 128, 32, 32)
    given = x.clone()
    assert cpu_norms.norm_silu(norm, x).data_ptr() != x.data_ptr() and torch.equal(x, given)
    assert cpu_norms.norm_silu(norm, x, overwrite=True).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("size", [(3, 70), (70, 70), (65, 62)])
def test_the_last_convolution_is_in_float32(size: tuple[int, int]) -> None:
    conv, x = Float32Conv2d(24, 3, 3, padding=1), pictures(2, 24, *size).bfloat16()
    out = packed(conv, torch.float32)(x)
    assert out.dtype == torch.float32
    assert_close(out, conv(x), rms=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 30.0, 3e3])
@pytest.mark.parametrize("shape", [(1, 128, 64, 64), (3, 160, 53, 37), (2, 136, 1, 2048), (2, 24, 128, 128), (2, 16, 90, 66)])
def test_norms_are_exact_whatever_the_mean(shape: tuple[int, ...], mean: float, dtype: torch.dtype) -> None:
    norm = GroupNorm(8, shape[1], eps=1e-5)
    norm.weight.copy_(1 + normal(shape[1]) / 4)
    norm.bias.copy_(normal(shape[1], seed=1))
    x = (mean + pictures(*shape)).to(dtype)
    expected = nn.functional.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), 1e-5)
    rms = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert cpu_norms.is_for(x)
    out = norm.to(dtype)(x)
    assert out.dtype == dtype
    assert_close(out, nn.functional.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), 1e-5), rms=rms)
    assert_close(cpu_norms.norm_silu(norm, x.clone(), overwrite=True), nn.functional.silu(expected), rms=2 * rms)


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0, 30.0, 3e3])
@pytest.mark.parametrize("shape", [(4, 160, 16, 16), (2, 24, 5, 7), (1, 24, 1, 9), (3, 64, 1, 1)])
def test_norms_of_small_maps_are_exact_whatever_the_mean(shape: tuple[int, ...], mean: float) -> None:
    x = mean + pictures(*shape)
    plain = nn.functional.group_norm(x.double(), 8, eps=1e-5)
    norm, scaled = GroupNorm(8, shape[1], eps=1e-5), AdaGroupNorm(8, shape[1], embed_dim=16, eps=1e-5)
    norm.weight.copy_(1 + normal(shape[1]) / 4)
    norm.bias.copy_(normal(shape[1], seed=1))
    emb = normal(shape[0], 16)
    scale, shift = (each.double()[:, :, None, None] for each in scaled.scale_shift(emb))
    assert cpu_norms.is_for(x)
    expected = plain * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    assert_close(norm(x), expected, rms=2e-6)
    assert_close(cpu_norms.norm_silu(norm, x.clone(), overwrite=True), nn.functional.silu(expected), rms=2e-6)
    assert_close(scaled(x, emb), plain * scale + shift, rms=2e-6)


@pytest.mark.parametrize("shape", [(1, 40, 8, 12), (2, 24, 1, 9), (3, 64, 1, 1)])
def test_norms_of_small_maps_take_any_memory(shape: tuple[int, ...]) -> None:
    norm, x, (n, c, _, width) = GroupNorm(8, shape[1], eps=1e-5), pictures(*shape), shape
    others = [x.contiguous(), torch.cat([x, x], dim=1)[:, :c], x.repeat_interleave(2, dim=3)[..., ::2]]
    if n == 1:
        others.append(x.as_strided(shape, (c, 1, width * c, c)))  # of views that slices of batches leave
    for other in others:
        assert torch.equal(other, x)
        assert_close(norm(other), norm(x), rms=1e-6)


def test_norms_of_small_maps_are_exact_where_squares_of_what_they_subtract_overflow() -> None:
    x = (pictures(2, 64, 8, 8) / 1024 + 1) * 1e20
    assert torch.isinf(x.square()).all()
    expected = nn.functional.group_norm(x.double(), 8)
    assert_close(GroupNorm(8, 64, eps=1e-5)(x), expected, rms=1e-3)


def test_norms_of_small_maps_take_factors_in_half_precision() -> None:
    norm, x = GroupNorm(8, 512, eps=1e-5), pictures(2, 512, 8, 8)
    norm.weight.copy_(normal(512))
    expected = norm(x)
    assert_close(norm.half()(x), expected, rms=1e-3)


def test_norms_and_blocks_leave_what_is_observed_and_their_input_alone() -> None:
    block, seen = ResnetBlock(128, 128, groups=8, eps=1e-5, time_embed_dim=16), dict[str, Tensor]()
    x, emb = pictures(2, 128, 24, 16), normal(2, 16)
    given = x.clone()
    plain = block(x, emb)
    with mvtorch.observe({"block": block}, lambda name, array, seconds: seen.__setitem__(name, array)):
        observed = block(x, emb)
    assert torch.equal(x, given)
    assert_close(plain, observed, rms=1e-6)
    np.testing.assert_array_equal(seen["block.norm1"], block.norm1(x).permute(0, 2, 3, 1))
    np.testing.assert_array_equal(seen["block.conv1"], block.conv1(nn.functional.silu(block.norm1(x))).permute(0, 2, 3, 1))


@pytest.mark.parametrize("spread", [1.0, 4.0, 30.0])
@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [(300, 300, 64), (70, 1000, 40), (1, 256, 16), (1100, 1500, 8), (300, 300, 32), (64, 400, 160)],
)
def test_shifted_attention_is_as_exact_as_its_weights(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, width: int, spread: float
) -> None:
    q, k, v = (normal(2, 3, count, width, seed=count).bfloat16() for count in (queries, keys, keys))
    q = q * spread
    bias = normal(keys)
    monkeypatch.setattr(widened, "is_for", lambda dtype: False)
    for key_bias in (None, bias):
        scores = q.double() @ k.double().transpose(-1, -2) * width**-0.5
        scores = scores if key_bias is None else scores + key_bias.double()
        expected = scores.softmax(-1) @ v.double()
        for packs in {packs_bfloat16(), False}:  # a PyTorch without those operators multiplies plain matrices
            monkeypatch.setattr(cpu_attention, "has_packed_linear", lambda packs=packs: packs)
            found = cpu_attention.shifted_attention(q, k, v, key_bias=key_bias)
            assert found.shape == q.shape
            assert_close(found, expected, rms=4.5e-3)


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_shifted_attention_sees_large_scores_beside_those_of_its_estimate(spread: float) -> None:
    keys = normal(1, 1, 512, 64) * spread**0.5
    queries = keys.clone()
    keys[:, :, 1::2] = queries[:, :, ::2] + 0.05 * normal(1, 1, 256, 64) * spread**0.5  # twins: only the first may be in it
    q, k, v = queries.bfloat16(), keys.bfloat16(), normal(1, 1, 512, 64).bfloat16()
    q, k = q[:, :, 2::4], k.roll(3, dims=2)
    expected = (q.double() @ k.double().transpose(-1, -2) / 8).softmax(-1) @ v.double()
    assert_close(cpu_attention.shifted_attention(q, k, v), expected, rms=5e-3)


def test_shifted_attention_is_for_processors_whose_kernel_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    q, few = torch.zeros(1, 1, 300, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 77, 8, dtype=torch.bfloat16)
    for instructions, wanted in (("AVX-512", True), (SLOW_AVX512, False), ("AMX", False), ("Arm's BF16", False), (None, False)):
        monkeypatch.setattr("mvshared.precision.bfloat16_instructions", lambda instructions=instructions: instructions)
        assert cpu_attention.is_for(q, q) is wanted
        assert not cpu_attention.is_for(q, few)
        assert not cpu_attention.is_for(q.float(), q.float())


def test_attention_takes_the_way_that_is_for_its_dtype_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted, wide = (counted(monkeypatch, *each) for each in ((cpu_attention, "shifted_attention"), (widened, "attention")))
    x = torch.zeros(1, 1, 300, 8)
    for instructions, dtype, expected in (
        ("AVX-512", torch.bfloat16, (1, 0)),
        ("AMX", torch.bfloat16, (0, 0)),
        (None, torch.bfloat16, (0, 1)),
        ("AVX-512", torch.float16, (0, 1)),
        ("AVX-512", torch.float32, (0, 0)),
    ):
        monkeypatch.setattr("mvshared.precision.bfloat16_instructions", lambda instructions=instructions: instructions)
        attention(*[x.to(dtype)] * 3, options=FUSED)
        assert (len(shifted), len(wide)) == expected
        shifted.clear()
        wide.clear()
        attention(*[x.to(dtype)] * 3, options=FUSED, causal=True)
        assert not shifted
        wide.clear()


@NETWORKS
@pytest.mark.parametrize(("batch", "views", "size"), [(1, 1, (8, 12)), (2, 5, (10, 6)), (1, 10, (16, 16))])
def test_a_packed_unet_computes_what_the_plain_one_and_diffusers_do(
    batch: int, views: int, size: tuple[int, int], dtype: torch.dtype, rms: float, convolutions: None
) -> None:
    inputs = unet_inputs(WIDE, batch=batch, views=views, size=size)
    plain = make_unet(WIDE, "torch")
    expected = denoise(plain, inputs)
    assert_close(expected, denoise_with_diffusers(WIDE, inputs), rms=FLOAT32_RMS)
    model = plain.to(dtype)
    pack_network(model)
    assert isinstance(model.conv_in, PackedConv2d | winograd.WinogradConv2d)
    assert_close(denoise(model, inputs), expected, rms=rms)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_unet_is_packed_without_a_trace(name: str, convolutions: None) -> None:
    inputs, model = unet_inputs(CONFIGS[name], views=2, size=(16, 24)), make_unet(CONFIGS[name], "torch")
    expected = denoise(model, inputs)
    pack_network(model)
    left = [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv2d, Upsample, FeedForward)]
    assert left == []
    assert_close(denoise(model, inputs), expected, rms=FLOAT32_RMS)


@NETWORKS
@pytest.mark.parametrize("config", [TINY_VAE, WIDE_VAE], ids=["tiny", "wide"])
def test_a_packed_vae_computes_what_the_plain_one_and_diffusers_do(
    config: VAEConfig, dtype: torch.dtype, rms: float, convolutions: None
) -> None:
    oracle, model = diffusers_vae(config), make_vae(config, "torch").to(dtype)
    model.decoder.conv_out.float()
    pack_network(model)
    for batch, size in ((1, (20, 12)), (3, (16, 28))):
        latents, pixels = normal(batch, *size, 4), normal(batch, *(config.downscale * each for each in size), 3)
        expected = oracle.decode(latents.permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)  # pyright: ignore
        found = model.decode(latents)
        assert found.dtype == torch.float32
        assert_close(found, expected, rms=rms)
        mean = oracle.encode(pixels.permute(0, 3, 1, 2)).latent_dist.mean.permute(0, 2, 3, 1)  # pyright: ignore
        assert_close(model.encode(pixels).mean, mean, rms=rms)


def test_a_packed_vae_in_tiles_has_no_seams(convolutions: None) -> None:
    model = make_vae(WIDE_VAE, "torch")
    pack_network(model)
    latents = normal(1, 40, 36, 4)
    pixels = model.decode(latents)
    assert_close(model.decode(latents, tile=64), pixels, rms=FLOAT32_RMS)
    assert_close(model.encode(pixels, tile=64).mean, model.encode(pixels).mean, rms=FLOAT32_RMS)


def test_blocks_of_a_packed_network_have_the_names_the_kinds_and_the_arithmetic_of_the_plain_one(convolutions: None) -> None:
    inputs, told, outputs = unet_inputs(TINY_UNET, size=(16, 16)), list[Any](), list[Any]()
    model = make_unet(TINY_UNET, "torch")
    for pack in (False, True):
        if pack:
            pack_network(model)
        blocks: list[Any] = []
        with mvtorch.observe_blocks({"unet": model}, blocks.append):
            denoise(model, inputs)
        told.append([(block.name, block.kind, block.flops, sorted(block.inputs)) for block in blocks])
        outputs.append({name: array for block in blocks for name, array in block.outputs.items()})
    assert told[0] == told[1]
    for name, array in outputs[0].items():
        assert_close(outputs[1][name], array, rms=FLOAT32_RMS)


@NETWORKS
def test_what_packing_adds_is_known_before(dtype: torch.dtype, rms: float, convolutions: None) -> None:
    model = make_unet(WIDE, "torch").to(dtype)
    before = weights_bytes(model)
    added, on_cuda = (packing_bytes(WIDE, dtype=NAMES[dtype], device=device) for device in ("cpu", "cuda"))
    assert on_cuda == 0
    pack_network(model)
    assert packed_bytes(model, dtype) == before + added > before


@NETWORKS
def test_a_lean_network_takes_no_more_memory(dtype: torch.dtype, rms: float, convolutions: None) -> None:
    for model in (make_unet(WIDE, "torch").to(dtype), make_vae(WIDE_VAE, "torch").to(dtype)):
        before = weights_bytes(model)
        pack_network(model, lean=True)
        assert packed_bytes(model, dtype) == before


def weights_bytes(network: nn.Module) -> int:
    return sum(weight.nbytes for weight in network.parameters() if weight.ndim > 1)


def packed_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """Of all weights in a dtype that a packed network keeps in some layout."""
    fields = [value for layer in network.modules() for name, value in vars(layer).items() if name != "outputs"]
    return sum(dtype.itemsize * each.numel() for each in arrays(fields) if each.ndim > 1 and not each.is_meta)


def test_a_lean_network_computes_the_same(convolutions: None) -> None:
    inputs, model = unet_inputs(WIDE, views=2, size=(16, 8)), make_unet(WIDE, "torch")
    expected = denoise(model, inputs)
    pack_network(model, lean=True)
    assert not any(isinstance(layer, winograd.WinogradConv2d) for layer in model.modules())
    assert any(isinstance(layer, PackedUpsample) for layer in model.modules())
    assert_close(denoise(model, inputs), expected, rms=FLOAT32_RMS)


def test_networks_are_lean_where_a_plan_spares_memory(convolutions: None) -> None:
    model: Any = load(FIXTURES / "tiny-mvdream", backend="torch", device="cpu", dtype="float32", low_memory=True).model

    def kinds(plan: MemoryPlan) -> set[type]:
        with model.planned(plan):
            return {type(layer) for layer in model.unet.modules()}

    fast, spared = kinds(PLAIN), kinds(replace(PLAIN, networks_at_once=False))
    assert winograd.WinogradConv2d not in spared
    model.release()
    assert (winograd.WinogradConv2d in kinds(PLAIN)) == (winograd.WinogradConv2d in fast) == (winograd._LEAST_CHANNELS == 1)


def arrays(fields: Any) -> Iterator[Tensor]:
    """The arrays among the fields of a layer, and in lists and tuples of them."""
    if isinstance(fields, Tensor):
        yield fields
    elif isinstance(fields, dict | list | tuple):
        for each in fields.values() if isinstance(fields, dict) else fields:
            yield from arrays(each)


def test_loaded_networks_are_packed_and_have_no_weights_to_save() -> None:
    model: Any = load(FIXTURES / "tiny-imagedream", backend="torch", device="cpu", dtype="float32").model
    assert isinstance(model.networks["text_encoder"].encoder.layers[0].self_attn.q_proj, PackedLinear)
    assert isinstance(model.vae.decoder.up_blocks[0].upsamplers[0], PackedUpsample)
    assert isinstance(model.unet.mid_block.attentions[0].transformer_blocks[0].ff, PackedFeedForward)
    with pytest.raises(BackendError, match="packed for inference"):
        model.unet.state_dict()
    folder = FIXTURES / "tiny-imagedream"
    unet = load_network(read_model_config(folder).unet, weight_files(folder, "unet"), dtype="float32", device="cpu")
    assert not any(isinstance(layer, PackedLinear | PackedConv2d) for layer in unet.modules())
    assert "conv_in.weight" in unet.state_dict()
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)  # as pictures are, or each call would copy


def test_a_vae_that_is_loaded_alone_is_packed_too() -> None:
    vae = load_latent_model(FIXTURES / "tiny-mvdream", device="cpu", dtype="float32").vae
    assert {"PackedConv2d", "PackedLinear"} <= {type(layer).__name__ for layer in vae.modules()}


def test_quantised_layers_stay_and_those_beside_them_are_packed() -> None:
    model: Any = load(FIXTURES / "tiny-mvdream", backend="torch", device="cpu", dtype="bfloat16", quantize="q8").model
    kinds = {type(layer).__name__ for layer in model.unet.modules()}
    assert {"QuantizedLinear", "QuantizedConv2d", "PackedLinear", "PackedConv2d"} <= kinds


@pytest.mark.parametrize("missing", ["packed.packed_matrix", "packed_convolutions.packed_kernel"])
def test_without_the_private_operators_networks_stay_plain_and_one_line_is_logged(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    monkeypatch.setattr(f"mvtorch.{missing}", refuse)
    monkeypatch.setattr(mvtorch.packed, "_told", set())
    inputs = unet_inputs(TINY_UNET)
    with caplog.at_level(logging.WARNING, logger="mvtorch.packed"):
        for _ in range(2):
            model = make_unet(TINY_UNET, "torch")
            expected = denoise(model, inputs)
            pack_network(model)
            assert_close(denoise(model, inputs), expected, rms=FLOAT32_RMS)
    assert len(caplog.records) == 1
    assert "no attribute" in caplog.text


def test_other_dtypes_stay_plain() -> None:
    model = make_unet(TINY_UNET, "torch").double()
    pack_network(model)
    assert type(model.conv_in) is nn.Conv2d
