"""The program that renders the heads of the demo model's last stage."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvshared.captures import load_capture
from mvshared.heads import Part, render, sample_identity
from mvshared.heads.dataset import dataset_poses

PROGRAM = Path(__file__).parents[1] / "examples/demo-model/ponytails.py"


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("ponytails", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_heads_are_as_many_of_each_kind_as_it_says(program: Any) -> None:
    numbers = program.choose()
    assert Counter(program.kind(sample_identity(number)) for number in numbers) == {"ponytail": 360, "none": 360, "other": 180}
    assert len(set(numbers)) == 900 and (min(numbers), max(numbers)) == (700_000, 707_041)


@pytest.mark.parametrize(("kind", "marked"), [("ponytail", True), ("none", True), ("other", False)])
def test_detail_maps_are_white_where_a_ponytail_is_or_could_be(program: Any, tmp_path: Path, kind: str, marked: bool) -> None:
    number = next(number for number in program.choose() if program.kind(sample_identity(number)) == kind)
    program.render_one(number, folder=tmp_path)
    capture = load_capture(tmp_path / f"head_{number:06}")
    maps = np.stack([np.asarray(Image.open(path)) for path in capture.detail_paths if path is not None])
    assert len(maps) == 8 and set(np.unique(maps)) == ({0, 255} if marked else {0})
    if kind == "ponytail":
        head = sample_identity(number)
        parts = render(head, dataset_poses(number, views=8), size_px=128).parts
        faces = np.isin(parts, (Part.EYE, Part.MOUTH))
        assert maps[faces].mean() < 3, "the face is kept as it is"
    stamp = capture.image_paths[0].stat().st_mtime_ns
    program.render_one(number, folder=tmp_path)
    assert capture.image_paths[0].stat().st_mtime_ns == stamp, "a head that is there is not rendered again"
