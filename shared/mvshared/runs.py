"""What a run of the pipeline was and what it made: its parameters, its views, and the folder that holds both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.checkpoint import config_from_json
from mvshared.config import TimestepSpacing
from mvshared.errors import CheckpointError, ConfigError, OptionError
from mvshared.export import (
    UPSCALED,
    check_free,
    metadata,
    metadata_file,
    parameters_from_metadata,
    transforms,
    view_names,
    weights_from_metadata,
    write_views,
)
from mvshared.images import encode_png, grid
from mvshared.memory.plan import PLAIN, MemoryPlan
from mvshared.normals import NormalSpace
from mvshared.weights import sha256_of_files, weight_stamps

UPSCALE_METHODS = ("bilinear", "lanczos", "sd-x2")


@dataclass(frozen=True, kw_only=True)
class UpscaleParameters:
    """How views were upscaled: the method and, for sd-x2, the upscaler by name or path, what it was told, and its config.

    `memory` is how memory was used if it was not as in the run that made the views.
    """

    method: str
    upscaler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    noise_level: float | None = None
    budget_bytes: int | None = None
    config_sha256: str | None = None
    memory: MemoryPlan | None = None

    def __post_init__(self) -> None:
        if self.method not in UPSCALE_METHODS:
            raise OptionError("method", expected=f"one of {', '.join(UPSCALE_METHODS)}", got=self.method)
        for name, value in vars(self).items():
            if name not in ("method", "memory") and (value is None) == (self.method == "sd-x2"):
                expected = "given for sd-x2" if value is None else f"null for {self.method}"
                raise OptionError(name, expected=expected, got=value)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A run, completely: everything that changes a pixel, resolved and checked, as JSON values.

    `image_sha256` and `normals_sha256` are of the prepared pixels, `latents_sha256` of the initial latents if they were given;
    `image`, `normals` and `latents`, absolute paths, are None beside them where arrays were given in memory. `normal_space` is
    None without normal maps. Prompts are None for a model that takes no text. `cameras` are poses (v, 4, 4). `upscale` is None
    where nothing was upscaled. `quantization` is q8 or q4 where weights were quantised as they were loaded, "stored" and a name
    where their files are, else None. `spacing` is None for that of the model's schedule. `memory` is how memory was used.
    What has a default here is missing in older files.
    """

    model: str
    family: str
    backend: str
    dtype: str
    device: str
    image: str | tuple[str, ...] | None
    image_sha256: str | None
    image_scale: float
    reference_scale: float = 1.0
    prompt: str | None
    negative_prompt: str | None
    normals: str | tuple[str, ...] | None
    normals_sha256: str | None
    normal_space: NormalSpace | None = None
    latents: str | None
    latents_sha256: str | None
    cameras: tuple[tuple[tuple[float, ...], ...], ...]
    fov_deg: float
    steps: int
    guidance: float
    guidance_text: float | None = None
    guidance_image: float | None = None
    guidance_normals: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_every: int = 1
    guidance_rescale: float = 0.0
    scheduler: str
    spacing: TimestepSpacing | None = None
    eta: float
    kv_pooling: int = 1
    seed: int
    size_px: int
    config_sha256: str
    upscale: UpscaleParameters | None = None
    quantization: str | None = None
    memory: MemoryPlan = PLAIN


class Run(NamedTuple):
    """What a finished run's metadata.json says: its parameters, and the SHA-256 of the weight files by name."""

    parameters: Parameters
    weights: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """The result of `Pipeline.generate`.

    `images` uint8 (v, h, w, 3), `latents` float32 (v, h / f, w / f, c), `cameras` float32 (v, 4, 4) camera-to-world with OpenGL
    axes, `reference` the prepared picture uint8 (h, w, 3) or None, `parameters` what repeats the run. Upscaled views have twice
    the size, latents too but for lanczos, which enlarges the pictures alone, and the weight files of the upscaler.
    `weight_stamps` are those of all weight files when they were loaded; without them nothing is known of that.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    cameras: NDArray[np.float32]
    reference: NDArray[np.uint8] | None
    parameters: Parameters
    weight_files: Sequence[Path]
    upscaler_files: Sequence[Path] = ()
    weight_stamps: Sequence[str] = ()

    def __repr__(self) -> str:
        """What they are in a line; a notebook shows the last value of a cell, and the arrays take hundreds."""
        views, height, width = self.images.shape[:3]
        run, many = self.parameters, "view" if views == 1 else "views"
        return f"<{views} {many} of {width} x {height} pixels by {run.model}, steps {run.steps}, seed {run.seed}>"

    def _repr_png_(self) -> bytes:
        """What a notebook shows them as: grid.png."""
        return encode_png(grid(self.images))

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write view_000.png ..., grid.png, turntable.gif, latents.npy, transforms.json and, last, metadata.json; returns the
        folder. What was upscaled of an earlier run there is removed.

        Raises OutputError if the folder or its folder `upscaled` holds a finished run and no `force` is given, or if it cannot
        be written; CheckpointError if the weight files, whose hashes belong to the metadata, are gone or others than were
        loaded.
        """
        names = view_names(len(self.images))
        height, width = self.images.shape[1:3]
        cameras = transforms(self.cameras, width_px=width, height_px=height, fov_deg=self.parameters.fov_deg, file_names=names)
        weights = sha256_of_files(self.weight_files)
        weights |= {f"upscaler/{name}": sha256 for name, sha256 in sha256_of_files(self.upscaler_files).items()}
        check_still_loaded(self.weight_stamps, [*self.weight_files, *self.upscaler_files], path=self.parameters.model)
        document = metadata(asdict(self.parameters), weights=weights, details={"width_px": width, "height_px": height})
        for place in (Path(folder), Path(folder) / UPSCALED):
            check_free(place, force=force)
        files: dict[str, Any] = {"latents": self.latents, "cameras": cameras, "document": document}
        return write_views(folder, self.images, **files, force=force, obsolete=Path(folder) / UPSCALED)


def check_still_loaded(stamps: Sequence[str], files: Sequence[Path], *, path: str) -> None:
    """Raise CheckpointError about `path` unless weight files have the stamps that some of them had when they were loaded."""
    if not set(stamps) <= set(weight_stamps(files)):
        reason = "weight files have another size or time than when they were loaded, and may not be those that made the views"
        raise CheckpointError(reason, path=path, hint="load the model again and repeat the run")


def read_run(path: Path | str) -> Run:
    """The run of a metadata.json, or of the output folder that holds it. Raises ConfigError for a malformed file."""
    path = metadata_file(path)
    document = parameters_from_metadata(path, known=[field.name for field in fields(Parameters)])
    parameters = config_from_json(Parameters, document, path=path, table="parameters", error=ConfigError)
    return Run(parameters, weights_from_metadata(path))
