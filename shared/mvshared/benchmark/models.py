"""What is measured: a model of a folder, or one of a public size with random weights, which needs no file."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvshared.backend import PACKAGES, BackendName, Dtype, Model
from mvshared.checkpoint import Component, find_model, read_model_config, weight_files
from mvshared.config import (
    IMAGEDREAM,
    MVDREAM,
    SD21,
    SD_VAE,
    SD_X2_UNET,
    CLIPImageConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Framing,
    ModelConfig,
    SchedulerConfig,
)
from mvshared.errors import CheckpointError
from mvshared.public_configs import family_defaults
from mvshared.upscaling.config import UpscalerConfig

_SQUEEZED = Framing(mode="none", resample="bilinear")  # as the reference code: squeezed to a square
_SD21 = ModelConfig(
    family="sd21",
    unet=SD21,
    vae=SD_VAE,
    scheduler=SchedulerConfig(),
    text_encoder=CLIPTextConfig(),
    defaults=family_defaults("sd21", size_px=512),
    framing=_SQUEEZED,
)
_MVDREAM = replace(_SD21, family="mvdream", unet=MVDREAM, defaults=family_defaults("mvdream", size_px=256))
RANDOM: dict[str, ModelConfig] = {
    "sd21": _SD21,
    "mvdream": _MVDREAM,
    "imagedream": replace(
        _MVDREAM,
        family="imagedream",
        unet=IMAGEDREAM,
        image_encoder=CLIPVisionConfig(),
        image_processor=CLIPImageConfig(),
        defaults=family_defaults("imagedream", size_px=256),
    ),
}
X2_UPSCALER = UpscalerConfig(
    family="sd-x2",
    unet=SD_X2_UNET,
    vae=SD_VAE,
    text_encoder=CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"
    ),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model by its name: `folder` is None for random weights."""

    name: str
    config: ModelConfig
    folder: Path | None


def measured(name: str) -> Measured:
    """The model of a name or a folder; a name of RANDOM that is not downloaded has random weights.

    Raises CheckpointError for another name, and for a folder that cannot be read.
    """
    try:
        folder = find_model(name)
    except CheckpointError:
        if name not in RANDOM:
            raise
        return Measured(name=name, config=RANDOM[name], folder=None)
    return Measured(name=name, config=read_model_config(folder), folder=folder)


def open_model(name: str, parts: Sequence[Component], *, backend: BackendName, dtype: Dtype, device: str) -> Model[Any]:
    """The model with these parts alone, each made when it is needed. Raises CheckpointError."""
    found = measured(name)
    if found.folder is None:
        package = importlib.import_module(f"{PACKAGES[backend]}.benchmark")
        return package.random_model(found.config, parts, dtype=dtype, device=device)
    module = importlib.import_module(f"{PACKAGES[backend]}.model")
    files = {part: weight_files(found.folder, part) for part in parts}
    networks = module.network_loaders(found.config, files, dtype=dtype, device=device)
    paths = [path for part in parts for path in files[part]]
    return module.MultiViewModel(found.config, networks, device=device, dtype=dtype, weight_files=paths)
