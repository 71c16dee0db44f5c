"""What a caller gave to `generate`: checked, and named for the run's metadata."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from mvshared.camera import as_poses, even_azimuths, orbit
from mvshared.config import ModelConfig
from mvshared.errors import OptionError
from mvshared.framing import Framed
from mvshared.normals import Normals
from mvshared.numbers import whole
from mvshared.upscaling.config import UpscalerConfig

Picture: TypeAlias = str | Path | Image.Image | NDArray[Any]
Pictures: TypeAlias = Picture | Sequence[Picture]
MAX_VIEWS = 64
SIZE_RANGE_PX = (16, 2048)

Latents: TypeAlias = str | Path | NDArray[np.floating[Any]]


def load_latents(given: Latents | None) -> NDArray[Any] | None:
    """Latents as an array, from an .npy file if a path was given. Raises OptionError for what is neither."""
    if isinstance(given, str | Path):
        try:
            with Path(given).open("rb") as file:
                loaded = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile, MemoryError) as cause:
            hint = (cause.strerror if isinstance(cause, OSError) else None) or "it holds no array of numbers"
            raise OptionError("latents", expected="an .npy file of floats", got=str(given), hint=hint) from cause
        if not isinstance(loaded, np.ndarray):
            raise OptionError("latents", expected="an .npy file of floats", got=str(given), hint="it is an .npz archive")
        return loaded
    if given is not None and not isinstance(given, np.ndarray):
        raise OptionError("latents", expected="a numpy array of floats", got=type(given).__name__)
    return given


def checked_latents(given: NDArray[Any] | None, shape: tuple[int, ...], *, extra: int) -> NDArray[np.float32] | None:
    """Given latents as float32 of this shape, without the `extra` frames at their end if they have them; None for None.
    Raises OptionError for others."""
    if given is None:
        return None
    if given.dtype.kind != "f":
        raise OptionError("latents", expected="a numpy array of floats", got=given.dtype.name)
    frames = given[: shape[0]] if extra and given.ndim and len(given) == shape[0] + extra else given
    if frames.shape != shape:
        raise OptionError("latents", expected=f"of shape {shape}", got=given.shape)
    with np.errstate(over="ignore"):
        latents = frames.astype(np.float32)
    if not np.isfinite(latents).all():
        raise OptionError("latents", expected="finite in float32", got="NaN, infinity or more than that")
    return latents


def noise(shape: tuple[int, ...], *, seed: int) -> NDArray[np.float32]:
    """Noise of deviation 1, drawn view after view so that more views do not change the first ones."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def picture_size(config: ModelConfig, size_px: object, *, name: str = "size_px") -> int:
    """Height and width of a model's views in pixels, its default for None. Raises OptionError for one that it cannot make."""
    size = whole(name, config.defaults.size_px if size_px is None else size_px, *SIZE_RANGE_PX)
    factor = config.vae.downscale * config.unet.downscale
    if size % factor:
        raise OptionError(name, expected=f"a multiple of {factor} for this model", got=size)
    return size


def view_poses(
    config: ModelConfig,
    *,
    views: int | None,
    azimuths_deg: Sequence[float] | None,
    elevation_deg: float | None,
    cameras: ArrayLike | None,
    without_cameras: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Poses float32 (v, 4, 4) that a caller asked for, as `Pipeline.generate` documents them; `without_cameras` are those if
    nothing was said. Raises OptionError and CameraError."""
    camera, defaults = config.camera, config.defaults
    given = {"views": views, "azimuths_deg": azimuths_deg, "cameras": cameras}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise OptionError(named[1], expected=f"left out where `{named[0]}` is given", got=given[named[1]])
    if cameras is not None:
        if elevation_deg is not None:
            raise OptionError("elevation_deg", expected="left out where `cameras` is given", got=elevation_deg)
        poses = as_poses(cameras, camera.radius)
    elif without_cameras is not None and not named and elevation_deg is None:
        named, poses = ["normals"], without_cameras
    else:
        count = whole("views", defaults.views if views is None else views, 1, MAX_VIEWS)
        azimuths = even_azimuths(count, start_deg=defaults.azimuth_start_deg) if azimuths_deg is None else azimuths_deg
        poses = orbit(azimuths, defaults.elevation_deg if elevation_deg is None else elevation_deg, radius=camera.radius)
    unet = config.unet
    joined = unet.reference_frame or bool(unet.normal_channels) or unet.cross_attention_dim is None
    if not (unet.camera_dim or joined):
        if len(poses) != 1:
            raise OptionError(named[0] if named else "views", expected="1: this model knows no cameras", got=len(poses))
        usual = orbit(even_azimuths(1, start_deg=defaults.azimuth_start_deg), defaults.elevation_deg, radius=camera.radius)
        if not np.allclose(poses, usual):  # a run that is repeated gives those that it had
            name = "elevation_deg" if elevation_deg is not None else named[0]
            raise OptionError(name, expected="left out: this model knows no cameras", got=given.get(name, elevation_deg))
    if len(poses) > MAX_VIEWS:
        raise OptionError(named[0], expected=f"at most {MAX_VIEWS} views", got=len(poses))
    return poses


def image_names(image: Pictures | None) -> str | tuple[str, ...] | None:
    """The file or the files of the pictures; None if one of them was given in memory."""
    if isinstance(image, str | Path):
        return str(Path(image).resolve())
    if not isinstance(image, list | tuple):
        return None
    names = tuple(str(Path(each).resolve()) for each in image if isinstance(each, str | Path))
    return names if len(names) == len(image) else None


def pictures_sha256(pictures: Sequence[Framed]) -> str | None:
    """Of all that a model can see of the pictures."""
    if not pictures:
        return None
    parts = [np.ascontiguousarray(array).tobytes() for each in pictures for array in (each.full, each.pixels)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def normals_names(normals: Normals | None) -> str | tuple[str, ...] | None:
    """The folder or the files of the normal maps; None if one of them was given in memory."""
    if isinstance(normals, str | Path):
        return str(Path(normals).resolve())
    if not isinstance(normals, Sequence):
        return None
    names = tuple(str(Path(item).resolve()) for item in normals if isinstance(item, str | Path))
    return names if len(names) == len(normals) else None


def array_sha256(array: NDArray[Any] | None) -> str | None:
    """Of the values; None for None."""
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def config_sha256(config: ModelConfig | UpscalerConfig) -> str:
    """Of all that a config says."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
