"""What a run will take, stage by stage, before any work: the weights of the networks that are in memory, and their activations.

Peaks are of this process's memory on the CPU, of the device's on a GPU, where PyTorch and MLX keep books of their own.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from mvshared.backend import PACKAGES, BackendName, Dtype
from mvshared.checkpoint import components, find_model, weight_files
from mvshared.config import ModelConfig, NetworkConfig
from mvshared.memory.activations import (
    DTYPE_BYTES,
    Sizes,
    costs_of,
    tower_bytes,
    unet_bytes,
    vae_bytes,
)
from mvshared.memory.plan import MemoryPlan
from mvshared.process_memory import resident
from mvshared.quantization.plans import preset_layers, stored_bytes
from mvshared.runs import UpscaleParameters
from mvshared.stages import StageName
from mvshared.upscaling.config import UpscalerConfig
from mvshared.upscaling.folder import read_upscaler_config, upscaler_weight_files
from mvshared.upscaling.latents import FACTOR, view_bytes
from mvshared.weights import stored_quantization

LOADING_BYTES = 160_000_000  # of a file that are in memory at once while its weights are read, and the tensor that they go to


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model in a backend: its config and, by component, bytes of a network's weights, and how many numbers the largest one
    and the largest quantised one have. `quantized_sizes` are those of the same model quantised, by preset."""

    config: ModelConfig | UpscalerConfig
    backend: BackendName
    device: str
    dtype: Dtype
    weights: Mapping[str, int]
    largest: Mapping[str, int]
    quantized: Mapping[str, int]
    quantized_sizes: Mapping[str, "ModelSize"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """What a run's memory depends on: views, reference pictures, branches of guidance that are computed for a step, texts, and
    the size of the views; normal maps or none. `upscaler` is the upscaler of the views, `enlarged` how much larger the latents
    are that are decoded."""

    views: int
    size_px: int
    pictures: int = 0
    branches: int = 1
    texts: int = 0
    normals: bool = False
    enlarged: int = 1
    upscaler: ModelSize | None = None
    upscaler_branches: int = 1


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """A stage: the networks in memory, the bytes of their weights, and the most that comes on top."""

    name: StageName
    networks: tuple[str, ...]
    weights_bytes: int
    activations_bytes: int

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.activations_bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All stages of a run, and what the process itself takes before it, Python and libraries."""

    process_bytes: int
    stages: tuple[StageEstimate, ...]

    @property
    def largest(self) -> StageEstimate:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def peak_bytes(self) -> int:
        return self.process_bytes + self.largest.bytes


def model_size(
    config: ModelConfig,
    files: Mapping[Any, Sequence[Path]],
    *,
    backend: BackendName,
    device: str,
    dtype: Dtype,
    quantize: str | None = None,
) -> ModelSize:
    """The size of a model whose weights are in files by component. Raises CheckpointError for damaged files."""
    return _size(config, files, backend=backend, device=device, dtype=dtype, quantize=quantize)


def folder_size(folder: Path, config: ModelConfig, **options: Any) -> ModelSize:
    """`model_size` of a checkpoint folder."""
    return _size(config, {component: weight_files(folder, component) for component in components(config)}, **options)


def upscaler_size(folder: Path, **options: Any) -> ModelSize:
    """The size of an upscaler's folder; the options are those of `model_size`. Raises CheckpointError."""
    config = read_upscaler_config(folder)
    files = {name: paths for name, paths in upscaler_weight_files(folder, config).items() if name != "vae"}
    return _size(config, files, **options)


def _size(
    config: ModelConfig | UpscalerConfig,
    files: Mapping[Any, Sequence[Path]],
    *,
    backend: BackendName,
    device: str,
    dtype: Dtype,
    quantize: str | None,
) -> ModelSize:
    network_shapes = importlib.import_module(f"{PACKAGES[backend]}.model").network_shapes
    weights, largest, quantized = {}, {}, {}
    for component, paths in files.items():
        network: NetworkConfig = getattr(config, component)
        shapes = network_shapes(network)
        layers = stored_quantization(paths).layers or preset_layers(network, shapes, quantize)
        weights[component] = stored_bytes(shapes, layers, dense_bytes=DTYPE_BYTES[dtype])
        largest[component] = max(prod(shape) for shape in shapes.values() if len(shape) == 4 or len(shape) == 2)
        quantized[component] = max((prod(layer.shape) for layer in layers.values()), default=0)
    return ModelSize(
        config=config, backend=backend, device=device, dtype=dtype, weights=weights, largest=largest, quantized=quantized
    )


def estimate(model: ModelSize, run: RunSize, plan: MemoryPlan, *, process_bytes: int = 0) -> Estimate:
    """What a run takes, stage by stage, if memory is used as the plan says; `process_bytes` are taken already."""
    config, costs = model.config, costs_of(model.backend, model.device)
    assert isinstance(config, ModelConfig)
    stages: list[StageEstimate] = []

    def add(name: StageName, owner: ModelSize, component: str, activations: int) -> None:
        there = {component: owner.weights.get(component, 0)}
        if plan.networks_at_once:
            there = {**model.weights, **there}
            if owner is not model:
                there |= {f"upscaler's {other}": size for other, size in owner.weights.items() if other != component}
        largest, quantized = (numbers.get(component, 0) for numbers in (owner.largest, owner.quantized))
        work = activations + costs.weight(largest, quantized, number=DTYPE_BYTES[owner.dtype])
        loading = min(LOADING_BYTES, owner.weights.get(component, 0))
        stages.append(
            StageEstimate(
                name=name,
                networks=tuple(there),
                weights_bytes=sum(there.values()),
                activations_bytes=max(work, loading) + costs.runtime,
            )
        )

    def sizes(batch: int, frames: int, side: int, attention: Any = plan.attention) -> Sizes:
        return Sizes(batch=batch, frames=frames, height=side, width=side, dtype=model.dtype, attention=attention)

    if config.image_encoder is not None and run.pictures:
        add("image_encoder", model, "image_encoder", tower_bytes(config.image_encoder, sizes(run.pictures, 1, 1), costs))
    picture = sizes(1, 1, run.size_px, plan.vae_attention)
    encoding = vae_bytes(config.vae, picture, costs, decoder=False, tile=plan.vae_tile)
    if (config.unet.reference_frame and run.pictures) or run.normals:
        add("vae_encoder", model, "vae", encoding)
    if config.text_encoder is not None and run.texts:
        add("text_encoder", model, "text_encoder", tower_bytes(config.text_encoder, sizes(run.texts, 1, 1), costs))
    frames = run.views + (run.pictures if config.unet.reference_frame else 0)
    branches = run.branches if plan.branches_at_once else 1
    latents = sizes(branches, frames, run.size_px // config.vae.downscale)
    add("unet", model, "unet", unet_bytes(config.unet, latents, costs) + _cross_bytes(config, run, dtype=model.dtype))
    if run.upscaler is not None:
        network = run.upscaler.config
        assert isinstance(network, UpscalerConfig)
        if network.text_encoder is not None:
            texts = tower_bytes(network.text_encoder, sizes(run.upscaler_branches, 1, 1), costs)
            add("text_encoder", run.upscaler, "text_encoder", texts)
        side = run.size_px // config.vae.downscale
        view = view_bytes(network.unet, (side, side), backend=model.backend, dtype=model.dtype)
        add("upscaler", run.upscaler, "unet", run.upscaler_branches * view)
    decoded = sizes(1, 1, run.enlarged * run.size_px, plan.vae_attention)
    add("vae_decoder", model, "vae", vae_bytes(config.vae, decoded, costs, decoder=True, tile=plan.vae_tile))
    return Estimate(process_bytes=process_bytes, stages=tuple(stages))


def _cross_bytes(config: ModelConfig, run: RunSize, *, dtype: Dtype) -> int:
    """Of the keys and values of text and image tokens, which every transformer keeps over the steps, for all branches."""
    unet = config.unet
    if unet.cross_attention_dim is None or config.text_encoder is None:
        return 0
    tokens = config.text_encoder.max_position_embeddings
    tokens += run.pictures * unet.resampler.num_queries if unet.resampler is not None else 0
    width = sum(
        channels * depth * (2 * layers + 1)
        for channels, depth, layers, attends in zip(
            unet.block_out_channels,
            unet.transformer_layers_per_block,
            unet.layers_per_block,
            unet.attention_levels,
            strict=True,
        )
        if attends
    )
    return 2 * DTYPE_BYTES[dtype] * run.branches * tokens * (width + unet.block_out_channels[-1])


def with_upscaling(run: RunSize, upscale: UpscaleParameters, **options: Any) -> RunSize:
    """A run whose views are upscaled; the options are those of `model_size`. Raises CheckpointError."""
    enlarged = 1 if upscale.method == "lanczos" else FACTOR
    if upscale.upscaler is None:
        return replace(run, enlarged=enlarged)
    size = upscaler_size(find_model(upscale.upscaler), **options)
    return replace(run, enlarged=enlarged, upscaler=size, upscaler_branches=2 if (upscale.guidance or 0) > 1 else 1)


def process_bytes(device: str) -> int:
    """What this process takes now, of the memory that counts: nothing of a CUDA device's."""
    return 0 if device.startswith("cuda") else resident()
