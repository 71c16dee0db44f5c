"""Noise schedules, and the timesteps and noise levels at which samplers call the model.

Sources: v-prediction (Salimans and Ho 2022, arXiv:2202.00512), spacings and zero terminal SNR (Lin et al. 2024,
arXiv:2305.08891), Karras' noise levels (Karras et al. 2022, arXiv:2206.00364, equation 5). Rounding follows diffusers'
schedulers. Their clip_sample and thresholding are not supported: they are no linear steps, and whoever reads a
scheduler_config.json has to refuse them.

`x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps`: the model is given `x_t` as it is, of variance 1. What is
published in terms of `x_0 + sigma eps` is `x_t` times sqrt(1 + sigma^2), where sigma^2 is `(1 - alphas_cumprod) /
alphas_cumprod`; it is infinite at the last timestep with zero terminal SNR.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from mvshared.config import SchedulerConfig, TimestepSpacing
from mvshared.errors import OptionError
from mvshared.numbers import whole

MAX_STEPS = 1000
KARRAS_RHO = 7.0


class Mix(NamedTuple):
    """A sum of a clean latent and unit noise: `x0 * x_0 + noise * eps`."""

    x0: float
    noise: float


class Levels(NamedTuple):
    """Where a sampler calls the model, from noise to picture: timesteps, which may lie between two of training, and the sigma
    at each of them and, one more, at the end, where it is 0."""

    timesteps: list[float]
    sigmas: list[float]


def betas(config: SchedulerConfig) -> NDArray[np.float64]:
    """Variances float64 (num_train_timesteps,) of the noise that each training timestep adds, rescaled if the config says so.

    Zero terminal SNR is algorithm 1 of arXiv:2305.08891. Raises OptionError.
    """
    count = config.num_train_timesteps
    match config.beta_schedule:
        case "linear":
            result = np.linspace(config.beta_start, config.beta_end, count, dtype=np.float64)
        case "scaled_linear":
            result = np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), count, dtype=np.float64) ** 2
        case other:
            raise OptionError("beta_schedule", expected="linear or scaled_linear", got=other)
    root = np.sqrt(np.cumprod(1 - result))
    if root[-1] ** 2 < np.finfo(np.float64).tiny:
        expected = "so small that some signal is left at the last timestep in float64"
        raise OptionError("beta_end", expected=expected, got=config.beta_end)
    if not config.rescale_betas_zero_snr:
        return result
    levels = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - np.concatenate([levels[:1], levels[1:] / levels[:-1]])


def alphas_cumprod(config: SchedulerConfig) -> NDArray[np.float64]:
    """Share float64 (num_train_timesteps,) of the signal's variance that is left at each timestep, falling within [0, 1).

    0 only at the last timestep, and only with zero terminal SNR. Raises OptionError.
    """
    return np.cumprod(1 - betas(config), dtype=np.float64)


def with_spacing(config: SchedulerConfig, spacing: str | None) -> SchedulerConfig:
    """The config with timesteps spaced that way, for None as it is. Raises OptionError for another name."""
    if spacing is None:
        return config
    for name in get_args(TimestepSpacing):
        if isinstance(spacing, str) and spacing == name:
            return replace(config, timestep_spacing=name)
    raise OptionError("spacing", expected=f"one of {', '.join(get_args(TimestepSpacing))}", got=spacing)


def training_sigmas(config: SchedulerConfig) -> NDArray[np.float64]:
    """The sigma float64 (num_train_timesteps,) of each training timestep, rising; the last one is infinite with zero terminal
    SNR. Raises OptionError."""
    levels = alphas_cumprod(config)
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - levels) / levels)


def timesteps(config: SchedulerConfig, steps: int) -> list[int]:
    """The timesteps, from noisy to clean, at which `steps` steps of DDIM call the model; table 2 of arXiv:2305.08891.

    Equal to diffusers, but for two faults of it. Trailing spacing gives one timestep too many there for some counts (61, 103,
    ... of 1000), which is -1; it is left out here. Leading spacing with an offset can start past the last training timestep
    (1000 steps with offset 1), where diffusers fails with an IndexError. Raises OptionError.
    """
    count = config.num_train_timesteps
    steps = whole("steps", steps, 1, min(MAX_STEPS, count))
    match config.timestep_spacing:
        case "leading":
            return _leading(config, steps, last=steps - 1, stride=count // steps)
        case "trailing":
            return (np.round(np.arange(count, 0, -count / steps))[:steps].astype(np.int64) - 1).tolist()
        case "linspace":
            return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64).tolist()
        case other:
            raise OptionError("timestep_spacing", expected="leading, trailing or linspace for DDIM", got=other)


def euler_levels(config: SchedulerConfig, steps: int) -> Levels:
    """The levels of `steps` steps of Euler's methods: those of diffusers' EulerDiscreteScheduler.

    Linspace spacing is not rounded to timesteps of training. Raises OptionError.
    """
    if config.timestep_spacing == "karras":
        if config.karras_ends == "training":
            return _karras_levels(config, steps)
        spaced = _levels(config, timesteps(replace(config, timestep_spacing=config.karras_ends), steps))
        return _karras_levels(config, steps, ends=(spaced.sigmas[0], spaced.sigmas[-2]))
    if config.timestep_spacing == "linspace":
        count = config.num_train_timesteps
        steps = whole("steps", steps, 1, min(MAX_STEPS, count))
        return _levels(config, np.linspace(0, count - 1, steps)[::-1].tolist())
    return _levels(config, timesteps(config, steps))


def solver_levels(config: SchedulerConfig, steps: int) -> Levels:
    """The levels of `steps` calls of the model by a solver: those of diffusers' DPMSolver and UniPC schedulers.

    Leading and linspace spacing have one more timestep there than is sampled: the last one, nearly without noise, is where the
    last step would end if that were not sigma 0. Karras' timesteps are rounded to those of training. Raises OptionError.
    """
    if config.timestep_spacing == "karras":
        levels = _karras_levels(config, steps)
        return Levels([float(round(timestep)) for timestep in levels.timesteps], levels.sigmas)
    if config.timestep_spacing == "trailing":
        return _levels(config, timesteps(config, steps))
    count = config.num_train_timesteps
    steps = whole("steps", steps, 1, min(MAX_STEPS, count - 1))
    if config.timestep_spacing == "leading":
        return _levels(config, _leading(config, steps, last=steps, stride=count // (steps + 1))[:-1])
    return _levels(config, np.linspace(0, count - 1, steps + 1).round()[:0:-1].astype(np.int64).tolist())


def add_noise(config: SchedulerConfig, timestep: int) -> Mix:
    """The mix that is `x_t` at a timestep from 0 to num_train_timesteps - 1. Raises OptionError."""
    alpha = _alpha(config, timestep)
    return Mix(x0=math.sqrt(alpha), noise=math.sqrt(1 - alpha))


def velocity(config: SchedulerConfig, timestep: int) -> Mix:
    """The mix that is `v`, what a v-prediction model learns at a timestep; arXiv:2202.00512. Raises OptionError."""
    alpha = _alpha(config, timestep)
    return Mix(x0=-math.sqrt(1 - alpha), noise=math.sqrt(alpha))


def _leading(config: SchedulerConfig, steps: int, *, last: int, stride: int) -> list[int]:
    """The multiples 0 to `last` of a stride, plus steps_offset, falling. Raises OptionError past the last training timestep."""
    offset, count = config.steps_offset, config.num_train_timesteps
    start = last * stride + offset
    if start >= count:
        raise OptionError(
            "steps",
            expected=f"such that leading spacing with steps_offset {offset} starts at timestep {count - 1} at most",
            got=steps,
            hint=f"it would start at {start}; take another number of steps",
        )
    return list(range(start, offset - 1, -stride))


def _levels(config: SchedulerConfig, called_at: Sequence[float]) -> Levels:
    sigmas = training_sigmas(config)
    return Levels(
        [float(timestep) for timestep in called_at], [*np.interp(called_at, np.arange(len(sigmas)), sigmas).tolist(), 0.0]
    )


def _karras_levels(config: SchedulerConfig, steps: int, *, ends: tuple[float, float] | None = None) -> Levels:
    """Noise levels evenly spaced in sigma^(1/7), and the timesteps where ln sigma is interpolated between those of training.
    The largest and the smallest are `ends`, or those of training.

    With zero terminal SNR there is no largest sigma. The first step is at the last timestep, and the others have the levels of
    the schedule as it was before it was rescaled. diffusers takes alphas_cumprod to be 2^-24 there, sigma 4096, and of 10 steps
    spends 7 above the largest sigma of before.
    """
    steps = whole("steps", steps, 1, min(MAX_STEPS, config.num_train_timesteps))
    plain = training_sigmas(replace(config, rescale_betas_zero_snr=False))
    first, last = (plain[-1], plain[0]) if ends is None or config.rescale_betas_zero_snr else ends
    roots = np.linspace(first ** (1 / KARRAS_RHO), last ** (1 / KARRAS_RHO), steps)
    sigmas = roots**KARRAS_RHO
    levels = training_sigmas(config)
    called_at = np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels)))
    if config.rescale_betas_zero_snr:
        called_at[0], sigmas[0] = len(levels) - 1, math.inf
    return Levels(called_at.tolist(), [*sigmas.tolist(), 0.0])


def _alpha(config: SchedulerConfig, timestep: int) -> float:
    levels = alphas_cumprod(config)
    return float(levels[whole("timestep", timestep, 0, len(levels) - 1)])
