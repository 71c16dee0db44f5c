"""The stages of a run: which there are, in which order, how their times and memory add up, what is left of one that fails."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, Backend

from mvshared.backend import load
from mvshared.stages import Stage, Stages

FIXTURES = Path(__file__).parent / "fixtures"


class Clock:
    """Tells a second more at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Meter:
    """Memory that the test sets."""

    def __init__(self) -> None:
        self.used = self.peak = 0

    def use(self, used: int) -> None:
        self.used, self.peak = used, max(self.peak, used)

    def memory_peak(self) -> int:
        return self.peak

    def reset_memory_peak(self) -> None:
        self.peak = self.used


def test_a_stage_inside_of_another_counts_for_itself() -> None:
    ended: list[Stage] = []
    stages = Stages(ended.append, clock=Clock())
    with stages("unet"):  # 1 to 4, of which 2 to 3 are the decoder's
        stages.step = 7
        with stages("vae_decoder"):
            assert stages.name == "vae_decoder"
        assert (stages.name, stages.step) == ("unet", 7)
    assert (stages.name, stages.step) == (None, None)
    assert [(stage.name, stage.start, stage.seconds, stage.own_seconds, stage.step) for stage in ended] == [
        ("vae_decoder", 2.0, 1.0, 1.0, 7),
        ("unet", 1.0, 3.0, 2.0, None),
    ]


def test_the_peak_of_a_stage_is_that_of_all_within_it_and_of_nothing_before() -> None:
    ended: list[Stage] = []
    meter = Meter()
    stages = Stages(ended.append, memory=meter)
    meter.use(100)
    meter.use(1)
    with stages("unet"):
        meter.use(5)
        meter.use(2)
        with stages("vae_decoder"):
            meter.use(3)
    with stages("vae_decoder"):
        pass
    with stages("unet"):
        with stages("vae_decoder"):
            meter.use(9)
            meter.use(4)
        with stages("vae_decoder"):
            pass
    assert [stage.peak_bytes for stage in ended] == [3, 5, 3, 9, 4, 9]


def test_a_stage_that_fails_is_left_and_not_reported() -> None:
    ended: list[Stage] = []
    stages = Stages(ended.append)
    with pytest.raises(RuntimeError), stages("unet", what="frame"):
        raise RuntimeError
    assert (stages.name, stages.what, ended) == (None, "view", [])


def test_threads_are_in_stages_of_their_own() -> None:
    ended: list[Stage] = []
    stages = Stages(ended.append, clock=Clock())
    with ThreadPoolExecutor(1) as other:
        reading = stages("pictures")
        with stages("unet"):
            stages.step = 7
            other.submit(reading.__enter__).result()
            assert (stages.name, stages.step) == ("unet", 7)
        other.submit(reading.__exit__, None, None, None).result()
        assert other.submit(lambda: (stages.name, stages.step)).result() == (None, None)
    assert (stages.name, stages.step) == (None, None)
    assert [stage.name for stage in ended] == ["unet", "pictures"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_through_every_stage_of_its_model(backend: Backend) -> None:
    pipe = load(FIXTURES / "tiny-imagedream", backend=backend, device="cpu")
    ended: list[Stage] = []
    pipe.stages = Stages(ended.append, memory=pipe.model)
    steps: list[Any] = []
    picture = FIXTURES / "tiny-imagedream" / "input.png"
    options: dict[str, Any] = {"prompt": "an owl", "negative_prompt": "", "steps": 2}
    pipe.generate(picture, **options, on_step=lambda progress: steps.append(pipe.stages.step))
    assert [stage.name for stage in ended] == [
        "pictures",
        "image_encoder",
        "text_encoder",
        "vae_encoder",
        "condition",
        "unet",
        "vae_decoder",
    ]
    assert steps == [1, 2]
    assert all(stage.seconds >= 0 for stage in ended)
    assert all(stage.peak_bytes is None or stage.peak_bytes > 100_000 for stage in ended)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_memory_peak_sees_an_array_that_is_gone(backend: Backend) -> None:
    model = load(FIXTURES / "tiny-mvdream", backend=backend, device="cpu").model
    if model.memory_peak() is None:
        pytest.skip("this system does not let a process reset its peak of resident memory")

    def peak() -> int:
        measured = model.memory_peak()
        assert measured is not None
        return measured

    model.reset_memory_peak()
    before = peak()
    array = np.ones((64, 1024, 1024), np.float32)
    there = model.from_numpy(array)
    del there, array
    assert peak() - before >= 256_000_000
    model.reset_memory_peak()
    assert peak() - before < 256_000_000
