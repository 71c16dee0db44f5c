"""Batches for the training of a latent upscaler: latents of pictures at half their size, and those of the pictures.

All randomness is drawn in numpy from (seed, step), as in `mvshared.training.data`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import A
from mvshared.camera import front_view
from mvshared.captures import load_capture
from mvshared.errors import DatasetError
from mvshared.images import from_model
from mvshared.training.config import DataConfig
from mvshared.training.data import Picture, mirror_picture, read_picture
from mvshared.training.kept import in_half, in_one
from mvshared.upscaling.config import MAX_NOISE_LEVEL, SigmaConfig
from mvshared.upscaling.schedule import noise_embedding, training_sigmas

UPSCALER_STREAM = 3  # first number of the random seeds, beside those of the other stages
CLEAN_SHARE = 0.5  # of the examples whose low-resolution latents get no noise


class UpscalerBatch(NamedTuple, Generic[A]):
    """Inputs and target of the upscaler's network, n pictures.

    Noisy and low-resolution latents (n, 1, h, w, 2 c), noise levels (n,) as quarters of ln sigma, conditions (n, k), and the
    target (n, 1, h, w, c), minus the velocity.
    """

    sample: A
    noise: A
    condition: A
    target: A


class LatentPairs(NamedTuple):
    """Scaled latents float16 of the same pictures at half (n, h, w, c) and at full size (n, 2 h, 2 w, c)."""

    low: NDArray[np.float16]
    high: NDArray[np.float16]

    @classmethod
    def joined(cls, parts: Sequence["LatentPairs"]) -> "LatentPairs":
        """The pairs of several, in their order. Raises DatasetError for pictures of different sizes."""
        return cls(in_one([part.low for part in parts]), in_one([part.high for part in parts]))


def encode_pairs(
    folders: list[Path],
    config: DataConfig,
    encode: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    *,
    multiple: int,
    after_each: Callable[[], object] = lambda: None,
) -> LatentPairs:
    """The latents of all pictures of the captures, and of their mirror images if the config says so.

    `encode` makes scaled latents of pixels. Half the size is the mean of two by two pixels. `after_each` is called after every
    capture. Raises DatasetError for pictures of different sizes, or of a size that is no multiple of `multiple` pixels, and
    NumericsError for latents that are not finite.
    """
    low, high = [], []
    for folder in folders:
        pictures = [read_picture(path, background=config.background) for path in load_capture(folder).image_paths]
        if config.mirror:
            pictures += [mirror_picture(picture) for picture in pictures]
        pixels = _pixels(pictures, folder=folder, multiple=multiple)
        what = f"latents of the pictures in {folder}"
        high.append(in_half(encode(pixels), what, where="vae"))
        low.append(in_half(encode(halved(pixels)), what, where="vae"))
        after_each()
    return LatentPairs(in_one(low), in_one(high))


def generated_pairs(
    folders: list[Path],
    config: DataConfig,
    generate: Callable[[NDArray[np.uint8], NDArray[np.float32]], NDArray[np.float32]],
    encode: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    *,
    multiple: int,
    after_each: Callable[[], object] = lambda: None,
) -> LatentPairs:
    """The latents that a model generates of captures, and those of the true pictures at twice the size.

    `generate` makes scaled latents (v, h, w, c) of a reference picture uint8 (h, w, 3) and cameras (v, 4, 4); the reference is
    the view nearest to the front. `after_each` is called after every capture. Raises as `encode_pairs` does.
    """
    low, high = [], []
    for folder in folders:
        capture = load_capture(folder)
        pictures = [read_picture(path, background=config.background) for path in capture.image_paths]
        pixels = _pixels(pictures, folder=folder, multiple=multiple)
        front = front_view(capture.poses)
        if pixels.shape[1] != pixels.shape[2]:
            raise DatasetError("must have square pictures for views_from: those are what is generated", path=folder)
        generated = generate(from_model(halved(pixels[front])), capture.poses)
        low.append(in_half(generated, f"generated latents of {folder}", where="unet"))
        high.append(in_half(encode(pixels), f"latents of the pictures in {folder}", where="vae"))
        after_each()
    return LatentPairs(in_one(low), in_one(high))


def halved(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pictures (..., h, w, 3) at half their size: the means of two by two pixels."""
    *n, height, width, _ = pixels.shape
    return pixels.reshape(*n, height // 2, 2, width // 2, 2, 3).mean(axis=(-4, -2))


def _pixels(pictures: list[Picture], *, folder: Path, multiple: int) -> NDArray[np.float32]:
    shapes = {picture.pixels.shape for picture in pictures}
    height, width, _ = next(iter(shapes))
    if len(shapes) > 1 or height % multiple or width % multiple:
        reason = f"all pictures must have one size, a multiple of {multiple} pixels, got {sorted(shapes)[0][:2]}"
        raise DatasetError(reason, path=folder)
    return np.stack([picture.pixels for picture in pictures])


class UpscalerBatches:
    """Pairs of latents, the larger ones noised at levels spread evenly in the logarithm, the smaller ones a little.

    `first_step_share` of the larger ones have the highest level, where a run begins, and a run of a single step ends;
    `generated_share` of the pairs are of `generated`, if that is given.
    """

    def __init__(
        self,
        pairs: LatentPairs,
        sigmas: SigmaConfig,
        *,
        channels: int,
        frequencies: tuple[float, ...],
        first_step_share: float = 0.0,
        generated: LatentPairs | None = None,
        generated_share: float = 0.5,
    ) -> None:
        """`channels` is the width of the condition, which holds the noise level of the low-resolution latents."""
        self.pairs, self.channels, self.frequencies = pairs, channels, frequencies
        self.first_step_share = first_step_share
        self.generated, self.generated_share = generated, 0.0 if generated is None else generated_share
        levels = training_sigmas(sigmas)
        self.log_sigmas = math.log(levels[0]), math.log(levels[-1])

    def batch(self, step: int, *, size: int, seed: int) -> UpscalerBatch[NDArray[np.float32]]:
        """The batch of a step: `size` pictures."""
        random = np.random.default_rng([UPSCALER_STREAM, seed, step])
        chosen = random.integers(len(self.pairs.high), size=size)
        low, high = (latents[chosen].astype(np.float32)[:, None] for latents in self.pairs)
        if self.generated is not None:
            ours = random.random(size) < self.generated_share
            others = random.integers(len(self.generated.high), size=size)[ours]
            low[ours, 0], high[ours, 0] = self.generated.low[others], self.generated.high[others]
        levels = np.where(random.random(size) < CLEAN_SHARE, 0, random.random(size) * MAX_NOISE_LEVEL)
        log_sigma = random.uniform(*self.log_sigmas, size)
        log_sigma[random.random(size) < self.first_step_share] = self.log_sigmas[1]
        blurred = _noisy(low, levels, random)
        noise, eps = np.exp(log_sigma), random.standard_normal(high.shape, np.float32)
        signal, sigma = (np.asarray(value, np.float32)[:, None, None, None, None] for value in _mix(noise))
        condition = [noise_embedding(level, channels=self.channels, frequencies=self.frequencies) for level in levels]
        enlarged = blurred.repeat(2, axis=2).repeat(2, axis=3)
        return UpscalerBatch(
            sample=np.concatenate([signal * high + sigma * eps, enlarged], axis=-1, dtype=np.float32),
            noise=(log_sigma / 4).astype(np.float32),
            condition=np.stack(condition),
            target=np.asarray(sigma * high - signal * eps, np.float32),
        )


def _mix(sigma: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of the signal and of the noise in x_t."""
    signal = 1 / np.sqrt(sigma**2 + 1)
    return signal, sigma * signal


def _noisy(low: NDArray[np.float32], levels: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float32]:
    """Low-resolution latents with noise of the levels (n,), scaled back to the variance that they had."""
    level = levels.astype(np.float32)[:, None, None, None, None]
    noised = low + level * random.standard_normal(low.shape, np.float32)
    return np.asarray(noised / np.sqrt(level**2 + 1), np.float32)
