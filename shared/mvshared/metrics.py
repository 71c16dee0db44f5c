"""How close views are to the true ones: PSNR, SSIM, contrast of details, overlap of silhouettes; one float64 number per view.
And how far arrays of any kind are apart.

Pictures are (v, h, w, c), uint8 of 0 to 255 or floats of 0 to 1, and masks bool (v, h, w). SSIM: Wang et al. 2004, "Image
quality assessment: from error visibility to structural similarity", IEEE TIP 13(4), section III.B.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvshared.errors import OptionError

# Section III.C of the paper: the window, and what keeps the quotients from 0 / 0.
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03

Pictures = NDArray[np.uint8] | NDArray[np.floating]


class Summary(NamedTuple):
    """Numbers over views or pictures; `std` is the population's, infinite where only some of the numbers are infinite."""

    mean: float
    std: float
    min: float
    max: float


def psnr(pictures: Pictures, references: Pictures, *, mask: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio float64 (v,) in dB: 10 log10(1 / mean squared error), infinite for equal pictures.

    With `mask` bool (v, h, w) only pixels inside count; a view whose mask is empty is refused. Raises OptionError.
    """
    x, y = _pair(pictures, references)
    squares = ((x - y) ** 2).mean(axis=-1)
    if mask is None:
        mse = squares.mean(axis=(1, 2))
    else:
        pixels = _inside(mask, shape=squares.shape)
        mse = (squares * mask).sum(axis=(1, 2)) / pixels
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mse)


def ssim(pictures: Pictures, references: Pictures, *, mask: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Structural similarity float64 (v,), from -1 to 1, 1 for equal pictures; the mean over pixels and channels.

    With `mask` bool (v, h, w) the mean is over the pixels inside, and of each one's window only pixels inside count; a view
    without pixels inside, the outermost 5 on each side left out, is refused.

    Equal to scikit-image's structural_similarity with gaussian_weights=True and use_sample_covariance=False: only windows that
    lie inside the picture count, so height and width are at least 11. Raises OptionError.
    """
    x, y = _pair(pictures, references)
    if min(x.shape[1:3]) < SSIM_WINDOW:
        raise OptionError("pictures", expected=f"at least {SSIM_WINDOW} pixels high and wide", got=x.shape)
    if mask is None:
        return np.array([_ssim_map(*views).mean() for views in zip(x, y, strict=True)])
    _check_masks("mask", mask, shape=x.shape[:3])
    edge = SSIM_WINDOW // 2
    centres = mask[:, edge:-edge, edge:-edge]
    pixels = centres.sum(axis=(1, 2))
    if (pixels == 0).any():
        raise OptionError("mask", expected="true in the middle of every view", got=f"an empty mask in view {pixels.argmin()}")
    return np.array([_ssim_map(*views)[centre].mean() for *views, centre in zip(x, y, mask, centres, strict=True)])


def contrast(pictures: Pictures, references: Pictures, *, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How much of the references' contrast inside `mask` bool (v, h, w) the pictures have in the same places, float64 (v,).

    It is the slope of the line through the pictures' values against the references', each less its channel's mean inside: 1 for
    equal pictures, 0 for flat ones and for details that are elsewhere, below 0 for inverted ones, above 1 for exaggerated ones.
    What is paler, softer or displaced has less, and what is added elsewhere in the mask changes nothing. A view whose mask is
    empty, or whose reference is flat there, is refused. Raises OptionError.
    """
    x, y = _pair(pictures, references)
    pixels = _inside(mask, shape=x.shape[:3])
    weights = mask[..., None] / pixels[:, None, None, None]
    x, y = (z - (z * weights).sum(axis=(1, 2), keepdims=True) for z in (x, y))
    energy = (weights * y * y).sum(axis=(1, 2, 3))
    if (flat := energy < 1e-12).any():
        raise OptionError("references", expected="not flat inside the mask", got=f"one colour in view {flat.argmax()}")
    return (weights * x * y).sum(axis=(1, 2, 3)) / energy


def alpha_mask(pictures: Pictures, *, threshold: float = 0.5) -> NDArray[np.bool_]:
    """Silhouettes bool (v, h, w) of RGBA pictures (v, h, w, 4): where alpha, as a share of opaque, is above `threshold`.

    Raises OptionError.
    """
    x = _unit("pictures", pictures)
    if x.shape[-1] != 4:
        raise OptionError("pictures", expected="RGBA, (v, h, w, 4)", got=x.shape)
    return x[..., 3] > _share("threshold", threshold)


def background_mask(pictures: Pictures, *, background: ArrayLike, threshold: float = 0.05) -> NDArray[np.bool_]:
    """Silhouettes bool (v, h, w): where a channel differs from a plain `background` (c,) by more than `threshold`.

    `background` has the range of the pictures (255 or 1 is white), `threshold` is a share of that range: 0.05 is 12.75 of 255.
    Parts of the object that have the background's colour are lost. Raises OptionError.
    """
    x = _unit("pictures", pictures)
    colour = np.asarray(background, dtype=np.float64)
    peak = _peak(pictures)
    if colour.shape != x.shape[-1:] or not ((colour >= 0) & (colour <= peak)).all():
        raise OptionError("background", expected=f"{x.shape[-1]} numbers from 0 to {peak:g}", got=background)
    return np.abs(x - colour / peak).max(axis=-1) > _share("threshold", threshold)


def iou(masks: NDArray[np.bool_], references: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Intersection over union float64 (v,) of silhouettes bool (v, h, w), from 0 to 1; 1 where both are empty.

    Raises OptionError.
    """
    _check_masks("masks", masks)
    _check_masks("references", references, shape=masks.shape)
    union = (masks | references).sum(axis=(1, 2))
    intersection = (masks & references).sum(axis=(1, 2))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def summary(values: Sequence[float] | NDArray[np.floating]) -> Summary:
    """Mean, deviation, smallest and largest of numbers (n,), n at least 1; infinity is a number here. Raises OptionError."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or np.isnan(numbers).any() or np.isneginf(numbers).any():
        raise OptionError("values", expected="one or more numbers, none of them NaN or minus infinity", got=values)
    smallest, largest = float(numbers.min()), float(numbers.max())
    if smallest == largest:
        return Summary(mean=largest, std=0.0, min=smallest, max=largest)
    std = float(numbers.std()) if np.isfinite(largest) else float("inf")
    return Summary(mean=float(numbers.mean()), std=std, min=smallest, max=largest)


def relative_rms(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root mean square of the differences of two arrays over that of `expected`: 0 for equal ones, infinite where a number is
    not finite, for zeros that should have been matched, and for other shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.size:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.subtract(actual, expected, dtype=np.float64)
        difference, scale = (float(np.sqrt(np.square(x, dtype=np.float64).mean())) for x in (differences, expected))
    if difference == 0:
        return 0.0
    return difference / scale if scale and np.isfinite(difference) else float("inf")


def _peak(pictures: Pictures) -> float:
    return 255.0 if pictures.dtype == np.uint8 else 1.0


def _unit(name: str, pictures: Pictures) -> NDArray[np.float64]:
    """Pictures (v, h, w, c) as float64 of 0 to 1. Raises OptionError."""
    if pictures.ndim != 4 or pictures.size == 0:
        raise OptionError(name, expected="of shape (v, h, w, c), none of them 0", got=pictures.shape)
    if pictures.dtype != np.uint8 and not np.issubdtype(pictures.dtype, np.floating):
        raise OptionError(name, expected="uint8 or floats", got=pictures.dtype)
    result = pictures.astype(np.float64) / _peak(pictures)
    if not (result.min() >= 0 and result.max() <= 1):
        raise OptionError(name, expected="floats from 0 to 1", got=(float(pictures.min()), float(pictures.max())))
    return result


def _pair(pictures: Pictures, references: Pictures) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if pictures.shape != references.shape:
        raise OptionError("references", expected=f"of the pictures' shape {pictures.shape}", got=references.shape)
    if _peak(pictures) != _peak(references):
        raise OptionError("references", expected=f"of the pictures' range ({pictures.dtype})", got=references.dtype)
    return _unit("pictures", pictures), _unit("references", references)


def _inside(mask: NDArray[np.bool_], *, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Numbers of pixels (v,) inside a mask of that shape (v, h, w). Raises OptionError, also if a view has none."""
    _check_masks("mask", mask, shape=shape)
    pixels = mask.sum(axis=(1, 2))
    if (pixels == 0).any():
        raise OptionError("mask", expected="true somewhere in every view", got=f"an empty mask in view {pixels.argmin()}")
    return pixels


def _check_masks(name: str, masks: NDArray[np.bool_], *, shape: tuple[int, ...] | None = None) -> None:
    if masks.dtype != np.bool_:
        raise OptionError(name, expected="bool", got=masks.dtype)
    if masks.ndim != 3 or masks.size == 0 or shape not in (None, masks.shape):
        raise OptionError(name, expected=f"of shape {shape or '(v, h, w), none of them 0'}", got=masks.shape)


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise OptionError(name, expected="from 0 to less than 1", got=value)
    return value


def _ssim_map(x: NDArray[np.float64], y: NDArray[np.float64], mask: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """SSIM (h - 10, w - 10, c) of the windows inside two pictures (h, w, c) of 0 to 1; equation 13.

    With a mask (h, w) the windows' weights are those of the pixels inside, and windows without one mean nothing.
    """
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    weights = 1.0 if mask is None else mask[..., None].astype(np.float64)
    norm = 1.0 if mask is None else np.maximum(_blur(mask[..., None].astype(np.float64)), np.finfo(np.float64).tiny)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_blur(z * weights) / norm for z in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    return (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


def _blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian means (h - 10, w - 10, c) of the windows inside (h, w, c); rows, then columns."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(x, SSIM_WINDOW, axis=axis)
        x = np.einsum("hwck,k->hwc", windows, weights)
    return x
