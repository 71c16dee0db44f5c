"""The sweep over samplers: it goes on where it stopped, refuses another model's runs, and reports complete heads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_MODEL, write_tiny_model

from benchmarks import samplers
from benchmarks.sampler_charts import Curve, Run, points, write_report
from mvshared.backend import load
from mvshared.errors import ConfigError
from mvshared.pipeline import Pipeline

CURVES = (
    Curve("samplers", "unipc karras", {"scheduler": "unipc", "spacing": "karras"}, (2, 3)),
    Curve("guidance", "guidance 1", {"guidance": 1.0}, (2,)),
    Curve("savings", "guidance-every 2", {"guidance_every": 2}, (2, 3)),
)
KEYS = [(curve.name, steps) for curve in CURVES for steps in curve.steps]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def few_reference_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "REFERENCE_STEPS", 3)


def tiny(folder: Path) -> Pipeline[Any]:
    return load(folder, backend="torch", device="cpu")


def test_a_sweep_that_was_stopped_goes_on_and_does_nothing_twice(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / samplers.RUNS
    samplers.sweep(tiny(folder), range(2), tmp_path, curves=CURVES)
    whole = path.read_text()
    about, runs = samplers.read_runs(path)
    assert [run[:3] for run in runs] == [(head, *key) for head in range(2) for key in KEYS]
    assert about["weights"] and all(len(figures) == 4 for run in runs for figures in run[3:])
    path.write_text("".join(whole.splitlines(keepends=True)[:8]))
    samplers.sweep(tiny(folder), range(2), tmp_path, curves=CURVES)
    assert path.read_text() == whole
    samplers.sweep(tiny(folder), range(2), tmp_path, curves=CURVES)
    assert path.read_text() == whole


@pytest.mark.parametrize(("guidance", "own"), [(1.5, 1), (2.0, 1), (7.5, 0)])
def test_a_model_s_own_guidance_is_measured_once(guidance: float, own: int) -> None:
    left = [curve.name for curve in samplers.CURVES if curve not in samplers.curves_of(guidance)]
    assert left == [f"guidance {guidance:g}"] * own


def test_runs_of_another_model_are_not_added_to(folder: Path, tmp_path: Path) -> None:
    samplers.sweep(tiny(folder), range(1), tmp_path, curves=CURVES[:1])
    other = write_tiny_model(tmp_path / "other", replace(TINY_MODEL, defaults=replace(TINY_MODEL.defaults, guidance=3.0)))
    with pytest.raises(ConfigError, match="is of another model"):
        samplers.sweep(tiny(other), range(1), tmp_path, curves=CURVES[:1])


def made_up(head: int, key: tuple[str, int], value: float) -> Run:
    return Run(head, *key, [value, value + 1], [0.5, 0.7], [float("inf"), 30.0])


def test_the_report_is_of_heads_that_have_every_run(tmp_path: Path) -> None:
    runs = [made_up(head, key, 10.0 + head) for head in range(3) for key in KEYS]
    found, heads = points(runs[:-1], CURVES, guidance=2.0)
    assert heads == 2
    assert found["unipc karras", 2] == pytest.approx((11.0, 0.6, 45.0, 4))
    assert [found[key].calls for key in KEYS] == [4, 6, 2, 3, 5]
    named: dict[str, Any] = {"guidance": 2.0, "baseline": "unipc karras", "baseline_steps": 2}
    assert write_report(tmp_path, runs, CURVES, **named) == 3
    for name in ("samplers.png", "guidance.png", "savings.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    tables = (tmp_path / "tables.md").read_text()
    assert "| `unipc karras` | 45.0, 11.50, 0.600 | 45.0, 11.50, 0.600 |" in tables
    assert "| guidance-every 2 | 3 | 5 | 11.50 | 0.600 | 45.0 |" in tables
    assert write_report(tmp_path, runs[:1], CURVES, **named) == 0
