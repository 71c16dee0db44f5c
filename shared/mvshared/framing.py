"""Where the subject is in a picture, and how it is put into the frame that a model was trained on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mvshared.config import Framing
from mvshared.errors import ImageError, OptionError
from mvshared.images import Source, composite, from_model, load_image, resize_bilinear, resize_rgba, to_model

BORDER_TOLERANCE = 24  # of 255, for a background to count as one colour
BORDER_SHARE = 0.75  # of the border's pixels that must have that colour; a bust may touch the lower border
SEARCH_PX = 256  # the subject is looked for at this size
DETAIL = 4  # source pixels per pixel of the frame that are looked at; beyond, the crop is made smaller first

Color = tuple[int, int, int]


class Box(NamedTuple):
    """A rectangle; right and bottom lie just outside."""

    left: float
    top: float
    right: float
    bottom: float


class Framed(NamedTuple):
    """A picture for a model: `full` uint8 (h, w, 3) at its own size, for an encoder that scales it by itself; `picture` uint8
    and `pixels` float32 in [-1, 1], both (size_px, size_px, 3). `doubt` says why all of it is shown where a subject was looked
    for and not found, else it is empty."""

    full: NDArray[np.uint8]
    picture: NDArray[np.uint8]
    pixels: NDArray[np.float32]
    doubt: str = ""


def load_framed(given: Source, *, size_px: int, framing: Framing) -> Framed:
    """`frame_picture` of a file or of a picture in memory. Raises ImageError, with the path of a file."""
    picture = load_image(given)
    try:
        return frame_picture(picture, size_px=size_px, framing=framing)
    except ImageError as error:
        if isinstance(given, str | Path):
            raise ImageError(error.message, path=given, hint=error.hint) from error
        raise


def frame_picture(rgba: NDArray[np.uint8], *, size_px: int, framing: Framing) -> Framed:
    """A picture (h, w, 4) as a model with this framing is given it. Raises as `frame_subject` does."""
    if framing.mode == "subject" or framing.resample == "lanczos":
        picture, doubt = _framed(rgba, size_px=size_px, framing=framing)
        return Framed(picture, picture, to_model(picture), doubt)
    _check_visible(rgba)
    full = composite(_squared(rgba) if framing.mode == "pad" else rgba, framing.background)
    pixels = resize_bilinear(full, (size_px, size_px))
    return Framed(full, from_model(pixels), pixels)


def foreground_mask(rgba: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """Where the subject is, (h, w) in [0, 1]: its alpha, else what a plain background leaves; None without either.

    The background is filled from the left, upper and right border, so that its colour inside the subject (the white of an eye)
    or below it (a white collar cut by the lower border) stays subject.
    """
    if _has_alpha(rgba):
        mask = rgba[..., 3].astype(np.float32)
        mask /= 255
    else:
        color = _plain_background(rgba)
        if color is None:
            return None
        mask = (~_background(rgba, color)).astype(np.float32)
    return mask if mask.max() >= 0.5 else None


def frame_subject(rgba: NDArray[np.uint8], *, size_px: int, framing: Framing) -> NDArray[np.uint8]:
    """A square picture uint8 (size_px, size_px, 3) of a picture (h, w, 4), framed as `framing` says.

    In mode `subject` a plain background of clearly another colour becomes that one's, without its colour on the outline. A
    square picture whose subject already fits is only resized, and not even that at the right size. Where no subject is found,
    the whole picture is padded to a square. Raises OptionError for a size below 1, ImageError if nothing is visible.
    """
    return _framed(rgba, size_px=size_px, framing=framing)[0]


def _framed(rgba: NDArray[np.uint8], *, size_px: int, framing: Framing) -> tuple[NDArray[np.uint8], str]:
    """What `frame_subject` returns, and the `doubt` of `Framed`."""
    background = framing.background
    if size_px < 1:
        raise OptionError("size_px", expected="1 or more", got=size_px)
    _check_visible(rgba)
    if framing.mode == "none":
        return composite(resize_rgba(rgba, size_px, size_px), background), ""
    small = _at_most(rgba, SEARCH_PX)
    mask = foreground_mask(small) if framing.mode == "subject" else None
    if mask is None:
        return composite(_padded(rgba, size_px), background), _doubt(small) if framing.mode == "subject" else ""
    box, color = _box(mask >= 0.5), None if _has_alpha(small) else _plain_background(small)
    kept = rgba.shape[0] == rgba.shape[1] and _fits(box, side=len(small), framing=framing)
    recolor = color is not None and np.abs(np.subtract(color, background)).max() > BORDER_TOLERANCE
    if kept and not recolor:
        return composite(resize_rgba(rgba, size_px, size_px), background), ""
    picture = _at_most(rgba if kept else _crop(rgba, box, search=small.shape), DETAIL * size_px)
    empty = picture[..., 3] < 128 if color is None else _background(picture, color)
    if color is not None and recolor:
        picture = _recolored(picture, empty, color=color, background=background)
    elif color is not None:
        background = color  # so that the crop has no visible edge
    if kept:
        return composite(resize_rgba(picture, size_px, size_px), background), ""
    return composite(_placed(picture, _box(~empty), size_px=size_px, framing=framing), background), ""


def _doubt(rgba: NDArray[np.uint8]) -> str:
    """Why there is no `foreground_mask` of a picture of which something is visible."""
    if _has_alpha(rgba):
        return "hardly anything of it is opaque"
    if _plain_background(rgba) is not None:
        return "it has one colour, from one border to the other"
    return "its background is neither transparent nor of one colour"


def _check_visible(rgba: NDArray[np.uint8]) -> None:
    if not rgba[..., 3].any():
        raise ImageError("the picture shows nothing: all of it is transparent")


def _squared(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture in the middle of a transparent square."""
    height, width = rgba.shape[:2]
    side = max(height, width)
    canvas = np.zeros((side, side, 4), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = rgba
    return canvas


def _has_alpha(rgba: NDArray[np.uint8]) -> bool:
    return bool(rgba[..., 3].min() < 128)


def _plain_background(rgba: NDArray[np.uint8]) -> Color | None:
    """The colour that most of the left, upper and right border has, if there is one."""
    color = rgba[..., :3].astype(np.int16)
    border = np.concatenate([color[0], color[:, 0], color[:, -1]])
    median = np.rint(np.median(border, axis=0)).astype(np.int16)
    if (np.abs(border - median).max(axis=1) <= BORDER_TOLERANCE).mean() < BORDER_SHARE:
        return None
    red, green, blue = median.tolist()
    return red, green, blue


def _background(rgba: NDArray[np.uint8], color: Color) -> NDArray[np.bool_]:
    """Bool (h, w): pixels near the colour that are connected to the left, upper or right border through such pixels."""
    free = np.abs(rgba[..., :3].astype(np.int16) - np.asarray(color, np.int16)).max(axis=2) <= BORDER_TOLERANCE
    reached = np.zeros_like(free)
    reached[0], reached[:, 0], reached[:, -1] = free[0], free[:, 0], free[:, -1]
    rows, columns = _runs(free), _runs(free.T).T
    count = 0
    while count < (count := int(reached.sum())):
        for runs in (rows, columns):
            hit = np.zeros(int(runs.max()) + 1, np.bool_)
            hit[runs[reached]] = True
            reached = hit[runs] & free
    return reached


def _runs(free: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers (h, w) of the horizontal runs of free pixels; what is between two runs has the number of the one before."""
    starts = free.copy()
    starts[:, 1:] &= ~free[:, :-1]
    return np.cumsum(starts, dtype=np.int64).reshape(free.shape)


def _box(inside: NDArray[np.bool_]) -> Box:
    """The rectangle around a mask (h, w), in pixels; the whole of it if the mask is empty."""
    if not inside.any():
        return Box(0, 0, inside.shape[1], inside.shape[0])
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _fits(box: Box, *, side: int, framing: Framing) -> bool:
    low, high = framing.kept_heights
    height, bottom, middle = (box.bottom - box.top) / side, box.bottom / side, (box.left + box.right) / 2 / side
    return low <= height <= high and max(abs(bottom - framing.bottom), abs(middle - 0.5)) <= framing.kept_offset


def _at_most(rgba: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The picture, made smaller if one of its sides is longer than `size`."""
    height, width = rgba.shape[:2]
    scale = size / max(height, width)
    return rgba if scale >= 1 else resize_rgba(rgba, max(1, round(width * scale)), max(1, round(height * scale)))


def _padded(rgba: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """The picture scaled to fit, in the middle of a transparent square."""
    height, width = rgba.shape[:2]
    scale = size_px / max(height, width)
    resized = resize_rgba(rgba, max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = np.zeros((size_px, size_px, 4), np.uint8)
    top, left = (size_px - resized.shape[0]) // 2, (size_px - resized.shape[1]) // 2
    canvas[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return canvas


def _crop(rgba: NDArray[np.uint8], box: Box, *, search: tuple[int, ...]) -> NDArray[np.uint8]:
    """The part of the picture in a box of pixels of the smaller picture of shape `search`, and one such pixel around it."""
    down, across = rgba.shape[0] / search[0], rgba.shape[1] / search[1]
    top, left = int(max(0, box.top - 1) * down), int(max(0, box.left - 1) * across)
    bottom, right = int(np.ceil((box.bottom + 1) * down)), int(np.ceil((box.right + 1) * across))
    return rgba[top:bottom, left:right]


def _recolored(rgba: NDArray[np.uint8], empty: NDArray[np.bool_], *, color: Color, background: Color) -> NDArray[np.uint8]:
    """The picture with another background. Pixels within 2 of it are taken as mixtures of it and the subject further in."""
    picture = rgba[..., :3].astype(np.float32)
    inner = Image.fromarray(np.where(empty, 0, 255).astype(np.uint8)).filter(ImageFilter.MinFilter(5))
    subject = Image.fromarray(np.dstack([rgba[..., :3], np.asarray(inner)])).convert("RGBa").filter(ImageFilter.BoxBlur(4))
    near = np.asarray(subject.convert("RGBA")).astype(np.float32)
    outline = ~empty & (np.asarray(inner) == 0) & (near[..., 3] > 0)
    contrast = near[..., :3] - np.asarray(color, np.float32)
    along = ((picture - np.asarray(color, np.float32)) * contrast).sum(axis=2) / np.maximum((contrast**2).sum(axis=2), 1)
    share = np.where(outline, np.clip(along, 0, 1), 1)[..., None]
    mixed = picture + (1 - share) * np.subtract(background, color, dtype=np.float32)
    filled = np.where(empty[..., None], np.asarray(background, np.float32), np.clip(mixed, 0, 255))
    return np.dstack([np.rint(filled).astype(np.uint8), rgba[..., 3]])


def _placed(rgba: NDArray[np.uint8], box: Box, *, size_px: int, framing: Framing) -> NDArray[np.uint8]:
    """The picture scaled and shifted so that the box stands where `framing` says, in a transparent square."""
    height, width = rgba.shape[:2]
    scale = min(framing.height * size_px / (box.bottom - box.top), framing.width * size_px / (box.right - box.left))
    x = size_px / 2 - scale * (box.left + box.right) / 2
    y = max(framing.bottom * size_px - scale * box.bottom, -scale * box.top)
    left, top = min(round(x), size_px - 1), min(round(y), size_px - 1)
    right, bottom = max(round(x + scale * width), left + 1, 1), max(round(y + scale * height), top + 1, 1)
    shown = (max(0, left), max(0, top), min(size_px, right), min(size_px, bottom))
    part = (
        (shown[0] - left) / (right - left) * width,
        (shown[1] - top) / (bottom - top) * height,
        (shown[2] - left) / (right - left) * width,
        (shown[3] - top) / (bottom - top) * height,
    )
    size = (shown[2] - shown[0], shown[3] - shown[1])
    resized = Image.fromarray(rgba).resize(size, Image.Resampling.LANCZOS, box=part)
    canvas = np.zeros((size_px, size_px, 4), np.uint8)
    canvas[shown[1] : shown[3], shown[0] : shown[2]] = np.asarray(resized)
    return canvas
