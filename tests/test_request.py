"""Requests: what a run is to be, without any model's weights."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY_MODEL, record, write_tiny_model
from numpy.typing import NDArray

from mvshared.backend import load
from mvshared.config import Framing, ModelConfig
from mvshared.errors import MvWarning, OptionError
from mvshared.images import save_png
from mvshared.pipeline import Pipeline
from mvshared.repetition import repeat
from mvshared.request import Request, prepare
from mvshared.runs import read_run

BUSY = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def no_tokenizer() -> Any:
    pytest.fail("this model takes no text")


def request_of(config: ModelConfig = TINY_MODEL, **options: Any) -> Request:
    given: dict[str, Any] = {"image": BUSY} | options
    return prepare(config, no_tokenizer, **given)


def test_its_arguments_are_those_of_generate() -> None:
    theirs, ours = (dict(inspect.signature(each).parameters) for each in (Pipeline.generate, prepare))
    for name in ("self", "upscale", "check_numerics", "on_step"):
        del theirs[name]
    for name in ("config", "tokenizer", "stages"):
        del ours[name]
    assert {name: (each.default, each.annotation) for name, each in ours.items()} == {
        name: (each.default, each.annotation) for name, each in theirs.items()
    }
    assert list(ours) == list(theirs)


def test_the_noise_is_that_of_the_seed_and_given_latents_take_its_place() -> None:
    request = request_of(seed=3, views=2)
    other: NDArray[np.float32] = request.with_seed(4).initial()
    assert request.initial().shape == other.shape == (2, 8, 8, 4)
    np.testing.assert_array_equal(request.initial(), request_of(seed=4, views=2).with_seed(3).initial())
    assert not np.array_equal(request.initial(), other)
    given = request_of(latents=other, views=2)
    np.testing.assert_array_equal(given.with_seed(9).initial(), other)
    with pytest.raises(OptionError, match="seed must be"):
        request.with_seed(-1)


def test_its_size_counts_what_memory_depends_on() -> None:
    size = request_of(image=[BUSY, BUSY], views=3, guidance=1.0).size
    assert (size.views, size.size_px, size.pictures, size.branches, size.texts, size.normals) == (3, 32, 2, 1, 0, False)
    assert request_of(guidance=2.0).size.branches == 2
    assert request_of(guidance=2.0, guidance_interval=(0.5, 1.0), steps=4).size.branches == 2


LOOKING = replace(TINY_MODEL, framing=Framing(mode="subject"))


def test_a_picture_whose_subject_is_not_found_is_warned_of_where_one_is_looked_for() -> None:
    with pytest.warns(
        MvWarning, match="no subject was found in the picture, and all of it is taken: its background is neither"
    ):
        request_of(LOOKING)
    subject = np.full((40, 40, 3), 255, np.uint8)
    subject[4:, 10:30] = 60
    request_of(LOOKING, image=subject)
    request_of(TINY_MODEL, image=BUSY)


def test_a_warning_names_the_line_that_called_into_this_project(tmp_path: Path) -> None:
    pipeline = load(write_tiny_model(tmp_path / "model", LOOKING), backend="torch", device="cpu")
    save_png(tmp_path / "busy.png", BUSY)
    with pytest.warns(MvWarning) as caught:
        request_of(LOOKING)
        views = pipeline.generate(tmp_path / "busy.png", steps=1)
        repeat(pipeline, read_run(views.save(tmp_path / "out")))
    assert [each.filename for each in caught] == [__file__] * 3


def test_what_is_no_request_to_a_model_is_refused_before_any_work(tmp_path: Path) -> None:
    recorded = record(load(write_tiny_model(tmp_path / "model"), backend="torch", device="cpu"))
    other = replace(TINY_MODEL, scheduler=replace(TINY_MODEL.scheduler, beta_end=0.013))
    with pytest.raises(OptionError, match="request must be one to this model, and its config is another"):
        recorded.pipeline.run(request_of(other))
    with pytest.raises(OptionError, match=r"request must be what mvshared\.request\.prepare made, got 'str'"):
        recorded.pipeline.run("x")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"upscale must be what .*plan_upscale made, .* got 'lanczos'"):
        recorded.pipeline.generate(BUSY, upscale="lanczos")  # type: ignore[arg-type]
    assert not recorded.model.calls
