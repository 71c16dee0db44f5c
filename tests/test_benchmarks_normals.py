"""The table of meshes that views follow: it compares silhouettes with the maps that led the views, or would have."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY_MODEL, write_tiny_model

from benchmarks import normals
from mvshared.backend import load
from mvshared.metrics import alpha_mask
from mvshared.pipeline import Pipeline

PORTRAIT = str(Path(__file__).resolve().parent.parent / "examples" / "portrait.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("normals") / "tiny", TINY_MODEL)


class Follower(Pipeline[Any]):
    """Draws the silhouettes of the maps that it is given, and leaves the pictures white without."""

    def generate(self, image: Any = None, **options: Any) -> Any:
        views = super().generate(image, steps=1, **options)  # which takes such maps
        images = np.full_like(views.images, 255)
        if options["normals"] is not None:
            images[alpha_mask(np.stack(options["normals"]))] = 0
        return replace(views, images=images)


def test_views_that_fill_the_maps_overlap_with_all_of_them(folder: Path) -> None:
    pipeline = Follower(load(folder, backend="torch", device="cpu").model, name="follower")
    header, _, *lines = normals.measure(pipeline, (7,), PORTRAIT)
    assert header == "| | with the maps | without |"
    assert lines == [f"| {name} | 1.00 | 0.00 |" for name in ("head 7, in its place", "head 7, fitted", "ball, fitted")]


def test_the_ball_is_round_and_its_normals_look_outward() -> None:
    ball = normals.ball_mesh()
    assert len(ball.faces) == 5120
    np.testing.assert_allclose(np.linalg.norm(ball.vertices, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(ball.normals, ball.vertices[ball.faces], atol=1e-2)


def test_the_command_has_a_row_for_every_mesh(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["normals", "--model", str(folder), "--heads", "3,7", "--portrait", PORTRAIT])
    normals.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 * 2 + 1
