"""Samplers, as steps of plain Python floats in the frame of `mvshared.schedule`.

Sources: DDIM (Song et al. 2021, arXiv:2010.02502, equations 12 and 16); Euler (Karras et al. 2022, arXiv:2206.00364) and its
ancestral form (k-diffusion's sample_euler_ancestral); DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, algorithms 1 and 2, and
its SDE-DPM-Solver++(2M)); UniPC (Zhao et al. 2023, arXiv:2302.04867, with B_2). All end at sigma 0 but DDIM, which ends where
its config says.

They are step by step those of diffusers: DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler,
DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler and UniPCMultistepScheduler as they are by default, which is order 2
and the lower order in the last steps. Three things differ. Every sampler starts from noise of deviation 1, where the Euler ones
of diffusers take 0.998 for the usual schedule. With zero terminal SNR the first step starts without any signal, as the model
was trained, where diffusers takes alphas_cumprod to be 2^-24 for all but DDIM. And all have all spacings, but DDIM, whose steps
are between timesteps of training, not Karras' one.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Generic, NamedTuple

from mvshared.backend import A
from mvshared.config import SamplerName, SchedulerConfig
from mvshared.errors import OptionError
from mvshared.schedule import Levels, alphas_cumprod, euler_levels, solver_levels, timesteps


class Sum(NamedTuple):
    """Factors of what is added up: `x_t`, the model's output, the kept latents, and the pictures of earlier steps, the last
    one first."""

    x: float = 0.0
    out: float = 0.0
    kept: float = 0.0
    pictures: tuple[float, ...] = ()


class Step(NamedTuple):
    """One call of the model at `timestep`, whose output is `out` (eps or v, as the schedule's prediction type says).

    The picture as far as it is known is `x0_x * x_t + x0_out * out_t`. The next latents are
    `x * x_t + out * out_t + noise * fresh_noise + kept * kept_latents + pictures[0] * last_picture + ...`, where the noise has
    deviation 1, and 0 times it means that none is needed. `keep` is what is then kept, None to leave what is.
    """

    timestep: float
    x: float
    out: float
    noise: float
    x0_x: float
    x0_out: float
    kept: float = 0.0
    pictures: tuple[float, ...] = ()
    keep: Sum | None = None


class State(NamedTuple, Generic[A]):
    """What a sampler goes on from: the latents `x`, those that were kept, and the pictures of earlier steps, the last first."""

    x: A
    kept: A | None = None
    pictures: tuple[A, ...] = ()


class Point(NamedTuple):
    """A noise level: `x_t = signal * x_0 + noise * eps`, sigma = noise / signal."""

    signal: float
    noise: float
    sigma: float


def remembered(steps: Sequence[Step]) -> int:
    """How many pictures of earlier steps the steps need."""
    return max(len(sum_.pictures) for step in steps for sum_ in (step, step.keep or Sum()))


def advance(state: State[A], step: Step, out: A, noise: A | None, *, remember: int) -> State[A]:
    """The state after a step: `out` is the model's output, `noise` of deviation 1 where the step needs some. The last
    `remember` pictures stay."""
    earlier = state.pictures[:remember]
    pictures = (step.x0_x * state.x + step.x0_out * out, *earlier)[:remember] if remember else ()
    terms = [(step.x, state.x), (step.out, out), (step.noise, noise), (step.kept, state.kept)]
    x = _added([*terms, *zip(step.pictures, earlier, strict=False)])
    kept = state.kept
    if step.keep is not None:
        terms = [(step.keep.x, state.x), (step.keep.out, out), (step.keep.kept, state.kept)]
        kept = _added([*terms, *zip(step.keep.pictures, earlier, strict=False)])
    return State(x, kept, pictures)


def _added(terms: Iterable[tuple[float, A | None]]) -> A:
    """The sum of arrays with factors; one that counts nothing need not be there."""
    return reduce(lambda a, b: a + b, [factor * array for factor, array in terms if factor and array is not None])


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
        x0_x, x0_out, eps_x, eps_out = _prediction(config, math.sqrt(alpha), math.sqrt(1 - alpha))
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


def euler_steps(config: SchedulerConfig, *, steps: int) -> list[Step]:
    """Euler's method in sigma, arXiv:2206.00364 without churn: DDIM's step between any two levels. Raises OptionError."""
    levels = euler_levels(config, steps)
    pairs = pairwise(_points(levels))
    return [_step(config, t, here, *_first_order(here, end)) for t, (here, end) in zip(levels.timesteps, pairs, strict=True)]


def euler_ancestral_steps(config: SchedulerConfig, *, steps: int) -> list[Step]:
    """Euler's method to a lower sigma, and fresh noise up to the next one. Raises OptionError."""
    levels = euler_levels(config, steps)
    result = []
    for timestep, (here, end) in zip(levels.timesteps, pairwise(_points(levels)), strict=True):
        from_x, from_picture, noise = _ancestral(here, end)
        result.append(_step(config, timestep, here, from_x, from_picture, noise=noise))
    return result


def dpmpp_2m_steps(config: SchedulerConfig, *, steps: int) -> list[Step]:
    """DPM-Solver++(2M): the line through this step's picture and the last one's. First and last step are Euler's.

    Raises OptionError.
    """
    levels = solver_levels(config, steps)
    points, result = _points(levels), []
    for index, timestep in enumerate(levels.timesteps):
        from_x, this, last = _second_order(points, index)
        result.append(_step(config, timestep, points[index], from_x, this, pictures=last))
    return result


def dpmpp_2m_sde_steps(config: SchedulerConfig, *, steps: int) -> list[Step]:
    """SDE-DPM-Solver++(2M): the same of the stochastic equation, with fresh noise in all steps but the last.

    Raises OptionError.
    """
    levels = solver_levels(config, steps)
    points, result = _points(levels), []
    for index, timestep in enumerate(levels.timesteps):
        here, end = points[index : index + 2]
        from_x, total, noise = _ancestral(here, end)
        this, last = _slope(points, index, total)
        result.append(_step(config, timestep, here, from_x, this, noise=noise, pictures=last))
    return result


def dpmpp_2s_steps(config: SchedulerConfig, *, steps: int) -> list[Step]:
    """DPM-Solver++(2S): steps in pairs, whose second one starts again where the first did, with the pictures of both.

    `steps` are calls of the model. The last one, with an even number the last two, are Euler's. Raises OptionError.
    """
    levels = solver_levels(config, steps)
    points, result = _points(levels), []
    for index, (timestep, here, end) in enumerate(zip(levels.timesteps, points[:-1], points[1:], strict=True)):
        if index % 2 == 0 or index == steps - 1:
            result.append(_step(config, timestep, here, *_first_order(here, end), keep=Sum(x=1.0)))
            continue
        start = points[index - 1]
        from_kept, total = _first_order(start, end)
        # h / h_0 of the paper; both are infinite where the pair starts without any signal.
        share = math.log(start.sigma / end.sigma) / math.log(start.sigma / here.sigma) if start.signal else 1.0
        this = 0.5 * share * total
        result.append(_step(config, timestep, here, 0.0, this, kept=from_kept, pictures=(total - this,)))
    return result


def unipc_steps(config: SchedulerConfig, *, steps: int) -> list[Step]:
    """UniPC of order 2: the step before is taken once more with this step's picture, then comes one of DPM-Solver++(2M).

    Raises OptionError.
    """
    levels = solver_levels(config, steps)
    points, result = _points(levels), []
    for index, timestep in enumerate(levels.timesteps):
        here = points[index]
        start, this, earlier = _corrector(points, index) if index else (0.0, 0.0, ())
        corrected = _in_terms_of_x(config, here, this)
        keep = Sum(*corrected, start, earlier) if index else Sum(x=1.0)
        from_kept, of_this, of_last = _second_order(points, index)
        x, out = _in_terms_of_x(config, here, of_this)
        pictures = [from_kept * factor for factor in keep.pictures]
        for position, factor in enumerate(of_last):
            pictures[position] += factor
        x0_x, x0_out, *_ = _prediction(config, here.signal, here.noise)
        result.append(
            Step(
                timestep=timestep,
                x=x + from_kept * keep.x,
                out=out + from_kept * keep.out,
                noise=0.0,
                x0_x=x0_x,
                x0_out=x0_out,
                kept=from_kept * keep.kept,
                pictures=tuple(pictures),
                keep=keep,
            )
        )
    return result


SAMPLERS: dict[SamplerName, Callable[..., list[Step]]] = {
    "ddim": ddim_steps,
    "euler": euler_steps,
    "euler-ancestral": euler_ancestral_steps,
    "dpmpp-2m": dpmpp_2m_steps,
    "dpmpp-2m-sde": dpmpp_2m_sde_steps,
    "dpmpp-2s": dpmpp_2s_steps,
    "unipc": unipc_steps,
}


def sampler_steps(name: str, config: SchedulerConfig, *, steps: int, eta: float = 0.0) -> list[Step]:
    """The `steps` steps of the sampler called `name` in SAMPLERS, with the spacing of the config.

    `eta` is DDIM's. Raises OptionError.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise OptionError("scheduler", expected=f"one of {', '.join(SAMPLERS)}", got=name)
    if name == "ddim":
        if config.timestep_spacing == "karras":
            hint = "euler takes the same steps between any noise levels"
            raise OptionError("spacing", expected="leading, trailing or linspace for ddim", got="karras", hint=hint)
        return ddim_steps(config, steps=steps, eta=eta)
    if eta:
        raise OptionError("eta", expected=f"0 with {name}: it is DDIM's", got=eta)
    return SAMPLERS[name](config, steps=steps)


def _points(levels: Levels) -> list[Point]:
    """The noise levels from first to last. Raises OptionError where two of them are the same."""
    for here, end in pairwise(levels.sigmas):
        if not end < here:
            expected = "so few that no two of them have the same noise level"
            raise OptionError("steps", expected=expected, got=len(levels.timesteps))
    # Written for infinite sigma as well, which is 0 signal and noise 1.
    return [
        Point(signal=1 / math.hypot(1, sigma), noise=1 / math.hypot(1, 1 / sigma) if sigma else 0.0, sigma=sigma)
        for sigma in levels.sigmas
    ]


def _first_order(here: Point, end: Point) -> tuple[float, float]:
    """What x_t and its picture count in the latents at another level, if the picture is the same all the way."""
    from_x = end.noise / here.noise
    return from_x, end.signal * (1 - end.sigma / here.sigma)


def _ancestral(here: Point, end: Point) -> tuple[float, float, float]:
    """What x_t, its picture and fresh noise count in the latents at another level, if the picture is the same all the way:
    Euler's ancestral step, which is SDE-DPM-Solver++1 of arXiv:2211.01095."""
    ratio = end.sigma / here.sigma
    down, up = end.noise * ratio, end.noise * math.sqrt(1 - ratio**2)
    from_x = down / here.noise
    return from_x, end.signal - from_x * here.signal, up


def _second_order(points: Sequence[Point], index: int) -> tuple[float, float, tuple[float, ...]]:
    """What the latents of a step, its picture and the last one's count in the next latents: equation 15 of arXiv:2211.01095
    with r_0 of the midpoint method; of first order in the first and the last step."""
    from_x, total = _first_order(*points[index : index + 2])
    return from_x, *_slope(points, index, total)


def _slope(points: Sequence[Point], index: int, total: float) -> tuple[float, tuple[float, ...]]:
    """What a step's picture and the last one's count in the next latents, `total` together."""
    here, end = points[index : index + 2]
    if index in (0, len(points) - 2):  # the first and the last step
        return total, ()
    # Without signal the last step was infinitely long: what is known there says nothing about the slope here.
    last = 0.5 * total * math.log(here.sigma / end.sigma) / math.log(points[index - 1].sigma / here.sigma)
    return total + last, (-last,)


def _corrector(points: Sequence[Point], index: int) -> tuple[float, float, tuple[float, ...]]:
    """What the kept latents of the step before, this step's picture and the earlier ones count in the corrected latents.

    UniC with B_2 (arXiv:2302.04867, algorithm 1) of the order that the step before had; with order 1 its factor is 1/2.
    """
    start, here = points[index - 1 : index + 1]
    from_kept, total = _first_order(start, here)
    if index == 1:
        return from_kept, 0.5 * total, (0.5 * total,)
    hh = -math.log(start.sigma / here.sigma)
    phi = math.expm1(hh)
    first = phi / hh - 1
    second = first / hh - 0.5
    ratio = math.log(points[index - 2].sigma / start.sigma) / hh  # r_1, below 0; infinite without signal
    rho = (first - 2 * second) / phi / (1 - ratio)
    rho_this = first / phi - rho
    before = total * rho / ratio
    this = total * rho_this
    return from_kept, this, (total - this - before, before)


def _step(
    config: SchedulerConfig,
    timestep: float,
    here: Point,
    from_x: float,
    from_picture: float,
    *,
    noise: float = 0.0,
    kept: float = 0.0,
    pictures: tuple[float, ...] = (),
    keep: Sum | None = None,
) -> Step:
    """The step to `from_x * x_t + from_picture * picture` and what else is given."""
    x0_x, x0_out, *_ = _prediction(config, here.signal, here.noise)
    x, out = from_x + from_picture * x0_x, from_picture * x0_out
    return Step(timestep, x, out, noise, x0_x, x0_out, kept, pictures, keep)


def _in_terms_of_x(config: SchedulerConfig, here: Point, from_picture: float) -> tuple[float, float]:
    """What x_t and the model's output count in that much of the picture."""
    x0_x, x0_out, *_ = _prediction(config, here.signal, here.noise)
    return from_picture * x0_x, from_picture * x0_out


def _prediction(config: SchedulerConfig, signal: float, noise: float) -> tuple[float, float, float, float]:
    """Coefficients (x0_x, x0_out, eps_x, eps_out) of x_t and of the model's output in the x_0 and the eps that it implies."""
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
