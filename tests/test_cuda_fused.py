"""Fused kernels without a GPU: Triton's interpreter runs them, or plain arithmetic in their place, for arrays on the CPU."""

import importlib
import logging
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor

from mvshared.attention import FUSED
from mvtorch import cpu_norms, cuda_fused
from mvtorch.attention import TransformerBlock
from mvtorch.layers import FeedForward, GroupNorm, ResnetBlock
from mvtorch.observation import observe

RMS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def pictures(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


class PlainKernels:
    """What the kernels compute, in PyTorch's arithmetic; counts its calls, and may fail or be wrong."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.factor = 1.0

    def group_norm(self, x: Tensor, out: Tensor, groups: int, weight: Tensor, bias: Tensor, **options: Any) -> None:
        self._called("group norm")
        for each in (options["before"], options["shift"]):
            x = x if each is None else x + each.view(-1, x.shape[1], 1, 1)
        y = self.factor * F.group_norm(x, groups, weight, bias, options["eps"])
        out.copy_(F.silu(y) if options["silu"] else y)

    def is_one_tile(self, x: Tensor, groups: int) -> bool:
        return x.shape[2] * x.shape[3] * x.shape[1] // groups <= 1 << 12

    def takes_all_loops(self, x: Tensor, groups: int) -> bool:
        return not self.is_one_tile(x, groups)

    def add(self, x: Tensor, rest: Tensor, out: Tensor, first: Tensor, second: Tensor | None) -> None:
        self._called("sum")
        total = x + rest + first[:, None, None]
        out.copy_(total if second is None else total + second[:, None, None])

    def layer_norm(
        self, x: Tensor, rest: Tensor | None, total: Tensor, out: Tensor, weight: Tensor, bias: Tensor, *, eps: float
    ) -> None:
        self._called("layer norm")
        if rest is not None:
            x = total.copy_(x + rest)
        out.copy_(F.layer_norm(x, x.shape[-1:], weight, bias, eps))

    def gate(self, x: Tensor, out: Tensor) -> None:
        self._called("GEGLU")
        value, gate = x.chunk(2, dim=-1)
        out.copy_(value * F.gelu(gate))

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.error is not None:
            raise self.error


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> PlainKernels:
    """Plain arithmetic in the place of kernels, for arrays on the CPU."""
    made = PlainKernels()
    use(monkeypatch, made)
    return made


def use(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    monkeypatch.setattr(cpu_norms, "is_for", lambda x: False)  # the CPU stands for a GPU
    monkeypatch.setattr(cuda_fused, "_kernels", lambda: kernels)
    monkeypatch.setattr(cuda_fused, "_on_device", lambda x: True)
    monkeypatch.setattr(cuda_fused, "_capturing", lambda: False)
    monkeypatch.setattr(cuda_fused, "_failed", set())
    monkeypatch.setattr(cuda_fused, "_checked", set())


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """The kernels, run by Triton's interpreter where there is no GPU, see conftest.py."""
    if torch.cuda.is_available():
        pytest.skip("tests/test_cuda.py has them compiled")
    pytest.importorskip("triton")
    return importlib.import_module("mvtorch.cuda_kernels")


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 16, 5, 7), 8),
        ((2, 16, 1, 1), 8),
        ((1, 320, 3, 5), 32),
        ((1, 60, 30, 33), 2),
        ((1, 8, 97, 90), 2),
        ((2, 96, 40, 37), 2),
    ],
)
def test_norms_are_those_of_the_plain_layer(
    interpreted: Any, shape: tuple[int, ...], groups: int, mean: float, dtype: torch.dtype
) -> None:
    x = (mean + pictures(*shape)).to(dtype)
    n, c = shape[:2]
    weight, bias, before, shift = (pictures(*size, seed=3 + i).to(dtype) for i, size in enumerate([(c,), (c,), (c,), (n, c)]))
    shift = F.pad(shift, (2, 3))[:, 2:-3]  # as a part of what joined layers give
    for silu, added in ((True, (before, shift)), (False, (None, None)), (True, (before, None))):
        exact = x.double()
        for each in added:
            exact = exact if each is None else exact + each.double().view(-1, c, 1, 1)
        exact = F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
        out = x.clone(memory_format=torch.channels_last)
        interpreted.group_norm(out, out, groups, weight, bias, eps=1e-5, silu=silu, before=added[0], shift=added[1])
        rms = 1e-4 if mean and dtype == torch.float32 else RMS[dtype]
        assert_close(out.double(), F.silu(exact) if silu else exact, rms=rms)


@pytest.mark.parametrize("dtype", RMS)
def test_sums_and_gates_are_those_of_the_plain_layers(interpreted: Any, dtype: torch.dtype) -> None:
    for shape in ((2, 16, 5, 7), (1, 72, 12, 13)):
        x, rest = (pictures(*shape, seed=seed).to(dtype) for seed in (0, 1))
        first, second = (pictures(shape[1], seed=seed).to(dtype) for seed in (2, 3))
        out = torch.empty_like(x)
        for other in (None, second):
            interpreted.add(x, rest, out, first, other)
            exact = x.double() + rest + first[:, None, None] + (0 if other is None else other[:, None, None])
            assert_close(out.double(), exact, rms=RMS[dtype])
    for rows, width in ((1, 64), (45, 200), (3, 1280), (2, 5000)):
        tokens, rest = (3 + pictures(rows, width, seed=seed).to(dtype) for seed in (4, 5))
        weight, bias = (pictures(width, seed=seed).to(dtype) for seed in (6, 7))
        for other in (None, rest):
            total, out = torch.full_like(tokens, 7), torch.empty_like(tokens)
            interpreted.layer_norm(tokens, other, total, out, weight, bias, eps=1e-5)
            exact = tokens.double() + (0 if other is None else other.double())
            assert_close(total.double(), torch.full_like(exact, 7) if other is None else exact, rms=RMS[dtype])
            exact = F.layer_norm(exact, (width,), weight.double(), bias.double(), 1e-5)
            assert_close(out.double(), exact, rms=RMS[dtype])
    for rows, hidden in ((1, 64), (45, 200)):
        projected = 3 * pictures(rows, 2 * hidden).to(dtype)
        out = projected.new_empty((rows, hidden))
        interpreted.gate(projected, out)
        value, gate = projected.double().chunk(2, dim=-1)
        assert_close(out.double(), value * F.gelu(gate), rms=RMS[dtype])


def test_blocks_computed_by_the_kernels_are_the_plain_ones(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, interpreted)
    blocks_are_the_plain_ones(monkeypatch)
    assert not cuda_fused._failed


def test_blocks_are_the_plain_ones_with_arithmetic_in_the_place_of_kernels(
    kernels: PlainKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_are_the_plain_ones(monkeypatch)
    assert {"group norm", "layer norm", "sum", "GEGLU"} == set(kernels.calls)


def blocks_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x, emb, tokens = pictures(2, 16, 9, 8), pictures(2, 12), pictures(2, 7, 16)
    for outputs in (16, 24):
        for width in (None, 12):
            block = ResnetBlock(16, outputs, groups=8, eps=1e-5, time_embed_dim=width)
            given = None if width is None else emb
            before = x.clone()
            with torch.no_grad():
                ours = block(x, given)
            assert_close(ours, block(x, given).detach(), rms=1e-6)  # with gradients it is plain
            assert torch.equal(x, before)
    for context_dim in (None, 12):
        block = TransformerBlock(16, 2, context_dim=context_dim, image_tokens=False)
        attended = None
        if context_dim is not None:
            with torch.no_grad():
                attended = block.attn2.cross_keys_values(pictures(2, 5, 12), None, image_scale=1.0)
        before = tokens.clone()
        with torch.no_grad():
            ours = block(tokens, attended, options=FUSED)
        assert_close(ours, block(tokens, attended, options=FUSED).detach(), rms=1e-6)
        assert torch.equal(tokens, before)
    for layer, given in ((GroupNorm(4, 16, eps=1e-5), x), (FeedForward(16), tokens)):
        with torch.no_grad():
            ours = layer(given)
        assert_close(ours, layer(given).detach(), rms=1e-6)


def test_the_first_call_of_a_kernel_is_checked_once(kernels: PlainKernels) -> None:
    norm, x = GroupNorm(8, 16, eps=1e-5), pictures(2, 16, 9, 8)
    with torch.no_grad():
        for _ in range(2):
            norm(x)
        assert len(kernels.calls) == 3
        norm(pictures(1, 16, 70, 70))
        assert len(kernels.calls) == 5


def test_every_form_of_a_norm_is_checked(kernels: PlainKernels) -> None:
    x, numbers, shifts = pictures(2, 16, 9, 8), torch.ones(16), torch.ones(2, 16)
    for silu, before, shift in product((False, True), (None, numbers), (None, shifts)):
        for calls in (2, 1):
            kernels.calls.clear()
            with torch.no_grad():
                cuda_fused.group_norm(x, 8, numbers, numbers, eps=1e-5, silu=silu, before=before, shift=shift)
            assert len(kernels.calls) == calls


def test_memory_that_is_not_there_is_no_fault_of_a_kernel(kernels: PlainKernels) -> None:
    norm, x = GroupNorm(8, 16, eps=1e-5), pictures(2, 16, 9, 8)
    kernels.error = torch.OutOfMemoryError("CUDA out of memory")
    with torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError):
            norm(x)
        kernels.error = None
        kernels.calls.clear()
        norm(x)
    assert kernels.calls and not cuda_fused._failed


@pytest.mark.parametrize("number", [0.0, float("nan")])
def test_a_model_s_weights_do_not_decide_whether_a_kernel_is_right(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    use(monkeypatch, interpreted)
    block = ResnetBlock(16, 24, groups=8, eps=1e-5, time_embed_dim=12)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(number)
        block(pictures(2, 16, 9, 8), pictures(2, 12))
    assert cuda_fused._checked and not cuda_fused._failed


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_large_maps_are_computed_and_checked_in_several_passes(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    for name, number in (("ONE_TILE", 256), ("_PIXELS", 32), ("_tiles_together", lambda width: 2)):
        monkeypatch.setattr(interpreted, name, number)  # so that the interpreter has less to do
    use(monkeypatch, interpreted)
    norm, x, given = GroupNorm(groups, 16, eps=1e-5), 30 + pictures(2, 16, 13, 14), list[Any]()
    plain = interpreted.group_norm
    monkeypatch.setattr(interpreted, "group_norm", lambda x, *rest, **options: (given.append(x), plain(x, *rest, **options)))
    with torch.no_grad():
        assert_close(norm(x), norm(x.contiguous()), rms=1e-5)
    checked, launched = given
    assert interpreted.takes_all_loops(checked, groups) and interpreted.takes_all_loops(launched, groups)
    assert not cuda_fused._failed


@pytest.mark.parametrize("fault", ["raises", "wrong", "missing"])
def test_a_kernel_that_fails_leaves_the_plain_layers_and_one_line(
    kernels: PlainKernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    block, x, emb = ResnetBlock(16, 24, groups=8, eps=1e-5, time_embed_dim=12), pictures(2, 16, 9, 8), pictures(2, 12)
    expected = block(x, emb).detach()
    if fault == "missing":
        monkeypatch.setattr(cuda_fused, "_kernels", lambda: importlib.import_module("mvtorch.no_such_kernels"))
    elif fault == "raises":
        kernels.error = RuntimeError("out of resource: registers\nand more")
    else:
        kernels.factor = 1.5
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_close(block(x, emb), expected, rms=1e-6)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "plain layers run" in line and "and more" not in line


@pytest.mark.parametrize("name", ["group norm", "sum"])
def test_a_kernel_that_fails_in_the_middle_of_a_block_changes_nothing(
    kernels: PlainKernels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    block, x, emb = ResnetBlock(16, 24, groups=8, eps=1e-5, time_embed_dim=12), pictures(2, 16, 9, 8), pictures(2, 12)
    expected = block(x, emb).detach()

    def fails(called: str) -> None:
        kernels.calls.append(called)
        if called == name and (name == "sum" or len(kernels.calls) > 2):
            raise RuntimeError("no more")

    monkeypatch.setattr(kernels, "_called", fails)
    with torch.no_grad():
        for _ in range(2):
            assert_close(block(x, emb), expected, rms=1e-6)
    assert cuda_fused._failed == {name}


def test_an_unchecked_kernel_is_not_recorded(kernels: PlainKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = GroupNorm(8, 16, eps=1e-5), pictures(2, 16, 9, 8)
    monkeypatch.setattr(cuda_fused, "_capturing", lambda: True)
    with torch.no_grad():
        norm(x)
    assert not kernels.calls


def test_blocks_that_are_observed_and_other_layouts_and_dtypes_are_plain(kernels: PlainKernels) -> None:
    block, x, emb = ResnetBlock(16, 24, groups=8, eps=1e-5, time_embed_dim=12), pictures(2, 16, 9, 8), pictures(2, 12)
    transformer, tokens = TransformerBlock(16, 2, context_dim=None, image_tokens=False), pictures(2, 7, 16)
    with torch.no_grad():
        with observe(block, lambda *_: None), observe(transformer, lambda *_: None):
            block(x, emb)
            transformer(tokens, None, options=FUSED)
        block(x.contiguous(), emb)
        block.double()(x.double(), emb.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            block.float()(x, emb)
    assert kernels.calls == []
    with torch.no_grad():
        block(x, emb)
    assert kernels.calls


def test_elsewhere_than_on_cuda_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_fused, "_kernels", lambda: SimpleNamespace())
    with torch.no_grad():
        assert not cuda_fused.is_for(pictures(1, 16, 2, 2))
