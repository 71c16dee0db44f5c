"""Half precision that is multiplied in float32: results, how much at a time, and on which processors."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mvshared.precision
from mvshared.attention import AttentionOptions
from mvshared.backend import load
from mvshared.precision import SLOW_AVX512
from mvtorch import widened
from mvtorch.attention import attention

FIXTURES = Path(__file__).parent / "fixtures"
HALVES = pytest.mark.parametrize(("dtype", "rms"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)  # one rounding


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=[1, 1 << 21], ids=["pieces", "whole"])
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_WEIGHTS", 50 * request.param)
    monkeypatch.setattr(widened, "_ROWS", 7 * request.param)
    monkeypatch.setattr(widened, "_PIXELS", 15 * request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@HALVES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 40, 20)])
def test_a_product_is_rounded_once(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, rms: float, at_a_time: None) -> None:
    layer, x = nn.Linear(20, 33, bias=bias).to(dtype), normal(*shape).to(dtype)
    factors = normal(*shape[:-1], 33, seed=1).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    assert_close(widened.linear(x, layer.weight, layer.bias), exact, rms=rms)
    assert_close(widened.linear(x, layer.weight, layer.bias, activation="gelu"), F.gelu(exact), rms=rms)
    assert_close(widened.linear(x, layer.weight, layer.bias, factors=factors), exact * factors.double(), rms=rms)
    assert widened.linear(x, layer.weight.float(), layer.bias).dtype == dtype  # of a quantised layer
    with torch.inference_mode(False), torch.enable_grad():  # of a network that is called as it is
        given = x.clone().requires_grad_()
        assert_close(
            widened.linear(given, layer.weight.clone(), None if layer.bias is None else layer.bias.clone()), exact, rms=rms
        )
    assert widened.linear(x.new_empty(2, 0, 20), layer.weight, layer.bias).shape == (2, 0, 33)


@HALVES
@pytest.mark.parametrize("size", [(3, 5, 5), (1, 9, 14), (5, 2, 3)], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (1, 3, 2), (2, 1, 0)])
def test_a_convolution_is_rounded_once(
    kernel: int, stride: int, padding: int, size: tuple[int, int, int], dtype: torch.dtype, rms: float, at_a_time: None
) -> None:
    n, height, width = size[0], *(max(each, kernel - 2 * padding) for each in size[1:])
    x = normal(n, 6, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    for bias in (True, False):
        conv = nn.Conv2d(6, 10, kernel, stride=stride, padding=padding, bias=bias).to(dtype)
        found = widened.convolution(x, conv.weight, conv.bias, stride=[stride] * 2, padding=[padding] * 2)
        assert found.dtype == dtype
        assert_close(found, copy.deepcopy(conv).double()(x.double()), rms=rms)


@HALVES
def test_pieces_alone_become_float32(dtype: torch.dtype, rms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[tuple[int, int]]()
    for name, limits in (("linear", {"_WEIGHTS": 60, "_ROWS": 4}), ("conv2d", {"_PIXELS": 20})):
        product = getattr(F, name)

        def told(x: Tensor, weights: Tensor, *others: Any, product: Any = product, **options: Any) -> Tensor:
            assert x.dtype == weights.dtype == torch.float32
            sizes.append((x.numel(), weights.numel()))
            return product(x, weights, *others, **options)

        monkeypatch.setattr(widened.F, name, told)
        for limit, value in limits.items():
            monkeypatch.setattr(widened, limit, value)
    widened.linear(normal(2, 5, 6).to(dtype), normal(25, 6).to(dtype), None)
    assert sizes == [(4 * 6, 9 * 6), (4 * 6, 9 * 6), (4 * 6, 7 * 6)] * 2 + [(2 * 6, 9 * 6), (2 * 6, 9 * 6), (2 * 6, 7 * 6)]
    sizes.clear()
    widened.convolution(normal(3, 2, 6, 8).to(dtype), normal(4, 2, 3, 3).to(dtype), None, stride=(1, 1), padding=(1, 1))
    assert sizes == [(2 * 4 * 10, 4 * 2 * 9)] * 9, "two rows of one picture at a time, with one above and one below"
    sizes.clear()
    widened.convolution(normal(5, 2, 3, 3).to(dtype), normal(4, 2, 3, 3).to(dtype), None, stride=(1, 1), padding=(1, 1))
    assert [size for size, _ in sizes] == [2 * 2 * 5 * 5] * 2 + [2 * 5 * 5], "two small pictures at a time"


def test_few_rows_stay_in_bfloat16_where_a_processor_has_it_the_fewer_the_more_threads_share_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mvshared.precision, "bfloat16_instructions", lambda: SLOW_AVX512)
    for threads, most in ((1, 32), (2, 16), (64, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert widened.product_dtype(torch.bfloat16, rows=most) == torch.bfloat16
        assert widened.product_dtype(torch.bfloat16, rows=most + 1) == torch.float32


@HALVES
@pytest.mark.parametrize("options", [AttentionOptions(), AttentionOptions(implementation="plain")], ids=["fused", "plain"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_rounded_once(causal: bool, options: AttentionOptions, dtype: torch.dtype, rms: float) -> None:
    q, k, v = (normal(2, 3, 40, 8, seed=seed).to(dtype) * 3 for seed in range(3))
    bias = None if causal else normal(40, seed=3).to(dtype)
    scores = q.double() @ k.double().transpose(-1, -2) / 8**0.5
    if bias is not None:
        scores += bias.double()
    if causal:
        scores.masked_fill_(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf)
    found = attention(q, k, v, options=options, causal=causal, key_bias=bias)
    assert found.dtype == dtype
    assert_close(found, scores.softmax(-1) @ v.double(), rms=rms)


@pytest.mark.parametrize(
    ("instructions", "bfloat16", "in_few_rows"),
    [
        ("AMX", torch.bfloat16, torch.bfloat16),
        ("AVX-512", torch.bfloat16, torch.bfloat16),
        ("Arm's BF16", torch.bfloat16, torch.bfloat16),
        (SLOW_AVX512, torch.float32, torch.bfloat16),
        (None, torch.float32, torch.float32),
    ],
)
def test_it_is_for_what_a_processor_multiplies_slower_than_float32(
    instructions: str | None, bfloat16: torch.dtype, in_few_rows: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvshared.precision, "bfloat16_instructions", lambda: instructions)
    for rows, expected in ((32, in_few_rows), (33, bfloat16)):
        assert widened.product_dtype(torch.bfloat16, rows=rows) == expected
        assert widened.product_dtype(torch.float16, rows=rows) == torch.float32
        assert widened.product_dtype(torch.float32, rows=rows) == torch.float32
    assert widened.is_for(torch.bfloat16) == (bfloat16 == torch.float32)
    x: Any = torch.zeros(2, dtype=torch.float16)
    assert widened.is_for_array(x) and not widened.is_for_array(x.to("meta"))
    with torch.inference_mode(False), torch.enable_grad():
        assert not widened.is_for_array(x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert widened.is_for(torch.bfloat16) and not widened.is_for(torch.float32)


def test_few_rows_stay_in_bfloat16_where_a_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvshared.precision, "bfloat16_instructions", lambda: SLOW_AVX512)
    dtypes: list[torch.dtype] = []
    product = F.linear

    def told(x: Tensor, *others: Any) -> Tensor:
        dtypes.append(x.dtype)
        return product(x, *others)

    monkeypatch.setattr(widened.F, "linear", told)
    matrix = normal(8, 6).bfloat16()
    for rows in (4, 40):
        x = normal(rows, 6).bfloat16()
        assert_close(widened.linear(x, matrix, None), x.double() @ matrix.double().T, rms=8e-3)
    assert dtypes == [torch.bfloat16, torch.float32]


class Products(TorchDispatchMode):
    """Tells in which dtypes matrices and kernels are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if any(word in name for word in ("linear", "mm", "matmul", "conv", "attention")):
            self.dtypes |= {(name, each.dtype) for each in args if isinstance(each, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", [None, "q8"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_model_in_half_precision_multiplies_in_float32_alone(preset: str | None, low_memory: bool) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float16", "quantize": preset, "low_memory": low_memory}
    pipeline = load(FIXTURES / "tiny-imagedream", backend="torch", **options)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with Products() as products:
        pipeline.generate(picture, prompt="a head", negative_prompt="", steps=1, size_px=64)
    names = ("conv2d", "linear", "scaled_dot_product_attention")
    assert products.dtypes == {(name, torch.float32) for name in names}
