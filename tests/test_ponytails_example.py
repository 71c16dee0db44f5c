"""The program that renders the heads of the demo model's stage on ponytails."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers import program_of_the_demo_model

from mvshared.heads import Part, render, sample_identity
from mvshared.heads.dataset import dataset_poses


@pytest.fixture(scope="module")
def program() -> Any:
    return program_of_the_demo_model("ponytails")


def test_the_heads_are_as_many_of_each_kind_as_it_says(program: Any) -> None:
    numbers = program.choose()
    assert Counter(program.kind(sample_identity(number)) for number in numbers) == {"ponytail": 360, "none": 360, "other": 180}
    assert len(set(numbers)) == 900 and (min(numbers), max(numbers)) == (700_000, 707_041)


@pytest.mark.parametrize(("kind", "marked"), [("ponytail", True), ("none", True), ("other", False)])
def test_detail_maps_are_white_where_a_ponytail_is_or_could_be(program: Any, kind: str, marked: bool) -> None:
    number = next(number for number in program.choose() if program.kind(sample_identity(number)) == kind)
    poses = dataset_poses(number, views=8)
    views = render(number, poses, size_px=128)
    maps = program.ponytails(number, poses, views)
    assert maps.shape == (8, 128, 128) and maps.dtype == np.uint8
    assert set(np.unique(maps)) == ({0, 255} if marked else {0})
    if kind == "ponytail":
        assert maps[np.isin(views.parts, (Part.EYE, Part.MOUTH))].mean() < 3, "the face is kept as it is"
