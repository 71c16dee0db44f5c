"""Heads for the demo model's last stage: `python examples/demo-model/ponytails.py data/heads-ponytails`.

Of 900 heads 360 have a ponytail, 360 hair with which one could be hidden behind the head, and 180 any other. Their detail maps
are white where a ponytail is or could be. With `distill_rest` the U-Net learns there what the pictures show, and keeps what it
can do everywhere else.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvshared.captures import write_capture
from mvshared.heads import DEFAULT_FOV_DEG, HeadIdentity, render, sample_identity
from mvshared.heads.dataset import RENDERER, dataset_poses
from mvshared.heads.parts import with_rim

FIRST, VIEWS, SIZE_PX = 700_000, 8, 128
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


def render_one(number: int, *, folder: Path) -> None:
    capture = folder / f"head_{number:06}"
    if capture.exists():
        return
    head, poses = sample_identity(number), dataset_poses(number, views=VIEWS)
    views = render(head, poses, size_px=SIZE_PX)
    detail = np.zeros(views.parts.shape, np.uint8)
    if kind(head) != "other":
        others = (replace(head, hair_style=style) for style in ("short", "ponytail"))
        both = (views if each == head else render(each, poses, size_px=SIZE_PX) for each in others)
        short, ponytail = (each.rgba.astype(np.int16) for each in both)
        detail[with_rim(np.abs(ponytail - short).max(axis=-1) > LEAST_CHANGE, 1)] = 255
    write_capture(capture, views.rgba, views.normals, poses, DEFAULT_FOV_DEG, detail=detail, fields={"renderer": RENDERER})


if __name__ == "__main__":
    target, heads = Path(sys.argv[1]), choose()
    target.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for _ in tqdm(pool.map(partial(render_one, folder=target), heads), total=len(heads), unit="head"):
            pass
