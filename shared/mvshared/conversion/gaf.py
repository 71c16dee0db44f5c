"""GAF's network from ImageDream's or Stable Diffusion's weights: `mvmlx init gaf`.

GAF (arXiv 2412.10209) is ImageDream with the latents of a normal map beside those of every view, eight input channels. What is
new is zero where it meets what there was, so that the network first computes what its source does, and then learns.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mvshared.checkpoint import Component, find_model, read_model_config, weight_files, write_model_config
from mvshared.clip_images import read_clip_image_config
from mvshared.config import CLIPImageConfig, CLIPVisionConfig, GenerationDefaults, ModelConfig, ResamplerConfig
from mvshared.conversion.configs import image_processor_document
from mvshared.conversion.folders import DEFAULT_SHARD_BYTES, OnTensor, Progress, copy_files, fingerprint, write_weights
from mvshared.conversion.networks import network_shapes
from mvshared.conversion.one_file import own_tensors
from mvshared.conversion.raw import RawTensor, cast, read_safetensors
from mvshared.conversion.report import Report, written
from mvshared.errors import CheckpointError, OptionError
from mvshared.files import make_folder, read_json_object, visible, write_json
from mvshared.numbers import MAX_SEED, whole
from mvshared.public_configs import clip_vision
from mvshared.training.initial import initial_weights

DEFAULTS = GenerationDefaults(views=4, steps=30, guidance=5.0, size_px=256)
# New tensors that are zero, by their ends: what they lead to is then added as zero.
ZEROS = ("to_v_ip.weight", "camera_embedding.linear_2.weight", "camera_embedding.linear_2.bias")


def init_gaf(
    source: Path | str,
    dest: Path,
    *,
    image_encoder: Path | None = None,
    cameras: bool = False,
    seed: int = 0,
    force: bool = False,
    on_tensor: OnTensor = lambda name, size: None,
) -> Report:
    """Write a GAF model that starts from the weights of an ImageDream, MVDream or Stable Diffusion 2.1 folder.

    It has eight input channels and the reference frame. Image tokens come with ImageDream's image encoder, or with
    `image_encoder`, a folder of transformers' CLIPVisionModel; a camera embedding is the source's, or new with `cameras`.
    `seed` is of what is neither zero nor there: the Resampler and the camera embedding's first layer.
    Raises CheckpointError, OptionError for a source that cannot be one, and OutputError.
    """
    seed = whole("seed", seed, 0, MAX_SEED)
    folder = find_model(source)
    config = read_model_config(folder)
    if config.unet.cross_attention_dim is None or config.unet.normal_channels:
        expected = "an ImageDream, MVDream or Stable Diffusion 2.1 folder"
        raise OptionError("from", expected=expected, got=f"{folder}, of the family {config.family}")
    gaf, vision_folder = _gaf_config(config, folder, image_encoder=image_encoder, cameras=cameras)
    tensors = _unet_tensors(folder, config, gaf, seed=seed)
    sources = [folder, *([vision_folder] if vision_folder else [])]
    options = f"gaf {cameras} {seed}"
    state = Progress(dest, fingerprint(sources, None, options, DEFAULT_SHARD_BYTES), sources=sources, force=force)
    folders: dict[Component, Path] = {"vae": folder / "vae", "text_encoder": folder / "text_encoder"}
    if vision_folder is not None:
        folders["image_encoder"] = vision_folder
    with state.writing(("unet", *folders)):
        make_folder(dest / "unet")
        write_json(dest / "unet" / "config.json", asdict(gaf.unet))
        parts = [written("unet", tensors, files=_write(dest, "unet", tensors, state, on_tensor))]
        names = {"unet": {name: (name,) for name in tensors}}
        for component, place in folders.items():
            files = weight_files(folder, component) if place.parent == folder else visible(place.glob("*.safetensors"))
            copied = {name: tensor for file in files for name, tensor in read_safetensors(file).items()}
            copy_files(place, dest / component, only=("config.json",))
            parts.append(written(component, copied, files=_write(dest, component, copied, state, on_tensor)))
        copy_files(folder / "tokenizer", dest / "tokenizer")
        if gaf.image_processor is not None:
            make_folder(dest / "feature_extractor")
            document = image_processor_document(gaf.image_processor)
            write_json(dest / "feature_extractor" / "preprocessor_config.json", document)
        write_model_config(dest, gaf)
    return Report(folder=dest, family="gaf", written=tuple(parts), names=names, left_out={}, missing=())


def _write(dest: Path, component: Component, tensors: Mapping[str, RawTensor], state: Progress, on_tensor: OnTensor) -> int:
    return write_weights(dest, component, tensors, shard_bytes=DEFAULT_SHARD_BYTES, state=state, on_tensor=on_tensor)


def _gaf_config(
    config: ModelConfig, folder: Path, *, image_encoder: Path | None, cameras: bool
) -> tuple[ModelConfig, Path | None]:
    """The config, and the folder of its image encoder if it has one."""
    unet, vision, processor = config.unet, config.image_encoder, config.image_processor
    vision_folder = folder / "image_encoder" if vision is not None else None
    if image_encoder is not None:
        if vision is not None:
            raise OptionError("image encoder", expected="left out: the source has its own", got=str(image_encoder))
        vision_folder = image_encoder
        vision, processor = _vision(image_encoder)
        width = config.unet.cross_attention_dim
        assert width is not None
        resampler = ResamplerConfig(embedding_dim=vision.hidden_size, output_dim=width, hidden_dim=width)
        unet = replace(unet, resampler=resampler)
    unet = replace(
        unet,
        in_channels=unet.in_channels + config.vae.latent_channels,
        reference_frame=True,
        camera_dim=unet.camera_dim or (16 if cameras else None),
    )
    size_px = min(DEFAULTS.size_px, config.defaults.size_px)
    gaf = replace(
        config,
        family="gaf",
        unet=unet,
        image_encoder=vision,
        image_processor=processor,
        defaults=replace(DEFAULTS, size_px=size_px, negative_prompt=config.defaults.negative_prompt),
    )
    return gaf, vision_folder


def _vision(folder: Path) -> tuple[CLIPVisionConfig, CLIPImageConfig]:
    path = folder / "config.json"
    files = visible(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError("holds no .safetensors weights", path=folder)
    projection = any("visual_projection.weight" in read_safetensors(file) for file in files)
    vision = clip_vision(read_json_object(path, error=CheckpointError), path=path, projection=projection)
    given = folder / "preprocessor_config.json"
    if given.is_file():
        return vision, read_clip_image_config(given)
    return vision, CLIPImageConfig(shortest_edge=vision.image_size, crop_size=vision.image_size)


def _unet_tensors(folder: Path, config: ModelConfig, gaf: ModelConfig, *, seed: int) -> dict[str, RawTensor]:
    """Those of the source, wider where there are new inputs, and the new ones."""
    own = own_tensors(folder, "unet", config)
    shapes = network_shapes(gaf.unet)
    dtype = own["conv_in.weight"].dtype
    new = {name: shape for name, shape in shapes.items() if name not in own}
    values = initial_weights(new, seed=seed, zeros=())
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("to_k_ip.weight") and name not in own:
            tensors[name] = own[name.replace("to_k_ip", "to_k")]
        elif name in own:
            tensors[name] = _wider(own[name], shape)
        else:
            array = np.zeros_like(values[name]) if name.endswith(ZEROS) else values[name]
            raw = RawTensor(dtype="F32", shape=shape, read=lambda array=array: np.ascontiguousarray(array).view(np.uint32))
            tensors[name] = cast(raw, dtype, name=name)
    return tensors


def _wider(tensor: RawTensor, shape: tuple[int, ...]) -> RawTensor:
    """A convolution's kernels (o, i, h, w) for more inputs, which it takes no part of yet; another tensor as it is."""
    if tensor.shape == shape:
        return tensor

    def read() -> Any:
        bits = tensor.read()
        return np.concatenate([bits, np.zeros((shape[0], shape[1] - bits.shape[1], *shape[2:]), bits.dtype)], axis=1)

    return RawTensor(dtype=tensor.dtype, shape=shape, read=read)
