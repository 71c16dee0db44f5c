"""The Metal kernel for group norms: its source run as C++, its arithmetic in numpy, and on a Mac the kernel itself."""

import shutil
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from helpers import FLOAT32_RMS, assert_close
from metal_on_cpu import check_as_cpp, group_norm_on_cpu
from numpy.typing import NDArray

import mvmlx.group_norm
import mvtorch.layers
from mvmlx.group_norm import MANY, MANY_THREADS, THREADS, fused_group_norm
from mvmlx.layers import GroupNorm
from mvmlx.norms import group_norm, norm_silu
from mvshared.errors import MvWarning

# (n, h, w, c) and groups, of the U-Nets' and the VAEs' finest and coarsest levels, the concatenated ones, and the demo model's.
FAMILIES = [
    ((2, 32, 32, 320), 32),
    ((2, 8, 8, 960), 32),
    ((2, 4, 4, 2560), 32),
    ((1, 64, 64, 128), 32),
    ((1, 16, 16, 512), 32),
    ((3, 7, 5, 48), 8),
    ((1, 1, 1, 32), 32),
]


def exact(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any], *, groups: int, eps: float, silu: bool) -> NDArray[Any]:
    """In float64."""
    grouped = x.astype(np.float64).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    y = (centred / np.sqrt(np.square(centred).mean(axis=(1, 3), keepdims=True) + eps)).reshape(x.shape) * weight + bias
    return y / (1 + np.exp(-y)) if silu else y


def emulated(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any], *, groups: int, eps: float, silu: bool) -> NDArray[Any]:
    """Every float32 operation of the kernel, in its order; the result is float32."""
    n, width = x.shape[0], x.shape[-1] // groups
    grouped = x.astype(np.float32).reshape(n, -1, groups, width).transpose(0, 2, 1, 3).reshape(n, groups, -1)
    count = grouped.shape[-1]
    lanes = THREADS if count <= MANY else MANY_THREADS

    def reduced(values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Every thread sums its numbers in turn, 64 at a time, then those sums; a simdgroup its threads as a butterfly, then
        those in turn."""
        padded = np.pad(values, [(0, 0), (0, 0), (0, -count % (64 * lanes))]).reshape(n, groups, -1, 64, lanes)
        parts = np.add.accumulate(padded, axis=3, dtype=np.float32)[:, :, :, -1]
        sums = np.add.accumulate(parts, axis=2, dtype=np.float32)[:, :, -1].reshape(n, groups, lanes // 32, 32)
        for step in (16, 8, 4, 2, 1):
            sums = sums + sums[..., np.arange(32) ^ step]
        return np.add.accumulate(sums[..., 0], axis=2, dtype=np.float32)[:, :, -1:]

    shifted = grouped - grouped[..., :1]
    mean = reduced(shifted) / np.float32(count)
    variance = reduced(np.square(shifted - mean)) / np.float32(count)
    scale = np.float32(1) / np.sqrt(variance + np.float32(eps))
    w, b = (np.tile(p.astype(np.float32).reshape(groups, width), (1, count // width)) for p in (weight, bias))
    y = (shifted - mean) * (scale * w) + b
    y = y / (1 + np.exp(-y)) if silu else y
    return y.reshape(n, groups, -1, width).transpose(0, 2, 1, 3).reshape(x.shape)


def inputs(shape: tuple[int, ...], *, mean: float = 0.0) -> tuple[NDArray[np.float32], ...]:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) + mean).astype(np.float32)
    return x, rng.standard_normal(shape[-1], np.float32), rng.standard_normal(shape[-1], np.float32)


def plain(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any], **options: Any) -> NDArray[np.float32]:
    return np.array(group_norm(*map(mx.array, (x, weight, bias)), **options).astype(mx.float32))


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(("shape", "groups"), FAMILIES)
def test_the_kernels_arithmetic_loses_no_digits(shape: tuple[int, ...], groups: int, mean: float) -> None:
    arrays, options = inputs(shape, mean=mean), {"groups": groups, "eps": 1e-5, "silu": True}
    np.testing.assert_allclose(emulated(*arrays, **options), exact(*arrays, **options), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(("shape", "groups"), FAMILIES)
@pytest.mark.parametrize("silu", [False, True])
def test_the_plain_path_loses_none_either(shape: tuple[int, ...], groups: int, mean: float, silu: bool) -> None:
    arrays, options = inputs(shape, mean=mean), {"groups": groups, "eps": 1e-6, "silu": silu}
    np.testing.assert_allclose(plain(*arrays, **options), exact(*arrays, **options), rtol=2e-5, atol=3e-5)


def flat(side: int, channels: int) -> NDArray[np.float32]:
    """A picture of two colours: what is added up is the same number again and again, and so is what is rounded."""
    x = np.broadcast_to(np.random.default_rng(0).random(channels, np.float32), (1, side, side, channels)).copy()
    x[:, : side // 3, : side // 3] *= 3
    return x


@pytest.mark.parametrize("computed", ["emulated", "plain", "torch"])
@pytest.mark.parametrize(("side", "channels"), [(512, 24), (256, 128), (515, 8)])
def test_large_flat_pictures_cost_no_digits(computed: str, side: int, channels: int) -> None:
    x, weight, bias = flat(side, channels), np.ones(channels, np.float32), np.zeros(channels, np.float32)
    options = {"groups": 8, "eps": 1e-6, "silu": False}
    expected = exact(x, weight, bias, **options)
    if computed == "torch":
        norm = mvtorch.layers.GroupNorm(8, channels, eps=1e-6)
        with torch.inference_mode():
            ours = norm(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    else:
        ours = {"emulated": emulated, "plain": plain}[computed](x, weight, bias, **options)
    assert_close(ours, expected, rms=FLOAT32_RMS)


def test_a_constant_group_becomes_its_bias_on_both_paths() -> None:
    x, weight, bias = np.full((2, 8, 8, 64), 1234.567, np.float32), *inputs((64,))[1:]
    options = {"groups": 32, "eps": 1e-6, "silu": False}
    for computed in (emulated, plain):
        np.testing.assert_array_equal(computed(x, weight, bias, **options), np.broadcast_to(bias, x.shape))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("shape", "groups", "silu", "threads"), [((2, 5, 7, 6), 3, True, 256), ((1, 130, 129, 4), 1, False, 512)]
)
def test_the_kernels_source_does_what_is_emulated(
    shape: tuple[int, ...], groups: int, silu: bool, threads: int, tmp_path: Path
) -> None:
    x, weight, bias = inputs(shape, mean=100.0)
    n, width = shape[0], shape[-1] // groups
    out = group_norm_on_cpu(
        x.reshape(n, -1, shape[-1]), weight, bias, width=width, eps=1e-5, silu=silu, threads=threads, folder=tmp_path
    )
    expected = emulated(x, weight, bias, groups=groups, eps=1e-5, silu=silu)
    np.testing.assert_allclose(out.reshape(shape), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("channels", [6, 96])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_what_mlx_makes_of_the_source_compiles(
    dtype: mx.Dtype,
    silu: bool,
    channels: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """MLX writes the signature for every call, also where it has no Metal if the call is exported."""
    build = mvmlx.group_norm._kernel.__wrapped__
    monkeypatch.setattr(mvmlx.group_norm, "_kernel", lambda: partial(build(), verbose=True))
    norm = partial(fused_group_norm, groups=3, eps=1e-5, silu=silu)
    arrays = (mx.zeros(shape, dtype) for shape in ((1, 2, 2, channels), channels, channels))
    mx.export_function(str(tmp_path / "norm.mlxfn"), norm, *arrays)
    _, source, _ = capfd.readouterr().out.split("```")
    check_as_cpp(source, folder=tmp_path)


@pytest.mark.gpu("metal")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("shape", "groups"), FAMILIES)
@pytest.mark.parametrize("silu", [False, True])
def test_the_kernel_gives_what_the_plain_path_gives(shape: tuple[int, ...], groups: int, silu: bool, dtype: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MvWarning)
        x, weight, bias = (mx.array(array).astype(getattr(mx, dtype)) for array in inputs(shape, mean=3.0))
        assert mvmlx.group_norm.usable(x)
    options = {"groups": groups, "eps": 1e-5, "silu": silu}
    expected = group_norm(*(array.astype(mx.float32) for array in (x, weight, bias)), **options)
    found = fused_group_norm(x, weight, bias, **options)
    assert found.dtype == x.dtype
    tolerance = {"float32": 3e-5, "float16": 1e-2}[dtype]
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(expected), rtol=tolerance, atol=tolerance)


def test_a_network_in_training_never_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, ...]] = []

    def fused(x: mx.array, *_: Any, **__: Any) -> mx.array:
        called.append(x.shape)
        return x

    monkeypatch.setattr("mvmlx.norms.usable", lambda x: True)
    monkeypatch.setattr("mvmlx.norms.fused_group_norm", fused)
    norm, x = GroupNorm(4, 16, eps=1e-5), mx.ones((1, 2, 2, 16))
    norm.train()
    norm(x)
    norm_silu(norm, x)
    assert called == []
    norm.eval()
    norm(x)
    norm_silu(norm, x)
    assert called == [(1, 2, 2, 16)] * 2


def test_a_kernel_that_cannot_be_built_is_told_once_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Unable to build metal library from source\nerror: and so on")

    monkeypatch.setattr(mvmlx.group_norm, "on_metal", lambda: True)
    monkeypatch.setattr(mvmlx.group_norm, "fused_group_norm", broken)
    mvmlx.group_norm._works.cache_clear()
    try:
        with pytest.warns(MvWarning, match="without a Metal kernel: Unable to build metal library from source$") as told:
            assert not mvmlx.group_norm.usable(mx.ones((1, 2)))
            assert not mvmlx.group_norm.usable(mx.ones((1, 2)))
        assert len(told) == 1
    finally:
        mvmlx.group_norm._works.cache_clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, float]]:
    """The plain path in the place of the kernel, with a factor of its result by dtype."""
    factors: dict[Any, float] = {mx.float32: 1.0, mx.float16: 1.0}

    def fused(x: mx.array, weight: mx.array, bias: mx.array, **options: Any) -> mx.array:
        return factors[x.dtype] * group_norm(x, weight, bias, **options)

    monkeypatch.setattr(mvmlx.group_norm, "on_metal", lambda: True)
    monkeypatch.setattr(mvmlx.group_norm, "fused_group_norm", fused)
    monkeypatch.delenv("MVMLX_METAL_KERNELS", raising=False)
    mvmlx.group_norm._works.cache_clear()
    yield factors
    mvmlx.group_norm._works.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_kernel_that_gives_something_else_is_told_and_done_without(dtype: str, kernels: dict[Any, float]) -> None:
    kernels[getattr(mx, dtype)] = 1.05
    with pytest.warns(MvWarning, match=f"without a Metal kernel: its result in mlx.core.{dtype} is wrong"):
        assert not mvmlx.group_norm.usable(mx.ones((1, 2)))


def test_the_kernel_is_for_the_dtypes_that_it_was_tried_in(kernels: dict[Any, float]) -> None:
    expected = {mx.float32: True, mx.float16: True, mx.bfloat16: False}
    assert {dtype: mvmlx.group_norm.usable(mx.ones((1, 2), dtype)) for dtype in expected} == expected
    assert not mvmlx.group_norm.usable(mx.zeros((0, 2)))


def test_the_kernel_is_tried_as_networks_call_it(kernels: dict[Any, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """With few threads and many, and with weights of 8 channels and more, which MLX passes otherwise than fewer."""
    tried: list[tuple[bool, Any, bool]] = []
    fused = mvmlx.group_norm.fused_group_norm

    def watched(x: mx.array, weight: mx.array, bias: mx.array, *, groups: int, **options: Any) -> mx.array:
        assert weight.dtype == bias.dtype == x.dtype
        tried.append((x.size // len(x) // groups > MANY, x.dtype, weight.size >= 8))
        return fused(x, weight, bias, groups=groups, **options)

    monkeypatch.setattr(mvmlx.group_norm, "fused_group_norm", watched)
    assert mvmlx.group_norm.usable(mx.ones((1, 2)))
    assert tried == [(many, dtype, True) for many in (False, True) for dtype in (mx.float32, mx.float16)]


def test_the_environment_turns_the_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvmlx.group_norm, "on_metal", lambda: True)
    monkeypatch.setattr(
        mvmlx.group_norm, "fused_group_norm", lambda x, *_, groups, **__: group_norm(x, *_, groups=groups, eps=0.0)
    )
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("MVMLX_METAL_KERNELS", value)
        mvmlx.group_norm._works.cache_clear()
        assert mvmlx.group_norm.usable(mx.ones((1, 2))) is expected
    mvmlx.group_norm._works.cache_clear()


def test_silu_in_one_step_is_silu_of_the_norm() -> None:
    norm, x = GroupNorm(4, 16, eps=1e-5), mx.array(inputs((2, 3, 4, 16))[0])
    np.testing.assert_array_equal(np.array(norm_silu(norm, x)), np.array(nn.silu(norm(x))))


def test_gradients_are_right_for_shapes_that_follow_others() -> None:
    """The compiled parts are traced for the first shape and used for all."""
    rng = np.random.default_rng(3)
    for n, size, groups, width in ((2, 3, 4, 2), (1, 5, 2, 3), (2, 2, 1, 1)):
        x, w, b = (rng.standard_normal(shape, np.float32) for shape in ((n, size, size, groups * width), *[groups * width] * 2))
        direction = rng.standard_normal(x.shape, np.float32)

        normalise = partial(group_norm, groups=groups, eps=1e-5, silu=True)

        def loss(*arrays: mx.array, normalise: Any = normalise, direction: Any = direction) -> mx.array:
            return (normalise(*arrays) * mx.array(direction)).sum()

        found = mx.grad(loss, argnums=(0, 1, 2))(*map(mx.array, (x, w, b)))
        for index, gradient in enumerate(found):
            step = [np.zeros(p.shape) for p in (x, w, b)]
            step[index] = 1e-4 * rng.standard_normal(step[index].shape)
            both = [
                (exact(x + s * step[0], w + s * step[1], b + s * step[2], groups=groups, eps=1e-5, silu=True) * direction).sum()
                for s in (-1, 1)
            ]
            expected = (both[1] - both[0]) / 2
            np.testing.assert_allclose((np.array(gradient, np.float64) * step[index]).sum(), expected, rtol=1e-3, atol=1e-8)
