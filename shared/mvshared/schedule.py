"""Noise schedules and samplers, as steps of plain Python floats.

Sources: DDIM (Song et al. 2021, arXiv:2010.02502, equations 12 and 16), v-prediction (Salimans and Ho 2022, arXiv:2202.00512),
spacings and zero terminal SNR (Lin et al. 2024, arXiv:2305.08891). Rounding follows diffusers' DDIMScheduler. Its clip_sample
and thresholding are not supported: they are no linear steps, and whoever reads a scheduler_config.json has to refuse them.

`x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps` for every sampler: sampling starts from noise of
deviation 1 (init_noise_sigma) and the model is given `x_t` as it is. A sampler that is published in terms of sigma (Euler,
DPM-Solver++) is written in this frame.
"""

import math
import operator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mvshared.config import SchedulerConfig
from mvshared.errors import OptionError

MAX_STEPS = 1000


class Step(NamedTuple):
    """One sampling step at `timestep`, for the model's output `out` (eps or v, as the schedule's prediction type says).

    The next latents are `x * x_t + out * out_t + noise * fresh_noise`, where fresh_noise has deviation 1 and `noise` 0 means
    that none is needed; the picture as far as it is known is `x0_x * x_t + x0_out * out_t`. A multi-step sampler adds a
    coefficient of the previous step's picture, 0 by default.
    """

    timestep: float
    x: float
    out: float
    noise: float
    x0_x: float
    x0_out: float


class Mix(NamedTuple):
    """A sum of a clean latent and unit noise: `x0 * x_0 + noise * eps`."""

    x0: float
    noise: float


class Sampler(Protocol):
    """What SAMPLERS holds: a function of the schedule that gives its steps, from noise to picture."""

    def __call__(self, config: SchedulerConfig, *, steps: int, eta: float) -> list[Step]: ...


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


def timesteps(config: SchedulerConfig, steps: int) -> list[int]:
    """The timesteps, from noisy to clean, at which `steps` sampling steps call the model; table 2 of arXiv:2305.08891.

    Equal to diffusers, but for two faults of it. Trailing spacing gives one timestep too many there for some counts (61, 103,
    ... of 1000), which is -1; it is left out here. Leading spacing with an offset can start past the last training timestep
    (1000 steps with offset 1), where diffusers fails with an IndexError. Raises OptionError.
    """
    count = config.num_train_timesteps
    steps = _whole("steps", steps, low=1, high=min(MAX_STEPS, count))
    match config.timestep_spacing:
        case "leading":
            offset = config.steps_offset
            ascending = np.arange(steps) * (count // steps) + offset
            if ascending[-1] >= count:
                raise OptionError(
                    "steps",
                    expected=f"such that leading spacing with steps_offset {offset} starts at timestep {count - 1} at most",
                    got=steps,
                    hint=f"it would start at {ascending[-1]}; take another number of steps",
                )
            return ascending[::-1].tolist()
        case "trailing":
            return (np.round(np.arange(count, 0, -count / steps))[:steps].astype(np.int64) - 1).tolist()
        case "linspace":
            return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64).tolist()
        case other:
            raise OptionError("timestep_spacing", expected="leading, trailing or linspace", got=other)


def ddim_steps(config: SchedulerConfig, *, steps: int, eta: float = 0.0) -> list[Step]:
    """DDIM: deterministic with `eta` 0, as noisy as DDPM with `eta` 1; arXiv:2010.02502, equations 12 and 16.

    As in diffusers, a step ends at the noise level of `timestep - num_train_timesteps // steps`. With leading spacing that is
    the next timestep; with trailing or linspace spacing the two may differ, where num_train_timesteps is no multiple of steps.
    Where rounding takes the square root of less than 0 in diffusers (`eta` 1 from zero terminal SNR: NaN), it is 0 here.

    Raises OptionError, also for epsilon prediction at a timestep without any signal (zero terminal SNR with trailing or
    linspace spacing), where the noise says nothing about the picture.
    """
    if not 0 <= eta <= 1:
        raise OptionError("eta", expected="0 to 1", got=eta)
    levels = alphas_cumprod(config).tolist()
    final = 1.0 if config.set_alpha_to_one else levels[0]
    called_at = timesteps(config, steps)
    stride = len(levels) // len(called_at)
    result = []
    for timestep in called_at:
        alpha = levels[timestep]
        following = levels[timestep - stride] if timestep >= stride else final
        x0_x, x0_out, eps_x, eps_out = _prediction(config, alpha)
        std = float(eta) * math.sqrt((1 - following) / (1 - alpha) * (1 - alpha / following))
        to_x0 = math.sqrt(following)
        to_eps = math.sqrt(max(0.0, 1 - following - std**2))
        result.append(
            Step(
                timestep=float(timestep),
                x=to_x0 * x0_x + to_eps * eps_x,
                out=to_x0 * x0_out + to_eps * eps_out,
                noise=std,
                x0_x=x0_x,
                x0_out=x0_out,
            )
        )
    return result


SAMPLERS: dict[str, Sampler] = {"ddim": ddim_steps}


def sampler_steps(name: str, config: SchedulerConfig, *, steps: int, eta: float = 0.0) -> list[Step]:
    """The `steps` steps of the sampler called `name` in SAMPLERS. Raises OptionError."""
    if name not in SAMPLERS:
        raise OptionError("scheduler", expected=f"one of {', '.join(SAMPLERS)}", got=name)
    return SAMPLERS[name](config, steps=steps, eta=eta)


def add_noise(config: SchedulerConfig, timestep: int) -> Mix:
    """The mix that is `x_t` at a timestep from 0 to num_train_timesteps - 1. Raises OptionError."""
    alpha = _alpha(config, timestep)
    return Mix(x0=math.sqrt(alpha), noise=math.sqrt(1 - alpha))


def velocity(config: SchedulerConfig, timestep: int) -> Mix:
    """The mix that is `v`, what a v-prediction model learns at a timestep; arXiv:2202.00512. Raises OptionError."""
    alpha = _alpha(config, timestep)
    return Mix(x0=-math.sqrt(1 - alpha), noise=math.sqrt(alpha))


def _whole(name: str, value: int, *, low: int, high: int) -> int:
    """`value`, which may be numpy's, as an int. Raises OptionError unless it is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
        raise OptionError(name, expected=f"a whole number from {low} to {high}", got=value)
    return operator.index(value)


def _alpha(config: SchedulerConfig, timestep: int) -> float:
    levels = alphas_cumprod(config)
    return float(levels[_whole("timestep", timestep, low=0, high=len(levels) - 1)])


def _prediction(config: SchedulerConfig, alpha: float) -> tuple[float, float, float, float]:
    """Coefficients (x0_x, x0_out, eps_x, eps_out) of x_t and of the model's output in the x_0 and the eps that it implies."""
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    match config.prediction_type:
        case "v_prediction":
            return signal, -noise, noise, signal
        case "epsilon" if signal == 0:
            raise OptionError(
                "prediction_type",
                expected="v_prediction where sampling starts without any signal (rescale_betas_zero_snr)",
                got=config.prediction_type,
                hint="or leading spacing with steps that do not start at the last timestep",
            )
        case "epsilon":
            return 1 / signal, -noise / signal, 0.0, 1.0
        case other:
            raise OptionError("prediction_type", expected="epsilon or v_prediction", got=other)
