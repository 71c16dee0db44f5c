"""Checkpoint folders in diffusers' layout: model_index.json, then a folder with config.json and weights per component.

Folders of this project name family, camera and generation defaults in `model_index.json`; those of public checkpoints have a
`_class_name` in every config, which says what to make of it.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from mvshared.clip_images import read_clip_image_config
from mvshared.config import (
    CameraConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Framing,
    GenerationDefaults,
    ModelConfig,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
)
from mvshared.embedded import embedded_folder
from mvshared.errors import CheckpointError, OptionError
from mvshared.files import FileError, make_folder, read_json_object, visible, write_atomic, write_json
from mvshared.models import EMBEDDED, REPOSITORIES, read_pins, repository_of
from mvshared.names import PROJECTIONS
from mvshared.public_configs import (
    SET_BY_PIPELINES,
    clip_text,
    clip_vision,
    diffusers_sampler,
    diffusers_scheduler,
    diffusers_unet,
    diffusers_vae,
    family_defaults,
    family_of,
    latent_size,
    ldm_unet,
)
from mvshared.weights import read_header, stored_quantization

Component = Literal["unet", "vae", "text_encoder", "image_encoder"]

WEIGHT_FILE = "diffusion_pytorch_model.safetensors"
WEIGHT_STEMS: dict[Component, str] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "image_encoder": "model",
}
FORMAT_VERSION = 1
OWN_UPSCALER, PUBLIC_UPSCALER = "LatentUpscalerPipeline", "StableDiffusionLatentUpscalePipeline"
UPSCALER_CLASSES = (OWN_UPSCALER, PUBLIC_UPSCALER)
# What a public model_index.json may name: what is read here, and what Stable Diffusion's pipelines have beside it.
PUBLIC_COMPONENTS = {*WEIGHT_STEMS, "tokenizer", "scheduler", "feature_extractor", "safety_checker"}
PUBLIC_CLASSES = {
    "unet": ("MultiViewUNetModel", "UNet2DConditionModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Config = TypeVar("Config", bound=_Dataclass)
Tower = TypeVar("Tower", CLIPTextConfig, CLIPVisionConfig)


def find_model(name: Path | str) -> Path:
    """The absolute folder of a model: the embedded one of that name, a folder on disk, or a downloaded model by its name or
    repository.

    Raises CheckpointError if there is none of them, OptionError for what is no name.
    """
    if not isinstance(name, str | os.PathLike):
        raise OptionError("model", expected="a name or a folder", got=name)
    folder = Path(name)
    if str(name) in EMBEDDED:
        folder = embedded_folder(str(name))
    elif not folder.is_dir():
        folder = _downloaded(str(name))
    if not (folder / "model_index.json").is_file():
        raise CheckpointError("is no checkpoint folder: model_index.json is missing", path=folder)
    return folder.absolute()


def component_folder(name: Path | str) -> Path:
    """The folder to take one component from: any folder on disk, such as the model of a run of the VAE's stage, which is no
    whole one, or a model by its name. Raises CheckpointError."""
    return Path(name) if str(name) not in EMBEDDED and Path(name).is_dir() else find_model(name)


def _downloaded(name: str) -> Path:
    repository = repository_of(name)
    pin = None if repository is None else read_pins().get(repository)
    if pin is not None and pin.complete():
        return Path(pin.folder)
    if name in REPOSITORIES or pin is not None:
        raise CheckpointError(f"the model {name!r} is not downloaded", hint=f"mvmlx download {name}")
    if Path(name).is_file():
        raise CheckpointError("is a file, and a checkpoint folder is needed", path=name, hint="mvmlx convert makes one of it")
    known = ", ".join((*EMBEDDED, *REPOSITORIES))
    raise CheckpointError(f"no such model: allowed are {known} and checkpoint folders, got {name!r}")


def model_name(name: Path | str) -> str:
    """What names a model wherever the program runs: the name of an embedded or downloaded one, else its folder's path."""
    named = str(name) in EMBEDDED or (not Path(name).is_dir() and repository_of(str(name)) is not None)
    return str(name) if named else str(Path(name).resolve())


def weight_files(folder: Path, component: Component) -> list[Path]:
    """The weight files of a component: one, its float16 variant if there is no other, or the shards that an index names.

    Raises CheckpointError if one is missing.
    """
    return weight_files_in(folder / component, component)


def weight_files_in(place: Path, component: Component) -> list[Path]:
    """`weight_files` of a component whose folder may have any name."""
    stem = WEIGHT_STEMS[component]
    for variant in ("", ".fp16"):
        path = place / f"{stem}{variant}.safetensors"
        if path.is_file():
            return [path]
        for index in (path.with_name(f"{path.name}.index.json"), path.with_name(f"{stem}.safetensors.index{variant}.json")):
            if index.is_file():
                return _shards(index)
    missing = place / f"{stem}.safetensors"
    raise CheckpointError("the weight file is missing", path=missing, hint=_way_out(missing, stem))


def _way_out(missing: Path, stem: str) -> str:
    """What can be done where a folder has other weights than those that are read."""
    pickles = (f"{name}{variant}.bin" for variant in ("", ".fp16") for name in (stem, "pytorch_model"))
    pickled = next((file for name in pickles if (file := missing.with_name(name)).is_file()), None)
    if pickled is not None:
        return f"mvmlx convert {pickled} {missing} makes it of what is there"
    kinds = ("*.safetensors", "*.bin", "*.msgpack", "*.onnx")
    others = visible(path for kind in kinds for path in missing.parent.glob(kind))
    if not others:
        return ""
    more = f" and {len(others) - 1} more" if others[1:] else ""
    return f"what is there, {others[0].name}{more}, is not read under this name"


def _shards(index: Path) -> list[Path]:
    names = read_json_object(index, error=CheckpointError).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError("must hold a weight_map of tensors to files", path=index)
    for name in names.values():
        if not name or Path(name).name != name:
            raise CheckpointError(f"a shard must lie beside its index, got {name!r}", path=index)
    files = [index.with_name(name) for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError("the weight file is missing", path=file)
    return files


def read_model_config(folder: Path) -> ModelConfig:
    """The configuration of the checkpoint in `folder`. Raises CheckpointError for missing or malformed fields."""
    index = read_json_object(folder / "model_index.json", error=CheckpointError)
    if index.get("_class_name") in UPSCALER_CLASSES:
        raise CheckpointError("is a latent upscaler, and no model of views", path=folder, hint="is it meant as `upscaler`?")
    try:
        if "format_version" in index:
            return _own_model(folder, index)
        _check_components(index, path=folder / "model_index.json")
        return _public_model(folder)
    except OptionError as refused:
        raise CheckpointError(str(refused), path=folder) from refused


def read_vae_config(folder: Path) -> VAEConfig:
    """The config of the VAE in a checkpoint folder, of this project or of diffusers. Raises CheckpointError."""
    path = folder / "vae" / "config.json"
    document = read_json_object(path, error=CheckpointError)
    if "_class_name" in document:
        return diffusers_vae(document, path=path)
    return config_from_json(VAEConfig, document, path=path)


def components(config: ModelConfig) -> list[Component]:
    """The parts of a model that have weights."""
    encoders: dict[Component, object] = {"text_encoder": config.text_encoder, "image_encoder": config.image_encoder}
    return ["unet", "vae", *(name for name, encoder in encoders.items() if encoder is not None)]


def _own_model(folder: Path, index: Mapping[str, Any]) -> ModelConfig:
    if index["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version must be {FORMAT_VERSION}, got {index['format_version']!r}",
            path=folder / "model_index.json",
            hint="this version of mvmlx did not write it",
        )
    parts: dict[str, Any] = {
        "unet": read_config(UNetConfig, folder / "unet" / "config.json"),
        "vae": read_vae_config(folder),
        "scheduler": read_config(SchedulerConfig, folder / "scheduler" / "scheduler_config.json"),
    }
    if (folder / "text_encoder").is_dir():
        parts["text_encoder"] = read_tower(folder, "text_encoder", clip_text)
    if (folder / "image_encoder").is_dir():
        parts |= _vision(folder)
    for name, kind in {"camera": CameraConfig, "defaults": GenerationDefaults, "framing": Framing}.items():
        parts[name] = config_from_json(kind, index.get(name, {}), path=folder / "model_index.json", table=name)
    return ModelConfig(family=str(index.get("family", "custom")), **parts)


def component_classes(index: Mapping[str, Any]) -> dict[str, str]:
    """`{component: class}` of a public model_index.json; those that it leaves out, as `[null, null]`, are not in it, nor is the
    pipeline's own class, which is such a pair where its code comes with the folder."""
    parts = {name: value for name, value in index.items() if not name.startswith("_")}
    pairs = {name: value for name, value in parts.items() if isinstance(value, list) and len(value) == 2}
    return {name: pair[1] for name, pair in pairs.items() if all(isinstance(each, str) for each in pair)}


def read_scheduler_document(place: Path) -> dict[str, Any]:
    """The scheduler_config.json in a folder. The class that the model_index.json beside the folder names goes before the
    file's own, as in diffusers. Raises CheckpointError."""
    document = read_json_object(place / "scheduler_config.json", error=CheckpointError)
    index = place.parent / "model_index.json"
    named = component_classes(read_json_object(index, error=CheckpointError)) if index.is_file() else {}
    return {**document, "_class_name": named["scheduler"]} if "scheduler" in named else document


def _check_components(index: Mapping[str, Any], *, path: Path) -> None:
    """Raise CheckpointError for a component that would be left aside, such as a camera's embedding outside of the U-Net, for
    one of a class that is not read, and for a model without a text encoder."""
    named = component_classes(index)
    for name, kind in named.items():
        if name not in PUBLIC_COMPONENTS:
            raise CheckpointError(f"names the component {name!r} ({kind}), which no model here has", path=path)
        allowed = PUBLIC_CLASSES.get(name, (kind,))
        if kind not in allowed:
            raise CheckpointError(f"the class of {name} must be {' or '.join(allowed)}, got {kind!r}", path=path)
    if named and "text_encoder" not in named and not (path.parent / "text_encoder").is_dir():
        hint = "a model that is given a picture alone?"
        raise CheckpointError("names no text_encoder, which all models of this layout here have", path=path, hint=hint)


def _public_model(folder: Path) -> ModelConfig:
    """MVDream, ImageDream or Stable Diffusion, by the class names and sizes in the components' configs."""
    unet_path = folder / "unet" / "config.json"
    document = read_json_object(unet_path, error=CheckpointError)
    unet = public_unet(document, place=folder / "unet")
    vae = read_vae_config(folder)
    sampling = read_scheduler_document(folder / "scheduler") | SET_BY_PIPELINES
    scheduler = diffusers_scheduler(sampling, path=folder / "scheduler" / "scheduler_config.json")
    encoders: dict[str, Any] = {"text_encoder": read_tower(folder, "text_encoder", clip_text)}
    if unet.resampler is not None:
        encoders |= _vision(folder)
    family = family_of(unet, scheduler)
    size_px = latent_size(document, path=unet_path, default=256 // vae.downscale) * vae.downscale
    return ModelConfig(
        family=family,
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        defaults=replace(family_defaults(family, size_px=size_px), scheduler=diffusers_sampler(sampling)),
        framing=Framing(mode="none", resample="bilinear"),  # as the reference code: squeezed to a square
        **encoders,
    )


def public_unet(document: Mapping[str, Any], *, place: Path) -> UNetConfig:
    """The U-Net of a public model: its config.json, a document, is in the folder `place`. Raises CheckpointError."""
    path = place / "config.json"
    match document.get("_class_name"):
        case "MultiViewUNetModel":
            return ldm_unet(document, path=path, linear=_linear_projections(place))
        case "UNet2DConditionModel":
            unet = diffusers_unet(document, path=path)
            check_in_channels(unet, path=path)
            return unet
        case other:
            expected = "MultiViewUNetModel or UNet2DConditionModel"
            raise CheckpointError(f"_class_name must be {expected}, got {other!r}", path=path)


def check_in_channels(unet: UNetConfig, *, path: Path) -> None:
    """Raise CheckpointError for a U-Net of Stable Diffusion's layout that is given more than the noisy latents."""
    if unet.normal_channels:
        got = f"{unet.in_channels} and {unet.out_channels}"
        reason = f"in_channels must be as many as out_channels for a model of this layout, got {got}"
        raise CheckpointError(reason, path=path, hint="a model that edits or fills in pictures?")


def _linear_projections(place: Path) -> bool:
    """Whether the projections around the U-Net's transformers are linear layers: (o, i), and not (o, i, 1, 1)."""
    files = weight_files_in(place, "unet")
    shapes = {name: info.shape for file in files for name, info in read_header(file).tensors.items()}
    shapes |= {f"{name}.weight": layer.shape for name, layer in stored_quantization(files).layers.items()}
    return not any(len(shape) == 4 and name.endswith(".proj_in.weight") for name, shape in shapes.items())


def _vision(folder: Path) -> dict[str, Any]:
    """The image encoder and how its pictures are prepared."""
    processor = read_clip_image_config(folder / "feature_extractor" / "preprocessor_config.json")
    return {"image_encoder": read_tower(folder, "image_encoder", clip_vision), "image_processor": processor}


def read_tower(folder: Path, component: Literal["text_encoder", "image_encoder"], read: Callable[..., Tower]) -> Tower:
    """The config of an encoder's folder, by one of the readers in `public_configs`. Raises CheckpointError."""
    path = folder / component / "config.json"
    names = {name for file in weight_files(folder, component) for name in read_header(file).tensors}
    projection = not names.isdisjoint(PROJECTIONS)
    return read(read_json_object(path, error=CheckpointError), path=path, projection=projection)


def read_config(cls: type[Config], path: Path) -> Config:
    """A config dataclass from a JSON file. Raises CheckpointError."""
    return config_from_json(cls, read_json_object(path, error=CheckpointError), path=path)


def config_from_json(
    cls: type[Config], document: object, *, path: Path, table: str = "", error: FileError = CheckpointError
) -> Config:
    """A config dataclass from a JSON object; keys that begin with `_` are comments.

    Raises `error` for an unknown key, a missing one, a value of the wrong type, or one that the class refuses; `table` is where
    in the file the object stands.
    """
    where = f"{table}." if table else ""
    if not isinstance(document, dict):
        raise error(f"{table or 'the file'} must hold an object, got {document!r}", path=path)
    hints = get_type_hints(cls)
    given = {name: value for name, value in document.items() if not name.startswith("_")}
    unknown = sorted(given.keys() - hints.keys())
    if unknown:
        allowed = ", ".join(sorted(hints))
        raise error(f"unknown field {where + unknown[0]!r}; allowed are {allowed}", path=path)
    missing = [field.name for field in fields(cls) if field.name not in given and _is_required(field)]
    if missing:
        raise error(f"the field {where + missing[0]!r} is missing", path=path)
    values = {}
    for name, value in given.items():
        nested = next((kind for kind in (hints[name], *get_args(hints[name])) if is_dataclass(kind)), None)
        if isinstance(value, dict) and isinstance(nested, type):
            values[name] = config_from_json(nested, value, path=path, table=where + name, error=error)
            continue
        converted, fits = _convert(value, hints[name])
        if not fits:
            raise error(f"{where}{name} must be {_type_name(hints[name])}, got {value!r}", path=path)
        values[name] = converted
    try:
        return cls(**values)
    except OptionError as refused:
        raise error(f"{where}{refused}", path=path) from refused


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


_TYPE_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "null"}


def _type_name(hint: Any) -> str:
    """What a type hint wants, in the words of who writes such a file."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type_name(each) for each in arguments))
    if origin is Literal:
        return ", ".join(map(repr, arguments[:-1])) + " or " * (len(arguments) > 1) + repr(arguments[-1])
    if origin is tuple:
        kinds = [_type_name(each) for each in arguments if each is not Ellipsis]
        count = "a list" if Ellipsis in arguments else f"a list of {len(kinds)}"
        return f"{count}, each {kinds[0]}" if len(set(kinds)) == 1 else f"{count}: {', '.join(kinds)}"
    return _TYPE_NAMES.get(hint, "an object" if is_dataclass(hint) else str(hint).replace("typing.", ""))


def _convert(value: Any, hint: Any) -> tuple[Any, bool]:
    """The value as the type hint wants it (lists become tuples), and whether it fits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for option in arguments:
            converted, fits = _convert(value, option)
            if fits:
                return converted, True
        return value, False
    if origin is Literal:
        return value, value in arguments
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return value, False
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            return value, False
        parts = [_convert(item, kind) for item, kind in zip(value, kinds, strict=True)]
        return tuple(part for part, _ in parts), all(fits for _, fits in parts)
    if hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return (float(value), True) if fits else (value, False)
    if hint is int:
        return value, isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value, value is None
    return value, isinstance(value, hint)


def write_component(
    folder: Path, component: Literal["unet", "vae"], config: UNetConfig | VAEConfig, weights: Mapping[str, NDArray[Any]]
) -> None:
    """Write config.json and the weights of a component, each atomically. Raises OutputError."""
    target = make_folder(folder / component)
    contiguous = {name: np.ascontiguousarray(weights[name]) for name in sorted(weights)}
    write_atomic(target / WEIGHT_FILE, save(contiguous, metadata={"format": "pt"}))
    write_json(target / "config.json", asdict(config))


def write_model_config(folder: Path, config: ModelConfig) -> None:
    """Write scheduler_config.json and model_index.json; the components' own files are `write_component`'s.

    Encoders, whose files are transformers' own, are read wherever their folders are.
    """
    write_json(make_folder(folder / "scheduler") / "scheduler_config.json", asdict(config.scheduler))
    parts = {name: asdict(getattr(config, name)) for name in ("camera", "defaults", "framing")}
    document = {"_class_name": "MultiViewPipeline", "format_version": FORMAT_VERSION, "family": config.family, **parts}
    write_json(folder / "model_index.json", document)
