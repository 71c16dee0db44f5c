"""What is in a checkpoint folder, and what is wrong with it, without loading the weights."""

import importlib
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mvshared.backend import PACKAGES, BackendName, Dtype, available_backends, choose_backend
from mvshared.checkpoint import (
    Component,
    components,
    find_model,
    read_model_config,
    read_scheduler_document,
    weight_files,
)
from mvshared.config import ModelConfig
from mvshared.errors import MvError
from mvshared.precision import DTYPE_BYTES
from mvshared.public_configs import diffusers_sampler
from mvshared.tokenizer import load_tokenizer
from mvshared.upscaling.config import UpscalerConfig
from mvshared.upscaling.folder import component_folders, is_upscaler, read_upscaler_config
from mvshared.weights import match_network, stored_quantization


@dataclass(frozen=True, kw_only=True)
class ComponentReport:
    """One component's weights: how many files, tensors and numbers, and how many tensors of each dtype in the files.

    `quantization` is the preset of a quantised component, else None; so many of its numbers are quantised, in so many bytes.
    """

    name: Component
    files: int
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    quantization: str | None = None
    quantized_parameters: int = 0
    quantized_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """A checkpoint folder: its config (None if it cannot be read), its sound components, and every fault in one line.

    `replaced_scheduler` is the class of diffusers that a public folder names and that is not here, else None: DDIM takes its
    place, with its noise schedule.
    """

    folder: Path
    config: ModelConfig | UpscalerConfig | None
    components: tuple[ComponentReport, ...]
    faults: tuple[str, ...]
    replaced_scheduler: str | None = None

    def memory_bytes(self) -> dict[str, int]:
        """What the weights of the sound components need, by dtype; activations come on top."""
        dense = sum(component.parameters - component.quantized_parameters for component in self.components)
        quantized = sum(component.quantized_bytes for component in self.components)
        return {dtype: dense * size + quantized for dtype, size in DTYPE_BYTES.items()}


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """What a backend computes on and in if nothing is said, and why in that dtype."""

    backend: BackendName
    device: str
    dtype: Dtype
    reason: str


def inspect_devices(*, backend: str = "auto") -> tuple[DeviceReport, ...]:
    """The defaults of a backend; `auto` is every one that is installed. Raises OptionError and BackendError."""
    chosen: BackendName = choose_backend(backend)
    names: list[BackendName] = available_backends() if backend == "auto" else [chosen]
    reports = []
    for name in names:
        module = importlib.import_module(f"{PACKAGES[name]}.model")
        device = module.choose_device()
        dtype, reason = module.default_dtype(device)
        reports.append(DeviceReport(backend=name, device=device, dtype=dtype, reason=reason))
    return tuple(reports)


def inspect(name: Path | str, *, backend: str = "auto") -> Report:
    """Look at configs, names and shapes of all tensors, and the tokenizer of a model or upscaler.

    `name` is that of an embedded or downloaded one, its repository, or a checkpoint folder. The models of a backend say which
    tensors belong there. Faults of the folder are in the report. Raises CheckpointError for a folder that is none, OptionError
    and BackendError for the backend.
    """
    network_shapes = importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.model").network_shapes
    folder = find_model(name)
    faults: list[str] = []
    try:
        config = read_upscaler_config(folder) if is_upscaler(folder) else read_model_config(folder)
        if isinstance(config, ModelConfig):
            places = dict.fromkeys(components(config), folder)
        else:
            places = component_folders(folder, config)
    except MvError as fault:
        return Report(folder=folder, config=None, components=(), faults=(str(fault),))
    reports = []
    for component, place in places.items():
        try:
            files = weight_files(place, component)
            network = getattr(config, component)
            quantization = stored_quantization(files)
            shapes = network_shapes(network)
            stored = match_network(network, shapes, files, layers=quantization.layers)
        except MvError as fault:
            faults.append(str(fault))
            continue
        reports.append(
            ComponentReport(
                name=component,
                files=len(files),
                tensors=len(stored),
                parameters=sum(prod(shape) for shape in shapes.values()),
                dtypes=dict(Counter(place.info.dtype for place in stored.values())),
                quantization=quantization.preset if quantization.layers else None,
                quantized_parameters=sum(prod(layer.shape) for layer in quantization.layers.values()),
                quantized_bytes=sum(layer.bytes for layer in quantization.layers.values()),
            )
        )
    if config.text_encoder is not None:
        try:
            load_tokenizer(folder, config.text_encoder)
        except MvError as fault:
            faults.append(str(fault))
    return Report(
        folder=folder,
        config=config,
        components=tuple(reports),
        faults=tuple(faults),
        replaced_scheduler=_replaced_scheduler(folder) if isinstance(config, ModelConfig) else None,
    )


def _replaced_scheduler(folder: Path) -> str | None:
    document = read_scheduler_document(folder / "scheduler")
    named = document.get("_class_name", "DDIMScheduler")
    return named if named != "DDIMScheduler" and diffusers_sampler(document) == "ddim" else None
