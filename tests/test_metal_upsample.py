"""Upsampling in float16 on Metal, whose convolutions are Winograd's, with transforms that are rounded to float16."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import assert_close, set_dtype
from numpy.typing import NDArray

from mvmlx.layers import Upsample

# Winograd's F(6x6, 3x3) of inputs (8), weights (3) and products (8), with the points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity.
INPUTS = np.array(
    [
        [1, 0, -5.25, 0, 5.25, 0, -1, 0],
        [0, 1, 1, -4.25, -4.25, 1, 1, 0],
        [0, -1, 1, 4.25, -4.25, -1, 1, 0],
        [0, 0.5, 0.25, -2.5, -1.25, 2, 1, 0],
        [0, -0.5, 0.25, 2.5, -1.25, -2, 1, 0],
        [0, 2, 4, -2.5, -5, 0.5, 1, 0],
        [0, -2, 4, 2.5, -5, -0.5, 1, 0],
        [0, -1, 0, 5.25, 0, -5.25, 0, 1],
    ]
)
POINTS = np.array([0, 1, -1, 2, -2, 0.5, -0.5])
SHARES = np.array([1, -2 / 9, -2 / 9, 1 / 90, 1 / 90, 32 / 45, 32 / 45])
WEIGHTS = np.vstack([SHARES[:, None] * POINTS[:, None] ** np.arange(3), [0, 0, 1]])
PRODUCTS = np.hstack([(POINTS[:, None] ** np.arange(6)).T, np.eye(6)[:, 5:]])


def rounded(x: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float16).astype(np.float64)


def winograd(x: mx.array, weight: mx.array, *_: Any) -> mx.array:
    """A convolution of (n, h, w, c) by (o, 3, 3, c) as Metal computes it in float16."""
    pixels, kernel = (np.array(each).astype(np.float64) for each in (x, weight))
    n, h, w, _c = pixels.shape
    down, across = -(-h // 6), -(-w // 6)
    padded = np.pad(pixels, [(0, 0), (1, 6 * down + 1 - h), (1, 6 * across + 1 - w), (0, 0)])
    rows, columns = (6 * np.arange(count)[:, None] + np.arange(8) for count in (down, across))
    tiles = padded[:, rows[:, None, :, None], columns[None, :, None, :]]
    filters = rounded(np.einsum("ai,oijc,bj->abco", WEIGHTS, kernel, WEIGHTS))
    with np.errstate(invalid="ignore"):
        transformed = rounded(np.einsum("ai,ndeijc,bj->ndeabc", INPUTS, tiles, INPUTS))
        products = rounded(np.einsum("ndeabc,abco->ndeabo", transformed, filters))
        out = np.einsum("ia,ndeabo,jb->ndiejo", PRODUCTS, products, PRODUCTS)
    return mx.array(rounded(out.reshape(n, 6 * down, 6 * across, -1)[:, :h, :w])).astype(mx.float16)


@pytest.fixture
def upsample() -> Upsample:
    return set_dtype(Upsample(16), "float16")


def pixels(size: float) -> mx.array:
    return mx.array(size * np.random.default_rng(0).standard_normal((2, 5, 7, 16))).astype(mx.float16)


@pytest.mark.parametrize("size", [0.1, 30, 5e3])
def test_activations_of_every_size_are_upsampled_on_metal(
    upsample: Upsample, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = pixels(size)
    expected = upsample(x)
    monkeypatch.setattr("mvmlx.layers.on_metal", lambda: True)
    monkeypatch.setattr(mx, "conv2d", winograd)
    assert_close(upsample(x), expected, rms=1.5e-2)


def test_small_activations_are_convolved_as_they_are(upsample: Upsample, monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels(30)
    expected = np.array(upsample(x))
    monkeypatch.setattr("mvmlx.layers.on_metal", lambda: True)
    np.testing.assert_array_equal(np.array(upsample(x)), expected)


@pytest.mark.parametrize("size", [30, 1e3])
def test_the_gradient_is_that_of_the_convolution(upsample: Upsample, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: mx.array) -> mx.array:
        return upsample(x).astype(mx.float32).square().mean()

    expected = mx.grad(loss)(pixels(size))
    monkeypatch.setattr("mvmlx.layers.on_metal", lambda: True)
    assert_close(mx.grad(loss)(pixels(size)), expected, rms=2e-3)


@pytest.mark.gpu("metal")
@pytest.mark.parametrize("size", [1, 5e3])
def test_wide_maps_are_upsampled_as_in_float32(size: float) -> None:
    upsample = Upsample(128)
    x = mx.array(size * np.random.default_rng(0).standard_normal((1, 32, 32, 128))).astype(mx.float16)
    with mx.stream(mx.Device(mx.cpu)):
        expected = upsample(x.astype(mx.float32))
    assert_close(set_dtype(upsample, "float16")(x), expected, rms=1.5e-2)
