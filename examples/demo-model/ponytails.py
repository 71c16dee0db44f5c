"""Heads for a late stage of the demo model: `python examples/demo-model/ponytails.py data/heads-ponytails`.

Of 900 heads 360 have a ponytail, 360 hair with which one could be hidden behind the head, and 180 any other. Their detail maps
are white where a ponytail is or could be. With `distill_rest` the U-Net learns there what the pictures show, and keeps what it
can do everywhere else.
"""

import sys
from dataclasses import replace
from itertools import count

import numpy as np
from numpy.typing import NDArray

from mvshared.heads import HeadIdentity, HeadViews, render, sample_identity
from mvshared.heads.dataset import render_dataset
from mvshared.heads.parts import with_rim

FIRST = 700_000
COULD_HIDE_ONE = ("short", "bun", "two_buns", "pigtails", "spiky", "side_part", "fringe", "bowl")
LEAST_CHANGE = 6  # of 255


def kind(head: HeadIdentity) -> str:
    return "ponytail" if head.hair_style == "ponytail" else "none" if head.hair_style in COULD_HIDE_ONE else "other"


def choose() -> list[int]:
    """The numbers of the heads, the first ones that there are of each kind."""
    chosen, left = list[int](), {"ponytail": 360, "none": 360, "other": 180}
    numbers = count(FIRST)
    while any(left.values()):
        number = next(numbers)
        found = kind(sample_identity(number))
        if left[found]:
            left[found] -= 1
            chosen.append(number)
    return chosen


def ponytails(number: int, poses: NDArray[np.float32], views: HeadViews) -> NDArray[np.uint8]:
    """Detail maps, white where the views would be others without the head's ponytail, or with one."""
    head, shape = sample_identity(number), views.parts.shape
    if kind(head) == "other":
        return np.zeros(shape, np.uint8)
    others = (replace(head, hair_style=style) for style in ("short", "ponytail"))
    both = (views if each == head else render(each, poses, size_px=shape[-1]) for each in others)
    short, ponytail = (each.rgba.astype(np.int16) for each in both)
    return np.uint8(255) * with_rim(np.abs(ponytail - short).max(axis=-1) > LEAST_CHANGE, 1)


if __name__ == "__main__":
    render_dataset(sys.argv[1], choose(), details=ponytails)
