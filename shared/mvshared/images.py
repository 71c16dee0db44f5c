"""Pictures in and out: files of any common kind to RGBA, model values, PNG, grids and turntables.

Decoding and encoding are Pillow's; what is refused is refused before the pixels are decoded.
"""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mvshared.errors import ImageError, NumericsError, OptionError
from mvshared.files import write_atomic

MAX_PIXELS = 100_000_000
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
NO_SURFACE = (128, 128, 128)  # colour of the empty places of a normal map

Source = str | Path | Image.Image | NDArray[Any]
DECODE_ERRORS = (OSError, SyntaxError, ValueError, IndexError, EOFError, TypeError, KeyError, OverflowError, MemoryError)


def load_image(source: Source) -> NDArray[np.uint8]:
    """A picture as RGBA uint8 (h, w, 4), straight alpha, turned upright.

    Files are recognised by their content (PNG, JPEG, WebP, GIF, BMP, TIFF, ...; of an animation the first frame). Pictures in
    memory are Pillow's, or arrays uint8, uint16 or float in [0, 1] of shape (h, w) or (h, w, 1 to 4).

    Raises ImageError for what is missing, truncated, no picture, or larger than 100 million pixels.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, None)
    path = Path(source)
    if path.is_dir():
        raise ImageError("is a folder, and a picture is needed", path=path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below stands for Pillow's, and odd metadata is no concern
            with Image.open(path) as image:
                return _decode(image, path)
    except FileNotFoundError as cause:
        raise ImageError("no such file", path=path) from cause
    except UnidentifiedImageError as cause:
        hint = "PNG, JPEG, WebP, GIF, BMP and TIFF can be read"
        raise ImageError("is empty" if path.stat().st_size == 0 else "is no picture", path=path, hint=hint) from cause
    except Image.DecompressionBombError as cause:
        raise _too_large(path) from cause
    except DECODE_ERRORS as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise ImageError(f"cannot be decoded: {reason}", path=path, hint="the file may be damaged: copy it again") from cause


def _too_large(path: Path | None) -> ImageError:
    return ImageError(f"has more than {MAX_PIXELS:,} pixels", path=path, hint="make it smaller first")


def _decode(image: Image.Image, path: Path | None) -> NDArray[np.uint8]:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(path)
    if not width * height:
        raise ImageError("has no pixels", path=path)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        peak = 65535.0 if image.mode != "F" else 1.0
        if not np.isfinite(values).all():
            raise ImageError("holds values that are not finite", path=path)
        return _from_array(np.clip(values / peak, 0, 1))
    return np.asarray(_to_srgb(image).convert("RGBA")).copy()


def _to_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB if it has a usable profile of another space."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted if converted is not None else image


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or not array.size:
        raise ImageError(f"an array must have shape (h, w) or (h, w, 1 to 4), got {array.shape}")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_large(None)
    if array.dtype == np.uint16:
        array = np.rint(array / 257.0).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError("an array of floats must be finite and within 0 to 1", hint="use uint8 for 0 to 255")
        array = np.rint(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"an array must be uint8, uint16 or float, got {array.dtype}")
    channels = array.shape[2]
    color = array[..., : 3 if channels >= 3 else 1]
    alpha = array[..., -1:] if channels in (2, 4) else np.full((*array.shape[:2], 1), 255, np.uint8)
    return np.concatenate([np.broadcast_to(color, (*array.shape[:2], 3)), alpha], axis=2)


def composite(rgba: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Pictures uint8 (..., 3) of straight-alpha pictures (..., 4) over a plain background."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)).astype(np.uint8)


def to_model(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float32 in [-1, 1] of uint8, any shape."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def from_model(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Uint8 of values in [-1, 1], clipped and rounded, any shape. Raises NumericsError for NaN and infinity."""
    if not np.isfinite(values).all():
        raise NumericsError("the picture is not finite", where="decoding", hint="use --dtype float32")
    return np.rint((np.clip(values, -1, 1).astype(np.float32) + 1) * np.float32(127.5)).astype(np.uint8)


def load_normals(source: str | Path | Sequence[str | Path | NDArray[Any]], *, views: int, size_px: int) -> NDArray[np.float32]:
    """Normal maps float32 (v, size_px, size_px, 3) in [-1, 1]: a folder (normal_*.png, else all pictures, by name), or a list.

    Camera space, x right, y up, z toward the camera, stored as (n + 1) / 2 in 8 or 16 bit; alpha 0 means no surface.
    Raises OptionError for a wrong number of maps, ImageError for a map that cannot be read or is not square.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        if not folder.is_dir():
            raise ImageError("no such folder of normal maps", path=folder)
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
        source = [path for path in pictures if path.name.startswith("normal_")] or pictures
    if len(source) != views:
        raise OptionError("normals", expected=f"one map per view ({views})", got=f"{len(source)} maps")
    maps = []
    for item in source:
        rgba = load_image(item)
        if rgba.shape[0] != rgba.shape[1]:
            path = None if isinstance(item, np.ndarray) else item
            raise ImageError(f"a normal map must be square, got {rgba.shape[1]} x {rgba.shape[0]} pixels", path=path)
        maps.append(to_model(composite(resize_rgba(rgba, size_px, size_px), NO_SURFACE)))
    return np.stack(maps)


def resize_rgba(rgba: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resize uint8 (h, w, 4) with Lanczos, antialiased, in premultiplied alpha; the same pixels if the size is the same."""
    if rgba.shape[:2] == (height, width):
        return rgba
    image = Image.fromarray(rgba).convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    return np.asarray(image).copy()


def grid(images: NDArray[np.uint8], *, columns: int | None = None) -> NDArray[np.uint8]:
    """Pictures (v, h, w, 3) side by side in rows of `columns`, white where there is none."""
    count, height, width = images.shape[:3]
    across = min(count, 4) if columns is None else columns
    down = math.ceil(count / across)
    padded = np.full((down * across, height, width, 3), 255, np.uint8)
    padded[:count] = images
    cells = padded.reshape(down, across, height, width, 3).swapaxes(1, 2)
    return cells.reshape(down * height, across * width, 3)


def sheet(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows of pictures (r, n, h, w, 3) as one picture."""
    return np.concatenate([grid(row, columns=len(row)) for row in rows])


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 (h, w, 3 or 4)."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def save_png(path: Path | str, image: NDArray[np.uint8]) -> None:
    """Write uint8 (h, w, 3 or 4), all of it or nothing. Raises OutputError."""
    write_atomic(path, encode_png(image))


def save_turntable(path: Path | str, images: NDArray[np.uint8], *, seconds: float = 2.0) -> None:
    """Write an endless GIF of pictures (v, h, w, 3) in their order, with one palette for all. Raises OutputError."""
    strip = Image.fromarray(grid(images, columns=len(images)))
    palette = strip.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = [Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    encoded = io.BytesIO()
    duration_ms = max(20, round(1000 * seconds / len(frames)))
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:], duration=duration_ms, loop=0)
    write_atomic(path, encoded.getvalue())
