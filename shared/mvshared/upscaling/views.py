"""Views at twice their size, by one of three methods, whichever model made them.

`sd-x2` is a diffusion model on the latents. `bilinear` interpolates the latents, as the VAE's decoder then shows them: blurry,
since in-between latents are no latents of sharp pictures. `lanczos` resizes the pixels: soft, and nothing is invented.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvshared.arguments import config_sha256
from mvshared.backend import BackendName, Dtype, load_upscaler
from mvshared.checkpoint import find_model, model_name
from mvshared.config import VAEConfig
from mvshared.errors import CheckpointError, OptionError
from mvshared.images import from_model, resize_bilinear
from mvshared.runs import UPSCALE_METHODS, UpscaleParameters, Views
from mvshared.stages import Stages
from mvshared.upscaling.config import UpscalerConfig
from mvshared.upscaling.folder import read_upscaler_config, upscaler_weight_files
from mvshared.upscaling.latents import (
    DEFAULT_BUDGET_BYTES,
    FACTOR,
    UpscaleProgress,
    Upscaler,
    check_finite,
    resolve,
    view_bytes,
    views_together,
)
from mvshared.weights import sha256_of_files, stored_quantization

Decode: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # pixels in [-1, 1] of scaled latents


_LABELS = {
    "upscaler": "upscaler",
    "noise_level": "noise level of the upscaler",
    "budget_bytes": "memory budget of the upscaler",
}


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """What a caller asks for; None is the upscaler's default. `upscaler` is a name or a folder, for sd-x2 alone. With
    `low_memory` the default of `budget_bytes` is what one view takes."""

    method: str = "sd-x2"
    upscaler: str | Path | None = None
    steps: int | None = None
    guidance: float | None = None
    noise_level: float | None = None
    budget_bytes: int | None = None
    low_memory: bool = False

    def __post_init__(self) -> None:
        if self.method not in UPSCALE_METHODS:
            raise OptionError("upscale", expected=f"one of {', '.join(UPSCALE_METHODS)}", got=self.method)
        for name in ("upscaler", "steps", "guidance", "noise_level", "budget_bytes"):
            if self.method != "sd-x2" and getattr(self, name) is not None:
                raise OptionError(option_label(name), expected=f"left out for {self.method}", got=getattr(self, name))


def option_label(name: str) -> str:
    """What errors call a field of `UpscaleOptions`."""
    return _LABELS.get(name, f"{name} of the upscaler")


def plan_upscale(
    options: UpscaleOptions, *, vae: VAEConfig, latent_size: tuple[int, int], backend: BackendName, dtype: Dtype
) -> UpscaleParameters:
    """The parameters of an upscaling, resolved and checked without loading any weights.

    Raises OptionError for what is not allowed, among it an upscaler of other latents than those of `vae`, and CheckpointError
    for a folder that is no upscaler's or lacks weights.
    """
    if options.method != "sd-x2":
        return UpscaleParameters(method=options.method)
    name = options.upscaler
    if name is None:
        hint = "bilinear and lanczos need none; mvmlx download sd-x2-latent-upscaler"
        raise OptionError("upscaler", expected="a name or a folder for sd-x2", got=None, hint=hint)
    folder = find_model(name)
    config = read_upscaler_config(folder)
    upscaler_weight_files(folder, config)
    check_fits(config.vae, vae, name="upscaler", got=str(folder))
    settings = resolve(config, steps=options.steps, guidance=options.guidance, noise_level=options.noise_level, seed=0)
    branches = 2 if settings.guidance > 1 else 1
    one_view = branches * view_bytes(config.unet, latent_size, backend=backend, dtype=dtype)
    budget = (
        (one_view if options.low_memory else DEFAULT_BUDGET_BYTES) if options.budget_bytes is None else options.budget_bytes
    )
    views_together(config.unet, latent_size, backend=backend, dtype=dtype, branches=branches, budget_bytes=budget)
    return UpscaleParameters(
        method=options.method,
        upscaler=model_name(name),
        steps=settings.steps,
        guidance=settings.guidance,
        noise_level=settings.noise_level,
        budget_bytes=budget,
        config_sha256=config_sha256(config),
    )


def check_fits(made_for: VAEConfig, vae: VAEConfig, *, name: str, got: object) -> None:
    """Raise OptionError about `name` unless the latents of two VAEs are the same."""
    for field in ("latent_channels", "downscale", "scaling_factor", "latents_mean", "latents_std"):
        theirs, ours = getattr(made_for, field), getattr(vae, field)
        if theirs != ours:
            raise OptionError(name, expected=f"of the same latents ({field} {ours}, not {theirs})", got=got)


def upscaler_files(parameters: UpscaleParameters | None) -> list[Path]:
    """The weight files that an upscaling depends on beside those of the views' own model."""
    if parameters is None or parameters.upscaler is None:
        return []
    folder = find_model(parameters.upscaler)
    files = upscaler_weight_files(folder, read_upscaler_config(folder))
    return [path for component in files if component != "vae" for path in files[component]]


class Upscaled(NamedTuple):
    """Pictures uint8 (v, 2 h, 2 w, 3) and, except for lanczos without latents, the latents (v, 2 h / f, 2 w / f, c)."""

    images: NDArray[np.uint8]
    latents: NDArray[np.float32] | None


def upscale_views(
    views: Views,
    parameters: UpscaleParameters,
    *,
    decode: Decode,
    upscaler: Upscaler[Any] | None = None,
    on_step: Callable[[UpscaleProgress], None] | None = None,
    stages: Stages | None = None,
) -> Views:
    """Views of twice the size. `decode` makes pixels of latents, with the VAE of the views' model.

    `upscaler` is the loaded one that the parameters name, None for the other methods. `stages` are told what runs. Raises
    NumericsError for latents that are not finite or become so.
    """
    run = views.parameters
    upscaled = upscale_arrays(
        views.images,
        views.latents,
        parameters,
        decode=decode,
        upscaler=upscaler,
        prompt=run.prompt,
        negative_prompt=run.negative_prompt,
        seed=run.seed,
        on_step=on_step,
        stages=stages,
    )
    return replace(
        views,
        images=upscaled.images,
        latents=views.latents if upscaled.latents is None else upscaled.latents,
        parameters=replace(run, upscale=parameters),
        upscaler_files=tuple(upscaler_files(parameters)),
    )


def upscale_arrays(
    images: NDArray[np.uint8] | None,
    latents: NDArray[np.float32] | None,
    parameters: UpscaleParameters,
    *,
    decode: Decode | None,
    upscaler: Upscaler[Any] | None,
    prompt: str | None,
    negative_prompt: str | None,
    seed: int,
    on_step: Callable[[UpscaleProgress], None] | None = None,
    stages: Stages | None = None,
) -> Upscaled:
    """Pictures (v, h, w, 3) by lanczos, or scaled latents (v, h, w, c) by another method, at twice their size.

    Prompts are for an upscaler with text; another one leaves them out. Raises NumericsError for latents that are not finite or
    become so.
    """
    stages = stages or Stages()
    if parameters.method == "lanczos":
        assert images is not None
        with stages("upscaler"):
            return Upscaled(enlarge(images), None)
    assert latents is not None and decode is not None
    check_finite(latents)
    if parameters.method == "bilinear":
        with stages("upscaler"):
            larger = enlarge_latents(latents)
    else:
        assert upscaler is not None
        larger = upscaler.upscale(
            latents,
            prompt=prompt if upscaler.takes_text else None,
            negative_prompt=negative_prompt if upscaler.takes_text else None,
            steps=parameters.steps,
            guidance=parameters.guidance,
            noise_level=parameters.noise_level,
            seed=seed,
            budget_bytes=parameters.budget_bytes or DEFAULT_BUDGET_BYTES,
            on_step=on_step,
            stages=stages,
        )
    with stages("vae_decoder"):
        return Upscaled(from_model(decode(larger)), larger)


def load_planned(
    parameters: UpscaleParameters,
    *,
    backend: str,
    dtype: str | None,
    device: str,
    quantize: str | None = None,
    at_once: bool = True,
) -> Upscaler[Any] | None:
    """The upscaler that parameters name, None if they name none; `quantize` is for one that is not stored quantised.

    Its networks are read `at_once`, or each when it is needed. Raises CheckpointError if its config is another one now.
    """
    if parameters.upscaler is None:
        return None
    if stored_quantization(upscaler_files(parameters)).layers:
        quantize = None
    upscaler = load_upscaler(
        parameters.upscaler, backend=backend, dtype=dtype, device=device, quantize=quantize, low_memory=not at_once
    )
    _check_config(upscaler.model.config, parameters)
    return upscaler


def _check_config(config: UpscalerConfig, parameters: UpscaleParameters) -> None:
    if config_sha256(config) != parameters.config_sha256:
        raise CheckpointError("the upscaler's configs have changed since the run", path=parameters.upscaler)
    steps, guidance, noise_level = parameters.steps, parameters.guidance, parameters.noise_level
    resolve(config, steps=steps, guidance=guidance, noise_level=noise_level, seed=0)


def check_unchanged(parameters: UpscaleParameters, weights: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the upscaler's config and weights have the hashes of a run's metadata."""
    if parameters.upscaler is not None:
        _check_config(read_upscaler_config(find_model(parameters.upscaler)), parameters)
    for name, sha256 in sha256_of_files(upscaler_files(parameters)).items():
        if weights.get(f"upscaler/{name}") != sha256:
            raise CheckpointError("the upscaler's weights have changed since the run", path=name)


def enlarge(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures uint8 (v, h, w, 3) at twice the size, by Pillow's Lanczos filter."""
    _, height, width, _ = images.shape
    size = (FACTOR * width, FACTOR * height)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images])


def enlarge_latents(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Latents (v, h, w, c) at twice the size, bilinear: PyTorch's interpolate with align_corners=False."""
    _, height, width, _ = latents.shape
    return np.stack([resize_bilinear(each, (FACTOR * height, FACTOR * width)) for each in latents])
