"""Upscaling of what is there already: the views of a run, pictures from elsewhere, or latents in a file."""

import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.arguments import array_sha256, load_latents
from mvshared.backend import PACKAGES, BackendName, Dtype, choose_backend, chosen_dtype, parse_dtype
from mvshared.checkpoint import find_model, model_name, read_vae_config
from mvshared.config import VAEConfig
from mvshared.errors import ImageError, OptionError
from mvshared.export import METADATA, check_free, check_source, metadata, transforms, view_names, write_views
from mvshared.images import composite, load_image, to_model
from mvshared.memory.plan import PLAIN, MemoryPlan
from mvshared.numbers import MAX_SEED, whole
from mvshared.quantization.plans import preset_of
from mvshared.runs import UPSCALED, Parameters, UpscaleParameters, check_still_loaded, read_run
from mvshared.shapes import check_pictures
from mvshared.upscaling.folder import read_upscaler_config, vae_folder
from mvshared.upscaling.latents import UpscaleProgress, Upscaler, check_finite
from mvshared.upscaling.views import Upscaled, UpscaleOptions, load_planned, plan_upscale, upscale_arrays, upscaler_files
from mvshared.weights import sha256_of_files

FORMAT = "mvmlx-upscale"
ASKED_BY_UPSCALER = ("prompt", "negative_prompt", "seed", "quantize")
UNUSED = {  # by method: what has no effect on it
    "lanczos": ("model", "backend", "dtype", "device", *ASKED_BY_UPSCALER),
    "bilinear": ASKED_BY_UPSCALER,
}


class Source(NamedTuple):
    """Pictures uint8 (v, h, w, 3) and scaled latents (v, h, w, c), one of them perhaps None; the run that made them, or None;
    and where they come from."""

    images: NDArray[np.uint8] | None
    latents: NDArray[np.float32] | None
    run: Parameters | None
    paths: tuple[Path, ...]


def read_source(paths: Sequence[Path]) -> Source:
    """The views of one output folder, one .npy file of latents, or pictures of one size.

    Raises OptionError, ImageError and ConfigError for what is none of these.
    """
    if len(paths) == 1 and paths[0].is_dir():
        return _read_run(paths[0])
    if any(path.suffix == ".npy" for path in paths):
        if len(paths) > 1:
            raise OptionError("source", expected="one .npy file, or pictures", got=[str(path) for path in paths])
        latents = load_latents(paths[0])
        if latents is None or latents.dtype.kind != "f" or latents.ndim != 4 or not latents.size:
            got = None if latents is None else (latents.dtype.name, latents.shape)
            raise OptionError("latents", expected="floats of shape (v, h, w, c)", got=got)
        return Source(None, _finite(latents), None, tuple(paths))
    return Source(_pictures(paths), None, None, tuple(paths))


def _read_run(folder: Path) -> Source:
    if not (folder / METADATA).is_file():
        raise OptionError("source", expected=f"an output folder, with a {METADATA}, or pictures", got=str(folder))
    run = read_run(folder).parameters
    images = _pictures(sorted(path for path in folder.iterdir() if re.fullmatch(r"view_\d{3,}\.png", path.name)))
    if images.shape[1] != run.size_px:
        raise OptionError("source", expected="views that are not upscaled yet", got=str(folder))
    path = folder / "latents.npy"
    latents = _finite(load_latents(path)) if path.is_file() else None
    if len(images) != len(run.cameras) or (latents is not None and (latents.ndim != 4 or len(latents) != len(images))):
        raise ImageError(f"has other files than its {METADATA} says", path=folder)
    return Source(images, latents, run, (folder,))


def _finite(latents: NDArray[Any] | None) -> NDArray[np.float32]:
    """Latents in float32. Raises NumericsError for NaN, infinity and what becomes infinity."""
    assert latents is not None
    with np.errstate(over="ignore", invalid="ignore"):
        return check_finite(latents.astype(np.float32))


def _pictures(paths: Sequence[Path]) -> NDArray[np.uint8]:
    pictures = [composite(load_image(path)) for path in paths]
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1:
        sizes = sorted({f"{width} x {height}" for height, width, _ in shapes})
        raise OptionError("source", expected="one or more pictures of one size", got=sizes or "none")
    return np.stack(pictures)


def upscale_source(
    source: Source,
    options: UpscaleOptions,
    output: Path | None,
    *,
    model: str | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    seed: int | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    force: bool = False,
    on_step: Callable[[UpscaleProgress], None] | None = None,
) -> Path:
    """Upscale and write an output folder, which is returned: `upscaled` in that of the run, or beside the first picture's name.

    `model` names the model whose VAE the latents are of; without one it is the upscaler's. `quantize` is for the
    upscaler. What is None or auto is taken from the run, if there is one, and how memory is used, unless backend or dtype are
    others. Raises OptionError, CheckpointError and OutputError before any long work, and NumericsError for latents that are not
    finite.
    """
    asked = _Asked(model, backend, dtype, device, quantize, prompt, negative_prompt, seed)
    for name in UNUSED.get(options.method, ()):
        if (value := getattr(asked, name)) not in (None, "auto"):
            raise OptionError(name, expected=f"left out with {options.method}, which has no use for it", got=value)
    run = source.run
    output = output or (source.paths[0] / UPSCALED if run else Path(f"{source.paths[0].stem}-{UPSCALED}"))
    check_source(output, source.paths)
    check_free(output, force=force)
    if run is not None:
        asked = _completed(asked, run, method=options.method)
    seed = whole("seed", 0 if asked.seed is None else asked.seed, 0, MAX_SEED)
    parse_dtype(asked.dtype, default="float32")
    networks = _load(source, options, asked)
    planned, codec, upscaler, latents = networks.planned, networks.codec, networks.upscaler, source.latents
    if upscaler is not None:
        upscaler.check_prompts(prompt, negative_prompt)
        if run is not None and upscaler.takes_text:
            prompt = run.prompt if prompt is None else prompt
            negative_prompt = run.negative_prompt if negative_prompt is None else negative_prompt
    with ExitStack() as context:
        for each in networks.models:
            context.enter_context(each.planned(networks.memory))
        if codec is not None and latents is None:
            assert source.images is not None
            latents = codec.to_numpy(codec.encode_latents(to_model(source.images)))
        upscaled = upscale_arrays(
            source.images,
            latents,
            planned,
            decode=None if codec is None else lambda larger: codec.decode(codec.from_numpy(larger)),
            upscaler=upscaler,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            on_step=on_step,
        )
    document = {
        **asdict(planned),
        "seed": None if upscaler is None else seed,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "model": asked.model,
        "backend": None if codec is None else codec.backend,
        "device": None if codec is None else codec.device,
        "dtype": None if codec is None else codec.dtype,
        "quantization": None if upscaler is None else upscaler.model.quantization,
        "source": [str(path.resolve()) for path in source.paths],
        "source_sha256": array_sha256(source.images if source.latents is None else source.latents),
    }
    files = [] if codec is None else codec.weight_files
    for each in networks.models:
        check_still_loaded(each.weight_stamps, each.weight_files, path=str(planned.upscaler or asked.model))
    return _save(output, upscaled, source, planned, document, files=files, force=force)


class _Asked(NamedTuple):
    """Arguments of `upscale_source`: what is None or auto is left to the run."""

    model: str | None
    backend: str
    dtype: str | None
    device: str
    quantize: str | None
    prompt: str | None
    negative_prompt: str | None
    seed: int | None


def _completed(asked: _Asked, run: Parameters, *, method: str) -> _Asked:
    """With what the run had, but for the texts: not all upscalers take them."""
    if asked.backend in ("auto", run.backend):  # another backend has other devices
        device = run.device if asked.device == "auto" else asked.device
        asked = asked._replace(backend=run.backend, dtype=asked.dtype or run.dtype, device=device)
    return asked._replace(
        model=asked.model or run.model,
        quantize=asked.quantize or (preset_of(run.quantization) if method == "sd-x2" else None),
        seed=run.seed if asked.seed is None else asked.seed,
    )


class _Networks(NamedTuple):
    """What an upscaling computes with: parameters, how memory is used, the VAE and the upscaler, None where none is needed."""

    planned: UpscaleParameters
    memory: MemoryPlan = PLAIN
    codec: Any = None
    upscaler: Upscaler[Any] | None = None

    @property
    def models(self) -> list[Any]:
        """Those that are loaded."""
        return [each for each in (self.codec, None if self.upscaler is None else self.upscaler.model) if each is not None]


def _load(source: Source, options: UpscaleOptions, asked: _Asked) -> _Networks:
    """The networks that the options ask for. Raises OptionError and CheckpointError."""
    if options.method == "lanczos":
        if source.images is None:
            raise OptionError("upscale", expected="bilinear or sd-x2 for latents", got="lanczos")
        return _Networks(UpscaleParameters(method="lanczos"))
    run, folder, chosen = source.run, _vae_folder(options, asked.model), choose_backend(asked.backend)
    place: dict[str, Any] = {"dtype": asked.dtype, "device": asked.device}
    vae, used = read_vae_config(folder), chosen_dtype(asked.dtype, backend=chosen, device=asked.device)
    memory = _memory_of(run, options, backend=chosen, dtype=used)
    options = replace(options, low_memory=not memory.networks_at_once)
    planned = plan_upscale(options, vae=vae, latent_size=_latent_size(source, vae), backend=chosen, dtype=used)
    planned = replace(planned, memory=None if run is None or memory == run.memory else memory)
    codec = importlib.import_module(f"{PACKAGES[chosen]}.upscaling").load_latent_model(folder, **place)
    at_once = memory.networks_at_once
    upscaler = load_planned(planned, backend=asked.backend, quantize=asked.quantize, at_once=at_once, **place)
    return _Networks(planned, memory, codec, upscaler)


def _memory_of(run: Parameters | None, options: UpscaleOptions, *, backend: BackendName, dtype: Dtype) -> MemoryPlan:
    """How memory is used: as the run's views were upscaled if by the same, else as they were made."""
    if run is None or (run.backend, run.dtype) != (backend, dtype):
        return PLAIN
    before, upscaler = run.upscale, None if options.upscaler is None else model_name(options.upscaler)
    if before is None or before.memory is None or (before.method, before.upscaler) != (options.method, upscaler):
        return run.memory
    return before.memory


def _vae_folder(options: UpscaleOptions, model: str | None) -> Path:
    """Where the VAE of the latents is."""
    if model is not None:
        return find_model(model)
    if options.upscaler is None:
        hint = "or, with sd-x2, `upscaler` alone"
        raise OptionError("model", expected="the one whose VAE the latents are of", got=None, hint=hint)
    folder = find_model(options.upscaler)
    read_upscaler_config(folder)  # refuses a folder of another kind by its name
    return vae_folder(folder)


def _latent_size(source: Source, vae: VAEConfig) -> tuple[int, int]:
    """Height and width of the latents. Raises OptionError if they or the pictures do not fit the VAE."""
    if source.latents is not None:
        check_pictures("latents", source.latents.shape, channels=vae.latent_channels)
        height, width = source.latents.shape[1:3]
        if source.images is not None and source.images.shape[1:3] != (height * vae.downscale, width * vae.downscale):
            raise OptionError("latents", expected="those of the pictures beside them", got=source.latents.shape)
        return height, width
    assert source.images is not None
    _, height, width, _ = source.images.shape
    if height % vae.downscale or width % vae.downscale:
        expected = f"pictures of a height and width that are multiples of {vae.downscale}"
        raise OptionError("source", expected=expected, got=f"{width} x {height}", hint='or method="lanczos"')
    return height // vae.downscale, width // vae.downscale


def _save(
    output: Path,
    upscaled: Upscaled,
    source: Source,
    planned: UpscaleParameters,
    document: dict[str, Any],
    *,
    files: Sequence[Path],
    force: bool,
) -> Path:
    """Write the output folder; `files` are the weights of the VAE."""
    hashes = sha256_of_files(upscaler_files(planned))
    weights = sha256_of_files(files) | {f"upscaler/{name}": sha256 for name, sha256 in hashes.items()}
    details = metadata(document, weights=weights) | {"format": FORMAT}
    cameras = None
    if source.run is not None:
        count, height, width, _ = upscaled.images.shape
        poses, names = np.asarray(source.run.cameras, np.float32), view_names(count)
        cameras = transforms(poses, width_px=width, height_px=height, fov_deg=source.run.fov_deg, file_names=names)
    return write_views(output, upscaled.images, latents=upscaled.latents, cameras=cameras, document=details, force=force)
