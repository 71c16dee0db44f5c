"""Schedules and samplers by themselves: what holds for every setting, and what is refused."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvshared import samplers, schedule
from mvshared.config import SchedulerConfig
from mvshared.errors import OptionError

CONFIG = SchedulerConfig()
ZERO_SNR = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)

configs = st.builds(
    SchedulerConfig,
    num_train_timesteps=st.integers(2, 1200),
    beta_schedule=st.sampled_from(["linear", "scaled_linear"]),
    prediction_type=st.sampled_from(["epsilon", "v_prediction"]),
    timestep_spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    steps_offset=st.integers(0, 1),
    set_alpha_to_one=st.booleans(),
    rescale_betas_zero_snr=st.booleans(),
)


def steps_or_none(config: SchedulerConfig, *, steps: int, eta: float) -> list[samplers.Step] | None:
    """The steps, or None for the two combinations that cannot be sampled; the reference tests say which they are."""
    try:
        return samplers.ddim_steps(config, steps=steps, eta=eta)
    except OptionError as error:
        assert error.name in ("steps", "prediction_type")
        return None


@given(configs, st.integers(1, 60), st.floats(0, 1))
def test_steps_are_finite_plain_floats_at_falling_timesteps(config: SchedulerConfig, steps: int, eta: float) -> None:
    result = steps_or_none(config, steps=min(steps, config.num_train_timesteps), eta=eta)
    for step in result or []:
        assert all(type(value) is float and math.isfinite(value) for value in step[:-2])
        assert (step.pictures, step.keep) == ((), None)
        assert 0 <= step.timestep < config.num_train_timesteps
    called_at = [step.timestep for step in result or []]
    assert called_at == sorted(set(called_at), reverse=True)


@given(configs, st.integers(1, 60), st.floats(0, 1))
def test_a_model_that_knows_the_answer_gets_the_picture_at_every_step(config: SchedulerConfig, steps: int, eta: float) -> None:
    """Noise a known x_0 as far as the step's timestep says: the exact eps or v must give x_0 back."""
    x0, eps = 0.7, -1.3
    for step in steps_or_none(config, steps=min(steps, config.num_train_timesteps), eta=eta) or []:
        mix = schedule.add_noise(config, int(step.timestep))
        v = schedule.velocity(config, int(step.timestep))
        x_t = mix.x0 * x0 + mix.noise * eps
        out = eps if config.prediction_type == "epsilon" else v.x0 * x0 + v.noise * eps
        assert step.x0_x * x_t + step.x0_out * out == pytest.approx(x0, abs=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_ends_at_the_noise_level_of_the_next_timestep(eta: float) -> None:
    steps = samplers.ddim_steps(CONFIG, steps=50, eta=eta)
    for step, following in itertools.pairwise(steps):
        here, there = (schedule.add_noise(CONFIG, int(each.timestep)) for each in (step, following))
        assert step.x * here.x0 == pytest.approx(there.x0, rel=1e-12)
        assert math.hypot(step.x * here.noise + step.out, step.noise) == pytest.approx(there.noise, rel=1e-9)


@pytest.mark.parametrize("config", [CONFIG, ZERO_SNR])
def test_only_eta_brings_fresh_noise_and_none_comes_into_the_finished_picture(config: SchedulerConfig) -> None:
    assert all(step.noise == 0 for step in samplers.ddim_steps(config, steps=30))
    clean = replace(config, set_alpha_to_one=True)
    noisy = samplers.ddim_steps(clean, steps=25, eta=1.0)
    assert all(step.noise > 0 for step in noisy[:-1])
    assert noisy[-1].noise == 0
    assert (noisy[-1].x, noisy[-1].out) == (noisy[-1].x0_x, noisy[-1].x0_out)


@given(configs)
def test_signal_falls_from_nearly_one_towards_zero(config: SchedulerConfig) -> None:
    levels = schedule.alphas_cumprod(config)
    assert levels.shape == (config.num_train_timesteps,)
    assert levels.dtype == np.float64
    assert 0.98 < levels[0] < 1
    assert (np.diff(levels) < 0).all()
    assert (levels[-1] == 0) == config.rescale_betas_zero_snr


def test_zero_terminal_snr_keeps_the_first_timestep() -> None:
    plain = replace(ZERO_SNR, rescale_betas_zero_snr=False)
    assert schedule.alphas_cumprod(ZERO_SNR)[0] == pytest.approx(schedule.alphas_cumprod(plain)[0], rel=1e-12)


def test_zero_terminal_snr_starts_at_the_last_timestep_from_noise_alone() -> None:
    first = samplers.ddim_steps(ZERO_SNR, steps=30)[0]
    assert first.timestep == 999
    assert (first.x0_x, first.x0_out) == (0, -1)
    assert schedule.add_noise(ZERO_SNR, 999) == (0, 1)
    assert schedule.velocity(ZERO_SNR, 999) == (-1, 0)


def test_thirty_leading_steps_are_those_of_the_public_mvdream_checkpoint() -> None:
    assert schedule.timesteps(CONFIG, 30) == [1 + 33 * index for index in reversed(range(30))]


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, "30"])
def test_counts_of_steps_outside_1_to_1000_are_refused(steps: Any) -> None:
    with pytest.raises(OptionError, match="steps must be a whole number from 1 to 1000, got"):
        samplers.ddim_steps(CONFIG, steps=steps)


def test_more_steps_than_training_timesteps_are_refused() -> None:
    config = replace(CONFIG, num_train_timesteps=100, steps_offset=0)
    assert len(samplers.ddim_steps(config, steps=100)) == 100
    with pytest.raises(OptionError, match="from 1 to 100, got 101"):
        samplers.ddim_steps(config, steps=101)


def test_more_than_1000_steps_are_refused_even_of_a_longer_training() -> None:
    with pytest.raises(OptionError, match="from 1 to 1000, got 1001"):
        samplers.ddim_steps(replace(CONFIG, num_train_timesteps=2000), steps=1001)


def test_numbers_of_numpy_are_taken_and_do_not_come_out_again() -> None:
    assert all(type(value) is float for value in samplers.ddim_steps(CONFIG, steps=2, eta=np.float64(0.5))[0][:-2])
    assert samplers.ddim_steps(CONFIG, steps=np.int64(7)) == samplers.ddim_steps(CONFIG, steps=7)  # pyright: ignore[reportArgumentType]
    assert type(schedule.add_noise(CONFIG, np.int64(7)).x0) is float  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_0_to_1_is_refused(eta: float) -> None:
    with pytest.raises(OptionError, match="eta must be 0 to 1"):
        samplers.ddim_steps(CONFIG, steps=3, eta=eta)


@pytest.mark.parametrize("timestep", [-1, 1000, 0.5])
def test_timesteps_outside_the_training_are_refused(timestep: Any) -> None:
    for mix in (schedule.add_noise, schedule.velocity):
        with pytest.raises(OptionError, match="timestep must be a whole number from 0 to 999"):
            mix(CONFIG, timestep)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 10.0),
        ("beta_start", 0.0),
        ("beta_start", math.nan),
        ("beta_end", 1.0),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("timestep_spacing", "karras"),
        ("prediction_type", "sample"),
        ("steps_offset", -1),
    ],
)
def test_schedules_that_cannot_be_sampled_are_refused_by_the_field(name: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        samplers.ddim_steps(replace(CONFIG, **{name: value}), steps=1)  # pyright: ignore[reportArgumentType]
    assert caught.value.name == name
    assert caught.value.got == value or value != value


def test_betas_that_leave_no_signal_in_float64_are_refused() -> None:
    drowned = replace(ZERO_SNR, beta_schedule="linear", beta_end=0.9999)
    for config in (drowned, replace(drowned, rescale_betas_zero_snr=False)):
        with pytest.raises(OptionError, match="beta_end must be so small that"):
            schedule.alphas_cumprod(config)


def test_one_timestep_cannot_be_rescaled_to_zero_terminal_snr() -> None:
    with pytest.raises(OptionError, match="num_train_timesteps must be at least 2 for zero terminal SNR"):
        replace(ZERO_SNR, num_train_timesteps=1)
