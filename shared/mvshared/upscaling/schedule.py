"""Euler's method over noise levels, as steps of plain Python floats in the frame of `mvshared.schedule`.

Sources: Karras et al. 2022 (arXiv 2206.00364, algorithm 1 without churn), diffusers' EulerDiscreteScheduler and
StableDiffusionLatentUpscalePipeline. There x_sigma = x_0 + sigma eps; here x_t = x_sigma / sqrt(sigma^2 + 1), which has
variance 1 and is what the network sees. With that, x_0 = signal x_t + noise out where signal = 1 / sqrt(sigma^2 + 1) and
noise = sigma signal: the output is minus the velocity of v-prediction, and an Euler step is one of DDIM.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.config import SchedulerConfig
from mvshared.errors import OptionError
from mvshared.numbers import whole
from mvshared.samplers import Step
from mvshared.schedule import alphas_cumprod
from mvshared.upscaling.config import SigmaConfig

MAX_UPSCALE_STEPS = 1000


class SigmaPlan(NamedTuple):
    """`initial` times noise of deviation 1 is the first x_t; the last of `steps` gives x_sigma at its last, small sigma."""

    initial: float
    steps: tuple[Step, ...]


def training_sigmas(config: SigmaConfig) -> NDArray[np.float64]:
    """The noise level float64 (num_train_timesteps,) of each training timestep, rising. Raises OptionError."""
    levels = alphas_cumprod(
        SchedulerConfig(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
        )
    )
    return np.sqrt((1 - levels) / levels)


def sampling_sigmas(config: SigmaConfig, steps: int) -> list[float]:
    """The noise levels from which `steps` steps start, falling, and the one at which the last of them ends.

    As diffusers has it, log-linear levels end at the smallest level of training, linear ones at 0. Raises OptionError.
    """
    steps = whole("steps", steps, 1, MAX_UPSCALE_STEPS)
    levels, count = training_sigmas(config), config.num_train_timesteps
    if config.interpolation_type == "log_linear":
        return np.exp(np.linspace(math.log(levels[-1]), math.log(levels[0]), steps + 1)).tolist()
    match config.timestep_spacing:
        case "linspace":
            timesteps = np.linspace(0, count - 1, steps)[::-1]
        case "leading":
            timesteps = np.arange(steps)[::-1] * (count // steps) + config.steps_offset
        case "trailing":
            timesteps = np.arange(count, 0, -count / steps)[:steps].round() - 1  # rounds halves as diffusers does
        case other:
            raise OptionError("timestep_spacing", expected="leading, trailing or linspace", got=other)
    return [*np.interp(timesteps, np.arange(count), levels).tolist(), 0.0]


def euler_plan(config: SigmaConfig, steps: int) -> SigmaPlan:
    """The plan of `steps` steps; a step's `timestep` is what the network gets, a quarter of ln sigma. Raises OptionError."""
    sigmas = sampling_sigmas(config, steps)
    result = []
    for number, (sigma, following) in enumerate(pairwise(sigmas), start=1):
        signal = 1 / math.sqrt(sigma**2 + 1)
        noise = sigma * signal
        # eps = noise x_t - signal out; the next x_t is signal' x_0 + noise' eps, and at the end x_sigma = x_0 + sigma' eps.
        to_x0 = 1.0 if number == steps else 1 / math.sqrt(following**2 + 1)
        to_eps = following * to_x0
        result.append(
            Step(
                timestep=0.25 * math.log(sigma),
                x=to_x0 * signal + to_eps * noise,
                out=to_x0 * noise - to_eps * signal,
                noise=0.0,
                x0_x=signal,
                x0_out=noise,
            )
        )
    leads = config.timestep_spacing == "leading"
    initial = 1.0 if leads else sigmas[0] / math.sqrt(sigmas[0] ** 2 + 1)
    return SigmaPlan(initial, tuple(result))


def noise_embedding(noise_level: float, *, channels: int, frequencies: tuple[float, ...] | None) -> NDArray[np.float32]:
    """Cosines and sines float32 (channels,) of ln(1 + noise_level) at the frequencies of an upscaler.

    At level 0 they are ones and zeros whatever the frequencies; at another level OptionError is raised if these are not known.
    """
    if noise_level and frequencies is None:
        hint = "the public folder does not hold what embeds other levels"
        raise OptionError("noise level of the upscaler", expected="0 for this upscaler", got=noise_level, hint=hint)
    angles = 2 * math.pi * math.log1p(noise_level) * np.asarray(frequencies or np.zeros(channels // 2), np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)
