"""`mvmlx convert`: a checkpoint file into a folder of diffusers' layout, a folder into another dtype, a folder into one file.

A folder is made file by file, each written whole or not at all, model_index.json last: before that it is no checkpoint. What a
broken run has finished, the next one finds and keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mvshared.backend import parse_dtype
from mvshared.checkpoint import (
    Component,
    check_in_channels,
    components,
    find_model,
    public_unet,
    read_config,
    read_model_config,
    read_scheduler_document,
    weight_files,
    weight_files_in,
)
from mvshared.config import (
    SD_VAE,
    CLIPImageConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ModelConfig,
    PredictionType,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
)
from mvshared.conversion.configs import euler_document, scheduler_document
from mvshared.conversion.folders import (
    DEFAULT_SHARD_BYTES,
    OnTensor,
    Progress,
    check_apart,
    copy_files,
    fingerprint,
    write_weights,
)
from mvshared.conversion.networks import Part, convert_network, network_shapes
from mvshared.conversion.one_file import rewrite_file, write_one_file
from mvshared.conversion.raw import FLOATS, STORED, RawTensor, cast, read_safetensors
from mvshared.conversion.report import Report, written
from mvshared.conversion.sources import read_file, sort_tensors
from mvshared.errors import CheckpointError, MvError, OptionError
from mvshared.files import make_folder, read_json_object, visible, write_json
from mvshared.models import EMBEDDED, REPOSITORIES, read_pins
from mvshared.names import BUFFERS
from mvshared.public_configs import SET_BY_PIPELINES, diffusers_scheduler
from mvshared.schedule import alphas_cumprod
from mvshared.upscaling.config import SigmaConfig, UpscalerConfig
from mvshared.upscaling.folder import PUBLIC_FAMILY, component_folders, is_upscaler, read_upscaler_config
from mvshared.weights import match_network

FAMILIES = ("mvdream", "imagedream", "imagedream-local", "sd15", "sd21", "sd21-768", PUBLIC_FAMILY)
PREDICTS: dict[str, PredictionType] = {"sd21": "epsilon", "sd21-768": "v_prediction"}  # all that tells them apart
SIZES_PX = {"sd15": 512, "sd21": 512, "sd21-768": 768}
REPORT = "conversion.json"
NETWORKS: dict[str, Component] = {  # by the kind that their config.json names
    "clip_text_model": "text_encoder",
    "clip_vision_model": "image_encoder",
    "AutoencoderKL": "vae",
    "UNet2DConditionModel": "unet",
    "MultiViewUNetModel": "unet",
}
PLAIN_FOLDERS = ("tokenizer", "feature_extractor", "scheduler")

Planned = dict[Component, tuple[Mapping[str, RawTensor], Mapping[str, Mapping[str, Any]]]]  # tensors and JSON files, by name


@dataclass(kw_only=True)
class _Collected:
    """The parts that sources give, by component, and folders whose files are copied."""

    parts: dict[str, Part] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    alphas_cumprod: RawTensor | None = None
    betas: RawTensor | None = None
    upscaler: bool = False

    def has(self, component: str) -> bool:
        return component in self.parts or component in self.folders


def convert(
    source: Path,
    dest: Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
    extra: Sequence[Path] = (),
    like: Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    on_tensor: OnTensor = lambda name, size: None,
) -> Report:
    """Convert a checkpoint file or folder to a folder, or to one file if `dest` ends in .safetensors.

    `source` may be a model's name, too. `extra` are files and folders with what it lacks: a tokenizer, an image encoder.
    `like` is a checkpoint folder of the same sizes, whose configs, schedule and tokenizer are taken: tensors do not tell how
    many heads there are, and without it they have those of the public models. `dtype` None keeps that of each tensor. `family`
    decides where the tensors do not. `on_tensor` gets the name and bytes of every tensor that is written.
    Raises CheckpointError for a source that is damaged, TensorMismatchError for tensors too many or too few, OptionError,
    OutputError for a folder that holds something else, BackendError for a pickle where PyTorch is not installed.
    """
    stored = None if dtype is None else STORED[parse_dtype(dtype, default="float32")]
    if family is not None and family not in FAMILIES:
        raise OptionError("family", expected=f"one of {', '.join(FAMILIES)}", got=family)
    if shard_bytes < 1:
        raise OptionError("shard size", expected="above 0", got=shard_bytes)
    if not source.exists() and (str(source) in (*EMBEDDED, *REPOSITORIES) or str(source) in read_pins()):
        source = find_model(source)
    sources = [source, *extra, *([find_model(like)] if like else [])]
    if dest.suffix == ".safetensors":
        check_apart(dest, sources)
        shards = None if shard_bytes == DEFAULT_SHARD_BYTES else shard_bytes
        for name, given in (("extra files", extra), ("like", like), ("family", family), ("shard size", shards)):
            if given:
                raise OptionError(name, expected="left out for one file, which holds what its source holds", got=given)
        write = write_one_file if source.is_dir() else rewrite_file
        return write(source, dest, stored=stored, force=force, on_tensor=on_tensor)
    collected = _Collected()
    for each in (source, *extra):
        _collect(collected, each, local=family == "imagedream-local")
    if source.is_dir():
        family = _family_of_folder(source, family)
    if like is not None:
        _take_configs(collected, sources[-1])
    chosen, schedule = _family_and_schedule(collected, family)
    told = family is not None or "scheduler" in collected.folders or chosen not in PREDICTS
    other = None if told else next(name for name in PREDICTS if name != chosen)
    if like is None and chosen in SIZES_PX:
        _set_sample_size(collected, SIZES_PX[chosen])
    _check_schedule(collected, schedule, path=source)
    _check_whole(collected, chosen, schedule, path=source)
    report = _write(
        collected,
        dest,
        family=chosen,
        stored=stored,
        shard_bytes=shard_bytes,
        state=Progress(dest, fingerprint(sources, stored, chosen, shard_bytes), sources=sources, force=force),
        index=source / "model_index.json" if (source / "model_index.json").is_file() else None,
        on_tensor=on_tensor,
    )
    return replace(report, guessed=other)


# Reading


def _read(folder: Path) -> ModelConfig | UpscalerConfig:
    """The config of a model's or an upscaler's folder. Raises CheckpointError."""
    return read_upscaler_config(folder) if is_upscaler(folder) else read_model_config(folder)


def _is_local(folder: Path) -> bool:
    """Whether a folder's model has image tokens and no reference frame."""
    config = _read(folder)
    return isinstance(config, ModelConfig) and config.unet.resampler is not None and not config.unet.reference_frame


def _check_model(folder: Path) -> str:
    """The family of a model or an upscaler whose tensors are all that it needs. Raises CheckpointError, TensorMismatchError."""
    config = _read(folder)
    named = components(config) if isinstance(config, ModelConfig) else component_folders(folder, config)
    for component in named:
        if (folder / component).is_dir():  # an upscaler's VAE may be another model's
            network = getattr(config, component)
            match_network(network, network_shapes(network), weight_files(folder, component), layers={})
    return config.family


def _collect(collected: _Collected, path: Path, *, local: bool) -> None:
    """Add what is in a file or a folder. Of several that have a component the first counts; another file is refused."""
    if not path.exists():
        raise CheckpointError("no such file or folder", path=path)
    if path.is_dir():
        _collect_folder(collected, path)
        return
    source = sort_tensors(read_file(path), path=path)
    collected.left_out |= source.left_out
    collected.alphas_cumprod = collected.alphas_cumprod or source.alphas_cumprod
    collected.betas = collected.betas or source.betas
    for layout, tensors in source.networks.items():
        try:
            parts, left_out = convert_network(layout, tensors, path=path, reference_frame=not local)
        except (IndexError, KeyError, ValueError, ZeroDivisionError, OptionError) as cause:
            raise CheckpointError(f"holds tensors of sizes that no such network has: {cause}", path=path) from cause
        except CheckpointError as fault:
            if fault.path is not None:
                raise
            raise CheckpointError(fault.message, path=path, hint=fault.hint) from fault
        prefix = source.prefixes[layout]
        collected.left_out |= {f"{prefix}{name}": why for name, why in left_out.items()}
        collected.upscaler |= layout == "k_upscaler"
        for part in parts:
            if collected.has(part.component):
                raise CheckpointError(f"holds another {part.component}: one source has it already", path=path)
            names = {f"{prefix}{other}": own for other, own in part.names.items()}
            collected.parts[part.component] = replace(part, names=names)


def _collect_folder(collected: _Collected, path: Path) -> None:
    """A folder of diffusers' layout, or of one network of diffusers, one CLIP tower of transformers, or a tokenizer."""
    there = {name: path / name for name in (*get_args(Component), *PLAIN_FOLDERS) if (path / name).is_dir()}
    if (path / "vocab.json").is_file() or (path / "tokenizer.json").is_file():
        there["tokenizer"] = path
    config = read_json_object(path / "config.json") if (path / "config.json").is_file() else {}
    kind = str(config.get("model_type") or config.get("_class_name"))
    component = NETWORKS.get(kind)
    if component is not None:
        there[component] = path
        if component == "image_encoder" and (path / "preprocessor_config.json").is_file():
            there["feature_extractor"] = path
    both = "holds both towers of CLIP; a folder of one of them can be taken"
    if kind == "clip":
        collected.left_out[str(path)] = both
    for name, folder in there.items():
        if collected.has(name):
            collected.left_out[str(folder)] = "another source, before this one, has it"
        else:
            collected.folders[name] = folder
    if not there:
        raise CheckpointError(both if kind == "clip" else "holds no component of a checkpoint", path=path)


def _take_configs(collected: _Collected, like: Path) -> None:
    """The JSON files of a folder instead of those from the shapes. Raises CheckpointError if its tensors are others."""
    config = read_model_config(like)
    for component, part in collected.parts.items():
        given, changes = getattr(config, component), {}
        if _lacks_projection(part.config, given):  # as all that was written to one file does
            given = replace(given, projection_dim=None)
            changes = {"architectures": [f"CLIP{'Text' if component == 'text_encoder' else 'Vision'}Model"]}
        if part.config is None or given is None or network_shapes(given) != network_shapes(part.config):
            raise CheckpointError(f"its {component} has other tensors than the one to convert", path=like)
        path = f"{component}/config.json"
        document = read_json_object(like / path, error=CheckpointError)
        if component in ("unet", "vae") and "_class_name" not in document:
            raise CheckpointError("is no config of diffusers", path=like / path)
        documents = {**part.documents, path: document | changes}
        collected.parts[component] = replace(part, config=given, documents=documents)
    for name in PLAIN_FOLDERS:
        if (like / name).is_dir():
            collected.folders.setdefault(name, like / name)


def _lacks_projection(found: object, given: object) -> bool:
    """Whether a tower has no projection where the given one has."""
    if not isinstance(found, CLIPTextConfig | CLIPVisionConfig) or not isinstance(given, CLIPTextConfig | CLIPVisionConfig):
        return False
    return found.projection_dim is None and given.projection_dim is not None


def _family_of_folder(source: Path, family: str | None) -> str | None:
    """The family of a folder of networks, which is its own if it is a whole model: then `family` may be left out."""
    whole = (source / "model_index.json").is_file()
    if not whole and family is not None:
        return family
    if not whole:
        hint = f"name the family that it is of, {', '.join(map(repr, FAMILIES))}"
        raise CheckpointError("is no whole model: model_index.json is missing", path=source, hint=hint)
    own = _check_model(source)
    local = own == "imagedream" and family == "imagedream-local" and _is_local(source)
    if family not in (None, own) and not local:
        raise OptionError("family", expected=f"{own}, which this folder is, or left out", got=family)
    return family or own


def _family_and_schedule(collected: _Collected, family: str | None) -> tuple[str, SchedulerConfig]:
    """The family that is asked for or fits, and its schedule. What the scheduler beside the networks predicts goes before what
    the family's public model does."""
    chosen = _family(collected, family)
    schedule = _schedule(collected, chosen)
    if chosen not in PREDICTS or schedule.prediction_type == PREDICTS[chosen] or not collected.parts:
        return chosen, schedule
    if family is not None:
        reason = f"another than {family}: the scheduler beside it says {schedule.prediction_type}"
        raise OptionError("family", expected=reason, got=family)
    return next((name for name, kind in PREDICTS.items() if kind == schedule.prediction_type), chosen), schedule


def _family(collected: _Collected, family: str | None) -> str:
    """The family that the tensors are of, or the given one if they can be of it. Raises OptionError if they cannot."""
    allowed = _families(collected)
    if not allowed:
        return family or "custom"
    if family is not None and family not in allowed:
        raise OptionError("family", expected=f"{' or '.join(allowed)}, which these tensors are", got=family)
    return family or allowed[0]


def _families(collected: _Collected) -> tuple[str, ...]:
    """The families that the U-Net can be of, the likeliest first; none if there is no U-Net of a public model."""
    unet: object = collected.parts["unet"].config if "unet" in collected.parts else None
    place = collected.folders.get("unet")
    upscaler = collected.upscaler
    if "unet" not in collected.parts and place is not None:
        document = read_json_object(place / "config.json", error=CheckpointError)
        upscaler = any(str(name).startswith("K") for name in document.get("down_block_types") or ())  # k-diffusion's
        unet = public_unet(document, place=place) if "_class_name" in document and not upscaler else None
    if upscaler:
        return (PUBLIC_FAMILY,)
    if not isinstance(unet, UNetConfig):
        return ()
    if unet.camera_dim is not None:
        return ("mvdream",) if unet.resampler is None else ("imagedream", "imagedream-local")
    return ("sd21", "sd21-768") if unet.use_linear_projection else ("sd15",)


def _schedule(collected: _Collected, family: str) -> SchedulerConfig:
    """The noise schedule that the folder will have: of the scheduler that comes along, or of the family."""
    folder = collected.folders.get("scheduler")
    if folder is None or collected.upscaler or not collected.parts:  # of a folder's tensors nothing else is known
        return SchedulerConfig(prediction_type=PREDICTS.get(family, "epsilon"))
    path, document = folder / "scheduler_config.json", read_scheduler_document(folder)
    if "_class_name" not in document:
        return read_config(SchedulerConfig, path)
    return diffusers_scheduler(document | SET_BY_PIPELINES, path=path)


def _check_schedule(collected: _Collected, schedule: SchedulerConfig, *, path: Path) -> None:
    """Raise CheckpointError if a file was trained with another noise schedule than the folder will have."""
    stored = collected.alphas_cumprod or collected.betas
    if stored is None:
        return
    found, expected = None, alphas_cumprod(schedule)
    if stored.dtype in FLOATS:
        found = cast(stored, "F32", name="alphas_cumprod").read().view(np.float32)
    elif stored.dtype == "F64":
        found = stored.read().view(np.float64)
    if found is not None and collected.alphas_cumprod is None:
        found = np.cumprod(1 - found.astype(np.float64))
    rounding = 2**-8 if stored.dtype == "BF16" else 1e-3
    if found is None or found.shape != expected.shape or not np.allclose(found, expected, rtol=rounding, atol=1e-6):
        other = "that of the scheduler beside it" if "scheduler" in collected.folders else "Stable Diffusion's"
        raise CheckpointError(f"was trained with another noise schedule than {other}", path=path)


def _check_whole(collected: _Collected, family: str, schedule: SchedulerConfig, *, path: Path) -> None:
    """Raise CheckpointError for networks of files that make no model together."""
    configs: dict[str, Any] = {component: part.config for component, part in collected.parts.items()}
    unet = configs.get("unet")
    if collected.upscaler or not isinstance(unet, UNetConfig):
        return
    if unet.resampler is None:
        check_in_channels(unet, path=path)
    if "vae" not in configs or (unet.cross_attention_dim is not None and "text_encoder" not in configs):
        return
    vision, processor = configs.get("image_encoder"), None
    if unet.resampler is not None:
        if vision is None:
            return
        processor = CLIPImageConfig(shortest_edge=vision.image_size, crop_size=vision.image_size)
    try:
        ModelConfig(
            family=family,
            unet=unet,
            vae=configs["vae"],
            scheduler=schedule,
            text_encoder=configs.get("text_encoder"),
            image_encoder=None if processor is None else vision,
            image_processor=processor,
        )
    except OptionError as refused:
        raise CheckpointError(f"holds networks that make no model: {refused}", path=path) from refused


# Writing a folder


def _write(
    collected: _Collected,
    dest: Path,
    *,
    family: str,
    stored: str | None,
    shard_bytes: int,
    state: Progress,
    index: Path | None,
    on_tensor: OnTensor,
) -> Report:
    planned, names = _planned(collected, stored)
    part = collected.parts.get("unet")
    unet = part.config if part is not None and isinstance(part.config, UNetConfig) else None
    needed = () if index is not None else _needed(family, unet)
    there = {*planned, *collected.folders, *([] if family == "custom" else ["scheduler"])}
    there |= {name.partition("/")[0] for _, documents in planned.values() for name in documents}
    with state.writing(planned, whole=index is not None or (family != "custom" and there.issuperset(needed))):
        parts = []
        for component, (tensors, documents) in planned.items():
            if component in collected.folders and component not in collected.parts:
                copy_files(collected.folders[component], dest / component, only=("config.json",))
            for name, document in documents.items():
                make_folder((dest / name).parent)
                write_json(dest / name, document)
            files = write_weights(dest, component, tensors, shard_bytes=shard_bytes, state=state, on_tensor=on_tensor)
            parts.append(written(component, tensors, files=files))
        for name in PLAIN_FOLDERS:
            if name in collected.folders:
                copy_files(collected.folders[name], dest / name)
        if "scheduler" not in collected.folders and family != "custom":
            make_folder(dest / "scheduler")
            write_json(dest / "scheduler" / "scheduler_config.json", _scheduler(family))
        missing = tuple(name for name in needed if name not in there)
        report = Report(
            folder=dest, family=family, written=tuple(parts), names=names, left_out=collected.left_out, missing=missing
        )
        write_json(
            dest / REPORT, {"family": family, "names": names, "left_out": dict(collected.left_out), "missing": list(missing)}
        )
        if index is not None:
            write_json(dest / "model_index.json", _without(read_json_object(index, error=CheckpointError), dest))
        elif not missing and family != "custom":
            scheduler = collected.folders.get("scheduler")
            kind = None if scheduler is None else read_scheduler_document(scheduler).get("_class_name")
            write_json(dest / "model_index.json", _model_index(family, unet, scheduler=kind))
        checked = index is not None and all(folder.parent == index.parent for folder in collected.folders.values())
        if not checked:
            _check_written(dest)  # networks that came in folders of their own, too
    return report


def _planned(collected: _Collected, stored: str | None) -> tuple[Planned, dict[str, Mapping[str, Sequence[str]]]]:
    """The tensors of every network as they are written, with its documents by their names, and the names that the tensors
    had. Raises what one of them is refused with, before any is written."""
    planned: Planned = {}
    names: dict[str, Mapping[str, Sequence[str]]] = {}
    for component in get_args(Component):
        if component in collected.parts:
            part = collected.parts[component]
            tensors, documents, names[component] = part.tensors, part.documents, part.names
        elif component in collected.folders:
            tensors, documents = _folder_tensors(collected, component), {}
            names[component] = {name: (name,) for name in tensors}
        else:
            continue
        _check_dtypes(tensors, stored)
        tensors = {name: cast(tensor, stored or tensor.dtype, name=name) for name, tensor in tensors.items()}
        planned[component] = tensors, documents
    return planned, names


def _check_written(dest: Path) -> None:
    """Check the whole model in a folder, if there is one. One that is refused is no model: its index goes."""
    if (dest / "model_index.json").is_file():
        try:
            _check_model(dest)
        except MvError:
            (dest / "model_index.json").unlink()
            raise


def _set_sample_size(collected: _Collected, size_px: int) -> None:
    vae = collected.parts["vae"].config if "vae" in collected.parts else None
    downscale = vae.downscale if isinstance(vae, VAEConfig) else SD_VAE.downscale
    for component, divisor in (("unet", downscale), ("vae", 1)):
        if component in collected.parts:
            part = collected.parts[component]
            documents = {
                name: {**each, "image_size" if "image_size" in each else "sample_size": size_px // divisor}
                for name, each in part.documents.items()
            }
            collected.parts[component] = replace(part, documents=documents)


def _folder_tensors(collected: _Collected, component: Component) -> dict[str, RawTensor]:
    """The weights in a component's folder; buffers are left out."""
    folder = collected.folders[component]
    try:
        files = weight_files_in(folder, component)
    except CheckpointError:
        files = visible(folder.glob("*.safetensors"))  # whatever its name, if it is the only one
        if len(files) != 1 or visible(folder.glob("*.index*.json")) or visible(folder.glob("*.bin")):
            raise
    tensors = {name: each for file in files for name, each in read_safetensors(file).items()}
    for name in [name for name in tensors if name.endswith(BUFFERS)]:
        del tensors[name]
        collected.left_out[name] = "numbers that every model knows by itself"
    return tensors


def _check_dtypes(tensors: Mapping[str, RawTensor], stored: str | None) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not (stored and tensor.dtype == "F64"):
            allowed = ", ".join(FLOATS.values())
            hint = 'dtype="float32", or another one, rounds it' if tensor.dtype == "F64" else ""
            raise CheckpointError(f"{name!r} must be one of {allowed}, got {tensor.dtype}", hint=hint)


def _needed(family: str, unet: UNetConfig | None) -> tuple[str, ...]:
    """The folders that a family needs, with a U-Net if one is converted."""
    base = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    return (*base, "image_encoder", "feature_extractor") if _takes_images(family, unet) else base


def _without(index: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """model_index.json without components that are not in the folder: diffusers would look for their weights."""
    named = [name for name, value in index.items() if isinstance(value, list) and len(value) == 2]  # library and class
    gone = [name for name in named if all(isinstance(each, str) for each in index[name]) and not (folder / name).is_dir()]
    unchecked = {"requires_safety_checker": False} if "safety_checker" in gone else {}
    return {**index, **{name: [None, None] for name in gone}, **unchecked}


def _takes_images(family: str, unet: UNetConfig | None) -> bool:
    return family.startswith("imagedream") or (unet is not None and unet.resampler is not None)


def _scheduler(family: str) -> dict[str, Any]:
    """scheduler_config.json of a family."""
    if family == PUBLIC_FAMILY:
        return euler_document(SigmaConfig())
    return scheduler_document(SchedulerConfig(prediction_type=PREDICTS.get(family, "epsilon")))


def _model_index(family: str, unet: UNetConfig | None, *, scheduler: str | None) -> dict[str, Any]:
    """model_index.json as the public folders of a family have it; image tokens have MVDream's pipeline. `scheduler` is the
    class of one that came along."""
    parts: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler or ("EulerDiscreteScheduler" if family == PUBLIC_FAMILY else "DDIMScheduler")],
    }
    if family.startswith("sd") and not _takes_images(family, unet):
        pipeline = "StableDiffusionLatentUpscalePipeline" if family == PUBLIC_FAMILY else "StableDiffusionPipeline"
        if family != PUBLIC_FAMILY:
            parts |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    else:
        pipeline = "MVDreamPipeline"
        parts |= {"unet": ["mv_unet", "MultiViewUNetModel"], "requires_safety_checker": False}
        if _takes_images(family, unet):
            parts["image_encoder"] = ["transformers", "CLIPVisionModel"]
            parts["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    return {"_class_name": pipeline, **parts}
