"""One network of another layout as a component of a folder: its config, and its tensors under their new names."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvshared.backend import PACKAGES, choose_backend
from mvshared.checkpoint import Component
from mvshared.config import MOST_LAYERS, CLIPImageConfig, CLIPVisionConfig, NetworkConfig, UNetConfig
from mvshared.conversion.configs import (
    clip_document,
    clip_text_config,
    clip_vision_config,
    diffusers_unet_document,
    image_processor_document,
    ldm_unet_config,
    ldm_unet_document,
    ldm_vae_config,
    open_clip_text_config,
    open_clip_vision_config,
    upscaler_document,
    vae_document,
)
from mvshared.conversion.links import (
    Link,
    open_clip_links,
    plain_links,
    unet_links,
    upscaler_links,
    vae_links,
)
from mvshared.conversion.raw import RawTensor, cast
from mvshared.conversion.sources import Layout
from mvshared.errors import CheckpointError, TensorMismatchError
from mvshared.names import PROJECTIONS
from mvshared.public_configs import ldm_unet

IMAGE_PX = 256  # MVDream's and ImageDream's
NOISE_FREQUENCIES = "low_res_noise_embed.weight"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A component of a folder: `documents` are its JSON files by their path in the folder, `names` the new ones by the old."""

    component: Component
    config: NetworkConfig | None
    documents: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, RawTensor]
    names: Mapping[str, Sequence[str]]


def convert_network(
    layout: Layout, tensors: Mapping[str, RawTensor], *, path: Path, reference_frame: bool = True
) -> tuple[list[Part], dict[str, str]]:
    """The components that the tensors of a layout make, and why some of the tensors are left out, by their names.

    Raises CheckpointError for tensors that are no such network's, TensorMismatchError for too many or too few.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    match layout:
        case "ldm_unet":
            return [_unet(tensors, ldm_unet_config(shapes, reference_frame=reference_frame), path)], {}
        case "ldm_vae":
            config = ldm_vae_config(shapes, sample_size=IMAGE_PX)
            links = vae_links(network_shapes(config))
            documents = {"vae/config.json": vae_document(config)}
            return [_part("vae", config, links, tensors, path=path, documents=documents)], {}
        case "hf_text" | "hf_vision":
            return [_hugging_face(layout, tensors, path)], {}
        case "k_upscaler":
            return _upscaler(tensors, path)
        case "open_clip":
            return _open_clip(tensors, path)


def _upscaler(tensors: Mapping[str, RawTensor], path: Path) -> tuple[list[Part], dict[str, str]]:
    """The network; the frequencies that embed the noise level, which diffusers' folder has no place for, go to its config."""
    rest = {name: tensor for name, tensor in tensors.items() if name != NOISE_FREQUENCIES}
    shapes = {name: tensor.shape for name, tensor in rest.items()}
    document, left_out = upscaler_document(shapes), {}
    if NOISE_FREQUENCIES in tensors:
        bits = cast(tensors[NOISE_FREQUENCIES], "F32", name=NOISE_FREQUENCIES).read()
        document["noise_frequencies"] = [float(value) for value in bits.view(np.float32).ravel()]
        left_out[NOISE_FREQUENCIES] = "kept as noise_frequencies in unet/config.json"
    links = list(upscaler_links(shapes))
    return [_part("unet", None, links, rest, path=path, documents={"unet/config.json": document})], left_out


def network_shapes(config: NetworkConfig, *, backend: str = "auto") -> dict[str, tuple[int, ...]]:
    """Names and shapes that a network has here, from whichever backend is installed."""
    return importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.model").network_shapes(config)


def _unet(tensors: Mapping[str, RawTensor], config: UNetConfig, path: Path) -> Part:
    """With cameras or image tokens as the public MVDream folders have it, under LDM's names; else as diffusers has it."""
    links = unet_links(network_shapes(config), config)
    size = IMAGE_PX // 8
    if config.camera_dim is None and config.resampler is None:
        documents = {"unet/config.json": diffusers_unet_document(config, sample_size=size)}
        return _part("unet", config, links, tensors, path=path, documents=documents)
    documents = {"unet/config.json": ldm_unet_document(config, image_size=size)}
    if ldm_unet(documents["unet/config.json"], path=path) != config:
        raise CheckpointError("holds a U-Net of sizes that MVDream's config cannot say", path=path)
    part = _part("unet", config, links, tensors, path=path, documents=documents)
    return Part(
        component="unet", config=config, documents=documents, tensors=tensors, names={name: (name,) for name in part.names}
    )


def _hugging_face(layout: Layout, tensors: Mapping[str, RawTensor], path: Path) -> Part:
    """A tower under transformers' names, which keep their prefix."""
    prefix = "text_model." if layout == "hf_text" else "vision_model."
    if not any(name.startswith(prefix) for name in tensors):  # as transformers 5, and old merges, have them
        prefix = ""
    plain = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items()}
    config = clip_text_config(plain) if layout == "hf_text" else clip_vision_config(plain)
    links = plain_links(network_shapes(config), prefix=prefix, unprefixed=PROJECTIONS)
    return _tower(config, links, tensors, path=path)


def _open_clip(tensors: Mapping[str, RawTensor], path: Path) -> tuple[list[Part], dict[str, str]]:
    """The text tower and, if it is there, the vision tower."""
    parts, left_out = [], {}
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    if text:
        shapes = {name: tensor.shape for name, tensor in text.items()}
        config = open_clip_text_config(shapes)
        behind = tuple(f"transformer.resblocks.{n}." for n in range(config.num_hidden_layers, MOST_LAYERS))
        for name in list(text):
            if name == "text_projection" or name.startswith(behind):
                del text[name]
                left_out[name] = "behind the text states that the U-Net takes"
        parts.append(_tower(config, open_clip_links(network_shapes(config), prefix=""), text, path=path))
    if vision:
        config = open_clip_vision_config({name.removeprefix("visual."): each.shape for name, each in vision.items()})
        if vision.pop("visual.proj", None) is not None:
            left_out["visual.proj"] = "behind the image states that the U-Net takes"
        parts.append(_tower(config, open_clip_links(network_shapes(config), prefix="visual."), vision, path=path))
    return parts, left_out


def _tower(config: Any, links: list[Link], tensors: Mapping[str, RawTensor], *, path: Path) -> Part:
    """A tower of CLIP under transformers' names, with the prefix that its versions before 5 need."""
    vision = isinstance(config, CLIPVisionConfig)
    component: Component = "image_encoder" if vision else "text_encoder"
    documents = {f"{component}/config.json": clip_document(config)}
    if vision:
        processor = CLIPImageConfig(shortest_edge=config.image_size, crop_size=config.image_size)
        documents["feature_extractor/preprocessor_config.json"] = image_processor_document(processor)
    part = _part(component, config, links, tensors, path=path, documents=documents)
    prefix = "vision_model." if vision else "text_model."

    def prefixed(name: str) -> str:
        return name if name in PROJECTIONS else f"{prefix}{name}"

    return Part(
        component=component,
        config=config,
        documents=documents,
        tensors={prefixed(name): tensor for name, tensor in part.tensors.items()},
        names={other: tuple(map(prefixed, own)) for other, own in part.names.items()},
    )


def _part(
    component: Component,
    config: NetworkConfig | None,
    links: Sequence[Link],
    tensors: Mapping[str, RawTensor],
    *,
    path: Path,
    documents: Mapping[str, Mapping[str, Any]],
) -> Part:
    """The tensors under this project's names, every one. Raises TensorMismatchError."""
    by_other = {link.other: link for link in links}
    missing, unexpected = sorted(by_other.keys() - tensors.keys()), sorted(tensors.keys() - by_other.keys())
    expected = None if config is None else network_shapes(config)
    misshaped = []
    for name in sorted(by_other.keys() & tensors.keys()):
        link, found = by_other[name], tensors[name].shape
        shape = link.own_shape(found)
        if shape is None or (expected is not None and any(expected[own] != shape for own in link.own)):
            wanted = "another" if expected is None else [list(expected[own]) for own in link.own]
            misshaped.append(f"{name} (here {wanted}, got {list(found)})")
    if missing or unexpected or misshaped:
        raise TensorMismatchError(path=path, missing=missing, unexpected=unexpected, misshaped=misshaped, hint="")
    own = {name: tensor for link in links for name, tensor in link.to_own(tensors[link.other]).items()}
    names = {link.other: link.own for link in links}
    return Part(component=component, config=config, documents=documents, tensors=own, names=names)
