"""What the pixels of a head's picture can show."""

from enum import IntEnum

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray


class Part(IntEnum):
    """What a pixel shows."""

    BACKGROUND = 0
    SKIN = 1
    EYE = 2
    BROW = 3
    MOUTH = 4
    HAIR = 5
    HAT = 6
    HAT_BAND = 7
    GLASSES = 8
    CLOTHES = 9
    COLLAR = 10
    ANIMAL_EARS = 11
    BEARD = 12
    NOSE = 13
    EAR = 14


def with_rim(covered: NDArray[np.bool_], rim_px: int) -> NDArray[np.bool_]:
    """Where pixels (v, h, w) are covered, or are within `rim_px` rows and columns of one that is."""
    padded = np.pad(covered, ((0, 0), (rim_px, rim_px), (rim_px, rim_px)))
    return np.any(sliding_window_view(padded, (2 * rim_px + 1,) * 2, axis=(1, 2)), axis=(-2, -1))
