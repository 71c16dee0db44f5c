"""ImageDream at its public size with random weights: loading it, and one guided step beside the same step of diffusers."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import peak_rss_bytes
from benchmarks.networks import condition_of, library_facts, random_latents
from benchmarks.worker import Prepared
from mvshared.backend import PACKAGES, load
from mvshared.checkpoint import WEIGHT_STEMS, Component, read_model_config, weight_files
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
from mvshared.files import make_folder, write_atomic, write_json
from mvshared.guidance import ALL, Guidance

TIMESTEP, GUIDANCE = 500.0, 5.0
POOL = 1 << 22  # random numbers that are used again and again: drawing two thousand million takes minutes


def write_random_imagedream(folder: Path) -> Path:
    """A checkpoint folder with the sizes of the public ImageDream and random weights in float16, 4 GB; returns the folder."""
    write_random_component(folder, "unet", IMAGEDREAM, ldm_unet_document(IMAGEDREAM, image_size=32))
    write_random_component(folder, "vae", SD_VAE, vae_document(SD_VAE))
    write_random_component(folder, "text_encoder", CLIPTextConfig(), clip_document(CLIPTextConfig()))
    write_random_component(folder, "image_encoder", CLIPVisionConfig(), clip_document(CLIPVisionConfig()))
    write_json(make_folder(folder / "scheduler") / "scheduler_config.json", scheduler_document(SchedulerConfig()))
    processor = image_processor_document(CLIPImageConfig())
    write_json(make_folder(folder / "feature_extractor") / "preprocessor_config.json", processor)
    write_random_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", {"_class_name": "MVDreamPipeline"})
    return folder


def write_random_tokenizer(folder: Path) -> None:
    """A tokenizer that knows the special tokens of CLIP and nothing else."""
    write_json(make_folder(folder) / "vocab.json", {"<|startoftext|>": 49406, "<|endoftext|>": 49407})
    write_atomic(folder / "merges.txt", b"#version: 0.2\n")


def write_random_component(folder: Path, component: Component, config: NetworkConfig, document: dict[str, Any]) -> None:
    """A component's config.json, and random weights in float16."""
    pool = np.random.default_rng(0).uniform(-1, 1, POOL).astype(np.float32)
    write_json(make_folder(folder / component) / "config.json", document)
    tensors = {name: _random(shape, pool, name=name) for name, shape in network_shapes(config).items()}
    path = folder / component / f"{WEIGHT_STEMS[component]}.safetensors"
    write_safetensors(path, tensors, on_tensor=lambda name, size: None)


def _random(shape: tuple[int, ...], pool: NDArray[np.float32], *, name: str) -> RawTensor:
    def read() -> NDArray[Any]:
        fan_in = int(np.prod(shape[1:])) or 1
        values = np.resize(pool, shape) * np.float32(fan_in**-0.5 if len(shape) > 1 else 0.1)
        if len(shape) == 1 and name.endswith("weight"):
            values += 1  # of a norm
        return values.astype(np.float16).view(np.uint16)

    return RawTensor(dtype="F16", shape=shape, read=read)


def loading(*, model: str, backend: str, dtype: str) -> Prepared:
    """`load`, from the files to networks that are ready; the model before is forgotten first."""
    config = read_model_config(Path(model))
    kept: list[Any] = []

    def call() -> None:
        kept.clear()
        kept.append(load(model, backend=backend, dtype=dtype).model)

    def facts() -> dict[str, Any]:
        shapes = importlib.import_module(f"{PACKAGES[kept[0].backend]}.model").expected_shapes(config)
        numbers = sum(int(np.prod(shape)) for part in shapes.values() for shape in part.values())
        weights = numbers * (4 if dtype == "float32" else 2)
        return {
            "device": kept[0].device,
            "peak_memory_bytes": peak_rss_bytes(),
            "weights_bytes": weights,
            **library_facts(kept[0]),
        }

    return Prepared(call, facts)


def step(*, model: str, backend: str, dtype: str) -> Prepared:
    """One guided call of the U-Net, with its constant part prepared; of the model, only the U-Net is loaded."""
    loaded = _unet_alone(Path(model), backend=backend, dtype=dtype)
    x = loaded.from_numpy(random_latents(loaded))
    guided = Guidance(guidance=GUIDANCE).mixture(ALL)
    condition = condition_of(loaded, x, branches=guided.branches)

    def facts() -> dict[str, Any]:
        return {"device": loaded.device, "peak_memory_bytes": peak_rss_bytes(), **library_facts(loaded)}

    return Prepared(lambda: loaded.to_numpy(loaded.denoise(x, TIMESTEP, condition, guided.weights)), facts)


def _unet_alone(folder: Path, *, backend: str, dtype: str) -> Any:
    if backend == "diffusers":
        return importlib.import_module("mvtorch.diffusers_model").DiffusersModel(folder, dtype=dtype, parts=("unet",))
    module = importlib.import_module(f"{PACKAGES[backend]}.model")  # type: ignore[index]
    config, device = read_model_config(folder), module.choose_device()
    files = weight_files(folder, "unet")
    networks = module.network_loaders(config, {"unet": files}, dtype=dtype, device=device)
    return module.MultiViewModel(config, networks, device=device, dtype=dtype, weight_files=files)
