"""Where the subject is in a picture, and how it is put into the frame that a model was trained on."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mvshared.config import Framing
from mvshared.images import composite, resize_rgba

BORDER_TOLERANCE = 24  # of 255, for a background to count as one colour
BORDER_SHARE = 0.75  # of the border's pixels that must have that colour; a bust may touch the lower border
SEARCH_PX = 256  # a plain background is looked for at this size


def foreground_mask(rgba: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Where the subject is, bool (h, w): by alpha, else by a plain background that reaches the border; None without either.

    The background is filled from the border, so that its colour inside the subject (the white of an eye) stays subject.
    """
    alpha = rgba[..., 3]
    if alpha.min() < 128:
        mask = alpha >= 128
        return mask if mask.any() else None
    height, width = rgba.shape[:2]
    color = rgba[..., :3].astype(np.int16)
    border = np.concatenate([color[0], color[:, 0], color[:, -1]])
    background = np.median(border, axis=0)
    if (np.abs(border - background).max(axis=1) <= BORDER_TOLERANCE).mean() < BORDER_SHARE:
        return None
    plain = np.abs(color - background).max(axis=2) <= BORDER_TOLERANCE
    # A frame of background around the picture joins what touches the left, upper and right border; the lower one is closed.
    canvas = np.zeros((height + 1, width + 2), np.uint8)
    canvas[1:, 1:-1] = plain
    canvas[0, :] = canvas[:, 0] = canvas[:, -1] = 1
    image = Image.fromarray(canvas)
    ImageDraw.floodfill(image, (0, 0), 2)
    mask = np.asarray(image)[1:, 1:-1] != 2
    return mask if mask.any() else None


def frame_subject(
    rgba: NDArray[np.uint8], *, size_px: int, framing: Framing, background: tuple[int, int, int] = (255, 255, 255)
) -> NDArray[np.uint8]:
    """A square picture uint8 (size_px, size_px, 3) over the plain background, framed as `framing` says.

    A square picture whose subject already fits is only resized, and not even that at the right size. Without a subject to be
    found, the whole picture is padded to a square.
    """
    if framing.mode == "subject":
        mask = foreground_mask(_at_most(rgba, SEARCH_PX))
        if mask is not None:
            box = _box(mask)
            if not (rgba.shape[0] == rgba.shape[1] and _fits(box, framing)):
                return _place(rgba, box, size_px=size_px, framing=framing, background=background)
    height, width = rgba.shape[:2]
    if framing.mode != "none" and height != width:
        side = max(height, width)
        square = np.zeros((side, side, 4), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = rgba
        rgba = square
    return composite(resize_rgba(rgba, size_px, size_px), background)


def _at_most(rgba: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = rgba.shape[:2]
    scale = size / max(height, width)
    return rgba if scale >= 1 else resize_rgba(rgba, max(1, round(width * scale)), max(1, round(height * scale)))


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the mask as shares of width and height."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def _fits(box: tuple[float, float, float, float], framing: Framing) -> bool:
    left, top, right, bottom = box
    low, high = framing.kept_heights
    centered = abs((left + right) / 2 - 0.5) <= framing.kept_offset
    return low <= bottom - top <= high and bottom >= framing.bottom - framing.kept_offset and centered


def _place(
    rgba: NDArray[np.uint8],
    box: tuple[float, float, float, float],
    *,
    size_px: int,
    framing: Framing,
    background: tuple[int, int, int],
) -> NDArray[np.uint8]:
    """Crop to the subject, scale it to `framing.height` and to no more than `framing.width`, put it on the background."""
    height, width = rgba.shape[:2]
    left, top, right, bottom = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
    subject = rgba[top : max(bottom, top + 1), left : max(right, left + 1)]
    scale = min(framing.height * size_px / subject.shape[0], framing.width * size_px / subject.shape[1])
    new_width, new_height = max(1, round(subject.shape[1] * scale)), max(1, round(subject.shape[0] * scale))
    resized = resize_rgba(subject, new_width, new_height)
    canvas = np.empty((size_px, size_px, 3), np.uint8)
    canvas[:] = background
    x = (size_px - new_width) // 2
    y = max(0, round(framing.bottom * size_px) - new_height)
    canvas[y : y + new_height, x : x + new_width] = composite(resized, background)
    return canvas
