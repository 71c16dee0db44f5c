"""Convolutions by Winograd's method: what plain ones compute, on maps of every size. Whole networks are in test_packed.py."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NEEDS_PACKED_BFLOAT16, TINY_UNET, assert_close, denoise, make_unet, multiplied, unet_inputs
from torch import Tensor, nn

from mvtorch import widened, winograd
from mvtorch.layers import Upsample
from mvtorch.packed import pack_network
from mvtorch.packed_convolutions import PackedConv2d, PackedUpsampledConv2d
from mvtorch.winograd import UpsampledConv2d, WinogradConv2d

# float32 as exact as a plain convolution; bfloat16 with the rounding of sums of inputs and weights, and of products.
LAYERS = multiplied({torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 7e-4})
SIZES = [(1, 1, 1), (3, 4, 4), (2, 1, 6), (1, 7, 5), (2, 18, 33), (9, 2, 3)]
WIDE_UNET = replace(TINY_UNET, block_out_channels=(40, 64), layers_per_block=(1, 2))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape: int) -> Tensor:
    return normal(*shape).contiguous(memory_format=torch.channels_last)


def assert_as_exact(found: Tensor, layer: nn.Module, x: Tensor, *, rms: float) -> None:
    """What a layer computes in float64 with its rounded weights."""
    expected = copy.deepcopy(layer).double()(x.double())
    assert found.dtype == x.dtype
    assert_close(found, expected, rms=rms)


@LAYERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [5, 512], ids=["bands", "whole"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_convolution_computes_what_the_plain_one_does(
    size: tuple[int, int, int], tiles: int, bias: bool, dtype: torch.dtype, rms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_TILES", tiles)
    n, height, width = size
    conv, x = nn.Conv2d(24, 20, 3, padding=1, bias=bias).to(dtype), pictures(n, 24, height, width).to(dtype)
    given = x.clone()
    assert_as_exact(WinogradConv2d(conv)(x), conv, x, rms=rms)
    assert torch.equal(x, given)


@LAYERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [5, 512], ids=["bands", "whole"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_upsampling_computes_what_the_plain_one_does(
    size: tuple[int, int, int], tiles: int, bias: bool, dtype: torch.dtype, rms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_TILES", tiles)
    n, height, width = size
    layer, x = Upsample(24), pictures(n, 24, height, width).to(dtype)
    layer.conv = nn.Conv2d(24, 20, 3, padding=1, bias=bias)
    layer.to(dtype)
    conv = UpsampledConv2d(layer.conv)
    assert_as_exact(conv.upsampled(x), layer, x, rms=rms)
    repeated = nn.functional.interpolate(x, scale_factor=2.0)
    assert torch.equal(conv(repeated), conv.upsampled(x))


@NEEDS_PACKED_BFLOAT16
def test_it_is_for_many_channels_and_for_processors_without_faster_products(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = nn.Conv2d(256, 256, 3, padding=1)
    others: list[Any] = [
        nn.Conv2d(256, 255, 3, padding=1),
        nn.Conv2d(255, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1, stride=2),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 1),
    ]
    for fast, widens in ((True, False), (False, True), (False, False)):
        in_bfloat16 = fast or widens
        monkeypatch.setattr(winograd, "computes_bfloat16_in_avx512", lambda fast=fast: fast)
        monkeypatch.setattr(widened, "is_for", lambda dtype, widens=widens: widens and dtype == torch.bfloat16)
        assert winograd.is_for(wide.float())
        assert winograd.is_for(wide.bfloat16()) is in_bfloat16
        assert not any(winograd.is_for(each) for each in others)
        network = nn.ModuleList([copy.deepcopy(wide), Upsample(256).bfloat16(), copy.deepcopy(others[0])])
        pack_network(network)
        upsample: Any = network[1]
        assert [type(network[0]), type(upsample.conv), type(network[2])] == [
            WinogradConv2d if in_bfloat16 else PackedConv2d,
            UpsampledConv2d if in_bfloat16 else PackedUpsampledConv2d,
            PackedConv2d,
        ]


@NEEDS_PACKED_BFLOAT16
def test_in_bfloat16_a_unet_errs_hardly_more_than_with_plain_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "computes_bfloat16_in_avx512", lambda: True)
    monkeypatch.setattr(widened, "is_for", lambda dtype: False)
    inputs = unet_inputs(WIDE_UNET, views=2, size=(24, 16))
    exact = denoise(make_unet(WIDE_UNET, "torch"), inputs)
    errors: list[float] = []
    for least in (1, 10_000):
        monkeypatch.setattr(winograd, "_LEAST_CHANNELS", least)
        model = make_unet(WIDE_UNET, "torch").bfloat16()
        pack_network(model)
        errors.append(float(np.linalg.norm(denoise(model, inputs) - exact) / np.linalg.norm(exact)))
    assert errors[0] < 1.5 * errors[1]
