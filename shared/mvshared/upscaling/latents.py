"""Latents of twice the size from latents, by a diffusion model: the loop of diffusers' StableDiffusionLatentUpscalePipeline.

Views do not see each other here, so they are upscaled a few at a time, as many as a memory budget allows.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import A, BackendName, Dtype, TextStates, UpscalerModel
from mvshared.checkpoint import find_model, model_name
from mvshared.config import KUNetConfig
from mvshared.errors import NumericsError, OptionError
from mvshared.guidance import GUIDANCE_RANGE
from mvshared.numbers import MAX_SEED, number, whole
from mvshared.numerics import check_views
from mvshared.precision import DTYPE_BYTES
from mvshared.shapes import check_pictures
from mvshared.stages import Stages
from mvshared.upscaling.config import MAX_NOISE_LEVEL, UpscalerConfig
from mvshared.upscaling.schedule import MAX_UPSCALE_STEPS, SigmaPlan, euler_plan, noise_embedding

if TYPE_CHECKING:
    from mvshared.tokenizer import CLIPTokenizer

FACTOR = 2
DEFAULT_BUDGET_BYTES = 2 * 10**9
# Second numbers of the random seeds, above those of the sampling's steps: other noise than that of the views themselves.
SAMPLE_STREAM, LEVEL_STREAM = 1_000_011, 1_000_012
# Activations of the finest level's widest input that are held at once, as measured on the CPU. MLX's CPU convolutions unfold
# their input, in float32 whatever the dtype.
WORKING_COPIES: dict[BackendName, int] = {"torch": 6, "mlx": 26}


class UpscaleProgress(NamedTuple):
    """What `on_step` gets: steps done and in all, where every group of views has its own."""

    step: int
    steps: int


class UpscaleSettings(NamedTuple):
    """How latents are upscaled, resolved and checked."""

    steps: int
    guidance: float
    noise_level: float
    seed: int


class Upscaler(Generic[A]):
    """A loaded latent upscaler. `mvtorch.load_upscaler` and `mvmlx.load_upscaler` return one."""

    def __init__(self, model: UpscalerModel[A], *, name: str) -> None:
        self.model = model
        self.name = model_name(name)

    @cached_property
    def tokenizer(self) -> "CLIPTokenizer":
        """The tokenizer of the upscaler's folder. Raises CheckpointError if it is missing or does not fit the text encoder."""
        from mvshared.tokenizer import load_tokenizer

        return load_tokenizer(find_model(self.name), self.model.config.text_encoder)

    def upscale(
        self,
        latents: NDArray[np.floating],
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise_level: float | None = None,
        seed: int = 0,
        noise: NDArray[np.float32] | None = None,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        on_step: Callable[[UpscaleProgress], None] | None = None,
        stages: Stages | None = None,
    ) -> NDArray[np.float32]:
        """Latents float32 (v, 2 h, 2 w, c) of scaled latents (v, h, w, c).

        A size that the network cannot halve often enough is padded with copies of its last row and column, and cut again.
        `guidance` is 0, which leaves the prompt out, 1, or up to 20, which computes an unconditional half as well.
        `noise_level` blurs the latents with noise of that deviation first and tells the network so, where the upscaler knows
        how. `noise` (v, 2 h, 2 w, c) of deviation 1 replaces that of `seed`. `budget_bytes` bounds the activations: as many
        views go together as fit. What is None comes from the upscaler's defaults. `stages` are told what runs.

        Raises OptionError for arguments that are not allowed, before any work, and NumericsError for latents that are not
        finite or become so.
        """
        config = self.model.config
        settings = resolve(config, steps=steps, guidance=guidance, noise_level=noise_level, seed=seed)
        plan = euler_plan(config.sigmas, settings.steps)
        low = _padded(check_latents(latents, config), config.unet)
        embedding = noise_embedding(settings.noise_level, channels=config.noise_channels, frequencies=config.noise_frequencies)
        together = views_together(
            config.unet,
            low.shape[1:3],
            backend=self.model.backend,
            dtype=self.model.dtype,
            branches=2 if settings.guidance > 1 else 1,
            budget_bytes=budget_bytes,
        )
        large = tuple(FACTOR * size for size in latents.shape[1:3])
        start = _start(noise, (len(low), *large, low.shape[3]), low.shape, seed=settings.seed)
        stages = stages or Stages()
        with stages("text_encoder", what="prompt"):
            text = self._text(prompt, negative_prompt, guidance=settings.guidance)
            self._done("text_encoder")
        low = _blurred(low, settings)
        groups = [slice(first, first + together) for first in range(0, len(low), together)]
        steps_done = iter(range(1, len(groups) * settings.steps + 1))

        def report() -> None:
            if on_step is not None:
                on_step(UpscaleProgress(next(steps_done), len(groups) * settings.steps))

        parts = []
        for group in groups:
            with stages("upscaler", first=group.start):
                part = self._sample(plan, low[group], start[group], embedding, text, stages, settings.guidance, report)
                parts.append(part)
        self._done("unet")
        result = np.concatenate(parts)[:, : large[0], : large[1]]
        check_views(result, "the upscaled latents", where="upscaling", dtype=self.model.dtype)
        return np.ascontiguousarray(result)

    def _done(self, component: str) -> None:
        """Drop a network whose stage is over, unless the plan keeps it."""
        if not self.model.plan.networks_at_once:
            self.model.release(component)

    def _sample(
        self,
        plan: SigmaPlan,
        low: NDArray[np.float32],
        start: NDArray[np.float32],
        embedding: NDArray[np.float32],
        text: TextStates[A] | None,
        stages: Stages,
        guidance: float,
        report: Callable[[], None],
    ) -> NDArray[np.float32]:
        """Run Euler's method for a group of views."""
        condition = self.model.condition(low, embedding, text=text)
        x = plan.initial * self.model.from_numpy(start)
        for index, step in enumerate(plan.steps):
            stages.step = index + 1
            out = self.model.denoise(x, step.timestep, condition, guidance)
            x = step.x * x + step.out * out
            report()
        return self.model.to_numpy(x)

    @property
    def takes_text(self) -> bool:
        """Whether it has a text encoder."""
        return self.model.config.text_encoder is not None

    def check_prompts(self, prompt: str | None, negative_prompt: str | None) -> None:
        """Raise OptionError for a prompt that an upscaler without text is given."""
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if value is not None and not self.takes_text:
                raise OptionError(name, expected="left out: this upscaler takes no text", got=value)

    def _text(self, prompt: str | None, negative_prompt: str | None, *, guidance: float) -> TextStates[A] | None:
        """States of the prompt, those of the negative one before it if it is needed; None for an upscaler without text."""
        self.check_prompts(prompt, negative_prompt)
        if not self.takes_text:
            return None
        positive = "" if prompt is None or guidance == 0 else prompt
        texts = {"negative prompt": negative_prompt or "", "prompt": positive} if guidance > 1 else {"prompt": positive}
        tokens = self.tokenizer(list(texts.values()))
        tokens.warn_of_cuts(*(f"upscaler's {name}" for name in texts))
        return self.model.encode_text(tokens.ids)


def resolve(
    config: UpscalerConfig, *, steps: int | None, guidance: float | None, noise_level: float | None, seed: int
) -> UpscaleSettings:
    """The settings of a run, defaults filled in. Raises OptionError for what is not allowed."""
    defaults = config.defaults
    steps = whole("steps of the upscaler", defaults.steps if steps is None else steps, 1, MAX_UPSCALE_STEPS)
    guidance = defaults.guidance if guidance is None else guidance
    guidance = number("guidance of the upscaler", guidance, *GUIDANCE_RANGE, or_zero=True)  # 0 leaves the prompt out
    if guidance > 1 and config.text_encoder is None:
        raise OptionError("guidance of the upscaler", expected="0 or 1: this upscaler takes no text", got=guidance)
    level = number(
        "noise level of the upscaler", defaults.noise_level if noise_level is None else noise_level, 0, MAX_NOISE_LEVEL
    )
    noise_embedding(level, channels=config.noise_channels, frequencies=config.noise_frequencies)
    return UpscaleSettings(steps, guidance, level, whole("seed", seed, 0, MAX_SEED))


def check_latents(latents: NDArray[np.floating], config: UpscalerConfig) -> NDArray[np.float32]:
    """The latents as float32. Raises OptionError for another shape or type, NumericsError for NaN and infinity."""
    if not isinstance(latents, np.ndarray) or latents.dtype.kind != "f":
        raise OptionError("latents", expected="a numpy array of floats", got=getattr(latents, "dtype", type(latents).__name__))
    check_pictures("latents", latents.shape, channels=config.unet.latent_channels)
    with np.errstate(over="ignore"):
        return check_finite(latents.astype(np.float32))


def check_finite(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same latents. Raises NumericsError for NaN and infinity."""
    if not np.isfinite(latents).all():
        raise NumericsError("the latents to upscale are not finite", where="upscaling")
    return latents


def view_bytes(config: KUNetConfig, size: tuple[int, int], *, backend: BackendName, dtype: Dtype) -> int:
    """About what the activations of one view take at most, whose low-resolution latents are of `size` (h, w) before padding.

    The skip connections of all levels, and WORKING_COPIES of the widest input of the finest level.
    """
    height, width = _padded_size(size, config)
    pixels, channels = FACTOR**2 * height * width, config.block_out_channels
    skips = sum(width * pixels // 4**level for level, width in enumerate(channels))
    number_bytes = DTYPE_BYTES["float32" if backend == "mlx" else dtype]
    return number_bytes * (skips + WORKING_COPIES[backend] * 2 * channels[0] * pixels)


def views_together(
    config: KUNetConfig, size: tuple[int, int], *, backend: BackendName, dtype: Dtype, branches: int, budget_bytes: int
) -> int:
    """How many views fit into a budget. Raises OptionError if not even one does."""
    budget_bytes = whole("budget_bytes", budget_bytes, 1, 2**63 - 1)
    needed = branches * view_bytes(config, size, backend=backend, dtype=dtype)
    if budget_bytes < needed:
        expected = f"at least {needed / 1e9:.3g} GB, what one view takes"
        raise OptionError("memory budget of the upscaler", expected=expected, got=f"{budget_bytes / 1e9:.3g} GB")
    return budget_bytes // needed


def _padded(low: NDArray[np.float32], config: KUNetConfig) -> NDArray[np.float32]:
    """Latents (v, h, w, c) with copies of their last rows and columns, up to a size that the network can take."""
    height, width = low.shape[1:3]
    new_height, new_width = _padded_size((height, width), config)
    return np.pad(low, [(0, 0), (0, new_height - height), (0, new_width - width), (0, 0)], mode="edge")


def _padded_size(size: tuple[int, int], config: KUNetConfig) -> tuple[int, int]:
    """Height and width, not below `size`, of low-resolution latents that the network can take."""
    multiple = max(1, config.downscale // FACTOR)
    height, width = (max(config.downscale, multiple * -(-side // multiple)) for side in size)
    return height, width


def _start(
    noise: NDArray[np.float32] | None, shape: tuple[int, ...], padded: tuple[int, ...], *, seed: int
) -> NDArray[np.float32]:
    """Noise of deviation 1 at the size of the padded result, drawn view after view, or what was given, padded with zeros."""
    v, height, width, channels = padded
    full = (v, FACTOR * height, FACTOR * width, channels)
    if noise is None:
        return np.random.default_rng([seed, SAMPLE_STREAM]).standard_normal(full, np.float32)
    if not isinstance(noise, np.ndarray) or noise.shape != shape or not np.isfinite(noise).all():
        raise OptionError("noise", expected=f"finite, of shape {shape}", got=getattr(noise, "shape", type(noise).__name__))
    result = np.zeros(full, np.float32)
    result[:, : shape[1], : shape[2]] = noise
    return result


def _blurred(low: NDArray[np.float32], settings: UpscaleSettings) -> NDArray[np.float32]:
    """The latents with noise of the level, scaled back to the variance that they had."""
    if not settings.noise_level:
        return low
    noise = np.random.default_rng([settings.seed, LEVEL_STREAM]).standard_normal(low.shape, np.float32)
    return ((low + settings.noise_level * noise) / np.sqrt(settings.noise_level**2 + 1)).astype(np.float32)
