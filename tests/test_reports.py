"""Steps that are begun before the one before them is told of, and MLX's limits of memory within a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import TINY_MODEL, write_tiny_model
from training_cases import vae_config

import mvmlx.latents
import mvmlx.metal
import mvshared.training.loop
from mvmlx.metal import CACHE_BYTES, memory_limits
from mvshared.backend import load
from mvshared.benchmark import cases
from mvshared.memory.plan import PLAIN, MemoryPlan
from mvshared.pipeline import Pipeline, Progress
from mvshared.training.loop import train

FIXTURES = Path(__file__).parent / "fixtures"
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline[mx.array]:
    return load(write_tiny_model(tmp_path_factory.mktemp("tiny"), TINY_MODEL), backend="mlx", device="cpu")


def test_mlx_puts_a_step_together_before_the_one_before_is_told_of(
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

    def on_step(progress: Progress) -> None:
        events.append(f"step {progress.step} of {pipeline.stages.step}")

    views = pipeline.generate(PIXELS, steps=3, on_step=on_step)
    first = ["denoise", "start", "denoise", "wait", "step 1 of 1", "start"]
    assert events == [*first, "denoise", "wait", "step 2 of 2", "start", "wait", "step 3 of 3"]
    monkeypatch.undo()
    monkeypatch.setattr(type(pipeline.model), "defers", False)
    np.testing.assert_array_equal(pipeline.generate(PIXELS, steps=3).latents, views.latents)


def test_who_looks_at_blocks_or_saves_memory_gets_one_step_after_the_other(pipeline: Pipeline[mx.array]) -> None:
    model: Any = pipeline.model
    assert model.defers
    seen = []
    with model.observe(lambda *_: None):
        pipeline.generate(PIXELS, steps=1, on_step=lambda _: seen.append(model.defers))
    low = load(FIXTURES / "tiny-imagedream", backend="mlx", device="cpu", low_memory=True)
    options: dict[str, Any] = {"prompt": "an owl", "negative_prompt": "", "steps": 1}
    low.generate(PIXELS, **options, on_step=lambda _: seen.append(low.model.defers))
    assert seen == [False, False]
    assert model.defers


def test_memory_does_not_grow_with_the_steps(pipeline: Pipeline[mx.array]) -> None:
    def peak_bytes(steps: int) -> int:
        pipeline.model.reset_memory_peak()
        before = mx.get_active_memory()
        pipeline.generate(PIXELS, steps=steps)
        return mx.get_peak_memory() - before

    peak_bytes(1)
    assert peak_bytes(24) < 1.25 * peak_bytes(4)


def test_a_step_computes_nothing_before_it_is_begun(pipeline: Pipeline[mx.array], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the device would stand still while the program waits."""
    events: list[str] = []
    for name in ("eval", "async_eval", "synchronize"):
        monkeypatch.setattr(mx, name, lambda *arrays, name=name: events.append(name))
    pipeline.generate(PIXELS, steps=3, on_step=lambda progress: events.append(f"step {progress.step}"))
    between = events[events.index("step 1") + 1 : events.index("step 2")]
    assert between == ["async_eval", "eval"]


class Limits:
    """Stands for MLX's limits on a Mac."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, macos: str) -> None:
        self.cache, self.memory, self.wired, self.events = 10**12, 10**11, 7, []
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", self.device_info)
        monkeypatch.setattr(mvmlx.metal.platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
        monkeypatch.setattr(mx, "set_cache_limit", lambda limit: self.change("cache", limit))
        monkeypatch.setattr(mx, "set_memory_limit", lambda limit: self.change("memory", limit))
        monkeypatch.setattr(mx, "set_wired_limit", lambda limit: self.change("wired", limit))
        monkeypatch.setattr(mx, "default_stream", lambda device: device)
        monkeypatch.setattr(mx, "synchronize", lambda stream: self.events.append(("synchronize", str(stream))))

    def device_info(self, device: mx.Device | None = None) -> dict[str, str | int]:
        gpu = (device or mx.default_device()) == mx.Device(mx.gpu)
        return {"max_recommended_working_set_size": 2**34} if gpu else {"device_name": "Apple M3"}

    def change(self, name: str, limit: int) -> int:
        before = getattr(self, name)
        setattr(self, name, limit)
        self.events.append((name, limit))
        return before


def test_a_run_on_metal_wires_its_memory_until_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, macos="15.2")
    with pytest.raises(KeyboardInterrupt), memory_limits("gpu"):
        assert (limits.cache, limits.memory, limits.wired) == (CACHE_BYTES, 2**34, 2**34)
        with memory_limits("gpu", 5):  # the upscaler's, within
            assert (limits.cache, limits.memory, limits.wired) == (5, 2**34, 2**34)
        assert (limits.cache, limits.memory, limits.wired) == (CACHE_BYTES, 2**34, 2**34)
        raise KeyboardInterrupt
    assert (limits.cache, limits.memory, limits.wired) == (10**12, 10**11, 7)
    assert [name for name, _ in limits.events[-4:]] == ["synchronize", "wired", "memory", "cache"]


def test_the_limits_are_those_of_the_gpu_where_the_default_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, macos="15.2")
    with mx.stream(mx.Device(mx.cpu)), memory_limits("gpu"):
        assert limits.memory == 2**34


@pytest.mark.parametrize(("memory_bytes", "left"), [(5 * 10**9, 5 * 10**9 - 3 * 10**8), (10**8, 0), (10**12, 2**34)])
def test_on_metal_mlx_is_held_to_what_a_plan_leaves_it(monkeypatch: pytest.MonkeyPatch, memory_bytes: int, left: int) -> None:
    limits = Limits(monkeypatch, macos="15.2")
    monkeypatch.setattr(mx, "get_active_memory", lambda: 2 * 10**9)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 10**9)
    monkeypatch.setattr(mvmlx.metal, "resident", lambda: 33 * 10**8)  # 0.3 GB are none of MLX's arrays
    with memory_limits("gpu", None, memory_bytes):
        assert (limits.memory, limits.wired) == (left, left)
    assert (limits.memory, limits.wired) == (10**11, 7)


def test_a_memory_limit_below_what_is_in_use_fails_nothing_and_changes_no_result() -> None:
    x = mx.random.normal((1, 64, 64, 16), key=mx.random.key(0))
    weight = mx.random.normal((16, 3, 3, 16), key=mx.random.key(1)) / 12
    mx.eval(x, weight)

    def computed() -> mx.array:
        y = x
        for _ in range(30):
            y = mx.conv2d(y, weight, padding=1)
        mx.eval(y)
        return y

    expected, before = computed(), mx.set_memory_limit(0)
    try:
        found = computed()
    finally:
        mx.set_memory_limit(before)
    assert mx.array_equal(found, expected)


def test_a_plan_s_limit_reaches_mlx(pipeline: Pipeline[mx.array], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(mvmlx.latents, "memory_limits", lambda *limits: given.append(limits) or nullcontext())
    with pipeline.model.planned(MemoryPlan(cache_bytes=5, memory_bytes=10**9)):
        assert given == [("cpu", 5, 10**9)]


def test_all_of_a_training_keeps_to_mlx_s_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Captures are encoded and samples drawn inside as well."""
    within: list[str] = []

    @contextmanager
    def limited(device: str) -> Iterator[None]:
        within.append(device)
        yield
        within.append("done")

    monkeypatch.setattr(mvmlx.metal, "memory_limits", limited)
    monkeypatch.setattr(mvshared.training.loop, "_train", lambda *given, **options: within.append("training"))
    train(vae_config(tmp_path / "data"), tmp_path / "out", backend="mlx", device="cpu")
    assert within == ["cpu", "training", "done"]


@pytest.mark.parametrize("case", ["step", "vae_decode"])
def test_a_benchmark_s_calls_are_made_as_a_run_makes_them(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    plans: list[MemoryPlan] = []

    @contextmanager
    def planned(self: Any, plan: MemoryPlan) -> Iterator[None]:
        plans.append(plan)
        yield

    monkeypatch.setattr(mvmlx.latents.LatentModel, "planned", planned)
    options: Any = {"model": "demo", "backend": "mlx", "device": "cpu", "dtype": "float32", "views": 1, "size_px": 32}
    prepared = getattr(cases, case)(**options, **({"guided": False} if case == "step" else {}))
    with prepared.within:
        assert plans == [PLAIN]


def test_an_older_macos_wires_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, macos="14.7")
    with memory_limits("gpu", None):
        assert (limits.cache, limits.wired) == (CACHE_BYTES, 7)


def test_the_cpu_keeps_its_limits_unless_the_plan_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, macos="15.2")
    with memory_limits("cpu", None):
        assert limits.events == []
    with memory_limits("cpu", 3, 4):
        assert (limits.cache, limits.memory, limits.wired) == (3, 10**11, 7)
    assert limits.cache == 10**12
