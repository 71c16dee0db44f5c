"""What a run will take, stage by stage, before any work: the weights of the networks that are in memory, and their activations.

Peaks are of this process's memory, but on a CUDA device of PyTorch's tensors there.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from mvshared.backend import PACKAGES, BackendName, Dtype
from mvshared.checkpoint import components, find_model, read_model_config, weight_files
from mvshared.config import ModelConfig, NetworkConfig
from mvshared.memory.activations import (
    Sizes,
    costs_of,
    tower_bytes,
    unet_bytes,
    vae_bytes,
)
from mvshared.memory.plan import MemoryPlan, vae_batch
from mvshared.precision import DTYPE_BYTES
from mvshared.process_memory import resident
from mvshared.quantization.plans import PRESETS, Layers, preset_layers, stored_bytes
from mvshared.runs import UpscaleParameters
from mvshared.stages import StageName
from mvshared.upscaling.config import UpscalerConfig
from mvshared.upscaling.folder import is_upscaler, read_upscaler_config, upscaler_weight_files
from mvshared.upscaling.latents import FACTOR, view_bytes
from mvshared.weights import stored_quantization

LOADING_BYTES = 160_000_000  # of a file that are in memory at once while its weights are read, and the tensor that they go to


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model in a backend: its config and, by component, bytes of a network's weights, `packing` of what they take more where
    memory is not to be spared, and how many numbers the largest one and the largest quantised one have. `quantized_sizes` are
    those of the same model quantised, by preset, `half_size` that of one in float32 in half precision."""

    config: ModelConfig | UpscalerConfig
    backend: BackendName
    device: str
    dtype: Dtype
    weights: Mapping[str, int]
    packing: Mapping[str, int]
    largest: Mapping[str, int]
    quantized: Mapping[str, int]
    quantized_sizes: Mapping[str, "ModelSize"] = field(default_factory=dict)
    half_size: "ModelSize | None" = None


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """What a run's memory depends on: views, reference pictures, branches of guidance that are computed for a step, texts, and
    the size of the views; normal maps or none. `upscaler` is the upscaler of the views, `enlarged` how much larger the latents
    are that are decoded. As many views are upscaled together as fit into `upscaler_budget_bytes`."""

    views: int
    size_px: int
    pictures: int = 0
    branches: int = 1
    texts: int = 0
    normals: bool = False
    enlarged: int = 1
    upscaler: ModelSize | None = None
    upscaler_branches: int = 1
    upscaler_budget_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """A stage: the networks in memory, the bytes of their weights, the most that comes on top, and what the library keeps of
    the stages before."""

    name: StageName
    networks: tuple[str, ...]
    weights_bytes: int
    activations_bytes: int
    cached_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.activations_bytes + self.cached_bytes


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


def model_size(folder: Path, *, backend: BackendName, device: str, dtype: Dtype, quantize: str | None = None) -> ModelSize:
    """The size of a model or an upscaler in a checkpoint folder; of an upscaler without its VAE, whose latents are decoded by
    the model that made them. Raises CheckpointError."""
    if is_upscaler(folder):
        config: ModelConfig | UpscalerConfig = read_upscaler_config(folder)
        files: dict[Any, Any] = {**upscaler_weight_files(folder, config)}
        files.pop("vae")
    else:
        config = read_model_config(folder)
        files = {component: weight_files(folder, component) for component in components(config)}
    stored = {component: stored_quantization(paths).layers for component, paths in files.items()}
    return config_size(config, stored, backend=backend, device=device, dtype=dtype, quantize=quantize)


def config_size(
    config: ModelConfig | UpscalerConfig,
    stored: Mapping[Any, Layers],
    *,
    backend: BackendName,
    device: str,
    dtype: Dtype,
    quantize: str | None = None,
) -> ModelSize:
    """The size of a model with the components of `stored`, and the layers of them that are stored quantised."""
    module = importlib.import_module(f"{PACKAGES[backend]}.model")
    networks: dict[str, NetworkConfig] = {component: getattr(config, component) for component in stored}
    shapes = {component: module.network_shapes(network) for component, network in networks.items()}

    def sized(preset: str | None, dtype: Dtype) -> ModelSize:
        layers = {name: stored[name] or preset_layers(networks[name], shapes[name], preset) for name in networks}
        packing = {
            name: 0 if layers[name] else module.packing_bytes(network, dtype=dtype, device=device)
            for name, network in networks.items()
        }
        numbers = {name: [prod(shape) for shape in shapes[name].values()] for name in networks}
        return ModelSize(
            config=config,
            backend=backend,
            device=device,
            dtype=dtype,
            weights={name: stored_bytes(shapes[name], layers[name], dense_bytes=DTYPE_BYTES[dtype]) for name in networks},
            packing=packing,
            largest={name: max(numbers[name]) for name in networks},
            quantized={name: max((prod(each.shape) for each in layers[name].values()), default=0) for name in networks},
        )

    presets = PRESETS if quantize is None and not any(stored.values()) else ()
    half: Dtype = "float16" if backend == "mlx" else "bfloat16"  # which Metal has no exact convolutions in
    return replace(
        sized(quantize, dtype),
        quantized_sizes={preset: sized(preset, dtype) for preset in presets},
        half_size=sized(quantize, half) if dtype == "float32" else None,
    )


def estimate(model: ModelSize, run: RunSize, plan: MemoryPlan, *, process_bytes: int = 0) -> Estimate:
    """What a run takes, stage by stage, if memory is used as the plan says; `process_bytes` are taken already."""
    config, costs = model.config, costs_of(model.backend, model.device)
    assert isinstance(config, ModelConfig)
    stages: list[StageEstimate] = []

    def add(name: StageName, owner: ModelSize, component: str, activations: int) -> None:
        there = {component: owner.weights.get(component, 0)}
        if plan.networks_at_once:
            there = _packed(model)
            if run.upscaler is not None and (owner is run.upscaler or name == "vae_decoder"):  # it is loaded for its stage
                there |= {f"upscaler's {other}": size for other, size in _packed(run.upscaler).items()}
        largest, quantized = (numbers.get(component, 0) for numbers in (owner.largest, owner.quantized))
        work = round(costs.spread * activations) + costs.weight(largest, quantized, number=DTYPE_BYTES[owner.dtype])
        loading = min(LOADING_BYTES, owner.weights.get(component, 0))
        used = max(work, loading) + costs.runtime
        cached = max((stage.activations_bytes - costs.runtime for stage in stages), default=0) if costs.caches else 0
        stages.append(
            StageEstimate(
                name=name,
                networks=tuple(there),
                weights_bytes=sum(there.values()),
                activations_bytes=used,
                cached_bytes=cached if plan.networks_at_once else 0,  # with a network's memory that of its cache goes
            )
        )

    def sizes(batch: int, frames: int, side: int, attention: Any = plan.attention) -> Sizes:
        return Sizes(batch=batch, frames=frames, height=side, width=side, dtype=model.dtype, attention=attention)

    if config.image_encoder is not None and run.pictures:
        add("image_encoder", model, "image_encoder", tower_bytes(config.image_encoder, sizes(run.pictures, 1, 1), costs))
    if config.text_encoder is not None and run.texts:
        add("text_encoder", model, "text_encoder", tower_bytes(config.text_encoder, sizes(run.texts, 1, 1), costs))

    def pictures(count: int, side: int) -> Sizes:
        together = min(count, vae_batch(plan, model.backend, model.device, pixels=side**2))
        return sizes(max(1, together), 1, side, plan.vae_attention)

    encoded = max(run.pictures, run.views if run.normals else 0)
    encoding = vae_bytes(config.vae, pictures(encoded, run.size_px), costs, decoder=False, tile=plan.vae_tile)
    if (config.unet.reference_frame and run.pictures) or run.normals:
        add("vae_encoder", model, "vae", encoding)
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
        together = max(1, min(run.views, run.upscaler_budget_bytes // (run.upscaler_branches * view)))
        add("upscaler", run.upscaler, "unet", together * run.upscaler_branches * view)
    decoded = pictures(run.views, run.enlarged * run.size_px)
    add("vae_decoder", model, "vae", vae_bytes(config.vae, decoded, costs, decoder=True, tile=plan.vae_tile))
    return Estimate(process_bytes=process_bytes, stages=tuple(stages))


def _packed(model: ModelSize) -> dict[str, int]:
    """Bytes of a network's weights by component, where memory is not to be spared."""
    return {name: size + model.packing[name] for name, size in model.weights.items()}


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


def usual_run(config: ModelConfig, *, views: int, size_px: int, guidance: float) -> RunSize:
    """A run with all that the model takes: one picture, a prompt and a negative one, normal maps."""
    return RunSize(
        views=views,
        size_px=size_px,
        pictures=1 if config.unet.takes_pictures else 0,
        branches=2 if guidance > 1 else 1,
        texts=2 if config.text_encoder is not None else 0,
        normals=config.unet.normal_channels > 0,
    )


def with_upscaling(run: RunSize, upscale: UpscaleParameters, **options: Any) -> RunSize:
    """A run whose views are upscaled; the options are those of `model_size`. Raises CheckpointError."""
    enlarged = 1 if upscale.method == "lanczos" else FACTOR
    if upscale.upscaler is None:
        return replace(run, enlarged=enlarged)
    size = model_size(find_model(upscale.upscaler), **options)
    return replace(
        run,
        enlarged=enlarged,
        upscaler=size,
        upscaler_branches=2 if (upscale.guidance or 0) > 1 else 1,
        upscaler_budget_bytes=upscale.budget_bytes or 0,
    )


def process_bytes(device: str) -> int:
    """What this process takes now, of the memory that counts: nothing of a CUDA device's."""
    return 0 if device.startswith("cuda") else resident()
