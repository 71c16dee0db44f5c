"""The VAE in tiles: the same pictures and latents as of the whole, whatever the size, without seams."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import BACKENDS, TINY_VAE, Backend, assert_close, from_numpy, make_vae, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mvmlx.layers
import mvmlx.tiling
import mvtorch.layers
import mvtorch.tiling
from mvshared.backend import load
from mvshared.errors import OptionError
from mvshared.images import from_model, to_model
from mvshared.tiling import tiles

PORTRAIT = Path(__file__).resolve().parent.parent / "examples" / "portrait.png"


@pytest.fixture(scope="module")
def vaes() -> dict[Backend, Any]:
    return {backend: make_vae(TINY_VAE, backend) for backend in BACKENDS}


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.sampled_from([(0, 1, 1), (1, 1, 1), (1, 2, 1), (2, 1, 2)])
)
def test_tiles_cover_the_output_once_and_see_all_that_they_need(
    height: int, width: int, side: int, layer: tuple[int, int, int]
) -> None:
    halo, up, down = layer
    height, width = height * up, width * up
    covered = np.zeros((height, width), int)
    for tile in tiles(height, width, side * up, halo=halo, up=up, down=down):
        covered[tile.target] += 1
        for source, crop, target, size in zip(*tile, (height, width), strict=True):
            assert source.start >= 0
            assert source.stop * up <= size * down
            assert crop.stop - crop.start == target.stop - target.start
            assert source.start * up + crop.start * down == target.start * down
            needed = max(0, target.start * down - halo * up), min(size * down, target.stop * down + halo * up)
            assert source.start * up <= needed[0]
            assert source.stop * up >= needed[1]
    assert (covered == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [8, 16, 24, 512])
@pytest.mark.parametrize("size", [(10, 7), (16, 16)])
def test_a_picture_in_tiles_is_the_whole_picture(vaes: dict[Backend, Any], backend: Backend, side: int, size: Any) -> None:
    vae, random = vaes[backend], np.random.default_rng(0)
    latents = from_numpy(vae, 3 * random.standard_normal((2, *size, 4), np.float32))
    whole = to_numpy(vae.decode(latents))
    assert_close(to_numpy(vae.decode(latents, tile=side)), whole, rms=1e-5)
    pixels = from_numpy(vae, random.uniform(-1, 1, whole.shape).astype(np.float32))
    for tiled, expected in zip(vae.encode(pixels, tile=side), vae.encode(pixels), strict=True):
        assert_close(to_numpy(tiled), to_numpy(expected), rms=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tiles_are_at_most_one_level_off(backend: Backend, dtype: str) -> None:
    """Of the demo model's VAE, on latents that are shifted far from zero too, which shifts the groups' means."""
    model: Any = load("demo", backend=backend, device="cpu", dtype=dtype).model
    picture = to_model(np.asarray(Image.open(PORTRAIT).convert("RGB").resize((192, 160)))[None])
    latents = model.vae.encode(from_numpy(model.vae, picture)).mean
    for shift in (0.0, 30.0):
        whole, tiled = (from_model(to_numpy(model.vae.decode(latents + shift, tile=tile))) for tile in (None, 64))
        difference = np.abs(whole.astype(int) - tiled)
        assert whole.std() > 1
        assert difference.max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (60.0, 1e-3), (0.0, 1.0)])
def test_a_group_norm_in_tiles_keeps_the_digits_of_a_large_mean(backend: Backend, mean: float, deviation: float) -> None:
    x = (mean + deviation * np.random.default_rng(0).standard_normal((1, 16, 24, 8))).astype(np.float32)
    exact = x.astype(np.float64).reshape(1, 16 * 24, 2, 4)
    exact = (exact - exact.mean((1, 3), keepdims=True)) / np.sqrt(exact.var((1, 3), keepdims=True) + 1e-6)
    exact = exact.reshape(x.shape)
    if backend == "torch":
        norm: Any = mvtorch.layers.GroupNorm(2, 8, eps=1e-6)
        given = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        out = mvtorch.tiling.norm_of(norm, given, side=8).silu(given).detach().permute(0, 2, 3, 1).numpy()
    else:
        norm = mvmlx.layers.GroupNorm(2, 8, eps=1e-6)
        out = np.array(mvmlx.tiling.norm_of(norm, mx.array(x), side=8).silu(mx.array(x)))
    np.testing.assert_allclose(out, exact / (1 + np.exp(-exact)), atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [-8, 4, 12])
def test_the_side_of_a_tile_is_a_multiple_of_8(vaes: dict[Backend, Any], backend: Backend, side: int) -> None:
    with pytest.raises(OptionError, match="tile must be a positive multiple of 8"):
        vaes[backend].decode(from_numpy(vaes[backend], np.zeros((1, 8, 8, 4), np.float32)), tile=side)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_blocks_return_is_left_alone(vaes: dict[Backend, Any], backend: Backend) -> None:
    vae, kept = vaes[backend], list[tuple[str, Any, np.ndarray]]()

    def keep(name: str, array: Any, seconds: float) -> None:
        kept.append((name, array, to_numpy(array).copy()))

    with {"torch": mvtorch, "mlx": mvmlx}[backend].observe(vae, keep):
        latents = vae.encode(
            from_numpy(vae, np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)), tile=16
        )
        vae.decode(latents.mean, tile=16)
    assert len(kept) > 50
    for name, array, then in kept:
        np.testing.assert_array_equal(to_numpy(array), then, err_msg=name)
