"""PSNR, SSIM and silhouettes: against scikit-image, known values, and what holds for every picture."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mvshared import metrics
from mvshared.errors import OptionError

pictures_u8 = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 3), st.integers(11, 16), st.integers(11, 16), st.sampled_from([1, 3]))
)
masks = hnp.arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))


def views(seed: int, *, shape: tuple[int, ...] = (3, 33, 20, 3)) -> tuple[np.ndarray, np.ndarray]:
    """Smooth uint8 pictures, and the same ones with noise that grows from view to view."""
    rng = np.random.default_rng(seed)
    h, w = np.mgrid[0 : shape[1], 0 : shape[2]]
    phases = rng.uniform(0, 6, (shape[0], 1, 1, shape[3]))
    smooth = 127 + 80 * np.sin(h[None, ..., None] / 5 + phases) * np.cos(w[None, ..., None] / 4 - phases)
    noise = rng.normal(0, 1, shape) * np.linspace(5, 40, shape[0])[:, None, None, None]
    return smooth.round().astype(np.uint8), (smooth + noise).clip(0, 255).round().astype(np.uint8)


def other(pictures: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, pictures.shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(3, 33, 20, 3), (1, 11, 11, 1), (2, 12, 64, 4)])
def test_ssim_equals_scikit_image(shape: tuple[int, ...]) -> None:
    clean, noisy = views(1, shape=shape)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": -1}
    expected = [structural_similarity(a, b, **options) for a, b in zip(clean, noisy, strict=True)]
    np.testing.assert_allclose(metrics.ssim(clean, noisy), expected, rtol=1e-9)


def test_psnr_equals_scikit_image() -> None:
    clean, noisy = views(2)
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(clean, noisy, strict=True)]
    np.testing.assert_allclose(metrics.psnr(clean, noisy), expected, rtol=1e-12)


def test_psnr_of_a_constant_error_is_that_of_the_definition() -> None:
    black = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    assert metrics.psnr(black, black + np.uint8(51)) == pytest.approx([20 * math.log10(5)])
    assert metrics.psnr(black, black + np.uint8(255)) == pytest.approx([0])


def test_contrast_is_the_slope_of_the_pictures_values_against_the_references() -> None:
    clean, noisy = (pictures.astype(np.float64) / 255 for pictures in views(3))
    mask = np.zeros(clean.shape[:3], dtype=bool)
    mask[:, 4:20, 3:17] = True
    slopes = metrics.contrast(noisy, clean, mask=mask)
    for view, slope in enumerate(slopes):
        y, x = (z[view][mask[view]] - z[view][mask[view]].mean(axis=0) for z in (clean, noisy))
        assert slope == pytest.approx(np.polyfit(y.ravel(), x.ravel(), 1)[0], rel=1e-9)
    np.testing.assert_allclose(metrics.contrast(clean, clean, mask=mask), 1)


def test_contrast_says_how_much_of_a_detail_is_left() -> None:
    truth = np.full((1, 16, 16, 3), 0.5)
    truth[:, 6:9, 4:12] = (0.35, 0.25, 0.3)
    mask = np.zeros((1, 16, 16), dtype=bool)
    mask[:, 4:11, 2:14] = True
    for share in (-1, 0, 0.4, 1, 1.2):
        paler = 0.4 + share * (truth - 0.5)  # and the skin is darker, which does not count
        assert metrics.contrast(paler, truth, mask=mask) == pytest.approx([share])
    outside = truth.copy()
    outside[:, 12:] = 0
    assert metrics.contrast(outside, truth, mask=mask) == pytest.approx([1])
    displaced = np.roll(truth, 2, axis=1)
    assert -0.2 < metrics.contrast(displaced, truth, mask=mask)[0] < 0.4


def test_contrast_needs_a_detail_inside_the_mask() -> None:
    clean, noisy = views(4)
    mask = np.ones(clean.shape[:3], dtype=bool)
    mask[1] = False
    with pytest.raises(OptionError, match="an empty mask in view 1"):
        metrics.contrast(noisy, clean, mask=mask)
    flat = clean.copy()
    flat[2] = (200, 100, 50)
    with pytest.raises(OptionError, match="references must be not flat inside the mask, got 'one colour in view 2'"):
        metrics.contrast(noisy, flat, mask=np.ones_like(mask))


@given(pictures_u8)
def test_equal_pictures_have_infinite_psnr_and_ssim_1(pictures: np.ndarray) -> None:
    assert (metrics.psnr(pictures, pictures.copy()) == math.inf).all()
    np.testing.assert_allclose(metrics.ssim(pictures, pictures.copy()), 1, rtol=1e-12)


@given(pictures_u8, st.integers(0, 2**32 - 1))
def test_scores_are_symmetric_and_in_their_range(pictures: np.ndarray, seed: int) -> None:
    references = other(pictures, seed)
    for metric, low, high in ((metrics.psnr, 0, math.inf), (metrics.ssim, -1, 1)):
        scores = metric(pictures, references)
        assert scores.shape == pictures.shape[:1]
        assert ((low <= scores) & (scores <= high)).all()
        np.testing.assert_allclose(scores, metric(references, pictures), rtol=1e-9)


@given(pictures_u8, st.integers(0, 2**32 - 1))
def test_a_views_scores_do_not_depend_on_other_views_nor_on_mirroring(pictures: np.ndarray, seed: int) -> None:
    references = other(pictures, seed)
    for metric in (metrics.psnr, metrics.ssim):
        scores = metric(pictures, references)
        alone = np.concatenate([metric(pictures[[view]], references[[view]]) for view in range(len(pictures))])
        np.testing.assert_array_equal(alone, scores)
        np.testing.assert_allclose(metric(pictures[:, ::-1, ::-1], references[:, ::-1, ::-1]), scores, rtol=1e-9, atol=1e-12)


@given(pictures_u8, st.integers(0, 2**32 - 1))
def test_floats_of_0_to_1_score_as_the_bytes_they_come_from(pictures: np.ndarray, seed: int) -> None:
    references = other(pictures, seed)
    for metric in (metrics.psnr, metrics.ssim):
        scores = metric(pictures / 255, references / 255)
        np.testing.assert_allclose(scores, metric(pictures, references), rtol=1e-9)
        singles = metric((pictures / 255).astype(np.float32), (references / 255).astype(np.float32))
        np.testing.assert_allclose(singles, scores, rtol=1e-4, atol=1e-4)


def test_more_noise_scores_worse() -> None:
    clean, noisy = views(3)
    assert (np.diff(metrics.psnr(clean, noisy)) < 0).all()
    assert (np.diff(metrics.ssim(clean, noisy)) < 0).all()


def test_a_mask_leaves_out_the_pixels_outside() -> None:
    clean, noisy = views(4)
    mask = np.zeros(clean.shape[:3], dtype=np.bool_)
    mask[:, 3:20, 5:11] = True
    cut = metrics.psnr(clean[:, 3:20, 5:11], noisy[:, 3:20, 5:11])
    np.testing.assert_allclose(metrics.psnr(clean, noisy, mask=mask), cut, rtol=1e-12)
    np.testing.assert_allclose(metrics.psnr(clean, noisy, mask=np.ones_like(mask)), metrics.psnr(clean, noisy), rtol=1e-12)


def test_ssim_within_a_mask_does_not_see_what_is_outside() -> None:
    clean, noisy = views(4)
    mask = np.zeros(clean.shape[:3], dtype=np.bool_)
    mask[:, 6:20, 5:17] = True
    scores = metrics.ssim(clean, noisy, mask=mask)
    changed = np.where(mask[..., None], noisy, 255 - noisy)
    np.testing.assert_allclose(metrics.ssim(clean, changed, mask=mask), scores, rtol=1e-9)
    assert (np.abs(metrics.ssim(clean, changed) - scores) > 0.05).all()
    np.testing.assert_allclose(metrics.ssim(clean, noisy, mask=np.ones_like(mask)), metrics.ssim(clean, noisy), rtol=1e-9)
    np.testing.assert_allclose(metrics.ssim(clean, clean.copy(), mask=mask), 1)


def test_ssim_within_a_mask_without_middle_is_refused_by_the_views_number() -> None:
    clean, noisy = views(5)
    mask = np.ones(clean.shape[:3], dtype=np.bool_)
    mask[2, 5:-5, 5:-5] = False
    with pytest.raises(OptionError, match="empty mask in view 2"):
        metrics.ssim(clean, noisy, mask=mask)


def test_a_view_with_an_empty_mask_is_refused_by_its_number() -> None:
    clean, noisy = views(5)
    mask = np.ones(clean.shape[:3], dtype=np.bool_)
    mask[1] = False
    with pytest.raises(OptionError, match="empty mask in view 1"):
        metrics.psnr(clean, noisy, mask=mask)


def test_silhouettes_of_alpha_are_where_it_is_above_the_threshold() -> None:
    rgba = np.zeros((1, 1, 4, 4), dtype=np.uint8)
    rgba[0, 0, :, 3] = [0, 127, 128, 255]
    assert metrics.alpha_mask(rgba).tolist() == [[[False, False, True, True]]]
    assert metrics.alpha_mask(rgba, threshold=0).tolist() == [[[False, True, True, True]]]
    assert metrics.alpha_mask(rgba / 255).tolist() == [[[False, False, True, True]]]


def test_silhouettes_on_a_plain_background_are_where_any_channel_differs() -> None:
    pictures = np.full((1, 1, 4, 3), 255, dtype=np.uint8)
    pictures[0, 0, 1] = [255, 255, 243]
    pictures[0, 0, 2] = [255, 242, 255]
    pictures[0, 0, 3] = 0
    expected = [[[False, False, True, True]]]
    assert metrics.background_mask(pictures, background=(255, 255, 255)).tolist() == expected
    assert metrics.background_mask(pictures / 255, background=(1, 1, 1)).tolist() == expected
    assert metrics.background_mask(pictures, background=(0, 0, 0)).tolist() == [[[True, True, True, False]]]


@given(masks, st.integers(0, 2**32 - 1))
def test_overlap_is_a_share_symmetric_and_1_for_equal_silhouettes(first: np.ndarray, seed: int) -> None:
    second = np.random.default_rng(seed).random(first.shape) < 0.5
    overlap = metrics.iou(first, second)
    assert ((overlap >= 0) & (overlap <= 1)).all()
    np.testing.assert_array_equal(overlap, metrics.iou(second, first))
    np.testing.assert_array_equal(metrics.iou(first, first), 1)
    some = first.any(axis=(1, 2))
    np.testing.assert_array_equal(metrics.iou(first, ~first)[some], 0)


def test_overlap_of_half_shifted_squares_is_a_third_in_each_view() -> None:
    first = np.zeros((2, 4, 8), dtype=np.bool_)
    second = first.copy()
    first[0, :, 0:4] = True
    second[0, :, 2:6] = True
    np.testing.assert_allclose(metrics.iou(first, second), [1 / 3, 1])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_a_summary_is_that_of_numpy_in_plain_floats(values: list[float]) -> None:
    result = metrics.summary(values)
    assert all(type(number) is float for number in result)
    assert (result.min, result.max) == (min(values), max(values))
    assert result.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert result.std == pytest.approx(np.std(values), abs=1e-6)


def test_a_summary_takes_the_infinite_psnr_of_equal_pictures() -> None:
    assert metrics.summary([math.inf, 20.0]) == (math.inf, math.inf, 20.0, math.inf)
    assert metrics.summary([math.inf, math.inf]) == (math.inf, 0, math.inf, math.inf)


@pytest.mark.parametrize("values", [[], [math.nan], [-math.inf, 1.0], [[1.0]]])
def test_a_summary_of_nothing_or_of_no_numbers_is_refused(values: Any) -> None:
    with pytest.raises(OptionError, match="values must be one or more numbers"):
        metrics.summary(values)


GOOD = np.zeros((2, 12, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("pictures", "references", "message"),
    [
        (GOOD, GOOD[:1], r"references must be of the pictures' shape \(2, 12, 12, 3\), got \(1, 12, 12, 3\)"),
        (GOOD, GOOD / 255, "references must be of the pictures' range"),
        (GOOD[0], GOOD[0], r"pictures must be of shape \(v, h, w, c\)"),
        (GOOD[:0], GOOD[:0], "none of them 0"),
        (GOOD.astype(np.int64), GOOD.astype(np.int64), "pictures must be uint8 or floats"),
        (GOOD + 2.0, GOOD + 0.0, "pictures must be floats from 0 to 1"),
        (GOOD + 0.0, GOOD - 0.1, "references must be floats from 0 to 1"),
        (GOOD + math.nan, GOOD + 0.0, "pictures must be floats from 0 to 1"),
    ],
)
def test_pictures_that_cannot_be_compared_are_refused(pictures: Any, references: Any, message: str) -> None:
    for metric in (metrics.psnr, metrics.ssim):
        with pytest.raises(OptionError, match=message):
            metric(pictures, references)


def test_pictures_smaller_than_the_window_have_no_ssim() -> None:
    small = np.zeros((1, 10, 40, 3), dtype=np.uint8)
    with pytest.raises(OptionError, match="at least 11 pixels high and wide"):
        metrics.ssim(small, small)


def test_masks_of_another_shape_or_type_are_refused() -> None:
    mask = np.ones((2, 12, 12), dtype=np.bool_)
    for wrong, message in ((mask[:, 1:], "shape"), (mask[0], "shape"), (mask.astype(np.uint8), "bool")):
        with pytest.raises(OptionError, match=f"mask must be .*{message}"):
            metrics.psnr(GOOD, GOOD, mask=wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(OptionError, match=f"references must be .*{message}"):
            metrics.iou(mask, wrong)  # pyright: ignore[reportArgumentType]


def test_silhouettes_of_wrong_pictures_or_thresholds_are_refused() -> None:
    with pytest.raises(OptionError, match="RGBA"):
        metrics.alpha_mask(GOOD)
    for background in ((255, 255), 255, (255, 255, 256), (math.nan, 0, 0)):
        with pytest.raises(OptionError, match="background must be 3 numbers from 0 to 255"):
            metrics.background_mask(GOOD, background=background)
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(OptionError, match="threshold must be from 0 to less than 1"):
            metrics.background_mask(GOOD, background=(0, 0, 0), threshold=threshold)


def test_relative_differences_of_arrays_are_0_for_equal_ones_and_infinite_for_what_is_no_number() -> None:
    values = np.array([3.0, -4.0], np.float16)
    assert metrics.relative_rms(values, values) == metrics.relative_rms(0 * values, 0 * values) == 0
    assert metrics.relative_rms(np.array([3.0, -3.0]), values) == pytest.approx(0.2)
    for other in (np.ones(3), np.array([3.0, np.nan]), np.array([np.inf, -4.0])):
        assert metrics.relative_rms(other, values) == metrics.relative_rms(values, other) == np.inf
    assert metrics.relative_rms(values, 0 * values) == np.inf
