"""Pictures in: every common kind of file and array; pictures out: values, PNG, grids, turntables; normal maps."""

import io
import os
import re
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, features

from mvshared import images
from mvshared.errors import ImageError, MvWarning, NumericsError, OptionError, OutputError, warn
from mvshared.images import (
    composite,
    encode_png,
    from_model,
    grid,
    load_image,
    load_values,
    quiet_pillow,
    resize_bilinear,
    resize_rgba,
    save_png,
    save_turntable,
    sheet,
    to_model,
)

HEIGHT, WIDTH = 24, 32


def smooth(height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """A picture (h, w, 3) without symmetry that lossy formats keep well."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + 2 * y) % 256], -1).astype(np.uint8)


def with_alpha() -> NDArray[np.uint8]:
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, : WIDTH // 2] = 90
    return np.concatenate([smooth(), alpha], axis=2)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def opaque(rgb: NDArray[Any]) -> NDArray[np.uint8]:
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 255)], axis=2).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_16_bit(values: NDArray[np.uint16], *, color_type: int, extra: bytes = b"") -> bytes:
    """A 16-bit PNG of (h, w, c), written here because Pillow writes only grey ones."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_files_give_their_pixels_whatever_their_name(tmp_path: Path, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    path = written(tmp_path / "picture.jpg", encoded(Image.fromarray(smooth()), format, **options))
    np.testing.assert_array_equal(load_image(path), opaque(smooth()))
    np.testing.assert_array_equal(load_image(str(path)), opaque(smooth()))


@pytest.mark.parametrize(("format", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB")])
def test_lossy_files_give_nearly_their_pixels(tmp_path: Path, format: str, mode: str) -> None:
    path = written(tmp_path / "picture", encoded(Image.fromarray(smooth()).convert(mode), format, quality=98))
    loaded = load_image(path)
    assert (loaded[..., 3] == 255).all()
    assert np.abs(loaded[..., :3].astype(int) - smooth()).mean() < 6


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_kept_straight(tmp_path: Path, format: str) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    path = written(tmp_path / "picture", encoded(Image.fromarray(with_alpha()), format, **options))
    np.testing.assert_array_equal(load_image(path), with_alpha())


def test_grey_and_one_bit_pictures_become_grey_rgb(tmp_path: Path) -> None:
    grey = smooth()[..., 0]
    for mode in ("L", "1"):
        image = Image.fromarray(grey).convert(mode)
        expected = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
        np.testing.assert_array_equal(load_image(written(tmp_path / mode, encoded(image, "PNG"))), opaque(expected))


def test_grey_with_alpha_keeps_both(tmp_path: Path) -> None:
    image = Image.fromarray(with_alpha()).convert("LA")
    loaded = load_image(written(tmp_path / "la.png", encoded(image, "PNG")))
    np.testing.assert_array_equal(loaded[..., 3], with_alpha()[..., 3])
    np.testing.assert_array_equal(loaded[..., 0], np.asarray(image)[..., 0])


def test_a_palette_with_a_transparent_entry_has_alpha(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    expected = np.array([[[10, 20, 30, 0], [200, 100, 50, 255]], [[200, 100, 50, 255], [10, 20, 30, 0]]])
    for format in ("PNG", "GIF"):
        loaded = load_image(written(tmp_path / format, encoded(image, format, transparency=0)))
        np.testing.assert_array_equal(loaded[..., 3], expected[..., 3])
        np.testing.assert_array_equal(loaded[loaded[..., 3] > 0], expected[expected[..., 3] > 0])


def test_the_transparent_colour_of_an_rgb_png_has_alpha_zero(tmp_path: Path) -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    loaded = load_image(written(tmp_path / "a.png", encoded(Image.fromarray(pixels), "PNG", transparency=(4, 5, 6))))
    np.testing.assert_array_equal(loaded[..., 3], [[255, 0]])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path: Path, format: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    loaded = load_image(written(tmp_path / "grey", encoded(Image.fromarray(values), format)))
    np.testing.assert_array_equal(loaded[0, :, 0], [0, 1, 128, 255])


def test_the_transparent_value_of_a_16_bit_grey_png_has_alpha_zero(tmp_path: Path) -> None:
    values = np.array([[[0], [300], [301]]], np.uint16)
    data = png_16_bit(values, color_type=0, extra=chunk(b"tRNS", struct.pack(">H", 300)))
    np.testing.assert_array_equal(load_image(written(tmp_path / "a.png", data))[0, :, 3], [255, 0, 255])


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (6, 4)])
def test_colour_of_16_bits_gives_the_upper_8(tmp_path: Path, color_type: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (3, 5, channels)).astype(np.uint16)
    loaded = load_image(written(tmp_path / "rgb.png", png_16_bit(values, color_type=color_type)))
    np.testing.assert_array_equal(loaded[..., :channels], values >> 8)


def test_float_tiffs_hold_0_to_1_and_others_are_refused(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.5, 1.0]], np.float32)
    loaded = load_image(written(tmp_path / "a.tif", encoded(Image.fromarray(values), "TIFF")))
    np.testing.assert_array_equal(loaded[0, :, 0], [0, 128, 255])
    for bad in (2.0, -0.5, np.nan):
        with pytest.raises(ImageError, match="outside 0 to 1"):
            load_image(written(tmp_path / "b.tif", encoded(Image.fromarray(values * 0 + np.float32(bad)), "TIFF")))


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        path = written(tmp_path / format, encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        red, _, blue, _ = load_image(path)[4, 4]
        assert red > 240 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_all_exif_orientations_come_out_upright(tmp_path: Path, format: str, orientation: int) -> None:
    upright = smooth()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    loaded = load_image(written(tmp_path / "a", encoded(image, format, exif=exif.tobytes(), quality=98)))
    assert loaded.shape == (HEIGHT, WIDTH, 4)
    assert np.abs(loaded[..., :3].astype(int) - upright).mean() < 6


def test_damaged_exif_does_not_spoil_a_picture(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(smooth()), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(load_image(written(tmp_path / "a.png", data)), opaque(smooth()))


def swapped_profile() -> bytes:
    """An sRGB profile whose red and green primaries are exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(132, 132 + 12 * int.from_bytes(data[128:132]), 12):
        name = bytes(data[entry : entry + 4])
        data[entry : entry + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_converted_to_srgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (4, 4), (250, 5, 5)).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)
    loaded = load_image(written(tmp_path / "a.png", encoded(image, "PNG", icc_profile=swapped_profile())))
    red, green, _, alpha = loaded[0, 0].astype(int)
    assert red < 40 and green > 215 and alpha == (77 if mode == "RGBA" else 255)


def test_the_transparent_colour_survives_a_profile(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    data = encoded(image, "PNG", transparency=(4, 5, 6), icc_profile=swapped_profile())
    np.testing.assert_array_equal(load_image(written(tmp_path / "a.png", data))[..., 3], [[255, 0]])


@pytest.mark.parametrize("profile", [b"nonsense", swapped_profile()[:200]])
def test_a_damaged_profile_is_ignored(tmp_path: Path, profile: bytes) -> None:
    path = written(tmp_path / "a.png", encoded(Image.fromarray(smooth()), "PNG", icc_profile=profile))
    np.testing.assert_array_equal(load_image(path), opaque(smooth()))


def test_one_pixel_is_a_picture() -> None:
    np.testing.assert_array_equal(load_image(Image.new("RGB", (1, 1), (1, 2, 3))), [[[1, 2, 3, 255]]])


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder.png").mkdir()
    cases = {
        tmp_path / "missing.png": "no such file",
        tmp_path / "folder.png": "is a folder",
        tmp_path / "fifo": "no regular file",
        written(tmp_path / "empty.png", b""): "is empty",
        written(tmp_path / "text.png", b"hello, this is text"): "is no picture",
        written(tmp_path / "page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"): "is no picture",
        tmp_path / ("x" * 5000): "cannot be read",
        tmp_path / "nul\0.png": "cannot be read",
    }
    for path, message in cases.items():
        with pytest.raises(ImageError, match=message) as caught:
            load_image(path)
        assert caught.value.path == path
    sources = {"NoneType$": None, r"BytesIO \(PIL.Image.open": io.BytesIO(b""), r"Tensor \(numpy.asarray": torch.zeros(2, 2, 3)}
    for message, source in sources.items():
        with pytest.raises(ImageError, match=f"got {message}"):
            load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1", b"avif"])
@pytest.mark.parametrize(("name", "converted"), [("IMG 1.HEIC", "IMG 1.png"), ("IMG 1.png", "IMG 1-converted.png")])
def test_for_the_picture_of_a_telephone_there_is_a_way_out(tmp_path: Path, name: str, converted: str, brand: bytes) -> None:
    path = written(tmp_path / name, struct.pack(">I", 24) + b"ftyp" + brand + b"\0\0\0\0mif1" + brand)
    expected = f"sips -s format png '{path}' --out '{tmp_path / converted}' makes a PNG, elsewhere heif-convert does"
    with pytest.raises(ImageError, match=re.escape(expected)):
        load_image(path)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow writes no AVIF here")
def test_files_that_pillow_writes_as_avif_are_told_as_such(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.avif")
    with pytest.raises(ImageError, match="HEIC and AVIF cannot be read; on a Mac sips "):
        load_image(tmp_path / "picture.avif")


@pytest.mark.parametrize("side", [10_001, 40_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="more than 100,000,000 pixels"):
        load_image(written(tmp_path / "bomb.png", data))


def test_too_many_pixels_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    for source in (Image.new("L", (11, 1)), np.zeros((1, 11), np.uint8)):
        with pytest.raises(ImageError, match="more than 10 pixels"):
            load_image(source)
    assert load_image(Image.new("L", (10, 1))).shape == (1, 10, 4)


FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_an_error_or_whole_never_half_a_picture(tmp_path: Path, format: str) -> None:
    data = encoded(Image.fromarray(smooth(60, 70)), format, **FORMATS[format])
    whole = load_image(written(tmp_path / "whole", data))
    refused, lengths = 0, np.unique(np.linspace(1, len(data) - 1, 60).astype(int))
    for length in lengths:
        try:
            np.testing.assert_array_equal(load_image(written(tmp_path / "cut", data[:length])), whole)
        except ImageError:
            refused += 1
    assert refused >= (lengths < len(data) - 20).sum(), "only what comes after the pixels may be missing"


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_bytes_raise_nothing_but_image_errors(tmp_path: Path, format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    metadata = {} if format in ("GIF", "BMP") else {"exif": exif.tobytes(), "icc_profile": swapped_profile()}
    data = encoded(Image.fromarray(smooth()), format, **FORMATS[format], **metadata)
    random, refused = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        for position in random.integers(0, len(data) if random.random() < 0.5 else 64, random.integers(1, 6)):
            damaged[position] = random.integers(256)
        try:
            loaded = load_image(written(tmp_path / "damaged", bytes(damaged)))
        except ImageError:
            refused += 1
        else:
            assert loaded.ndim == 3 and loaded.shape[2] == 4 and loaded.dtype == np.uint8
    assert refused > 10


def test_a_truncated_pillow_picture_is_an_image_error() -> None:
    image = Image.open(io.BytesIO(encoded(Image.fromarray(smooth(60, 70)), "PNG")[:100]))
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(image)


def test_arrays_of_every_accepted_kind_agree() -> None:
    rgba = with_alpha()
    deep = rgba.astype(np.uint16) * 257
    for array in (rgba, deep, deep.astype(">u2"), deep.astype("<u2"), rgba / 255, (rgba / 255).astype(np.float32)):
        np.testing.assert_array_equal(load_image(array), rgba)
    grey = rgba[..., 0]
    for array in (grey, grey[..., None], np.stack([grey, grey * 0 + 255], -1), np.stack([grey] * 3, -1)):
        np.testing.assert_array_equal(load_image(array), opaque(np.stack([grey] * 3, -1)))


def test_a_loaded_array_is_a_copy() -> None:
    rgba = with_alpha()
    load_image(rgba)[:] = 0
    np.testing.assert_array_equal(rgba, with_alpha())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(4, np.uint8),
        np.zeros((2, 2, 5), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((0, 3, 3), np.uint8),
        np.zeros((2, 2), np.int64),
        np.zeros((2, 2), np.bool_),
        np.full((2, 2), np.nan),
        np.full((2, 2), np.inf),
        np.full((2, 2), 1.01),
        np.full((2, 2), -0.01),
    ],
)
def test_arrays_of_another_shape_type_or_range_are_refused(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match="an array"):
        load_image(array)


@given(arrays(np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=4)))
def test_model_values_and_pixels_are_a_round_trip(pixels: NDArray[np.uint8]) -> None:
    values = to_model(pixels)
    assert values.dtype == np.float32 and values.min() >= -1 and values.max() <= 1
    np.testing.assert_array_equal(from_model(values), pixels)


def test_model_values_span_minus_one_to_one_and_are_clipped_and_rounded() -> None:
    np.testing.assert_array_equal(to_model(np.array([0, 255], np.uint8)), [-1, 1])
    half = 0.5 / 127.5
    np.testing.assert_array_equal(
        from_model(np.array([-7.0, -1, -1 + 0.9 * half, -1 + 1.1 * half, 1, 9])), [0, 0, 0, 1, 255, 255]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_no_picture(bad: float) -> None:
    with pytest.raises(NumericsError):
        from_model(np.array([0.0, bad], np.float32))


def test_compositing_mixes_by_alpha() -> None:
    rgba = np.array([[[100, 0, 200, 0], [100, 0, 200, 255], [100, 0, 200, 51]]], np.uint8)
    np.testing.assert_array_equal(composite(rgba, (255, 255, 0)), [[[255, 255, 0], [100, 0, 200], [224, 204, 40]]])
    np.testing.assert_array_equal(composite(rgba[..., :1, :]), [[[255, 255, 255]]])


def test_resizing_does_not_bring_in_the_colour_under_transparency() -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, :, 1] = 255
    rgba[8:24, 8:24] = (255, 0, 0, 255)
    resized = resize_rgba(rgba, 21, 21)
    assert (resized[resized[..., 3] > 8][:, 1] < 8).all()


def test_grids_are_filled_row_by_row_and_padded_with_white() -> None:
    views = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 3, 3), np.uint8)
    joined = grid(views, columns=3, pad_px=1)
    assert joined.shape == (5, 11, 3)
    np.testing.assert_array_equal(joined[0, :, 0], [0, 0, 0, 255, 1, 1, 1, 255, 2, 2, 2])
    np.testing.assert_array_equal(joined[2, :, 0], [255] * 11)
    np.testing.assert_array_equal(joined[3, :, 0], [3, 3, 3, 255, 4, 4, 4, 255, 255, 255, 255])
    assert grid(views).shape == (4, 12, 3) and grid(views[:2]).shape == (2, 6, 3)
    np.testing.assert_array_equal(sheet(np.stack([views[:2], views[2:4]]))[:, ::3, 0], [[0, 1], [0, 1], [2, 3], [2, 3]])


@pytest.mark.parametrize(("columns", "pad_px"), [(0, 0), (-1, 0), (2, -1)])
def test_grids_without_columns_or_with_negative_distances_are_refused(columns: int, pad_px: int) -> None:
    with pytest.raises(OptionError):
        grid(np.zeros((2, 2, 2, 3), np.uint8), columns=columns, pad_px=pad_px)


@pytest.mark.parametrize("bad", [np.zeros((0, 2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3))])
def test_what_is_no_pictures_is_not_written(tmp_path: Path, bad: NDArray[Any]) -> None:
    for write in (lambda: grid(bad), lambda: save_turntable(tmp_path / "a.gif", bad), lambda: encode_png(bad[..., :2])):
        with pytest.raises(ImageError):
            write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [3, 4])
def test_a_saved_png_has_the_same_pixels_and_leaves_nothing_else(tmp_path: Path, channels: int) -> None:
    save_png(tmp_path / "view.png", with_alpha()[..., :channels])
    np.testing.assert_array_equal(load_image(tmp_path / "view.png")[..., :channels], with_alpha()[..., :channels])
    assert [path.name for path in tmp_path.iterdir()] == ["view.png"]


def test_writing_into_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        save_png(tmp_path / "none" / "view.png", smooth())
    with pytest.raises(OutputError):
        save_turntable(tmp_path / "none" / "turn.gif", smooth()[None])


def test_a_turntable_loops_forever_with_one_palette_and_the_exact_background(tmp_path: Path) -> None:
    views = np.full((6, 40, 60, 3), 255, np.uint8)
    for view, picture in enumerate(views):
        picture[8:, 4 + 3 * view : 24 + 3 * view] = smooth(32, 20)
        picture[8:, 40:] = 253 - smooth(32, 20) // 16  # many colours that are nearly the background's
    save_turntable(tmp_path / "turn.gif", views, seconds=1.5)
    with Image.open(tmp_path / "turn.gif") as animation:
        assert animation.info["loop"] == 0 and getattr(animation, "n_frames", 1) == 6
        for view, picture in enumerate(views):
            animation.seek(view)
            assert animation.info["duration"] == 250
            shown = np.asarray(animation.convert("RGB")).astype(int)
            assert np.abs(shown - picture).mean() < 4
            assert (shown[:8] == 255).all()
    data = (tmp_path / "turn.gif").read_bytes()
    position, local_palettes = 0, 0
    while (position := data.find(b"\x21\xf9\x04", position)) >= 0:
        descriptor = position + 8
        local_palettes += data[descriptor : descriptor + 1] == b"," and data[descriptor + 9] >> 7
        position = descriptor
    assert data[10] >> 7 and not local_palettes


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), "2", None])
def test_a_turntable_of_no_duration_is_refused(tmp_path: Path, seconds: Any) -> None:
    with pytest.raises(OptionError, match="seconds"):
        save_turntable(tmp_path / "turn.gif", smooth()[None], seconds=seconds)


def test_pictures_are_composited_in_bands_and_pixels_looked_at_are_put_into_the_model_s_range_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 4), np.uint8)
    whole = composite(rgba, (10, 200, 3))
    monkeypatch.setattr(images, "BAND", 5)
    np.testing.assert_array_equal(composite(rgba, (10, 200, 3)), whole)
    assert composite(rgba[:0], (0, 0, 0)).shape == (0, 9, 7, 3)
    for size in ((4, 4), (20, 3), (9, 7)):
        resized = resize_bilinear(whole[0], size)
        np.testing.assert_array_equal(resized, resize_bilinear(to_model(whole[0]), size))
        assert resized.dtype == np.float32


@pytest.mark.parametrize(("bits", "step"), [(1, 255), (2, 85), (4, 17), (8, 1)])
def test_the_transparent_value_of_a_grey_png_of_few_bits_has_alpha_zero(tmp_path: Path, bits: int, step: int) -> None:
    values = np.arange(min(2**bits, 8)).repeat(8)[: 8 * min(2**bits, 8)]
    packed = np.packbits(((values[:, None] >> np.arange(bits)[::-1]) & 1).astype(np.uint8))
    header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", 1)) + chunk(b"IDAT", zlib.compress(b"\0" + packed.tobytes()))
    )
    loaded = load_image(written(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")))
    np.testing.assert_array_equal(loaded[0, :, 0], values * step)
    np.testing.assert_array_equal(loaded[0, :, 3], np.where(values == 1, 0, 255))


@pytest.mark.parametrize("load", [load_image, load_values])
def test_the_transparent_colour_of_a_16_bit_png_has_alpha_zero(tmp_path: Path, load: Any) -> None:
    values = np.array([[[0, 0, 0], [0x8012, 0x8012, 0x8012], [65535, 0, 0], [0x8013, 0x8012, 0x8012]]], np.uint16)
    transparent = chunk(b"tRNS", struct.pack(">HHH", 0x8012, 0x8012, 0x8012))
    path = written(tmp_path / "a.png", png_16_bit(values, color_type=2, extra=transparent))
    # Colours have 8 bits, numbers all 16.
    np.testing.assert_array_equal(load(path)[0, :, 3], [255, 0, 255, 0 if load is load_image else 255])


def test_no_picture_of_a_turntable_is_shorter_than_players_take(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3), dtype=np.uint8)
    save_turntable(tmp_path / "a.gif", images, seconds=0.3)
    with Image.open(tmp_path / "a.gif") as found:
        assert found.info["duration"] == 20


def test_threads_that_read_pictures_leave_warnings_as_they_were(tmp_path: Path) -> None:
    """Those of others are given meanwhile, and afterwards."""
    path, entered, leave = tmp_path / "picture.png", threading.Event(), threading.Event()
    Image.new("RGB", (4, 4)).save(path)
    before = list(warnings.filters)

    def outlasting() -> None:
        with quiet_pillow():
            entered.set()
            assert leave.wait(60)

    thread = threading.Thread(target=outlasting)
    with quiet_pillow():  # the first that comes in is not the last that goes
        thread.start()
        assert entered.wait(60)
        with pytest.warns(MvWarning, match="meanwhile"):
            warn("meanwhile")
    load_image(path)
    leave.set()
    thread.join()
    assert list(warnings.filters) == before


def test_filters_of_the_program_stay_where_new_ones_go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Python 3.14 with warnings that belong to a context: filterwarnings then adds to a list of its own."""
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    monkeypatch.setattr(images, "CONTEXT_AWARE", True, raising=False)
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_, **__: None)
    before = list(warnings.filters)
    with quiet_pillow():
        warnings.warn("odd metadata", stacklevel=1)
    load_image(tmp_path / "picture.png")
    assert list(warnings.filters) == before
