"""What is loaded of a folder, as far as that needs no array library: its config, its weight files, and whether they fit."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mvshared.checkpoint import Component, components, find_model, read_model_config, weight_files
from mvshared.config import ModelConfig, NetworkConfig
from mvshared.networks import Networks
from mvshared.upscaling.config import UpscalerConfig
from mvshared.upscaling.folder import read_upscaler_config, upscaler_weight_files
from mvshared.weights import choose_quantization, match_network, stored_quantization

C = TypeVar("C", ModelConfig, UpscalerConfig)


class Parts(NamedTuple, Generic[C]):
    """A model's or an upscaler's config, the weight files of its networks, the networks that it cannot do without, and how
    weights are quantised, see `choose_quantization`."""

    config: C
    files: Mapping[Component, Sequence[Path]]
    needed: Sequence[Component]
    quantization: str | None = None

    @property
    def weight_files(self) -> list[Path]:
        """The files of all networks that are needed."""
        return [path for component in self.needed for path in self.files[component]]


def model_parts(name: str | Path, *, quantize: str | None) -> Parts[ModelConfig]:
    """What `find_model` finds, whose weights are to be quantised so. Raises CheckpointError and OptionError."""
    folder = find_model(name)
    config = read_model_config(folder)
    parts = components(config)
    files: dict[Component, list[Path]] = {component: weight_files(folder, component) for component in parts}
    return Parts(config, files, parts, choose_quantization(files, quantize))


def encoder_parts(name: str | Path) -> Parts[ModelConfig]:
    """The text and image encoders of what `find_model` finds. Raises CheckpointError and OptionError."""
    folder = find_model(name)
    config = read_model_config(folder)
    parts: list[Component] = [component for component in components(config) if component not in ("unet", "vae")]
    files: dict[Component, list[Path]] = {component: weight_files(folder, component) for component in parts}
    return Parts(config, files, parts)


def upscaler_parts(name: str | Path, *, quantize: str | None) -> Parts[UpscalerConfig]:
    """An upscaler that `find_model` finds, whose weights are to be quantised so; it can do without its VAE.

    Raises CheckpointError, also for a folder of another kind, and OptionError.
    """
    folder = find_model(name)
    config = read_upscaler_config(folder)
    files = upscaler_weight_files(folder, config)
    needed: list[Component] = [component for component in files if component != "vae"]
    return Parts(config, files, needed, choose_quantization(files, quantize))


def prepare(
    networks: Networks,
    parts: Parts[Any],
    *,
    shapes: Callable[[NetworkConfig], Mapping[str, tuple[int, ...]]],
    at_once: bool,
) -> None:
    """Read the networks that are needed `at_once`, or look whether their files fit, by the headers alone.

    `shapes` gives a network's names and shapes. Raises as the networks' loaders do.
    """
    for component in parts.needed:
        if at_once:
            networks[component]
        else:
            config, paths = getattr(parts.config, component), parts.files[component]
            match_network(config, shapes(config), paths, layers=stored_quantization(paths).layers)
