"""Sample sheets during training: what the averaged weights make of held-out captures, or of those that are learned."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import PACKAGES, choose_backend, load, load_upscaler
from mvshared.camera import front_view
from mvshared.captures import load_capture
from mvshared.checkpoint import read_vae_config, weight_files
from mvshared.config import ModelConfig
from mvshared.errors import CameraError, ImageError, NumericsError, OptionError, warn
from mvshared.files import make_folder, write_atomic
from mvshared.images import encode_png, from_model, sheet
from mvshared.training.config import TrainConfig
from mvshared.training.data import find_captures, read_picture
from mvshared.training.run_folder import sheet_path
from mvshared.training.upscaler_data import halved
from mvshared.upscaling.views import enlarge

ROWS, VIEWS, UPSCALED_VIEWS = 6, 4, 2


def sample_writer(config: TrainConfig, folder: Path, *, backend: str, device: str) -> Callable[[Path, int], None]:
    """A function (model folder, step) that writes `folder`/samples/step_000500.png.

    Rows of the U-Net stage: reference, generated views, true views; of the VAE stage: pictures, then their reconstructions; of
    the upscaler's stage: pictures of half the size enlarged by Lanczos, the upscaled ones, the true ones.
    """

    def write(model: Path, step: int) -> None:
        training, held_out = find_captures(config.data.folder, held_out=config.data.held_out)
        makers = {"vae": _reconstructions, "unet": _generated, "upscaler": _upscaled}
        try:
            picture = makers[config.stage](config, (held_out or training)[:ROWS], model, backend=backend, device=device)
        except NumericsError as error:  # the training knows by itself whether its loss is finite
            warn(f"no sample sheet at step {step}: {error.message}")
            return
        if picture is not None:
            path = sheet_path(folder, step)
            make_folder(path.parent)
            write_atomic(path, encode_png(picture))

    return write


def _read(config: TrainConfig, paths: Any) -> NDArray[np.float32]:
    return np.stack([read_picture(path, background=config.data.background).pixels for path in paths])


def _reconstructions(config: TrainConfig, folders: list[Path], model: Path, *, backend: str, device: str) -> NDArray[np.uint8]:
    package = importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.model")
    vae = package.load_vae(read_vae_config(model), weight_files(model, "vae"), device=device)
    rows = []
    for folder in folders:
        pixels = _read(config, load_capture(folder).image_paths[:VIEWS])
        rows.append(from_model(np.concatenate([pixels, vae.decode(vae.encode(pixels))])))
    return _sheet(rows)


def _normals(config: TrainConfig, paths: list[Path | None], model: ModelConfig) -> list[Path] | None:
    """The normal maps that steer a GAF model, if every view has one."""
    found = [path for path in paths if path is not None]
    return found if model.family == "gaf" and config.data.normals and len(found) == len(paths) else None


def _generated(config: TrainConfig, folders: list[Path], model: Path, *, backend: str, device: str) -> NDArray[np.uint8] | None:
    pipeline = load(model, backend=backend, device=device, dtype="float32")
    rows = []
    for folder in folders:
        capture = load_capture(folder)
        front = front_view(capture.poses)
        others = [view for view in range(len(capture.poses)) if view != front][-VIEWS:]
        if not others:
            continue
        reference, *truth = from_model(_read(config, [capture.image_paths[view] for view in (front, *others)]))
        if reference.shape[0] != reference.shape[1]:
            warn("no sample sheets: the captures are not square, and what is generated is")
            return None
        normals = _normals(config, [capture.normal_paths[view] for view in others], pipeline.model.config)
        given: dict[str, Any] = {"cameras": capture.poses[others]}
        given["prompt"] = None if pipeline.model.config.text_encoder is None else config.data.prompt
        try:
            views = pipeline.generate(reference, normals=normals, **given)
        except (ImageError, CameraError, OptionError) as refused:
            if normals is None:  # such as a model that takes no picture
                warn(f"no sample sheets: {refused}")
                return None
            # What training takes may be no map to steer by.
            warn(f"sampled without the normal maps of {folder.name}: {refused}")
            views = pipeline.generate(reference, **given)
        rows.append(np.stack([reference, *views.images, *truth]))
    return _sheet(rows) if rows else None


def _upscaled(config: TrainConfig, folders: list[Path], model: Path, *, backend: str, device: str) -> NDArray[np.uint8]:
    upscaler = load_upscaler(model, backend=backend, device=device, dtype="float32")
    network, rows = upscaler.model, []
    for folder in folders:
        truth = _read(config, load_capture(folder).image_paths[:UPSCALED_VIEWS])
        low = network.encode_latents(halved(truth))
        larger = network.from_numpy(upscaler.upscale(network.to_numpy(low)))
        small = from_model(network.decode(low))
        rows.append(np.concatenate([enlarge(small), from_model(network.decode(larger)), from_model(truth)]))
    return _sheet(rows)


def _sheet(rows: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Rows of pictures (n, h, w, 3), of captures with fewer views shorter ones, as one picture."""
    longest = max(len(row) for row in rows)
    padded = [np.pad(row, ((0, longest - len(row)), (0, 0), (0, 0), (0, 0)), constant_values=255) for row in rows]
    return sheet(np.stack(padded))
