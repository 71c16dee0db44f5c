"""Training steps on CUDA, without a GPU: the copy in half precision, and calls that are recorded and repeated."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from test_graphs import Recorder
from test_parity_training import STAGES, make_batch, make_trainer

from mvtorch.train import _copy_in, _RecordedGradients


def losses_of(trainer: Any, stage: str, *, steps: int) -> list[float]:
    return [trainer.step(make_batch(stage, seed), learning_rate=1e-2).loss for seed in range(steps)]


def recorded(trainer: Any, recorder: Recorder) -> Any:
    """The trainer as on CUDA, with a recorder that repeats its calls."""
    trainer._recorded = _RecordedGradients(recorder)
    return trainer


@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_in_half_precision_learns_what_autocast_does(stage: str) -> None:
    trainers = [make_trainer("torch", stage, dtype="bfloat16") for _ in range(2)]
    trainers[1]._half = _copy_in("bfloat16", trainers[1].network)
    autocast, copied = (losses_of(trainer, stage, steps=8) for trainer in trainers)
    np.testing.assert_allclose(copied, autocast, rtol=0.02, atol=0.02)
    assert copied[-1] < copied[0]
    kept = {name: parameter.dtype for name, parameter in trainers[1]._half.named_parameters()}
    assert {str(dtype) for dtype in kept.values()} <= {"torch.bfloat16", "torch.float32"}
    assert all(("conv_out" in name or "time_proj" in name) for name, dtype in kept.items() if dtype == torch.float32)
    evaluated = [trainer.evaluate(make_batch(stage)) for trainer in trainers]
    np.testing.assert_allclose(evaluated[1], evaluated[0], rtol=0.02, atol=0.02)


def test_frozen_weights_of_a_copy_stay_frozen() -> None:
    trainer = make_trainer("torch", "vae", dtype="bfloat16", frozen=("encoder.",))
    trainer._half = _copy_in("bfloat16", trainer.network)
    before = trainer.weights()
    losses_of(trainer, "vae", steps=2)
    changed = {name for name, array in trainer.weights().items() if not np.array_equal(array, before[name])}
    assert changed and not any(name.startswith("encoder.") for name in changed)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_recorded_steps_learn_bit_for_bit_what_ordinary_ones_do(stage: str, dtype: str) -> None:
    recorder, plain = Recorder(), make_trainer("torch", stage, dtype=dtype)
    trainer = recorded(make_trainer("torch", stage, dtype=dtype), recorder)
    assert losses_of(trainer, stage, steps=5) == losses_of(plain, stage, steps=5)
    assert (recorder.recorded, recorder.replayed) == (1, 4)
    state = trainer.state()
    for name, array in plain.state().items():
        np.testing.assert_array_equal(state[name], array)


def test_a_batch_of_another_size_is_recorded_anew() -> None:
    recorder, plain = Recorder(), make_trainer("torch", "unet")
    trainer = recorded(make_trainer("torch", "unet"), recorder)
    batch = make_batch("unet")
    small = type(batch)(*(None if array is None else array[:1] for array in batch))
    order = [batch, batch, batch, small, small, batch, batch]
    ours, theirs = ([each.step(given, learning_rate=1e-2).loss for given in order] for each in (trainer, plain))
    assert ours == theirs
    assert recorder.recorded == 3


def test_after_a_recording_that_failed_steps_are_ordinary_ones_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    recorder, plain = Recorder(), make_trainer("torch", "unet")
    recorder.error = "out of memory\nmore"
    trainer = recorded(make_trainer("torch", "unet"), recorder)
    with caplog.at_level(logging.WARNING):
        assert losses_of(trainer, "unet", steps=4) == losses_of(plain, "unet", steps=4)
    assert recorder.tries == 1
    assert [record.getMessage() for record in caplog.records if "could not be recorded (out of memory)" in record.getMessage()]


def test_gradients_of_a_recording_that_failed_half_way_are_not_learned() -> None:
    trainers = [make_trainer("torch", "unet", dtype="bfloat16") for _ in range(2)]
    for trainer in trainers:
        trainer._half = _copy_in("bfloat16", trainer.network)
    plain, trainer = trainers

    class RunsOutOfMemory(Recorder):
        def record(self, function: Any) -> Any:
            for parameter in trainer._half.parameters():
                parameter.grad = torch.ones_like(parameter)
            raise RuntimeError("out of memory")

    recorded(trainer, RunsOutOfMemory())
    assert losses_of(trainer, "unet", steps=4) == losses_of(plain, "unet", steps=4)
