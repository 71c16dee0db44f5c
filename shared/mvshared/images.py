"""Pictures in and out: files of any common kind to RGBA, model values, PNG, grids and turntables.

Decoding and encoding are Pillow's; what is refused is refused before the pixels are decoded.
"""

import io
import math
import os
import re
import shlex
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from mvshared.errors import ImageError, NumericsError, OptionError
from mvshared.files import write_atomic
from mvshared.numbers import whole

MAX_PIXELS = 100_000_000
BAND = 2**20  # pixels that are mixed at once
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PALETTE_SAMPLES = 20_000  # pixels of a turntable that its palette is made from

GREY_STEPS = {"L;2": 85, "L;4": 17}  # of a PNG's fewer bits among 8, by Pillow's raw mode
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of Pillow's; some of its others start programs
HEIF = re.compile(rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1|avi[fs])", re.DOTALL)  # how HEIC, HEIF and AVIF begin
GREY_PEAKS = {"I;16": 65535.0, "I;16L": 65535.0, "I;16B": 65535.0, "I;16N": 65535.0, "I": 65535.0, "F": 1.0}
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation

Source = str | Path | Image.Image | NDArray[Any]
Convert = Callable[[Image.Image, Path | None], NDArray[Any]]


def load_image(source: Source) -> NDArray[np.uint8]:
    """A picture as RGBA uint8 (h, w, 4), straight alpha, upright, in sRGB if its colour profile can be used.

    Files are recognised by their content (PNG, JPEG, WebP, GIF, BMP, TIFF; of an animation the first frame). Pictures in
    memory are Pillow's, or arrays uint8, uint16 or float in [0, 1] of shape (h, w) or (h, w, 1 to 4). Pillow reads 16 bits
    per channel of grey pictures and the upper 8 of coloured ones.

    Raises ImageError for what is missing, truncated, no picture, or larger than 100 million pixels.
    """
    return _from_array(source) if isinstance(source, np.ndarray) else _load(source, _colors)


def load_values(source: Source) -> NDArray[np.float32]:
    """The numbers that a picture stores, RGBA float32 (h, w, 4) from 0 to 255, upright: for pictures of something else than
    colours, whose colour profile says nothing. Of PNG all 16 bits are kept, but of grey with alpha. Takes and raises what
    `load_image` does."""
    return _scaled(source).astype(np.float32) if isinstance(source, np.ndarray) else _load(source, _stored)


CONTEXT_AWARE = getattr(sys.flags, "context_aware_warnings", False)  # Python 3.14's; without the GIL it is the default


class _Readers:
    """How many threads are reading pictures, and the filter that keeps Pillow's warnings back meanwhile."""

    lock = threading.Lock()
    count = 0
    filter: Any = None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """A context without the warnings of reading pictures: MAX_PIXELS stands for Pillow's limit, and odd metadata is no concern.

    Many threads may be in it at once: `warnings.catch_warnings` would leave all warnings of the process off if the first that
    came in is not the last that goes. Where warnings belong to a context, it concerns that alone.
    """
    if CONTEXT_AWARE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        return
    with _Readers.lock:
        _Readers.count += 1
        if _Readers.count == 1:
            warnings.filterwarnings("ignore", module=rf"PIL\.|{re.escape(__name__)}$")
            _Readers.filter = warnings.filters[0]
    try:
        yield
    finally:
        with _Readers.lock:
            _Readers.count -= 1
            if _Readers.count == 0 and _Readers.filter in warnings.filters:
                cast(list[Any], warnings.filters).remove(_Readers.filter)


def _load(source: Source, convert: Convert) -> NDArray[Any]:
    with quiet_pillow():
        if isinstance(source, Image.Image):
            return _decode(source, None, convert)
        if not isinstance(source, str | Path):
            opened = isinstance(source, bytes) or hasattr(source, "read")
            hint = "PIL.Image.open reads it" if opened else "numpy.asarray makes an array of it" * hasattr(source, "__array__")
            expected = "a path, a Pillow image or an array"
            raise ImageError(f"a picture must be {expected}, got {type(source).__name__}", hint=hint)
        return _from_file(Path(source), convert)


def _from_file(path: Path, convert: Convert) -> NDArray[Any]:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("is a folder, and a picture is needed", path=path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("is no regular file", path=path)
        if not status.st_size:
            raise ImageError("is empty", path=path)
        with path.open("rb") as file:
            return _decode(_open(file, path), path, convert)
    except FileNotFoundError as cause:
        raise ImageError("no such file", path=path) from cause
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        raise ImageError(f"cannot be read: {getattr(cause, 'strerror', None) or cause}", path=path) from cause


def _open(file: BinaryIO, path: Path) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as cause:
        raise ImageError("is no picture that can be read", path=path, hint=what_can_be_read(path)) from cause
    except Image.DecompressionBombError as cause:
        raise _too_large(path) from cause
    except Exception as cause:  # Pillow's parsers meet damaged data with nearly every class of error
        raise _damaged(path, cause) from cause


def what_can_be_read(path: Path) -> str:
    """A hint about a file that is none of FORMATS; of one of a telephone's pictures, how to make one of them."""
    try:
        with path.open("rb") as file:
            telephone = HEIF.match(file.read(12)) is not None
    except OSError:
        telephone = False
    if not telephone:
        return "PNG, JPEG, WebP, GIF, BMP and TIFF can be read"
    converted = path.with_name(f"{path.stem}{'-converted' if path.suffix == '.png' else ''}.png")
    old, new = (shlex.quote(str(each)) for each in (path, converted))
    return (
        f"HEIC and AVIF cannot be read; on a Mac sips -s format png {old} --out {new} makes a PNG, elsewhere heif-convert does"
    )


def _too_large(path: Path | None) -> ImageError:
    return ImageError(f"has more than {MAX_PIXELS:,} pixels", path=path, hint="make it smaller first")


def _damaged(path: Path | None, cause: Exception) -> ImageError:
    reason = str(cause) or type(cause).__name__
    return ImageError(f"cannot be decoded: {reason}", path=path, hint="the file may be damaged: copy it again")


def _decode(image: Image.Image, path: Path | None, convert: Convert) -> NDArray[Any]:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(path)
    if not width * height:
        raise ImageError("has no pixels", path=path)
    try:
        return convert(image, path)
    except ImageError:
        raise
    except Exception as cause:  # as in _open
        raise _damaged(path, cause) from cause


def _colors(image: Image.Image, path: Path | None) -> NDArray[np.uint8]:
    _scale_transparency(image)
    image.load()
    image = _upright(image)
    if image.mode in GREY_PEAKS:
        return _from_array(_grey(image, path))
    return np.asarray(_to_srgb(image).convert("RGBA")).copy()


def _stored(image: Image.Image, path: Path | None) -> NDArray[np.float32]:
    encoded, raw_mode = _png_of_16_bits(image)
    transparent = image.info.get("transparency")
    _scale_transparency(image)
    image.load()
    upper = _upright(image)
    if upper.mode in GREY_PEAKS:
        return _scaled(_grey(upper, path)).astype(np.float32)
    values = np.asarray(upper.convert("RGBA")).astype(np.float32)
    if encoded:
        # Pillow keeps the first byte of every number. Read as little-endian numbers, the file yields the second ones.
        second: Any = Image.open(io.BytesIO(encoded), formats=("PNG",))
        second.tile = [(codec, box, offset, raw_mode.replace("16B", "16L")) for codec, box, offset, _ in second.tile]
        second.load()
        lower = np.asarray(_upright(second), dtype=np.float32)
        channels = lower.shape[2]
        whole = values[..., :channels] * 256 + lower
        values[..., :channels] = whole / 257
        if isinstance(transparent, tuple):
            values[..., 3] = np.where((whole == transparent).all(axis=-1), 0, 255)
    return values


def _scale_transparency(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the 8 bits that Pillow will decode to, which it leaves in those of the file."""
    tile, colour = getattr(image, "tile", None), image.info.get("transparency")
    raw_mode = tile[0][3] if image.format == "PNG" and tile else ""
    if isinstance(colour, int) and raw_mode in GREY_STEPS:
        image.info["transparency"] = colour * GREY_STEPS[raw_mode]
    elif isinstance(colour, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _png_of_16_bits(image: Image.Image) -> tuple[bytes, str]:
    """The bytes and the raw mode of a coloured PNG with 16 bits per channel that is not decoded yet; else both empty.

    Pillow closes a file that it has opened itself as soon as it has decoded it, so this is before that.
    """
    tile, file = getattr(image, "tile", None), getattr(image, "fp", None)
    raw_mode = tile[0][3] if image.format == "PNG" and tile and file is not None else ""
    if file is None or raw_mode not in ("RGB;16B", "RGBA;16B"):
        return b"", ""
    place = file.tell()
    file.seek(0)
    encoded = file.read()
    file.seek(place)
    return encoded, raw_mode


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; not ImageOps.exif_transpose, which fails on other damaged tags."""
    found = orientation(image)
    return image.transpose(UPRIGHT[found]) if found in UPRIGHT else image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, which is upright, if there is none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as in _open; damaged metadata does not spoil the picture
        return 1
    return found if found in UPRIGHT else 1


def _grey(image: Image.Image, path: Path | None) -> NDArray[np.float64]:
    """Grey and alpha (h, w, 2) in [0, 1] of more than 8 bits."""
    values, peak = np.asarray(image, dtype=np.float64), GREY_PEAKS[image.mode]
    if not (values.min() >= 0 and values.max() <= peak):  # false for NaN, too
        raise ImageError(f"holds grey values outside 0 to {peak:g}", path=path)
    alpha = values != image.info.get("transparency")
    return np.stack([values / peak, alpha], axis=-1)


def _to_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB if it has a usable profile of another space; profiles of grey pictures are ignored."""
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if converted is None else converted


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    scaled = _scaled(array)
    return scaled if scaled.dtype == np.uint8 else np.rint(scaled).astype(np.uint8)


def _scaled(array: NDArray[Any]) -> NDArray[Any]:
    """RGBA (h, w, 4) from 0 to 255 of an array that `load_image` takes: uint8, or float64 with fractions."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or not array.size:
        raise ImageError(f"an array must have shape (h, w) or (h, w, 1 to 4), got {array.shape}")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_large(None)
    if array.dtype.newbyteorder("=") == np.uint16:  # TIFF files have either order
        array = array / 257.0
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # false for NaN, too
            raise ImageError("an array of floats must be finite and within 0 to 1", hint="use uint8 for 0 to 255")
        array = array.astype(np.float64) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"an array must be uint8, uint16 or float, got {array.dtype}")
    channels = array.shape[2]
    color = array[..., : 3 if channels >= 3 else 1]
    alpha = array[..., -1:] if channels in (2, 4) else np.full((*array.shape[:2], 1), 255, array.dtype)
    return np.concatenate([np.broadcast_to(color, (*array.shape[:2], 3)), alpha], axis=2)


def composite(rgba: NDArray[np.uint8], background: tuple[int, int, int] = (255, 255, 255)) -> NDArray[np.uint8]:
    """Pictures uint8 (..., 3) of straight-alpha pictures (..., 4) over a plain background."""
    pixels = rgba.reshape(-1, 4)
    result = np.empty((len(pixels), 3), np.uint8)
    for start in range(0, len(pixels), BAND):  # a photograph in float would be a gigabyte
        band = pixels[start : start + BAND]
        alpha = band[:, 3:].astype(np.float32) / 255
        mixed = band[:, :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
        result[start : start + BAND] = np.rint(mixed, out=mixed)
    return result.reshape(*rgba.shape[:-1], 3)


def to_model(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float32 in [-1, 1] of uint8, any shape."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def from_model(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Uint8 of values in [-1, 1], clipped and rounded, any shape. Raises NumericsError for NaN and infinity."""
    if not np.isfinite(values).all():
        raise NumericsError("the picture is not finite", where="decoding", hint='use dtype="float32"')
    return np.rint((np.clip(values, -1, 1).astype(np.float32) + 1) * np.float32(127.5)).astype(np.uint8)


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of a picture."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def find_picture(folder: Path, name: str) -> Path | None:
    """The file of that name, which may lack its suffix, as in Blender's transforms.json, or have the backslashes of Windows;
    None if there is none."""
    suffixes = ("", *PICTURE_SUFFIXES, *(suffix.upper() for suffix in PICTURE_SUFFIXES))
    names = (each + suffix for each in dict.fromkeys((name, name.replace("\\", "/"))) for suffix in suffixes)
    return next((path for each in names if os.path.isfile(path := folder / each)), None)


def resize_rgba(rgba: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resize uint8 (h, w, 4) with Lanczos, antialiased, by Pillow in premultiplied alpha; the same pixels at the same size."""
    if rgba.shape[:2] == (height, width):
        return rgba
    return np.asarray(Image.fromarray(rgba).resize((width, height), Image.Resampling.LANCZOS)).copy()


def resize_plane(plane: NDArray[np.float32], size_px: int) -> NDArray[np.float32]:
    """Values (h, w) at (size_px, size_px), with Pillow's Lanczos in float, which may overshoot."""
    return np.asarray(Image.fromarray(plane).resize((size_px, size_px), Image.Resampling.LANCZOS))


def resize_bilinear(pixels: NDArray[Any], size_px: tuple[int, int]) -> NDArray[np.float32]:
    """Pixels (h, w, c) at `size_px` (height, width), bilinear, not antialiased: PyTorch's interpolate, corners not aligned.

    Pixels of uint8 are put into [-1, 1] as `to_model` does, as many of them as are looked at.
    """
    for axis, size in enumerate(size_px):
        length = pixels.shape[axis]
        position = np.maximum((np.arange(size) + 0.5) * (length / size) - 0.5, 0)
        low = position.astype(np.int64)
        share = (position - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, length - 1)
        near, far = pixels.take(low, axis), pixels.take(high, axis)
        if near.dtype == np.uint8:
            near, far = to_model(near), to_model(far)
        pixels = near * (1 - share) + far * share
    return pixels


def grid(images: NDArray[np.uint8], *, columns: int | None = None, pad_px: int = 0) -> NDArray[np.uint8]:
    """Pictures (v, h, w, 3) side by side in rows of `columns` (4 if not given), `pad_px` apart, white where there is none.

    Raises OptionError for fewer than one column or a negative distance, ImageError for an array that is no pictures.
    """
    count, height, width = _pictures(images).shape[:3]
    across = min(count, 4) if columns is None else whole("columns", columns, 1)
    pad_px = whole("pad_px", pad_px, 0)
    down = math.ceil(count / across)
    padded = np.full((down * across, height + pad_px, width + pad_px, 3), 255, np.uint8)
    padded[:count, :height, :width] = images
    cells = padded.reshape(down, across, height + pad_px, width + pad_px, 3).swapaxes(1, 2)
    joined = cells.reshape(down * (height + pad_px), across * (width + pad_px), 3)
    return joined[: joined.shape[0] - pad_px, : joined.shape[1] - pad_px]


def _pictures(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise ImageError(f"pictures must be uint8 (v, h, w, 3), got {images.dtype} {images.shape}")
    return images


def sheet(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows of pictures (r, n, h, w, 3) as one picture."""
    return np.concatenate([grid(row, columns=len(row)) for row in rows])


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 (h, w, 3 or 4). Raises ImageError for another array."""
    if image.ndim != 3 or image.shape[2] not in (3, 4) or image.dtype != np.uint8 or not image.size:
        raise ImageError(f"a picture must be uint8 (h, w, 3 or 4), got {image.dtype} {image.shape}")
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def save_png(path: Path | str, image: NDArray[np.uint8]) -> None:
    """Write uint8 (h, w, 3 or 4), all of it or nothing. Raises ImageError for another array, OutputError."""
    write_atomic(path, encode_png(image))


def save_turntable(path: Path | str, images: NDArray[np.uint8], *, seconds: float = 2.0) -> None:
    """Write an endless GIF of pictures (v, h, w, 3) in their order, with one palette for all.

    `seconds` is one round, to 1/100 s per picture and no less than 2/100 s, below which players slow down. Raises OptionError,
    ImageError for an array that is no pictures, OutputError.
    """
    if not isinstance(seconds, int | float | np.number) or not 0 < seconds <= 600:
        raise OptionError("seconds", expected="above 0, at most 600", got=seconds)
    palette = _shared_palette(images)
    frames = [Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    encoded = io.BytesIO()
    duration_ms = max(20, 10 * round(100 * seconds / len(frames)))
    colors = palette.getpalette()  # given once more, or Pillow writes a reordered copy into every frame
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:], duration=duration_ms, loop=0, palette=colors)
    write_atomic(path, encoded.getvalue())


def _shared_palette(images: NDArray[np.uint8]) -> Image.Image:
    """A picture with 256 colours for pictures (v, h, w, 3), such that the first corner's is kept exactly.

    A background that is off by a little is what one sees first. Pillow looks a colour up by its cell of 4 x 4 x 4 values, as
    if it were at the cell's lower corner, so every entry nearer to that corner than the colour itself gives way to it.
    """
    colors = _pictures(images).reshape(-1, 3)
    sample = colors[:: math.ceil(len(colors) / PALETTE_SAMPLES)]
    palette = Image.fromarray(sample[None]).quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    entries = np.asarray(palette.getpalette(), np.int64).reshape(-1, 3)
    corner = colors[0].astype(np.int64)
    cell = corner // 4 * 4
    distance = ((entries - cell) ** 2).sum(axis=1)
    entries[distance <= max(distance.min(), ((corner - cell) ** 2).sum())] = corner
    palette.putpalette(entries.ravel().tolist())
    return palette
