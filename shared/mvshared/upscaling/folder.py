"""Folders of latent upscalers: the public one's layout (diffusers' StableDiffusionLatentUpscalePipeline), and this project's.

A folder of this project may leave its VAE out and name the model that has it, as `vae_from` in model_index.json.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from mvshared.checkpoint import (
    FORMAT_VERSION,
    OWN_UPSCALER,
    UPSCALER_CLASSES,
    WEIGHT_FILE,
    Component,
    config_from_json,
    find_model,
    read_config,
    read_tower,
    read_vae_config,
    weight_files,
)
from mvshared.config import K_NORM_EPS, KUNetConfig
from mvshared.errors import CheckpointError, OptionError
from mvshared.files import make_folder, read_json_object, write_atomic, write_json
from mvshared.numbers import number
from mvshared.public_configs import DIFFUSERS_UNET_NEUTRAL, Document, Fields, attention_levels, clip_text
from mvshared.upscaling.config import SigmaConfig, UpscaleDefaults, UpscalerConfig

PUBLIC_FAMILY = "sd-x2-latent-upscaler"

_DOWN_BLOCKS = {"KCrossAttnDownBlock2D": True, "KDownBlock2D": False}
_UP_BLOCKS = {"KCrossAttnUpBlock2D": True, "KUpBlock2D": False}
_UNET_NEUTRAL = DIFFUSERS_UNET_NEUTRAL | {
    "act_fn": ("gelu",),
    "conv_in_kernel": (1,),
    "conv_out_kernel": (1,),
    "mid_block_type": (None,),
    "norm_eps": (K_NORM_EPS,),
    "norm_num_groups": (None,),
    "num_attention_heads": (None,),
    "resnet_time_scale_shift": ("scale_shift",),
    "time_embedding_type": ("fourier",),
    "timestep_post_act": ("gelu",),
    "transformer_layers_per_block": (1,),
    "use_linear_projection": (False,),
}
_SCHEDULER_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "final_sigmas_type": ("zero",),
    "prediction_type": ("sample", "original_sample"),
    "rescale_betas_zero_snr": (False,),
    "set_alpha_to_one": (False, True),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "skip_prk_steps": (False, True),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
}


def is_upscaler(folder: Path) -> bool:
    """Whether a folder's model_index.json is a latent upscaler's. Raises CheckpointError if it cannot be read."""
    index = read_json_object(folder / "model_index.json", error=CheckpointError)
    return index.get("_class_name") in UPSCALER_CLASSES


def read_upscaler_config(folder: Path) -> UpscalerConfig:
    """The configuration of the upscaler in `folder`. Raises CheckpointError for another model, missing or malformed fields."""
    index = read_json_object(folder / "model_index.json", error=CheckpointError)
    if not is_upscaler(folder):
        raise CheckpointError(
            f"is no latent upscaler: its _class_name is {index.get('_class_name')!r}",
            path=folder,
            hint="is it meant as `model`?",
        )
    try:
        return _own(folder, index) if "format_version" in index else _public(folder)
    except OptionError as refused:
        raise CheckpointError(str(refused), path=folder) from refused


def vae_folder(folder: Path) -> Path:
    """The folder whose `vae` an upscaler uses: its own, or the model's that its model_index.json names.

    Raises CheckpointError if there is none.
    """
    name = read_json_object(folder / "model_index.json", error=CheckpointError).get("vae_from")
    return folder if name is None else find_model(str(name))


def component_folders(folder: Path, config: UpscalerConfig) -> dict[Component, Path]:
    """The folders that hold an upscaler's components: unet, vae, which may be another model's, text_encoder if there is one."""
    places: dict[Component, Path] = {"unet": folder, "vae": vae_folder(folder)}
    if config.text_encoder is not None:
        places["text_encoder"] = folder
    return places


def upscaler_weight_files(folder: Path, config: UpscalerConfig) -> dict[Component, list[Path]]:
    """Weight files by component: unet, vae, text_encoder if there is one. Raises CheckpointError if one is missing."""
    return {name: weight_files(place, name) for name, place in component_folders(folder, config).items()}


def write_upscaler(folder: Path, config: UpscalerConfig, weights: Mapping[str, NDArray[Any]], *, vae_from: str | None) -> None:
    """Write the network and the configs of an upscaler without text, each file atomically.

    `vae_from` names the model whose VAE it uses; None if the folder has one of its own.
    """
    target = make_folder(folder / "unet")
    contiguous = {name: np.ascontiguousarray(weights[name]) for name in sorted(weights)}
    write_atomic(target / WEIGHT_FILE, save(contiguous, metadata={"format": "pt"}))
    write_json(target / "config.json", asdict(config.unet))
    write_json(make_folder(folder / "scheduler") / "scheduler_config.json", asdict(config.sigmas))
    index: dict[str, Any] = {"_class_name": OWN_UPSCALER, "format_version": FORMAT_VERSION, "family": config.family}
    index |= {} if vae_from is None else {"vae_from": vae_from}
    frequencies = None if config.noise_frequencies is None else list(config.noise_frequencies)
    write_json(folder / "model_index.json", index | {"noise_frequencies": frequencies, "defaults": asdict(config.defaults)})


def _own(folder: Path, index: Mapping[str, Any]) -> UpscalerConfig:
    path = folder / "model_index.json"
    if index["format_version"] != FORMAT_VERSION:
        version = index["format_version"]
        raise CheckpointError(f"format_version must be {FORMAT_VERSION}, got {version!r}", path=path)
    known = {"format_version", "family", "vae_from", "noise_frequencies", "defaults"}
    unknown = sorted(name for name in index if name not in known and not name.startswith("_"))
    if unknown:
        raise CheckpointError(f"unknown field {unknown[0]!r}", path=path)
    has_text = (folder / "text_encoder").is_dir()
    return UpscalerConfig(
        family=str(index.get("family", "custom")),
        unet=read_config(KUNetConfig, folder / "unet" / "config.json"),
        vae=read_vae_config(vae_folder(folder)),
        text_encoder=read_tower(folder, "text_encoder", clip_text) if has_text else None,
        sigmas=read_config(SigmaConfig, folder / "scheduler" / "scheduler_config.json"),
        noise_frequencies=_frequencies(index.get("noise_frequencies"), path=path),
        defaults=config_from_json(UpscaleDefaults, index.get("defaults", {}), path=path, table="defaults"),
    )


def _public(folder: Path) -> UpscalerConfig:
    unet_path, scheduler_path = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    document = read_json_object(unet_path, error=CheckpointError)
    frequencies = _frequencies(document.pop("noise_frequencies", None), path=unet_path)
    return UpscalerConfig(
        family=PUBLIC_FAMILY,
        unet=k_unet(document, path=unet_path),
        vae=read_vae_config(folder),
        text_encoder=read_tower(folder, "text_encoder", clip_text),
        sigmas=euler_sigmas(read_json_object(scheduler_path, error=CheckpointError), path=scheduler_path),
        noise_frequencies=frequencies,
    )


def _frequencies(value: object, *, path: Path) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        given: list[object] = value if isinstance(value, list) else [None]
        return tuple(number("noise_frequencies", each, -sys.float_info.max, sys.float_info.max) for each in given)
    except OptionError as refused:
        raise CheckpointError("noise_frequencies must be a list of numbers", path=path) from refused


def k_unet(document: Document, *, path: Path) -> KUNetConfig:
    """The network of diffusers' UNet2DConditionModel with K blocks. Raises CheckpointError for any other."""
    if document.get("_class_name") != "UNet2DConditionModel":
        raise CheckpointError(f"_class_name must be UNet2DConditionModel, got {document.get('_class_name')!r}", path=path)
    fields = Fields(document, path=path)
    channels = tuple(fields.take("block_out_channels", (list, tuple)))
    levels = len(channels)
    if not levels:
        raise CheckpointError("block_out_channels must be one or more whole numbers of at least 1, got ()", path=path)
    attends = attention_levels(fields, "down_block_types", _DOWN_BLOCKS, levels)
    if attention_levels(fields, "up_block_types", _UP_BLOCKS, levels) != attends[::-1]:
        raise CheckpointError("up_block_types must be down_block_types the other way round", path=path)
    layers, widths = fields.per_level("layers_per_block", levels, 2), fields.per_level("attention_head_dim", levels, 8)
    if len(set(layers)) > 1 or len(set(widths)) > 1:
        raise CheckpointError("layers_per_block and attention_head_dim must be the same at all levels", path=path)
    for level in range(1, levels):
        if not attends[level] and channels[level] != channels[level - 1]:
            # There diffusers' KUpBlock2D narrows in another place than k-diffusion.
            raise CheckpointError(f"block_out_channels must not change at level {level}, which has no attention", path=path)
    fields.take("only_cross_attention", (bool, list, tuple), False)  # K blocks do not look at it
    config = KUNetConfig(
        in_channels=fields.take("in_channels", int, 4),
        out_channels=fields.take("out_channels", int, 4),
        block_out_channels=channels,
        layers_per_block=layers[0],
        attention_levels=attends,
        attention_head_dim=widths[0],
        cross_attention_dim=fields.take("cross_attention_dim", int, 1280),
        time_cond_proj_dim=fields.take("time_cond_proj_dim", int),
    )
    needed = {"act_fn", "conv_in_kernel", "conv_out_kernel", "mid_block_type", "norm_num_groups", "time_embedding_type"}
    for name in sorted((needed | {"timestep_post_act"}) - fields.left.keys()):
        raise CheckpointError(f"the field {name!r} is missing", path=path)
    fields.finish(_UNET_NEUTRAL)
    return config


def euler_sigmas(document: Document, *, path: Path) -> SigmaConfig:
    """The noise levels of an EulerDiscreteScheduler that predicts the sample. Raises CheckpointError for any other."""
    if document.get("_class_name") != "EulerDiscreteScheduler":
        raise CheckpointError(f"_class_name must be EulerDiscreteScheduler, got {document.get('_class_name')!r}", path=path)
    fields = Fields(document, path=path)
    config = SigmaConfig(
        num_train_timesteps=fields.take("num_train_timesteps", int, 1000),
        beta_start=fields.take("beta_start", float, 0.0001),
        beta_end=fields.take("beta_end", float, 0.02),
        beta_schedule=fields.choice("beta_schedule", ("linear", "scaled_linear"), "linear"),
        interpolation_type=fields.choice("interpolation_type", ("linear", "log_linear"), "linear"),
        timestep_spacing=fields.choice("timestep_spacing", ("leading", "trailing", "linspace"), "linspace"),
        steps_offset=fields.take("steps_offset", int, 0),
    )
    if "prediction_type" not in fields.left:
        raise CheckpointError("prediction_type must be 'sample', got the default 'epsilon'", path=path)
    fields.finish(_SCHEDULER_NEUTRAL)
    return config
