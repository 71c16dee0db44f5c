"""Compiled calls of MLX's networks: the same results, the weights of now, and only where nobody looks at the blocks."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import TINY_MODEL, write_tiny_model

from mvmlx.compiled import CompiledCalls
from mvmlx.layers import ResnetBlock
from mvmlx.metal import worth_compiling
from mvmlx.observation import observe
from mvshared.backend import load


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0
        self.attention_options: Any = "fused"
        self.power = 0

    def __call__(self, x: mx.array, factor: float = 1.0) -> mx.array:
        self.calls += 1
        if callable(self.attention_options):
            self.attention_options(x)
        return self.linear(x) * factor * 2.0**self.power


@pytest.fixture
def network() -> Network:
    network = Network()
    network.eval()
    mx.eval(network.parameters())
    return network


X = mx.array([[1.0, -2.0, 3.0]])


def test_a_call_is_traced_for_new_shapes_and_new_numbers_only(network: Network) -> None:
    compiled = CompiledCalls(worthwhile=True)
    for x, factor, traces in ((X, 1.0, 1), (X + 1, 1.0, 1), (X, 2.0, 2), (mx.concatenate([X, X]), 1.0, 3), (X, 1.0, 3)):
        out = np.array(compiled(network)(x, factor))
        assert network.calls == traces
        np.testing.assert_array_equal(out, np.array(network.linear(x) * factor))


def test_weights_that_change_are_those_that_count(network: Network) -> None:
    compiled = CompiledCalls(worthwhile=True)
    compiled(network)(X)
    network.linear.weight = network.linear.weight + 1
    np.testing.assert_array_equal(np.array(compiled(network)(X)), np.array(network.linear(X)))
    assert network.calls == 1


def test_other_options_are_traced_anew(network: Network) -> None:
    compiled = CompiledCalls(worthwhile=True)
    for options in ("fused", "sliced", "fused"):
        network.attention_options = options
        compiled(network)(X)
    assert network.calls == 2


def test_what_is_observed_or_trained_or_not_worth_it_runs_as_it_is(network: Network) -> None:
    compiled = CompiledCalls(worthwhile=True)
    seen: list[str] = []
    for _ in range(2):
        compiled(network)(X)
    with observe(network, lambda name, *_: seen.append(name)):
        for _ in range(2):
            compiled(network)(X)
    assert (network.calls, seen) == (3, ["linear"] * 2)
    with observe({"part": network.linear}, lambda name, *_: seen.append(name)), observe(network, lambda *_: None):
        compiled(network)(X)
    assert (network.calls, seen.pop()) == (4, "part")
    compiled(network)(X)
    assert network.calls == 4
    network.train()
    for _ in range(2):
        compiled(network)(X)
    assert network.calls == 6
    network.eval()
    plain = CompiledCalls(worthwhile=False)
    for _ in range(2):
        plain(network)(X)
    assert network.calls == 8


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_trace_that_is_cut_short_leaves_the_weights(network: Network, error: type[BaseException]) -> None:
    def cut_short(x: mx.array) -> mx.array:
        raise error

    compiled, expected = CompiledCalls(worthwhile=True), np.array(network(X))
    network.attention_options = cut_short  # what a call may stumble over
    with pytest.raises(error):
        compiled(network)(X)
    network.attention_options = None
    np.testing.assert_array_equal(np.array(network(X)), expected)
    np.testing.assert_array_equal(np.array(compiled(network)(X)), expected)


def test_no_thread_takes_a_function_for_one_that_was_forgotten(network: Network) -> None:
    compiled, found = CompiledCalls(worthwhile=True), []
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for number in range(20):
            network.power = number
            for thread in (first, second):
                found.append(thread.submit(lambda: compiled(network)(X).tolist()).result())
            compiled.forget()
    assert found == [(network.linear(X) * 2.0**number).tolist() for number in range(20) for _ in range(2)]


def test_a_network_that_is_forgotten_leaves_memory() -> None:
    network = Network()
    network.eval()
    compiled, gone = CompiledCalls(worthwhile=True), weakref.ref(network.linear)
    mx.eval(compiled(network)(X))
    compiled.forget()
    del network
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("Apple M1", None, False),
        ("Apple M2 Ultra", None, False),
        ("Apple M3", None, True),
        ("Apple M4 Pro", None, True),
        ("Apple M10", None, True),
        ("Apple M4", "0", False),
        ("Apple M1", "1", True),
    ],
)
def test_which_macs_compile(monkeypatch: pytest.MonkeyPatch, name: str, chosen: str | None, expected: bool) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": name})
    if chosen is None:
        monkeypatch.delenv("MVMLX_COMPILE", raising=False)
    else:
        monkeypatch.setenv("MVMLX_COMPILE", chosen)
    assert worth_compiling() is expected


def test_without_metal_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MVMLX_COMPILE", raising=False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert not worth_compiling()


def test_the_cpu_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVMLX_COMPILE", "1")  # as on a Mac with an M3
    model: Any = load(write_tiny_model(tmp_path), backend="mlx", device="cpu").model
    assert not model._compiled.worthwhile


def test_the_networks_of_a_run_are_called_compiled(tmp_path: Path) -> None:
    pipeline = load(write_tiny_model(tmp_path, TINY_MODEL), backend="mlx", device="cpu")
    model: Any = pipeline.model
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = pipeline.generate(picture, steps=2)
    model._compiled = CompiledCalls(worthwhile=True)
    with pytest.MonkeyPatch.context() as patch:  # a compiler for the CPU takes a minute
        patch.setattr(mx, "compile", lambda function, inputs: function)
        found = pipeline.generate(picture, steps=2)
    assert [key[2] for key in model._compiled._functions] == ["__call__", "decode"]
    np.testing.assert_array_equal(found.images, expected.images)
    model.release("unet")
    assert not model._compiled._functions


@pytest.mark.slow
def test_a_compiled_block_gives_the_same_numbers() -> None:
    block = ResnetBlock(8, 12, groups=4, eps=1e-5, time_embed_dim=6)
    block.eval()
    x, emb = mx.random.normal((2, 4, 4, 8), key=mx.random.key(0)), mx.random.normal((2, 6), key=mx.random.key(1))
    object.__setattr__(block, "attention_options", None)
    found = CompiledCalls(worthwhile=True)(block)(x, emb)
    np.testing.assert_allclose(np.array(found), np.array(block(x, emb)), rtol=1e-6, atol=1e-6)
