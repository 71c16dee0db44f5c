"""Checkpoint folders of public sizes with random weights, for what is measured from files."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvshared.benchmark.cases import write_empty_tokenizer
from mvshared.checkpoint import WEIGHT_STEMS, Component
from mvshared.config import (
    IMAGEDREAM,
    SD_VAE,
    CLIPImageConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    NetworkConfig,
    SchedulerConfig,
)
from mvshared.conversion.configs import (
    clip_document,
    image_processor_document,
    ldm_unet_document,
    scheduler_document,
    vae_document,
)
from mvshared.conversion.networks import network_shapes
from mvshared.conversion.raw import RawTensor, write_safetensors
from mvshared.files import make_folder, write_json
from mvshared.random_weights import random_pool, random_weight


def write_random_imagedream(folder: Path) -> Path:
    """A checkpoint folder with the sizes of the public ImageDream and random weights in float16, 4 GB; returns the folder."""
    write_random_component(folder, "unet", IMAGEDREAM, ldm_unet_document(IMAGEDREAM, image_size=32))
    write_random_component(folder, "vae", SD_VAE, vae_document(SD_VAE))
    write_random_component(folder, "text_encoder", CLIPTextConfig(), clip_document(CLIPTextConfig()))
    write_random_component(folder, "image_encoder", CLIPVisionConfig(), clip_document(CLIPVisionConfig()))
    write_json(make_folder(folder / "scheduler") / "scheduler_config.json", scheduler_document(SchedulerConfig()))
    processor = image_processor_document(CLIPImageConfig())
    write_json(make_folder(folder / "feature_extractor") / "preprocessor_config.json", processor)
    write_empty_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", {"_class_name": "MVDreamPipeline"})
    return folder


def write_random_component(folder: Path, component: Component, config: NetworkConfig, document: dict[str, Any]) -> None:
    """A component's config.json, and random weights in float16."""
    pool = random_pool()
    write_json(make_folder(folder / component) / "config.json", document)
    tensors = {name: _random(shape, pool, name=name) for name, shape in network_shapes(config).items()}
    path = folder / component / f"{WEIGHT_STEMS[component]}.safetensors"
    write_safetensors(path, tensors, on_tensor=lambda name, size: None)


def _random(shape: tuple[int, ...], pool: NDArray[np.float32], *, name: str) -> RawTensor:
    def read() -> NDArray[Any]:
        return random_weight(shape, pool, name=name).astype(np.float16).view(np.uint16)

    return RawTensor(dtype="F16", shape=shape, read=read)
