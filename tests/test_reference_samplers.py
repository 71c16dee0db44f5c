"""Samplers against diffusers' schedulers: whole runs of x_t for a network that is no linear function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from numpy.typing import NDArray

from mvshared import samplers, schedule
from mvshared.config import PredictionType, SamplerName, SchedulerConfig, TimestepSpacing
from mvshared.errors import OptionError

Floats = NDArray[np.float64]

# diffusers makes numpy arrays of tensors, whose `__array__` is of before numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS: dict[SamplerName, Any] = {
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
    "dpmpp-2m-sde": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "dpmpp-2s": DPMSolverSinglestepScheduler,
    "unipc": UniPCMultistepScheduler,
}
PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction")
SPACINGS: tuple[TimestepSpacing, ...] = ("leading", "trailing", "linspace", "karras")
STEPS = (1, 2, 3, 4, 5, 7, 8, 13, 14, 15, 16, 20, 31, 50)
SD21 = SchedulerConfig()
DEMO = SchedulerConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True, steps_offset=0)
TINY = 2.0**-24  # what diffusers takes for the last alphas_cumprod with zero terminal SNR


@contextmanager
def in_float64() -> Iterator[None]:
    """diffusers' own arithmetic, which names float32 wherever it makes or casts an array."""
    with patch.object(torch, "float32", torch.float64), patch.object(np, "float32", np.float64):
        yield


def diffusers_scheduler(name: SamplerName, config: SchedulerConfig, steps: int) -> Any:
    """The scheduler of that sampler, set to the timesteps of the config; those that it has not by itself it is given."""
    karras, spacing = config.timestep_spacing == "karras", config.timestep_spacing
    common = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    fields = {field: getattr(config, field) for field in common}
    if name != "euler-ancestral":
        fields["use_karras_sigmas"] = karras
    if name != "dpmpp-2s":
        fields["timestep_spacing"] = "linspace" if karras else spacing
        fields |= {"steps_offset": config.steps_offset, "rescale_betas_zero_snr": config.rescale_betas_zero_snr}
    scheduler = SCHEDULERS[name](**fields)
    if name == "dpmpp-2s" and config.rescale_betas_zero_snr:
        donor = diffusers_scheduler("dpmpp-2m", config, steps)
        scheduler.alphas_cumprod = donor.alphas_cumprod
    if name == "dpmpp-2s" and not karras:
        levels = schedule.solver_levels(config, steps)
        scheduler.set_timesteps(timesteps=[int(timestep) for timestep in levels.timesteps])
    else:
        scheduler.set_timesteps(steps)
    if name == "euler-ancestral" and karras:
        donor = diffusers_scheduler("euler", config, steps)
        scheduler.sigmas, scheduler.timesteps = donor.sigmas, donor.timesteps
    scheduler.set_begin_index(0)
    return scheduler


def network(x: Floats, timestep: float) -> Floats:
    """Any function of x_t and t that is far from linear."""
    return np.sin(3 * x + 0.01 * timestep) + 0.3 * x**2 / (1 + x**2) - np.roll(x, 1) * np.cos(timestep / 300)


def diffusers_run(scheduler: Any, x: Floats, noise: Callable[[int], Floats]) -> list[Floats]:
    """x_t, of variance 1, after every step from the x_t given."""
    euler = isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
    module = type(scheduler).__module__
    sigmas, found = scheduler.sigmas.tolist(), []
    sample = torch.from_numpy(x)[None] * (np.hypot(1, sigmas[0]) if euler else 1.0)
    for index, timestep in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(sample, timestep)
        out = torch.from_numpy(network(given[0].numpy(), float(timestep)))[None]
        with patch(f"{module}.randn_tensor", lambda *_, index=index, **__: torch.from_numpy(noise(index))[None], create=True):
            sample = scheduler.step(out, timestep, sample, return_dict=False)[0]
        assert sample.dtype == torch.float64
        found.append(sample[0].numpy() / (np.hypot(1, sigmas[index + 1]) if euler else 1.0))
    return found


def own_run(steps: list[samplers.Step], x: Floats, noise: Callable[[int], Floats]) -> list[Floats]:
    state, found = samplers.State(x), []
    for index, step in enumerate(steps):
        out = network(state.x, step.timestep)
        state = samplers.advance(state, step, out, noise(index), remember=samplers.remembered(steps))
        found.append(state.x)
    return found


def assert_runs_equal(name: SamplerName, config: SchedulerConfig, steps: int, *, rtol: float = 1e-8) -> None:
    start = np.random.default_rng(steps).standard_normal(8)

    def noise(index: int) -> Floats:
        return np.random.default_rng([steps, index]).standard_normal(8)

    with in_float64():
        scheduler = diffusers_scheduler(name, config, steps)
        expected = diffusers_run(scheduler, start, noise)
    plan = samplers.sampler_steps(name, config, steps=steps)
    where = f"{name}, {config}, {steps} steps"
    np.testing.assert_allclose([step.timestep for step in plan], scheduler.timesteps.tolist(), rtol=1e-9, err_msg=where)
    for index, (got, wanted) in enumerate(zip(own_run(plan, start, noise), expected, strict=True)):
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol, err_msg=f"{where}, step {index}")


@contextmanager
def last_signal(value: float) -> Iterator[None]:
    """The last alphas_cumprod of a zero terminal SNR schedule is that."""
    exact = schedule.alphas_cumprod

    def nearly(config: SchedulerConfig) -> Floats:
        levels = exact(config).copy()
        levels[-1] = levels[-1] or value
        return levels

    with patch.object(schedule, "alphas_cumprod", nearly):
        yield


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sampler_is_that_of_diffusers_step_by_step(
    name: SamplerName, spacing: TimestepSpacing, prediction: PredictionType
) -> None:
    for steps in STEPS:
        if name.startswith("euler") and (spacing, steps) == ("karras", 1):
            continue  # see below
        assert_runs_equal(name, replace(SD21, timestep_spacing=spacing, prediction_type=prediction), steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sampler_with_zero_terminal_snr_is_that_of_diffusers_if_it_leaves_as_much_signal(
    name: SamplerName, spacing: TimestepSpacing
) -> None:
    with last_signal(TINY):
        for steps in STEPS:
            assert_runs_equal(name, replace(DEMO, timestep_spacing=spacing), steps, rtol=1e-7)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_signal_is_the_limit_of_less_and_less(name: SamplerName, spacing: TimestepSpacing) -> None:
    config = replace(DEMO, timestep_spacing=spacing)
    start, noise = np.random.default_rng(0).standard_normal(8), lambda index: np.full(8, 0.1 * index)
    for steps in (2, 3, 8, 15):
        exact = own_run(samplers.sampler_steps(name, config, steps=steps), start, noise)
        assert np.isfinite(exact).all()
        nearer = []
        for signal in (1e-12, 1e-24, 1e-300):
            with last_signal(signal):
                found = own_run(samplers.sampler_steps(name, config, steps=steps), start, noise)
            nearer.append(np.abs(found[1] - exact[1]).max())  # pyright: ignore[reportArgumentType]
        assert nearer[2] < 0.02
        assert nearer == sorted(nearer, reverse=True) or max(nearer) < 1e-5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_many_steps_are_those_of_diffusers(name: SamplerName) -> None:
    for spacing, steps in (("leading", 333), ("linspace", 999), ("trailing", 500), ("karras", 100)):
        assert_runs_equal(name, replace(SD21, timestep_spacing=spacing, prediction_type="v_prediction"), steps, rtol=1e-6)


def test_in_float32_a_sampler_differs_from_diffusers_by_rounding() -> None:
    for name in SCHEDULERS:
        scheduler = diffusers_scheduler(name, replace(SD21, timestep_spacing="trailing"), 10)
        plan = samplers.sampler_steps(name, replace(SD21, timestep_spacing="trailing"), steps=10)
        assert [step.timestep for step in plan] == scheduler.timesteps.tolist()
        levels = schedule.solver_levels(replace(SD21, timestep_spacing="trailing"), 10)
        np.testing.assert_allclose(levels.sigmas, scheduler.sigmas.tolist(), rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("ends", ["leading", "trailing"])
def test_euler_between_the_ends_of_a_spacing_is_that_of_diffusers(ends: Any, prediction: PredictionType) -> None:
    for steps in (1, 2, 5, 10, 30, 333):
        config = replace(SD21, timestep_spacing="karras", karras_ends=ends, prediction_type=prediction)
        with in_float64():
            theirs = SCHEDULERS["euler"](
                **{name: getattr(config, name) for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type")},
                use_karras_sigmas=True,
                timestep_spacing=ends,
                steps_offset=1,
            )
            theirs.set_timesteps(steps)
        levels = schedule.euler_levels(config, steps)
        np.testing.assert_allclose(levels.sigmas, theirs.sigmas.tolist(), rtol=1e-6)
        np.testing.assert_allclose(levels.timesteps, theirs.timesteps.tolist(), rtol=1e-5, atol=1e-3)
        assert len(samplers.sampler_steps("euler", config, steps=steps)) == steps
    assert schedule.solver_levels(config, 10) == schedule.solver_levels(replace(config, karras_ends="training"), 10)


# Where diffusers is not followed


@pytest.mark.parametrize("name", ["euler", "euler-ancestral"])
def test_one_karras_step_starts_at_the_largest_sigma_where_diffusers_starts_at_the_smallest(name: SamplerName) -> None:
    config = replace(SD21, timestep_spacing="karras")
    assert diffusers_scheduler("euler", config, 1).timesteps.tolist() == [0.0]
    assert [step.timestep for step in samplers.sampler_steps(name, config, steps=1)] == [999.0]


def test_karras_levels_with_zero_terminal_snr_are_those_of_before_where_diffusers_goes_to_4096() -> None:
    config = replace(DEMO, timestep_spacing="karras")
    sigmas = diffusers_scheduler("dpmpp-2m", config, 10).sigmas.tolist()
    before = schedule.training_sigmas(replace(DEMO, rescale_betas_zero_snr=False))[-1]
    assert sigmas[0] == pytest.approx(4096, rel=1e-3)
    assert sum(sigma > before for sigma in sigmas) == 7
    levels = schedule.solver_levels(config, 10)
    plain = schedule.solver_levels(replace(config, rescale_betas_zero_snr=False), 10)
    assert (levels.timesteps[0], levels.sigmas[0]) == (999, np.inf)
    assert levels.sigmas[1:] == plain.sigmas[1:]
    rescaled = schedule.training_sigmas(config)
    for timestep, sigma in list(zip(levels.timesteps, levels.sigmas, strict=False))[1:]:
        assert rescaled[int(max(timestep - 1, 0))] <= sigma * (1 + 1e-9)
        assert sigma <= rescaled[int(timestep + 1)]


def test_trailing_solvers_leave_out_the_timestep_that_diffusers_has_too_many() -> None:
    config = replace(SD21, timestep_spacing="trailing")
    assert diffusers_scheduler("unipc", config, 61).timesteps.tolist()[60:] == [15, -1]
    assert schedule.solver_levels(config, 61).timesteps[60:] == [15]


def test_noise_levels_that_are_the_same_are_refused_where_diffusers_gives_nan() -> None:
    config = replace(SD21, timestep_spacing="linspace")
    scheduler = diffusers_scheduler("dpmpp-2m", config, 1000)
    found = diffusers_run_in_float32(scheduler)
    assert not np.isfinite(found).all()
    with pytest.raises(OptionError, match="steps must be a whole number from 1 to 999, got 1000"):
        samplers.sampler_steps("dpmpp-2m", config, steps=1000)


def diffusers_run_in_float32(scheduler: Any) -> Any:
    sample = torch.ones(1, 4)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.sin(sample), timestep, sample, return_dict=False)[0]
    return sample.numpy()
