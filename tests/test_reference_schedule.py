"""Betas, timesteps, DDIM steps, noising and velocity against diffusers' DDIMScheduler."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from mvshared import samplers, schedule
from mvshared.config import BetaSchedule, PredictionType, SchedulerConfig, TimestepSpacing
from mvshared.errors import OptionError

SPACINGS: tuple[TimestepSpacing, ...] = ("leading", "trailing", "linspace")
PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction")
BETAS: tuple[tuple[BetaSchedule, float, float], ...] = (("linear", 0.0001, 0.02), ("scaled_linear", 0.00085, 0.012))
FEW_STEPS = (1, 2, 3, 7, 30, 50)
MANY_STEPS = (61, 333, 999, 1000)


@contextmanager
def float64_linspace() -> Iterator[None]:
    """diffusers asks torch.linspace for float32 betas; everything after follows their dtype."""
    linspace = torch.linspace

    def in_float64(start: float, end: float, steps: int, *, dtype: torch.dtype) -> torch.Tensor:
        assert dtype == torch.float32
        return linspace(start, end, steps, dtype=torch.float64)

    with patch.object(torch, "linspace", in_float64):
        yield


def oracle(config: SchedulerConfig, *, float64: bool = True) -> DDIMScheduler:
    """diffusers' scheduler of the same settings, its own arithmetic in float64 unless told otherwise."""

    def build() -> DDIMScheduler:
        return DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            timestep_spacing=config.timestep_spacing,  # pyright: ignore[reportArgumentType]
            steps_offset=config.steps_offset,
            set_alpha_to_one=config.set_alpha_to_one,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            clip_sample=False,
        )

    if not float64:
        return build()
    with float64_linspace():
        return build()


def settings(spacing: TimestepSpacing, prediction: PredictionType, *, rescale: bool) -> Iterator[SchedulerConfig]:
    for (name, start, end), offset, to_one in itertools.product(BETAS, (0, 1), (False, True)):
        yield SchedulerConfig(
            beta_start=start,
            beta_end=end,
            beta_schedule=name,
            prediction_type=prediction,
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=to_one,
            rescale_betas_zero_snr=rescale,
        )


def refused(config: SchedulerConfig, steps: int) -> bool:
    """Where diffusers divides by zero (eps without any signal) or indexes past the last timestep."""
    scheduler = oracle(config)
    scheduler.set_timesteps(steps)
    first = int(scheduler.timesteps[0])
    if first >= config.num_train_timesteps:
        return True
    return config.prediction_type == "epsilon" and float(scheduler.alphas_cumprod[first]) == 0


def assert_sampling_equal(config: SchedulerConfig, *, steps: int, eta: float) -> None:
    """Sample twice from the same noise with the same model outputs, and compare latents and pictures after each step."""
    rng = np.random.default_rng(steps)
    scheduler = oracle(config)
    scheduler.set_timesteps(steps)
    expected_timesteps = scheduler.timesteps.tolist()[:steps]
    result = samplers.ddim_steps(config, steps=steps, eta=eta)
    assert [step.timestep for step in result] == expected_timesteps, (config, steps)
    x = rng.standard_normal(6)
    x_torch = torch.from_numpy(x)
    for step, timestep in zip(result, expected_timesteps, strict=True):
        out, noise = rng.standard_normal((2, 6))
        reference = scheduler.step(
            torch.from_numpy(out), timestep, x_torch, eta=eta, variance_noise=torch.from_numpy(noise), return_dict=False
        )
        picture = step.x0_x * x + step.x0_out * out
        x = step.x * x + step.out * out + step.noise * noise
        x_torch = reference[0]
        where = f"{config}, {steps} steps, eta {eta}, timestep {timestep}"
        np.testing.assert_allclose(picture, reference[1].numpy(), rtol=1e-9, atol=1e-9, err_msg=where)
        np.testing.assert_allclose(x, x_torch.numpy(), rtol=1e-9, atol=1e-9, err_msg=where)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_equals_diffusers_step_by_step(spacing: TimestepSpacing, prediction: PredictionType, rescale: bool) -> None:
    compared = 0
    for config, steps in itertools.product(settings(spacing, prediction, rescale=rescale), FEW_STEPS):
        if refused(config, steps):
            continue
        for eta in (0.0, 0.3, 0.9 if rescale else 1.0):
            assert_sampling_equal(config, steps=steps, eta=eta)
            compared += 1
    zero_signal = rescale and prediction == "epsilon" and spacing != "leading"
    one_step_at_timestep_0 = len(BETAS) * 4 * 3 if spacing == "linspace" else 0
    assert compared == (one_step_at_timestep_0 if zero_signal else len(BETAS) * 4 * len(FEW_STEPS) * 3)


@pytest.mark.parametrize("steps", MANY_STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_equals_diffusers_with_many_steps(spacing: TimestepSpacing, steps: int) -> None:
    assert_sampling_equal(SchedulerConfig(timestep_spacing=spacing, steps_offset=0), steps=steps, eta=1.0)
    zero_snr = SchedulerConfig(
        timestep_spacing=spacing, steps_offset=0, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    assert_sampling_equal(zero_snr, steps=steps, eta=0.0)


@pytest.mark.parametrize("count", [1, 10, 64, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1, 30])
def test_timesteps_equal_diffusers_for_every_count_of_steps(count: int, spacing: TimestepSpacing, offset: int) -> None:
    config = SchedulerConfig(num_train_timesteps=count, timestep_spacing=spacing, steps_offset=offset)
    scheduler = oracle(config)
    for steps in range(1, count + 1):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()
        if expected[0] >= count:
            with pytest.raises(OptionError, match=f"would start at {expected[0]}"):
                schedule.timesteps(config, steps)
            continue
        assert schedule.timesteps(config, steps) == expected[:steps]
        assert expected[steps:] in ([], [-1])


def test_trailing_spacing_leaves_out_the_timestep_that_diffusers_has_too_many() -> None:
    config = SchedulerConfig(timestep_spacing="trailing")
    scheduler = oracle(config)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps.tolist()[60:] == [15, -1]
    assert schedule.timesteps(config, 61)[60:] == [15]


def test_leading_spacing_past_the_last_timestep_is_refused_where_diffusers_fails() -> None:
    config = SchedulerConfig(timestep_spacing="leading", steps_offset=1)
    scheduler = oracle(config)
    scheduler.set_timesteps(1000)
    with pytest.raises(IndexError):
        scheduler.step(torch.zeros(1), int(scheduler.timesteps[0]), torch.zeros(1))
    with pytest.raises(OptionError, match="steps_offset 1"):
        samplers.ddim_steps(config, steps=1000)


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 30), ("linspace", 2), ("leading", 500)])
def test_epsilon_without_signal_is_refused_where_diffusers_divides_by_zero(spacing: TimestepSpacing, steps: int) -> None:
    config = SchedulerConfig(timestep_spacing=spacing, rescale_betas_zero_snr=True)
    scheduler = oracle(config)
    scheduler.set_timesteps(steps)
    latents = scheduler.step(torch.ones(1), int(scheduler.timesteps[0]), torch.ones(1), return_dict=False)[0]
    assert not torch.isfinite(latents).any()
    with pytest.raises(OptionError, match="prediction_type must be v_prediction"):
        samplers.ddim_steps(config, steps=steps)


def test_full_noise_without_signal_is_finite_where_diffusers_takes_the_root_of_a_rounding_error() -> None:
    config = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    scheduler = oracle(config)
    scheduler.set_timesteps(1)
    latents = scheduler.step(torch.ones(1), 999, torch.ones(1), eta=1.0, variance_noise=torch.ones(1), return_dict=False)[0]
    assert torch.isnan(latents).all()
    exact, nearly = (samplers.ddim_steps(config, steps=1, eta=eta)[0] for eta in (1.0, 1 - 1e-12))
    np.testing.assert_allclose(exact[:-2], nearly[:-2], atol=1e-6)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("name", "start", "end"), BETAS)
def test_noising_and_velocity_equal_diffusers(name: BetaSchedule, start: float, end: float, rescale: bool) -> None:
    config = SchedulerConfig(beta_schedule=name, beta_start=start, beta_end=end, rescale_betas_zero_snr=rescale)
    scheduler = oracle(config)
    x0, eps = np.random.default_rng(0).standard_normal((2, 8))
    for timestep in (0, 1, 17, 500, 998, 999):
        arguments = (torch.from_numpy(x0)[None], torch.from_numpy(eps)[None], torch.IntTensor([timestep]))
        mix = schedule.add_noise(config, timestep)
        noisy = scheduler.add_noise(*arguments)
        np.testing.assert_allclose(mix.x0 * x0 + mix.noise * eps, noisy[0].numpy(), rtol=1e-9, atol=1e-9)
        mix = schedule.velocity(config, timestep)
        v = scheduler.get_velocity(*arguments)
        np.testing.assert_allclose(mix.x0 * x0 + mix.noise * eps, v[0].numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("name", "start", "end"), BETAS)
def test_schedules_differ_from_diffusers_in_float32_by_rounding_only(
    name: BetaSchedule, start: float, end: float, rescale: bool
) -> None:
    config = SchedulerConfig(beta_schedule=name, beta_start=start, beta_end=end, rescale_betas_zero_snr=rescale)
    scheduler = oracle(config, float64=False)
    np.testing.assert_allclose(schedule.betas(config), scheduler.betas.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(schedule.alphas_cumprod(config), scheduler.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-6)
