"""The subject of a picture is found by alpha or a plain background, and stands in the frame as in training."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mvshared.config import Framing
from mvshared.errors import ImageError, OptionError
from mvshared.framing import foreground_mask, frame_picture, frame_subject
from mvshared.images import composite, from_model, load_image, resize_bilinear, to_model

SUBJECT = Framing(mode="subject")
SIZE = 64
WHITE = (255, 255, 255)


def bust(width: int, height: int, *, background: tuple[int, int, int] = WHITE, scale: float = 1.0) -> NDArray[np.uint8]:
    """A brown head with white eyes on shoulders that the lower border cuts, RGBA, antialiased."""
    image = Image.new("RGB", (4 * width, 4 * height), background)
    draw, middle, base, r = ImageDraw.Draw(image), 2 * width, 4 * height, 0.7 * height * scale
    draw.ellipse([middle - 1.6 * r, base - 1.2 * r, middle + 1.6 * r, base + 2 * r], fill=(40, 60, 120))
    draw.ellipse([middle - r, base - 3.6 * r, middle + r, base - r], fill=(140, 90, 60))
    for side in (-0.4, 0.4):
        draw.ellipse([middle + (side - 0.2) * r, base - 2.6 * r, middle + (side + 0.2) * r, base - 2.2 * r], fill=WHITE)
    return load_image(image.resize((width, height), Image.Resampling.BOX))


def cut_out(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same with the white around it transparent, and green below the transparency."""
    mask = foreground_mask(rgba)
    assert mask is not None
    result = rgba.copy()
    result[mask < 0.5] = (0, 255, 0, 0)
    return result


def extent(picture: NDArray[np.uint8], *, background: tuple[int, int, int] = WHITE) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what clearly differs from the background."""
    inside = np.abs(picture.astype(int) - background).max(axis=2) > 60
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def assert_placed(picture: NDArray[np.uint8], framing: Framing, *, background: tuple[int, int, int] = WHITE) -> None:
    size = len(picture)
    left, top, right, bottom = extent(picture, background=background)
    got = ((bottom - top) / size, bottom / size, (left + right) / 2 / size)
    np.testing.assert_allclose(got, (framing.height, framing.bottom, 0.5), atol=1.5 / size)


def test_alpha_is_the_mask() -> None:
    rgba = cut_out(bust(60, 60))
    rgba[30, 30, 3] = 200
    mask = foreground_mask(rgba)
    assert mask is not None and mask.dtype == np.float32
    np.testing.assert_allclose(mask, rgba[..., 3] / 255, atol=1e-6)


def test_white_eyes_stay_subject_on_a_white_background() -> None:
    rgba = bust(80, 80)
    mask = foreground_mask(rgba)
    white = (rgba[..., :3] == 255).all(axis=2)
    assert mask is not None and mask[white].any(), "the eyes"
    assert not mask[0].any() and not mask[:, 0].any()
    inside = Image.fromarray(mask.astype(np.uint8)).getbbox()
    assert inside is not None and mask[inside[1] + 20, 40] == 1 and white[mask == 1].sum() > 20


def test_the_background_is_followed_around_every_corner() -> None:
    free = np.ones((49, 49), np.bool_)
    free[4:45, 4:45] = False
    free[5:44, 5:44] = True
    free[4, 6] = True  # the one way in
    for number, row in enumerate(range(8, 41, 4)):
        free[row, 4 : 42 if number % 2 else 45] = False
        free[row, 42 if number % 2 else 6] = True
    mask = foreground_mask(load_image(np.where(free, 255, 0).astype(np.uint8)))
    np.testing.assert_array_equal(mask, (~free).astype(np.float32))


def test_what_the_background_does_not_reach_stays_subject_even_at_the_lower_border() -> None:
    rgba = np.full((30, 30, 4), 255, np.uint8)
    rgba[10:, 8:22, :3] = 0
    rgba[12:20, 12:18, :3] = 255
    rgba[24:, 12:18, :3] = 255
    mask = foreground_mask(rgba)
    expected = np.zeros((30, 30), np.float32)
    expected[10:, 8:22] = 1
    np.testing.assert_array_equal(mask, expected)


def test_noise_on_a_plain_background_does_not_count() -> None:
    rgba = bust(80, 80, background=(120, 130, 140))
    noisy = rgba.astype(int)
    noisy[..., :3] += np.random.default_rng(0).integers(-10, 11, (80, 80, 3))
    clean, found = foreground_mask(rgba), foreground_mask(noisy.clip(0, 255).astype(np.uint8))
    assert clean is not None and found is not None
    assert np.abs(clean - found).mean() < 0.01


def test_without_alpha_or_a_plain_background_there_is_no_mask() -> None:
    y, x = np.mgrid[:40, :40]
    busy = load_image(np.stack([x * 6, y * 6, x * y % 256], -1).astype(np.uint8))
    assert foreground_mask(busy) is None
    assert foreground_mask(load_image(np.full((9, 9, 3), 77, np.uint8))) is None, "nothing but background"
    assert foreground_mask(np.zeros((9, 9, 4), np.uint8)) is None, "nothing but transparency"


@pytest.mark.parametrize("shape", [(90, 140), (140, 90), (100, 100), (700, 1100)])
@pytest.mark.parametrize("framing", [SUBJECT, replace(SUBJECT, height=0.6, bottom=0.8)])
@pytest.mark.parametrize("kind", ["white", "grey", "alpha"])
def test_the_subject_stands_where_the_framing_says(shape: tuple[int, int], framing: Framing, kind: str) -> None:
    height, width = shape
    rgba = bust(width, height, background=(110, 110, 115) if kind == "grey" else WHITE, scale=0.5)
    picture = frame_subject(cut_out(rgba) if kind == "alpha" else rgba, size_px=SIZE, framing=framing)
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    assert_placed(picture, framing)


def test_a_small_subject_in_a_large_picture_keeps_its_detail_and_place() -> None:
    rgba = np.full((1500, 2100, 4), 255, np.uint8)
    rgba[300:420, 1700:1790] = bust(90, 120)
    picture = frame_subject(rgba, size_px=SIZE, framing=SUBJECT)
    assert_placed(picture, SUBJECT)
    assert picture.astype(int).std() > 60


def test_a_wide_subject_is_limited_by_its_width() -> None:
    rgba = np.full((60, 200, 4), 255, np.uint8)
    rgba[20:40, 10:190, :3] = 0
    left, top, right, bottom = extent(frame_subject(rgba, size_px=100, framing=SUBJECT))
    assert abs(right - left - 98) <= 2 and bottom == 100 and abs(bottom - top - 11) <= 1


def test_a_coloured_background_becomes_the_wanted_one_without_a_fringe() -> None:
    on_green = frame_subject(bust(150, 220, background=(0, 200, 0)), size_px=SIZE, framing=SUBJECT)
    on_white = frame_subject(bust(150, 220), size_px=SIZE, framing=SUBJECT)
    np.testing.assert_array_equal(on_green[0], 255)
    difference = np.abs(on_green.astype(int) - on_white)
    assert difference.mean() < 3
    eyes = (on_white > 250).all(axis=2) & (difference.max(axis=2) == 0)
    assert eyes[20:].any()
    red, green, blue = np.moveaxis(on_green.astype(int), 2, 0)
    assert (green - np.maximum(red, blue)).max() < 12, "no green is left on the outline"


def test_a_nearly_white_background_is_kept_and_continued_without_a_seam() -> None:
    picture = frame_subject(bust(90, 140, background=(242, 240, 238), scale=0.5), size_px=SIZE, framing=SUBJECT)
    np.testing.assert_array_equal(picture[0], np.broadcast_to((242, 240, 238), (SIZE, 3)))
    _, top, right, _ = extent(picture)
    np.testing.assert_array_equal(picture[: top - 2], np.broadcast_to((242, 240, 238), (top - 2, SIZE, 3)))
    np.testing.assert_array_equal(picture[:, right + 2 :], np.broadcast_to((242, 240, 238), (SIZE, SIZE - right - 2, 3)))


def test_transparent_pictures_take_the_wanted_background_and_no_hidden_colour() -> None:
    picture = frame_subject(cut_out(bust(90, 140)), size_px=SIZE, framing=replace(SUBJECT, background=(10, 0, 90)))
    np.testing.assert_array_equal(picture[0], np.broadcast_to((10, 0, 90), (SIZE, 3)))
    _, green, _ = np.moveaxis(picture.astype(int), 2, 0)
    assert ((green > 150) & (picture[..., 0] < 100)).sum() == 0


@pytest.mark.parametrize("mode", ["none", "pad", "subject"])
def test_a_square_picture_that_fits_keeps_its_pixels(mode: Literal["none", "pad", "subject"]) -> None:
    rgba = bust(SIZE, SIZE, scale=1.3)
    np.testing.assert_array_equal(frame_subject(rgba, size_px=SIZE, framing=Framing(mode=mode)), rgba[..., :3])


def test_a_square_picture_whose_subject_is_too_small_or_off_its_place_is_framed_anew() -> None:
    small = bust(4 * SIZE, 4 * SIZE, scale=0.5)
    shifted = np.roll(bust(4 * SIZE, 4 * SIZE, scale=1.3), 32, axis=1)
    for rgba in (small, shifted):
        assert_placed(frame_subject(rgba, size_px=SIZE, framing=SUBJECT), SUBJECT)


def test_a_subject_is_framed_whatever_resampling_is_named() -> None:
    framing = Framing(mode="subject", resample="bilinear")
    assert_placed(frame_picture(bust(4 * SIZE, 4 * SIZE, scale=0.5), size_px=SIZE, framing=framing).picture, framing)


def test_mode_none_keeps_any_square_picture_and_squeezes_others() -> None:
    small = bust(SIZE, SIZE, scale=0.4)
    np.testing.assert_array_equal(frame_subject(small, size_px=SIZE, framing=Framing(mode="none")), small[..., :3])
    stripes = load_image(np.repeat([[0, 255]], 50, axis=1).astype(np.uint8).repeat(30, axis=0))
    picture = frame_subject(stripes, size_px=20, framing=Framing(mode="none"))
    np.testing.assert_allclose(picture[:, :8], 0, atol=2)
    np.testing.assert_allclose(picture[:, 12:], 255, atol=2)


@pytest.mark.parametrize("mode", ["pad", "subject"])
def test_a_picture_without_a_subject_is_padded_to_a_square(mode: Literal["pad", "subject"]) -> None:
    busy = np.random.default_rng(0).integers(0, 200, (40, 80, 3)).astype(np.uint8)
    picture = frame_subject(load_image(busy), size_px=80, framing=Framing(mode=mode, background=(1, 2, 255)))
    np.testing.assert_array_equal(picture[20:60], busy)
    np.testing.assert_array_equal(picture[[19, 60]], np.broadcast_to((1, 2, 255), (2, 80, 3)))


@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    size_px=st.integers(1, 40),
    framing=st.builds(
        Framing,
        mode=st.sampled_from(["subject", "pad", "none"]),
        height=st.floats(0.01, 1),
        width=st.floats(0.01, 1),
        bottom=st.floats(0.01, 1),
    ),
    kind=st.sampled_from(["noise", "spot", "alpha"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200)
def test_any_picture_in_gives_the_exact_size_out_and_always_the_same(
    height: int, width: int, size_px: int, framing: Framing, kind: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    rgba = np.full((height, width, 4), 255, np.uint8)
    rgba[random.integers(height) :, random.integers(width) :, :3] = 30
    if kind == "noise":
        rgba[..., :3] = random.integers(0, 256, (height, width, 3))
    elif kind == "alpha":
        rgba[..., 3] = 255 * (random.random((height, width)) < 0.2)
        rgba[0, 0, 3] = 255
    picture = frame_subject(rgba, size_px=size_px, framing=framing)
    assert picture.shape == (size_px, size_px, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(frame_subject(rgba, size_px=size_px, framing=framing), picture)


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (3, 20_000)])
@pytest.mark.parametrize("mode", ["subject", "pad", "none"])
def test_absurd_shapes_need_no_absurd_memory(shape: tuple[int, int], mode: Literal["subject", "pad", "none"]) -> None:
    rgba = np.full((*shape, 4), 255, np.uint8)
    rgba[shape[0] // 2 :, shape[1] // 3 : shape[1] // 2 + 1, :3] = 0
    picture = frame_subject(rgba, size_px=SIZE, framing=Framing(mode=mode))
    assert picture.shape == (SIZE, SIZE, 3) and picture.min() < 200


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(OptionError, match="size_px must be 1 or more, got 0"):
        frame_subject(bust(8, 8), size_px=0, framing=SUBJECT)


@pytest.mark.parametrize("mode", ["subject", "pad", "none"])
def test_a_picture_that_shows_nothing_is_refused(mode: Literal["subject", "pad", "none"]) -> None:
    clear = np.zeros((20, 30, 4), np.uint8)
    with pytest.raises(ImageError, match="shows nothing"):
        frame_subject(clear, size_px=16, framing=Framing(mode=mode))


# Pictures for the public models

BILINEAR = Framing(mode="pad", resample="bilinear")


@pytest.mark.parametrize(("size", "size_px"), [((64, 64), 32), ((33, 50), 24), ((10, 7), 31), ((1, 1), 8), ((40, 40), 40)])
def test_pictures_are_resized_as_pytorch_interpolates(size: tuple[int, int], size_px: int) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (*size, 3)).astype(np.float32)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, (size_px, size_px), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize_bilinear(pixels, (size_px, size_px)), expected[0].permute(1, 2, 0), atol=1e-5)


def test_an_encoder_sees_the_picture_at_its_own_size_in_a_white_square() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (60, 40, 4), np.uint8)
    framed = frame_picture(rgba, size_px=32, framing=BILINEAR)
    assert framed.full.shape == (60, 60, 3)
    assert (framed.full[:, :10] == 255).all() and (framed.full[:, 50:] == 255).all()
    np.testing.assert_array_equal(framed.full[:, 10:50], composite(rgba, (255, 255, 255)))
    np.testing.assert_array_equal(framed.pixels, resize_bilinear(to_model(framed.full), (32, 32)))
    np.testing.assert_array_equal(framed.picture, from_model(framed.pixels))


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    rgba = np.full((32, 32, 4), 255, np.uint8)
    rgba[..., :3] = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    framed = frame_picture(rgba, size_px=32, framing=BILINEAR)
    for pixels in (framed.full, framed.picture):
        np.testing.assert_array_equal(pixels, rgba[..., :3])
    np.testing.assert_array_equal(framed.pixels, to_model(framed.full))


def test_without_padding_the_whole_picture_is_resized() -> None:
    rgba = np.full((20, 40, 4), 255, np.uint8)
    framed = frame_picture(rgba, size_px=16, framing=Framing(mode="none", resample="bilinear"))
    assert (framed.full.shape, framed.picture.shape) == ((20, 40, 3), (16, 16, 3))


def test_nothing_to_see_is_refused_for_every_framing() -> None:
    for framing in (BILINEAR, Framing(mode="none"), Framing(mode="subject")):
        with pytest.raises(ImageError, match="all of it is transparent"):
            frame_picture(np.zeros((8, 8, 4), np.uint8), size_px=8, framing=framing)


@pytest.mark.parametrize(
    ("kind", "doubt"),
    [
        ("busy", "neither transparent nor of one colour"),
        ("blank", "it has one colour, from one border to the other"),
        ("faint", "hardly anything of it is opaque"),
        ("plain", ""),
    ],
)
def test_a_picture_without_a_subject_is_in_doubt(kind: str, doubt: str) -> None:
    busy = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    pictures = {
        "busy": load_image(busy),
        "blank": load_image(np.full((60, 60, 3), 200, np.uint8)),
        "faint": np.dstack([busy, np.full((60, 60), 90, np.uint8)]),
        "plain": bust(60, 60),
    }
    framed = frame_picture(pictures[kind], size_px=32, framing=SUBJECT)
    assert framed.doubt == "" if not doubt else doubt in framed.doubt
    assert frame_picture(pictures[kind], size_px=32, framing=Framing(mode="pad")).doubt == ""
