"""The training stage of a latent upscaler: what `loop.train` needs for it."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvshared.arguments import MAX_VIEWS
from mvshared.backend import PACKAGES, choose_backend, load
from mvshared.captures import load_capture
from mvshared.checkpoint import component_folder, find_model, read_model_config, read_vae_config, weight_files
from mvshared.conversion.networks import network_shapes
from mvshared.errors import ConfigError
from mvshared.files import copy_folder
from mvshared.models import EMBEDDED
from mvshared.training.checks import check_frozen, check_sizes
from mvshared.training.config import TrainConfig
from mvshared.training.data import captures_digest, find_captures
from mvshared.training.initial import initial_upscaler_weights
from mvshared.training.kept import kept_arrays
from mvshared.training.upscaler_data import LatentPairs, UpscalerBatches, encode_pairs, generated_pairs
from mvshared.upscaling.config import SigmaConfig, UpscalerConfig
from mvshared.upscaling.folder import read_upscaler_config, write_upscaler
from mvshared.upscaling.views import check_fits
from mvshared.weights import read_weights, sha256_of_files, short_name

FREQUENCY_DEVIATION = 2.0  # of the noise level's embedding, as k-diffusion draws it
FIXED = ("time_proj.",)  # random frequencies that k-diffusion and diffusers do not train
FREQUENCY_STREAM = 4


def upscaler_config(config: TrainConfig) -> UpscalerConfig:
    """What is trained. Raises ConfigError and OptionError if network, VAE and models do not fit, CheckpointError
    for a folder."""
    assert config.upscaler is not None and config.vae_from is not None
    if config.init_from is not None:  # its weights know its own frequencies
        frequencies = read_upscaler_config(find_model(config.init_from)).noise_frequencies
        if frequencies is None:
            raise ConfigError("init_from must be an upscaler that knows its noise_frequencies", path=config.init_from)
    else:
        count = config.upscaler.time_cond_proj_dim // 2
        drawn = np.random.default_rng([FREQUENCY_STREAM, config.seed]).standard_normal(count) * FREQUENCY_DEVIATION
        frequencies = tuple(round(float(value), 6) for value in drawn)
    vae = read_vae_config(component_folder(config.vae_from))
    if vae.latent_channels != config.upscaler.latent_channels:
        latents = config.upscaler.latent_channels
        raise ConfigError(f"the upscaler has {latents} latent channels, the VAE of vae_from {vae.latent_channels}")
    if config.views_from is not None:
        check_fits(vae, read_model_config(find_model(config.views_from)).vae, name="views_from", got=config.views_from)
    return UpscalerConfig(
        family=config.family,
        unet=config.upscaler,
        vae=vae,
        text_encoder=None,
        sigmas=SigmaConfig(),
        noise_frequencies=frequencies,
        defaults=config.upscale_defaults,
    )


def upscaler_trainer(config: TrainConfig, upscaler: UpscalerConfig, module: ModuleType, *, backend: str, device: str) -> Any:
    """The backend's trainer, from `init_from` or from random weights."""
    shapes = network_shapes(upscaler.unet, backend=backend)
    check_frozen(config, shapes)
    if config.init_from is not None:
        weights = read_weights(weight_files(find_model(config.init_from), "unet"), shapes)
    else:
        weights = initial_upscaler_weights(shapes, seed=config.seed)
    return module.upscaler_trainer(
        upscaler.unet,
        config.optimizer,
        weights,
        frozen=(*FIXED, *config.frozen),
        dtype=config.dtype,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def check_pictures_of(config: TrainConfig, upscaler: UpscalerConfig) -> None:
    """Raise DatasetError for captures that cannot be learned from, before anything is written."""
    captures = find_captures(config.data.folder, held_out=config.data.held_out)
    smallest = 2 * upscaler.vae.downscale * upscaler.unet.downscale
    loaded = [load_capture(folder) for folders in captures for folder in folders]
    check_sizes(loaded, factor=_multiple(upscaler), smallest=smallest)


def _multiple(upscaler: UpscalerConfig) -> int:
    """Widths and heights of pictures are multiples of this, so that half of them makes latents that the network can take."""
    return 2 * upscaler.vae.downscale * max(1, upscaler.unet.downscale // 2)


def upscaler_batches(
    config: TrainConfig, upscaler: UpscalerConfig, folder: Path, *, vae: str, backend: str, device: str
) -> tuple[UpscalerBatches, UpscalerBatches | None]:
    """Batches for training and for validation, None if nothing is held out; the latents are kept in the run folder under the
    hashes of the weights, `vae` those of the VAE, and of the captures."""
    assert config.vae_from is not None
    files = weight_files(component_folder(config.vae_from), "vae")
    captures = find_captures(config.data.folder, held_out=config.data.held_out)
    multiple = _multiple(upscaler)

    @cache
    def encode() -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        package = importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.model")
        return package.load_vae(upscaler.vae, files, device=device).encode

    kept = partial(kept_arrays, join=LatentPairs.joined, kind=LatentPairs)
    generated = None
    if config.views_from is not None:
        denoiser = short_name(sha256_of_files(weight_files(find_model(config.views_from), "unet")))
        chosen = captures[0][: config.generated_captures]
        path = folder / f"pairs-generated-{vae}-{denoiser}-{captures_digest(chosen)}.npz"
        views = cache(partial(_view_maker, config, backend=backend, device=device))

        def generate(some: list[Path], after_each: Callable[[], object]) -> LatentPairs:
            return generated_pairs(some, config.data, views(), encode(), multiple=multiple, after_each=after_each)

        generated = kept(path, chosen, generate, replaces="pairs-generated-*.npz", desc="generating")

    def make(some: list[Path], after_each: Callable[[], object]) -> LatentPairs:
        return encode_pairs(some, config.data, encode(), multiple=multiple, after_each=after_each)

    batches = []
    for name, folders in zip(("training", "held-out"), captures, strict=True):
        if not folders:
            continue
        path = folder / f"pairs-{name}-{vae}-{captures_digest(folders)}.npz"
        pairs = kept(path, folders, make, replaces=f"pairs-{name}-*.npz", desc="encoding")
        frequencies = upscaler.noise_frequencies
        assert frequencies is not None
        batches.append(
            UpscalerBatches(
                pairs,
                upscaler.sigmas,
                channels=upscaler.noise_channels,
                frequencies=frequencies,
                first_step_share=config.first_step_share,
                generated=generated if name == "training" else None,
                generated_share=config.generated_share,
            )
        )
    return batches[0], batches[1] if len(batches) > 1 else None


def _view_maker(
    config: TrainConfig, *, backend: str, device: str
) -> Callable[[NDArray[np.uint8], NDArray[np.float32]], NDArray[np.float32]]:
    """A function that makes latents of views with the model of `views_from`, in float32.

    The reference is taken as it is: framed otherwise, the views would show the subject in another size than the true ones.
    """
    assert config.views_from is not None
    pipeline = load(config.views_from, backend=backend, device=device, dtype="float32")
    model = pipeline.model.config
    pipeline.model.config = replace(model, framing=replace(model.framing, mode="none"))
    prompt = None if model.text_encoder is None else config.data.prompt

    def make(reference: NDArray[np.uint8], cameras: NDArray[np.float32]) -> NDArray[np.float32]:
        groups = [cameras[first : first + MAX_VIEWS] for first in range(0, len(cameras), MAX_VIEWS)]
        options: dict[str, Any] = {"size_px": len(reference), "prompt": prompt}
        return np.concatenate([pipeline.generate(reference, cameras=group, **options).latents for group in groups])

    return make


def save_upscaler(folder: Path, config: TrainConfig, upscaler: UpscalerConfig, weights: Mapping[str, NDArray[Any]]) -> None:
    """Write the checkpoint folder of a run; a VAE that is not in the package is copied into it."""
    assert config.vae_from is not None
    embedded = config.vae_from in EMBEDDED
    if not embedded and not (folder / "model_index.json").exists():
        copy_folder(component_folder(config.vae_from) / "vae", folder / "vae")
    write_upscaler(folder, upscaler, weights, vae_from=config.vae_from if embedded else None)
