"""The table of guidance: its figures are those of the evaluation, and every row is a run that the model takes."""

from pathlib import Path

import pytest
from helpers import TINY_MODEL, write_tiny_model

from benchmarks import guidance
from benchmarks.guidance import ROWS, Row, measure
from mvshared.backend import load
from mvshared.evaluation import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("guidance") / "tiny", TINY_MODEL)


def test_the_figures_are_those_of_the_evaluation(folder: Path) -> None:
    pipeline = load(folder, backend="torch", device="cpu")
    rows = [Row("defaults", "2", {}), Row("three steps", "2", {"steps": 3}), Row("maps", "2", {}, normals=True)]
    lines = measure(pipeline, range(2), rows)[2:]
    plain, longer, led = (
        evaluate(pipeline, range(2), steps=steps, normals=normals)
        for steps, normals in ((None, False), (3, False), (None, True))
    )
    assert len(set(lines)) == 3
    for line, row, found in zip(lines, rows, (plain, longer, led), strict=True):
        figures = f"{found.psnr_db.mean:.1f} | {found.ssim.mean:.3f} | {found.silhouette_iou.mean:.3f}"
        assert line == f"| {row.name} | 2 | {figures} |"


def test_every_row_is_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["guidance", "--model", str(folder), "--heads", "0:1"])
    guidance.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(ROWS)
