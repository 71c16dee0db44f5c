"""Steps that are begun before the one before them is told of, and MLX's limits of memory within a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import TINY_MODEL, write_tiny_model

import mvmlx.metal
from mvmlx.metal import CACHE_BYTES, memory_limits
from mvshared.ahead import Reports
from mvshared.backend import load
from mvshared.pipeline import Pipeline
from mvshared.stages import Stages

FIXTURES = Path(__file__).parent / "fixtures"
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


class Device:
    """Writes down what it is asked for."""

    def __init__(self, ahead: int) -> None:
        self.ahead, self.asked = ahead, []

    def start(self, x: str) -> None:
        self.asked.append(f"start {x}")

    def wait(self, x: str) -> None:
        self.asked.append(f"wait {x}")


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (0, ["start a", "wait a", "tell 1", "start b", "wait b", "tell 2", "start c", "wait c", "tell 3"]),
        (1, ["start a", "start b", "wait a", "tell 1", "start c", "wait b", "tell 2", "wait c", "tell 3"]),
    ],
)
def test_a_step_is_told_of_when_it_is_done_and_those_ahead_are_begun(ahead: int, expected: list[str]) -> None:
    device, stages = Device(ahead), Stages()
    model: Any = device
    reports = Reports(model, stages)
    for step, x in enumerate("abc", start=1):
        stages.step = step
        reports.add(step, x, lambda: device.asked.append(f"tell {stages.step}"))
    reports.finish()
    assert (device.asked, stages.step) == (expected, 3)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline[mx.array]:
    return load(write_tiny_model(tmp_path_factory.mktemp("tiny"), TINY_MODEL), backend="mlx", device="cpu")


@contextmanager
def steps_ahead(model: Any, ahead: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "ahead", ahead)
        yield


def test_mlx_works_at_a_step_while_the_one_before_is_told_of(
    pipeline: Pipeline[mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    asked: list[str] = ["start", "wait", "denoise"]
    for name in asked:
        original: Callable[..., Any] = getattr(pipeline.model, name)

        def noted(*args: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            events.append(name)
            return original(*args)

        monkeypatch.setattr(pipeline.model, name, noted)
    views = pipeline.generate(PIXELS, steps=3, on_step=lambda progress: events.append(f"step {progress.step}"))
    step, told = ["denoise", "start"], ["wait", "step 1", "wait", "step 2", "wait", "step 3"]
    assert events == [*step, *step, *told[:2], *step, *told[2:]]
    monkeypatch.undo()
    with steps_ahead(pipeline.model, 0):
        np.testing.assert_array_equal(pipeline.generate(PIXELS, steps=3).latents, views.latents)


def test_who_looks_at_blocks_or_saves_memory_gets_one_step_after_the_other(pipeline: Pipeline[mx.array]) -> None:
    assert pipeline.model.ahead == 1
    seen = []
    with pipeline.model.observe(lambda *_: None):
        pipeline.generate(PIXELS, steps=1, on_step=lambda _: seen.append(pipeline.model.ahead))
    low = load(FIXTURES / "tiny-imagedream", backend="mlx", device="cpu", low_memory=True)
    low.generate(PIXELS, prompt="an owl", negative_prompt="", steps=1, on_step=lambda _: seen.append(low.model.ahead))
    assert seen == [0, 0]
    assert pipeline.model.ahead == 1


def test_memory_does_not_grow_with_the_steps(pipeline: Pipeline[mx.array]) -> None:
    def peak_bytes(steps: int) -> int:
        pipeline.model.reset_memory_peak()
        before = mx.get_active_memory()
        pipeline.generate(PIXELS, steps=steps)
        return mx.get_peak_memory() - before

    peak_bytes(1)
    assert peak_bytes(24) < 1.25 * peak_bytes(4)


def test_a_step_is_begun_and_not_waited_for(pipeline: Pipeline[mx.array], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a step makes the program wait: it would idle the device."""
    waited = []
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, lambda *arrays, name=name: waited.append(name))
    monkeypatch.setattr(type(pipeline.model), "wait", lambda self, x: waited.append("wait"))
    pipeline.generate(PIXELS, steps=2, on_step=lambda progress: waited.append(f"step {progress.step}"))
    during = waited[waited.index("wait") + 1 : waited.index("step 2")]
    assert during == ["step 1", "wait"]


class Limits:
    """Stands for MLX's limits on a Mac."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, macos: str) -> None:
        self.cache, self.wired, self.events = 10**12, 7, []
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 2**34})
        monkeypatch.setattr(mvmlx.metal.platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
        monkeypatch.setattr(mx, "set_cache_limit", lambda limit: self.change("cache", limit))
        monkeypatch.setattr(mx, "set_wired_limit", lambda limit: self.change("wired", limit))
        monkeypatch.setattr(mx, "default_stream", lambda device: device)
        monkeypatch.setattr(mx, "synchronize", lambda stream: self.events.append(("synchronize", str(stream))))

    def change(self, name: str, limit: int) -> int:
        before = getattr(self, name)
        setattr(self, name, limit)
        self.events.append((name, limit))
        return before


def test_a_run_on_metal_wires_its_memory_until_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, macos="15.2")
    with pytest.raises(KeyboardInterrupt), memory_limits("gpu", None):
        assert (limits.cache, limits.wired) == (CACHE_BYTES, 2**34)
        with memory_limits("gpu", 5):  # the upscaler's, within
            assert (limits.cache, limits.wired) == (5, 2**34)
        assert (limits.cache, limits.wired) == (CACHE_BYTES, 2**34)
        raise KeyboardInterrupt
    assert (limits.cache, limits.wired) == (10**12, 7)
    assert limits.events[-3][0] == "synchronize"


def test_an_older_macos_wires_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, macos="14.7")
    with memory_limits("gpu", None):
        assert (limits.cache, limits.wired) == (CACHE_BYTES, 7)


def test_the_cpu_keeps_its_limits_unless_the_plan_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, macos="15.2")
    with memory_limits("cpu", None):
        assert limits.events == []
    with memory_limits("cpu", 3):
        assert (limits.cache, limits.wired) == (3, 7)
    assert limits.cache == 10**12
