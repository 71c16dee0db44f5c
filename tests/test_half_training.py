"""Training in half precision: loss scaling, steps that are skipped, gradients that are not finite, runs that go on."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import BACKENDS, Backend, assert_close, assert_different
from numpy.typing import NDArray
from safetensors.numpy import load_file
from test_parity_training import LEARNING_RATES, STAGES, joined, make_batch, make_trainer, make_weights, run
from training_cases import run as run_loop
from training_cases import vae_config, write_objects

import mvmlx.train
import mvtorch.layers
import mvtorch.train
from mvshared.errors import BackendError, NumericsError, OptionError, TensorMismatchError
from mvshared.training import loss_scale
from mvshared.training.data import VAEPictures
from mvshared.training.log import read_log
from mvshared.training.loss_scale import FIRST_SCALE, GROWTH_STEPS, LARGEST_SCALE, SMALLEST_SCALE, LossScale, unpack
from mvshared.training.optimizer import StepResult, counted, ema_decay, step_result, updates

HALVES = ("float16", "bfloat16")
LOSS_RTOL = {"float16": 5e-3, "bfloat16": 5e-2}


def times(trainer: Any, factor: float) -> Any:
    """The trainer with its loss multiplied by a factor."""
    loss = trainer.loss
    trainer.loss = lambda network, batch: loss(network, batch) * factor
    return trainer


def with_nan_gradients(trainer: Any) -> Any:
    """The trainer with a loss that is what it was, and whose gradient is not a number: the root of 0 has none."""
    loss = trainer.loss

    def rooted(network: Any, batch: Any) -> Any:
        value = loss(network, batch)
        return value + (value * 0) ** 0.5

    trainer.loss = rooted
    return trainer


def states_equal(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(array, theirs[name]) for name, array in ours.items())


# The scale


def test_the_scale_halves_at_an_overflow_and_doubles_after_many_good_steps() -> None:
    scale = LossScale()
    for _ in range(GROWTH_STEPS - 1):
        scale = scale.after(finite=True)
    assert scale == LossScale(scale=FIRST_SCALE, good_steps=GROWTH_STEPS - 1)
    assert scale.after(finite=True) == LossScale(scale=2 * FIRST_SCALE)
    assert scale.after(finite=False) == LossScale(scale=FIRST_SCALE / 2, skipped=1)
    assert LossScale(scale=LARGEST_SCALE, good_steps=GROWTH_STEPS - 1).after(finite=True).scale == LARGEST_SCALE
    last = LossScale(scale=2 * SMALLEST_SCALE).after(finite=False)
    assert not LossScale().exhausted and last.exhausted


def test_a_scale_survives_its_packing_exactly() -> None:
    for scale in (LossScale(), LossScale(scale=SMALLEST_SCALE, good_steps=GROWTH_STEPS - 1, skipped=2**23 + 1)):
        assert unpack(scale.pack()) == scale


def test_a_failed_step_counts_only_if_a_smaller_scale_may_help() -> None:
    scale, inf, nan = LossScale(), float("inf"), float("nan")
    assert step_result(1.0, 2.0, scale) == StepResult(1.0, 2.0)
    assert step_result(1.0, inf, scale).skipped and step_result(1.0, nan, scale).skipped
    assert not step_result(nan, nan, scale).skipped
    assert not step_result(1.0, inf, None).skipped
    assert not step_result(1.0, inf, LossScale(scale=SMALLEST_SCALE)).skipped
    assert counted(StepResult(1.0, 2.0), 5, None) == (6, None)
    assert counted(StepResult(1.0, inf), 5, None) == (5, None)
    steps, after = counted(step_result(1.0, inf, scale), 5, scale)
    assert (steps, updates(steps, after)) == (6, 5)
    assert counted(StepResult(nan, nan), 5, scale) == (5, scale)


# Steps


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_trains_near_float32_with_float32_weights(backend: Backend, dtype: str, stage: str) -> None:
    full, half = (make_trainer(backend, stage, dtype=each) for each in ("float32", dtype))
    expected, actual = (np.array(run(trainer, stage, 2)) for trainer in (full, half))
    np.testing.assert_allclose(actual, expected, rtol=LOSS_RTOL[dtype])
    assert not np.array_equal(actual, expected)
    for weights in (half.parameters, half.ema):
        assert {str(array.dtype).rpartition(".")[2] for array in weights.values()} == {"float32"}
    start = joined(make_weights(stage))
    assert_close(joined(half.weights()) - start, joined(full.weights()) - start, rms=0.03 if dtype == "float16" else 0.2)
    assert half.evaluate(make_batch(stage, seed=5)) == pytest.approx(
        full.evaluate(make_batch(stage, seed=5)), rel=LOSS_RTOL[dtype]
    )
    assert (half.loss_scale is not None) == (dtype == "float16")


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_follows_the_loss_of_float32_to_its_end(backend: Backend) -> None:
    losses = {}
    for dtype in ("float32", "float16"):
        trainer = make_trainer(backend, "unet", dtype=dtype)
        losses[dtype] = [trainer.step(make_batch("unet"), learning_rate=1e-2).loss for _ in range(40)]
    assert losses["float32"][-1] < 0.6 * losses["float32"][0]
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_too_small_for_float16_survive_with_the_scale_and_not_without(backend: Backend) -> None:
    small = 2.0**-22
    norms = {}
    for dtype, scale in (("float32", None), ("float16", LossScale()), ("float16", LossScale(scale=1.0))):
        trainer = times(make_trainer(backend, "unet", dtype=dtype), small)
        trainer.loss_scale = scale
        norms[None if scale is None else scale.scale] = run(trainer, "unet", 1)[0].gradient_norm
    assert norms[FIRST_SCALE] == pytest.approx(norms[None], rel=0.01)
    assert norms[1.0] < 0.5 * norms[None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_skips_the_step_and_changes_the_scale_alone(backend: Backend) -> None:
    trainer, untouched = (make_trainer(backend, "unet", dtype="float16") for _ in range(2))
    for each in (trainer, untouched):
        run(each, "unet", 1)
    trainer.loss_scale = LossScale(scale=LARGEST_SCALE)
    result = run(times(trainer, 2.0**20), "unet", 1)[0]
    assert result.skipped and np.isfinite(result.loss) and not np.isfinite(result.gradient_norm)
    assert trainer.loss_scale == LossScale(scale=LARGEST_SCALE / 2, skipped=1)
    assert (trainer.steps, untouched.steps) == (2, 1)
    ours, theirs = trainer.state(), untouched.state()
    for state in (ours, theirs):
        del state["steps"], state["loss_scale"]
    assert states_equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_skipped_steps_adam_and_the_average_count_those_that_changed_something(backend: Backend) -> None:
    trainer, plain = (make_trainer(backend, "unet", dtype="float16") for _ in range(2))
    trainer.loss_scale = LossScale(scale=LARGEST_SCALE)
    loss = trainer.loss
    run(times(trainer, 2.0**20), "unet", 1)
    trainer.loss, trainer.loss_scale = loss, LossScale(skipped=1)
    for each in (trainer, plain):
        for step in range(2):
            each.step(make_batch("unet", seed=step), learning_rate=LEARNING_RATES[step])
    for part in ("weights", "ema_weights"):
        assert states_equal(getattr(trainer, part)(), getattr(plain, part)())
    resumed = make_trainer(backend, "unet", dtype="float16")
    resumed.load_state(trainer.state())
    for each in (trainer, plain, resumed):
        each.step(make_batch("unet", seed=7), learning_rate=1e-2)
    assert states_equal(trainer.state(), resumed.state())
    assert states_equal(trainer.weights(), plain.weights())
    assert ema_decay(trainer.config, 3) != ema_decay(trainer.config, 4)


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_no_numbers_change_nothing(backend: Backend, dtype: str) -> None:
    trainer = make_trainer(backend, "vae", dtype=dtype)
    run(trainer, "vae", 1)
    before = trainer.state()
    result = run(with_nan_gradients(trainer), "vae", 1)[0]
    assert np.isfinite(result.loss) and np.isnan(result.gradient_norm) and not result.learned
    assert result.skipped == (dtype == "float16")
    after = trainer.state()
    if dtype == "float16":  # the scale may be the reason
        assert after.pop("steps") == before.pop("steps") + 1
        assert after.pop("loss_scale")[0] == before.pop("loss_scale")[0] / 2
    assert states_equal(before, after)


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_is_no_number_changes_nothing_and_does_not_count(backend: Backend, dtype: str) -> None:
    trainer = make_trainer(backend, "vae", dtype=dtype)
    run(trainer, "vae", 1)
    before = trainer.state()
    batch = make_batch("vae")
    result = trainer.step(batch._replace(pixels=batch.pixels * np.float32("nan")), learning_rate=1e-2)
    assert np.isnan(result.loss) and not result.learned and not result.skipped
    assert states_equal(before, trainer.state())
    assert np.isfinite(run(trainer, "vae", 1)[0]).all()


@pytest.mark.parametrize("kind", ["plain", "short", "zero", "nan", "infinite"])
def test_mlx_clips_gradients_as_torch_does_it(kind: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"a": (3, 4), "b": (5,)}.items()}
    factor = {"short": 1e-3, "zero": 0.0}.get(kind, 1.0)
    arrays = {name: array * np.float32(factor) for name, array in arrays.items()}
    if kind in ("nan", "infinite"):
        arrays["a"][1, 2] = float("nan") if kind == "nan" else float("inf")
    parameters = {name: torch.zeros(array.shape, requires_grad=True) for name, array in arrays.items()}
    for name, array in arrays.items():
        parameters[name].grad = torch.from_numpy(array.copy())
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
    clipped, own_norm = mvmlx.train.clip_grad_norm({name: mx.array(array) for name, array in arrays.items()}, 0.5)
    np.testing.assert_allclose(np.array(own_norm), norm.numpy(), rtol=1e-6)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(np.array(clipped[name]), np.asarray(parameter.grad), rtol=1e-5)


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float16_run_that_broke_off_ends_as_one_that_did_not(
    data: Path, tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    config = vae_config(data, steps=6, checkpoint_every=2, log_every=1, dtype="float16")
    healthy = VAEPictures.batch

    def poisoned(self: VAEPictures, step: int, *, size: int, seed: int) -> Any:
        batch = healthy(self, step, size=size, seed=seed)
        return batch._replace(pixels=batch.pixels * np.float32("nan")) if (step, seed) == (5, 0) else batch

    run_loop(config, tmp_path / "whole", backend=backend)
    monkeypatch.setattr(VAEPictures, "batch", poisoned)
    with pytest.raises(NumericsError, match="training step 5: loss nan"):
        run_loop(config, tmp_path / "parts", backend=backend)
    monkeypatch.setattr(VAEPictures, "batch", healthy)
    run_loop(config, tmp_path / "parts", backend=backend)
    states = [(tmp_path / folder / "state.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert states[0] == states[1]
    rows = read_log(tmp_path / "parts/log.csv")
    assert [row.loss_scale for row in rows] == [row.loss_scale for row in read_log(tmp_path / "whole/log.csv")]
    assert rows[-1].loss_scale == unpack(load_file(tmp_path / "parts/state.safetensors")["loss_scale"]).scale
    assert len({row.loss_scale for row in rows}) > 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float16_trainer_is_restored_bit_for_bit_after_an_overflow(backend: Backend, stage: str) -> None:
    trainer = make_trainer(backend, stage, dtype="float16")
    trainer.loss_scale = LossScale(scale=2.0**22, good_steps=17, skipped=3)
    trainer.steps = 3
    loss = trainer.loss
    times(trainer, 2.0**18).step(make_batch(stage), learning_rate=1e-2)
    trainer.loss = loss
    assert trainer.loss_scale == LossScale(scale=2.0**21, skipped=4)
    trainer.loss_scale = LossScale(scale=2.0**10, good_steps=5, skipped=4)
    trainer.step(make_batch(stage), learning_rate=1e-2)
    resumed = make_trainer(backend, stage, dtype="float16")
    resumed.load_state(trainer.state())
    assert resumed.loss_scale == LossScale(scale=2.0**10, good_steps=6, skipped=4)
    for each in (trainer, resumed):
        each.step(make_batch(stage, seed=1), learning_rate=1e-2)
    assert states_equal(trainer.state(), resumed.state())


def test_a_float16_state_goes_on_in_the_other_backend_and_not_in_another_dtype() -> None:
    states = {dtype: make_trainer("torch", "unet", dtype=dtype).state() for dtype in ("float32", "float16")}
    ours = make_trainer("mlx", "unet", dtype="float16")
    ours.load_state(states["float16"])
    assert states_equal(ours.state(), states["float16"])
    for dtype, other in (("float32", "float16"), ("float16", "float32")):
        with pytest.raises(TensorMismatchError, match="loss_scale"):
            make_trainer("torch", "unet", dtype=dtype).load_state(states[other])


def test_the_log_counts_skipped_steps_and_has_no_norm_where_there_was_none(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = mvtorch.train.Trainer.step

    def failing(self: Any, batch: Any, *, learning_rate: float) -> StepResult:
        if self.steps in (1, 2, 3):
            result = step_result(0.5, float("inf"), self.loss_scale)
            self.steps, self.loss_scale = counted(result, self.steps, self.loss_scale)
            return result
        return original(self, batch, learning_rate=learning_rate)

    monkeypatch.setattr(mvtorch.train.Trainer, "step", failing)
    run_loop(vae_config(data, steps=4, log_every=2, checkpoint_every=4, dtype="float16"), tmp_path / "run", backend="torch")
    rows = read_log(tmp_path / "run/log.csv")
    assert [(row.skipped_steps, row.loss_scale, row.gradient_norm is None) for row in rows] == [
        (1, FIRST_SCALE / 2, False),
        (2, FIRST_SCALE / 8, True),
    ]
    assert load_file(tmp_path / "run/state.safetensors")["steps"] == 4


def test_a_run_whose_smallest_scale_does_not_help_ends(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "SMALLEST_SCALE", FIRST_SCALE / 2)
    monkeypatch.setattr(mvtorch.train.Trainer, "_loss", lambda self, batch: _root_of_nothing(self))
    with pytest.raises(NumericsError, match=r"training step 1: loss 0\.0, gradient norm nan"):
        run_loop(vae_config(data, dtype="float16"), tmp_path / "run", backend="torch")


def _root_of_nothing(trainer: Any) -> Any:
    return (next(iter(trainer.parameters.values())).sum() * 0) ** 0.5


def test_a_log_from_before_loss_scaling_is_read(tmp_path: Path) -> None:
    names = "step,loss,held_out_loss,gradient_norm,learning_rate,seconds_per_step"
    (tmp_path / "log.csv").write_text(f"{names}\n1,0.5,,2.0,0.001,0.1\n")
    row = read_log(tmp_path / "log.csv")[0]
    assert (row.loss_scale, row.skipped_steps, row.gradient_norm) == (None, 0, 2.0)


# Dtypes, and the float32 islands of training


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dtype_that_nobody_trains_in_is_refused(backend: Backend) -> None:
    with pytest.raises(OptionError, match="dtype must be float32, float16 or bfloat16, got 'float64'"):
        make_trainer(backend, "unet", dtype="float64")


def test_mlx_refuses_to_train_in_bfloat16_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvmlx.train, "choose_device", lambda device: "gpu")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with pytest.raises(BackendError, match="use float16 or float32"):
        make_trainer("mlx", "unet", dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lean_group_normalisation_of_constant_groups_beyond_half_precision_is_finite(dtype: torch.dtype) -> None:
    x = torch.full((1, 8, 4, 4), 1e4, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = mvtorch.train._LeanGroupNorm.apply(x, torch.ones(8), torch.zeros(8), 4, 1e-5)
    out.sum().backward()
    assert out.dtype == dtype and out.abs().max() < 0.25  # float32's rounding of 3e6
    assert x.grad is not None and x.grad.dtype == dtype and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_last_convolution_stays_float32_under_autocast(dtype: torch.dtype) -> None:
    conv = mvtorch.layers.Float32Conv2d(4, 3, 3, padding=1)
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = conv(x)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(conv(x), expected)
            assert_different(torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1).float(), expected, rms=1e-5)
