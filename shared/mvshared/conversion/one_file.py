"""A folder's checkpoint in one file, as the original code of its family has it."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mvshared.checkpoint import Component, components, find_model, read_model_config, weight_files
from mvshared.config import ModelConfig
from mvshared.conversion.configs import open_clip_text_layers
from mvshared.conversion.links import Link, open_clip_links, plain_links, unet_links, vae_links
from mvshared.conversion.networks import network_shapes
from mvshared.conversion.raw import FLOATS, RawTensor, cast, read_safetensors, write_safetensors
from mvshared.conversion.report import Report, written
from mvshared.conversion.sources import read_file
from mvshared.errors import CheckpointError, OutputError
from mvshared.files import LEFT_OVER_S, make_folder, remove_leftovers
from mvshared.names import PROJECTIONS
from mvshared.weights import match_tensors


def write_one_file(
    source: Path, dest: Path, *, stored: str | None, force: bool, on_tensor: Callable[[str, int], None]
) -> Report:
    """Write a folder's whole checkpoint to one file, under the names of its family's original code.

    `stored` is safetensors' name of the dtype, None keeps each tensor's. Raises OutputError and CheckpointError.
    """
    if dest.exists() and not force:
        raise OutputError("exists", path=dest, hint="name another file, or use force=True")
    folder = find_model(source)
    config = read_model_config(folder)
    tensors: dict[str, RawTensor] = {}
    names: dict[str, dict[str, tuple[str, ...]]] = {}
    left_out: dict[str, str] = {}
    for component in components(config):
        own = own_tensors(folder, component, config)
        prefix, links = _original_links(component, config, names=list(own))
        if component == "text_encoder" and config.unet.use_linear_projection:
            assert config.text_encoder is not None
            links, without = _states_alone(links, own, layers=config.text_encoder.num_hidden_layers, path=folder / component)
            left_out |= {f"{component}/{name}": "behind the text states that the U-Net takes" for name in without}
        names[component] = {}
        for link in links:
            tensors[f"{prefix}{link.other}"] = link.to_other(own)
            for name in link.own:
                names[component][name] = (f"{prefix}{link.other}",)
    tensors = {name: cast(tensors[name], stored or tensors[name].dtype, name=name) for name in sorted(tensors)}
    make_folder(dest.parent)
    remove_leftovers(dest.parent, re.escape(dest.name), unchanged_s=LEFT_OVER_S)
    write_safetensors(dest, tensors, on_tensor=on_tensor)
    account = written("checkpoint", tensors, files=1)
    return Report(folder=dest, family=config.family, written=(account,), names=names, left_out=left_out, missing=())


def rewrite_file(source: Path, dest: Path, *, stored: str | None, force: bool, on_tensor: Callable[[str, int], None]) -> Report:
    """Write a file's tensors to a safetensors file under the same names, every one.

    `stored` is safetensors' name of the dtype of floating-point tensors, None keeps each one's. Raises OutputError and
    CheckpointError.
    """
    if dest.exists() and not force:
        raise OutputError("exists", path=dest, hint="name another file, or use force=True")
    given = read_file(source)
    tensors = {
        name: cast(given[name], stored if stored and given[name].dtype in (*FLOATS, "F64") else given[name].dtype, name=name)
        for name in sorted(given)
    }
    make_folder(dest.parent)
    remove_leftovers(dest.parent, re.escape(dest.name), unchanged_s=LEFT_OVER_S)
    write_safetensors(dest, tensors, on_tensor=on_tensor)
    names = {"checkpoint": {name: (name,) for name in tensors}}
    account = written("checkpoint", tensors, files=1)
    return Report(folder=dest, family="custom", written=(account,), names=names, left_out={}, missing=())


def own_tensors(folder: Path, component: Component, config: ModelConfig) -> dict[str, RawTensor]:
    """The tensors of a component under this project's names, with their shapes here."""
    files = weight_files(folder, component)
    shapes = network_shapes(getattr(config, component))
    raw = {file: read_safetensors(file) for file in files}
    own = {}
    for name, place in match_tensors(files, shapes, unet=config.unet if component == "unet" else None).items():
        tensor = raw[place.path][place.name]
        own[name] = _reshaped(tensor, shapes[name])
    return own


def _reshaped(tensor: RawTensor, shape: tuple[int, ...]) -> RawTensor:
    return RawTensor(dtype=tensor.dtype, shape=shape, read=lambda: tensor.read().reshape(shape))


def _states_alone(links: list[Link], own: dict[str, RawTensor], *, layers: int, path: Path) -> tuple[list[Link], list[str]]:
    """The links of an OpenCLIP text tower without its projection, beside which readers leave out the last layer, and the names
    that are without one then. Raises CheckpointError for more layers than readers take."""
    kept = [link for link in links if not any(name in PROJECTIONS for name in link.own)]
    taken = open_clip_text_layers({link.other: link.to_other(own).shape for link in kept})
    if taken != layers:
        reason = f"has {layers} layers, and of files with the original names of its family {taken} are read"
        raise CheckpointError(reason, path=path, hint="a folder keeps them all")
    return kept, [name for link in links if link not in kept for name in link.own]


def _original_links(component: Component, config: ModelConfig, *, names: Sequence[str]) -> tuple[str, list[Link]]:
    """The prefix of a component in the original checkpoints of its family, and the names behind it."""
    imagedream = config.unet.resampler is not None
    match component:
        case "unet":
            return "model.diffusion_model.", unet_links(names, config.unet)
        case "vae":
            return "vae_model." if imagedream else "first_stage_model.", vae_links(names)
        case "text_encoder" if not config.unet.use_linear_projection:
            links = plain_links(names, prefix="text_model.", unprefixed=PROJECTIONS)
            return "cond_stage_model.transformer.", links
        case "text_encoder":
            return "clip_model.model." if imagedream else "cond_stage_model.model.", open_clip_links(names, prefix="")
        case "image_encoder":
            return "clip_model.model.", open_clip_links(names, prefix="visual.")
