"""What a run leaves behind: its folder, transforms.json for 3D trainers, and metadata.json to repeat it.

transforms.json: https://docs.nerf.studio/quickstart/data_conventions.html and the loader of
https://github.com/NVlabs/instant-ngp (src/nerf_loader.cu, docs/nerf_dataset_tips.md).
"""

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvshared.camera import validate_poses
from mvshared.errors import ConfigError, OptionError, OutputError
from mvshared.files import (
    check_folder,
    is_same,
    lock_folder,
    make_folder,
    read_json_object,
    remove_if_empty,
    with_leftovers,
    write_atomic,
    write_json,
)
from mvshared.images import encode_png, grid, save_png, save_turntable

METADATA = "metadata.json"
UNFINISHED = ".unfinished"
UPSCALED = "upscaled"  # the folder of the upscaled views, inside of the run's
RUN_FILES = re.compile(r"view_\d{3,}\.png|grid\.png|turntable\.gif|latents\.npy|transforms\.json")
LEFTOVERS = with_leftovers(rf"{RUN_FILES.pattern}|{re.escape(METADATA)}|{re.escape(UNFINISHED)}")  # of a run, killed or not
EVALUATION = "evaluation.json"
EVALUATING = ".evaluating"
VIEWS_SHEET = "sheet.png"  # of the views in a folder
SHEETS = re.compile(r"sheet(_\d{2,})?\.png")
EVALUATION_FILES = with_leftovers(rf"{SHEETS.pattern}|{re.escape(EVALUATION)}|{re.escape(EVALUATING)}")

METADATA_FORMAT = "mvmlx-run"
METADATA_VERSION = 1
# Whatever can change a number of the result; those that are not installed are left out.
PACKAGES = ("mvmlx", "mlx", "torch", "numpy", "pillow", "safetensors", "tokenizers")


def check_free(folder: Path | str, *, force: bool = False) -> None:
    """Raise OutputError if `prepare` would refuse `folder` for what is there; nothing is changed."""
    folder = Path(folder)
    overwrite = "name another folder, or overwrite it with force=True"
    check_folder(folder)
    if force:
        return
    try:
        finished = (folder / METADATA).exists()
        leftovers = _run_files(folder) if folder.is_dir() else []
    except OSError as cause:
        raise OutputError(f"cannot be read: {cause.strerror or cause}", path=folder) from cause
    if finished:
        raise OutputError("holds a finished run", path=folder, hint=overwrite)
    if leftovers and not (folder / UNFINISHED).exists():
        raise OutputError(f"holds {leftovers[0].name}, which no unfinished run left there", path=folder, hint=overwrite)


def prepare(folder: Path | str, *, force: bool = False) -> Path:
    """Make `folder` ready for a run's files and return it; `finish` must follow when they are written.

    The folder is made if it is not there. With `force` the files of an earlier run go, its metadata.json first, so that a run
    that dies half-way never looks finished; the folder's other files stay. What an unfinished run left gives way without
    `force`: a marker, `.unfinished`, tells it from a capture or from pictures of the user's own.

    Raises OutputError if the folder holds a finished run or a file that the run would overwrite, and no `force` is given; if a
    file is in its place; if it cannot be written.
    """
    folder = Path(folder)
    check_free(folder, force=force)
    make_folder(folder)
    try:
        write_atomic(folder / UNFINISHED, b"")
        for path in (*_figures(folder), folder / METADATA, *_run_files(folder, LEFTOVERS)):
            if path.name != UNFINISHED:
                path.unlink(missing_ok=True)
    except OSError as cause:
        raise OutputError(f"cannot be written: {cause.strerror or cause}", path=folder) from cause
    return folder


def check_evaluation(folder: Path | str) -> None:
    """Raise OutputError if `write_evaluation` would refuse `folder` for what is there; nothing is changed."""
    folder = Path(folder)
    check_folder(folder)
    if folder.is_dir() and not any((folder / name).exists() for name in (EVALUATION, EVALUATING)):
        for path in _run_files(folder, SHEETS):
            hint = "name another folder, or move the picture away"
            raise OutputError(f"holds {path.name}, which no evaluation left there", path=folder, hint=hint)


def write_evaluation(folder: Path | str, sheets: Mapping[str, NDArray[np.uint8]], document: Mapping[str, Any]) -> None:
    """Write sheets, pictures by file name, and last evaluation.json, in place of those of an earlier evaluation.

    Raises OutputError if the folder holds other sheets, or cannot be written.
    """
    folder = Path(folder)
    check_evaluation(folder)
    try:
        with ExitStack() as stack:
            stack.callback(lock_folder(make_folder(folder), busy="is being written to by another evaluation"))
            write_atomic(folder / EVALUATING, b"")  # tells sheets of one that was killed from pictures of the user's own
            for path in (folder / EVALUATION, *_run_files(folder, EVALUATION_FILES)):
                if path.name != EVALUATING:
                    path.unlink(missing_ok=True)
            for name, picture in sheets.items():
                write_atomic(folder / name, encode_png(picture))
            write_json(folder / EVALUATION, document)
            (folder / EVALUATING).unlink()
    except OSError as cause:
        raise OutputError(f"cannot be written: {cause.strerror or cause}", path=folder) from cause


def check_source(folder: Path | str, sources: Iterable[Path]) -> None:
    """Raise OptionError about the output if a run that is written into `folder` would remove what it is made of: files of an
    earlier run there, upscaled or not, or folders that have some."""
    removed: dict[Path, list[Path]] = {}
    for place in (Path(folder), Path(folder) / UPSCALED):
        with suppress(OSError):  # there is none, or whoever writes to it says what is wrong with it
            removed[place] = _run_files(place, LEFTOVERS)
    for source in sources:
        real = Path(os.path.realpath(source))
        if any(
            (files and is_same(real, place)) or (is_same(real.parent, place) and any(is_same(real, file) for file in files))
            for place, files in removed.items()
        ):
            raise OptionError(
                "output", expected=f"another folder: {source}, which is read, would be removed there", got=str(folder)
            )


def discard(folder: Path | str) -> None:
    """Remove the files of a run in `folder`, and the folder if nothing else is in it; fine if there is none.

    Raises OutputError if something cannot be removed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    try:
        files = [path for path in _run_files(folder, LEFTOVERS) if path.name != UNFINISHED]
        for path in (*_figures(folder), folder / METADATA, *files, folder / UNFINISHED):
            path.unlink(missing_ok=True)
        remove_if_empty(folder)
    except OSError as cause:
        raise OutputError(f"cannot be removed: {cause.strerror or cause}", path=folder) from cause


def _figures(folder: Path) -> list[Path]:
    """What `mvmlx evaluate` wrote of the views of a run into its folder; that of a model has sheets of other names."""
    files = [folder / EVALUATION, folder / VIEWS_SHEET]
    return files if (folder / METADATA).exists() and all(file.exists() for file in files) else []


def _run_files(folder: Path, names: re.Pattern[str] = RUN_FILES) -> list[Path]:
    return sorted(path for path in folder.iterdir() if names.fullmatch(path.name))


def view_names(count: int) -> list[str]:
    """The file names of views: view_000.png ..."""
    return [f"view_{index:03}.png" for index in range(count)]


def write_views(
    folder: Path | str,
    images: NDArray[np.uint8],
    *,
    latents: NDArray[np.float32] | None,
    cameras: Mapping[str, Any] | None,
    document: Mapping[str, Any],
    force: bool = False,
    obsolete: Path | None = None,
) -> Path:
    """Write views uint8 (v, h, w, 3), grid.png, turntable.gif and, where they are known, latents.npy and transforms.json, which
    gets `cameras`; last the metadata.json `document`. Returns the folder. `obsolete` is the
    folder of a run that goes, too. Raises OutputError as `prepare` does, and if another process writes a run there."""
    folder = Path(folder)
    check_free(folder, force=force)
    with ExitStack() as stack:
        stack.callback(lock_folder(make_folder(folder), busy="is being written to by another run"))
        target = prepare(folder, force=force)
        if obsolete is not None:
            discard(obsolete)
        for name, image in zip(view_names(len(images)), images, strict=True):
            save_png(target / name, image)
        write_atomic(target / "grid.png", encode_png(grid(images)))
        save_turntable(target / "turntable.gif", images)
        if latents is not None:
            with BytesIO() as file:
                np.save(file, latents)
                write_atomic(target / "latents.npy", file.getvalue())
        if cameras is not None:
            write_json(target / "transforms.json", cameras)
        finish(target, document)
    return target


def finish(folder: Path | str, document: Mapping[str, Any]) -> None:
    """Write metadata.json, which says that the run of `folder` is complete. Raises OutputError."""
    folder = Path(folder)
    write_json(folder / METADATA, document)
    try:
        (folder / UNFINISHED).unlink(missing_ok=True)
    except OSError as cause:
        raise OutputError(f"cannot be removed: {cause.strerror or cause}", path=folder / UNFINISHED) from cause


def metadata(
    parameters: Mapping[str, Any], *, weights: Mapping[str, str], details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The metadata.json document of a run.

    `parameters` are what repeats the run, as JSON values; `weights` the SHA-256 of every weight file by name; `details`
    whatever else is worth keeping, such as the device. Versions of the packages, of Python and of the system are added; no
    array library is imported for that. Raises OptionError for a parameter or detail that JSON does not have.
    """
    return {
        "format": METADATA_FORMAT,
        "version": METADATA_VERSION,
        "parameters": _as_json(parameters),
        "weights": dict(weights),
        "details": _as_json(details or {}),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def parameters_from_metadata(path: Path | str, *, known: Collection[str]) -> dict[str, Any]:
    """The parameters in the metadata.json of a run, for repeating it; a folder stands for the file in it.

    Raises ConfigError for a file that is malformed, is no run's metadata, is of another version of the format, or has
    parameters that are not in `known`.
    """
    path, document = _read_metadata(path)
    parameters = document.get("parameters")
    if not isinstance(parameters, dict):
        raise ConfigError(f"parameters must be a JSON object, got {type(parameters).__name__}", path=path)
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ConfigError(f"has unknown parameters: {', '.join(unknown)}", path=path, hint=f"known: {', '.join(sorted(known))}")
    return parameters


def weights_from_metadata(path: Path | str) -> dict[str, str]:
    """The SHA-256 of the weight files by name, from the metadata.json of a run or the folder that holds it.

    Raises ConfigError for a file that is malformed or no run's metadata.
    """
    path, document = _read_metadata(path)
    weights = document.get("weights")
    if not isinstance(weights, dict) or not all(isinstance(sha256, str) for sha256 in weights.values()):
        raise ConfigError(f"weights must be a JSON object of texts, got {weights!r}", path=path)
    return weights


def metadata_file(path: Path | str) -> Path:
    """The metadata.json of a run, which its folder stands for."""
    path = Path(path)
    return path / METADATA if path.is_dir() else path


def _read_metadata(path: Path | str) -> tuple[Path, dict[str, Any]]:
    """The file, which a folder stands for, and its document in this version of the format. Raises ConfigError."""
    path = metadata_file(path)
    document = read_json_object(path)
    if document.get("format") != METADATA_FORMAT:
        raise ConfigError(
            f"is no metadata of a run: format must be {METADATA_FORMAT!r}, got {document.get('format')!r}",
            path=path,
            hint=f"give the {METADATA} of an output folder",
        )
    version = document.get("version")
    if type(version) is not int or version != METADATA_VERSION:
        raise ConfigError(
            f"version must be {METADATA_VERSION}, got {version!r}",
            path=path,
            hint="repeat the run with the mvmlx that wrote it; see its packages",
        )
    return path, document


def transforms(
    poses: ArrayLike,
    *,
    width_px: int,
    height_px: int,
    fov_deg: float,
    file_names: Sequence[str],
    normal_names: Sequence[str] | None = None,
    detail_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The transforms.json document of pictures `file_names`, taken from poses (v, 4, 4) with the vertical field of view.

    The matrices are the poses as they are: OpenGL axes, in a world whose up is +Y. Trainers read that without conversion:
    instant-ngp takes the up axis from `up` and maps the world into its unit cube by `scale` and `offset`, chosen so that what
    the cameras see at the origin fills the cube (its default suits cameras four units away); nerfstudio turns and scales the
    world from the cameras themselves. Pixels are square and the principal point is the centre. `normal_names` and
    `detail_names` become `normal_file_path` and `detail_file_path` of the frames, fields of this project that trainers skip.

    Raises CameraError for what is no pose, OptionError for everything else.
    """
    checked = validate_poses(poses)
    for name, value in (("width_px", width_px), ("height_px", height_px)):
        if value < 1:
            raise OptionError(name, expected="at least 1", got=value)
    if not 0 < fov_deg < 180:
        raise OptionError("fov_deg", expected="between 0 and 180", got=fov_deg)
    for name, names in (("file_names", file_names), ("normal_names", normal_names), ("detail_names", detail_names)):
        if names is not None and len(names) != len(checked):
            raise OptionError(name, expected=f"one name per view ({len(checked)})", got=len(names))

    tangent_y = math.tan(math.radians(fov_deg) / 2)
    tangent_x = tangent_y * width_px / height_px
    focal_px = height_px / 2 / tangent_y
    radius = float(np.linalg.norm(checked[:, :3, 3].astype(np.float64), axis=-1).max())
    frames: list[dict[str, Any]] = [
        {"file_path": name, "transform_matrix": pose.tolist()} for name, pose in zip(file_names, checked, strict=True)
    ]
    for field, names in (("normal_file_path", normal_names), ("detail_file_path", detail_names)):
        for frame, name in zip(frames, names or (), strict=names is not None):
            frame[field] = name
    return {
        "camera_model": "OPENCV",
        "w": int(width_px),
        "h": int(height_px),
        "fl_x": focal_px,
        "fl_y": focal_px,
        "cx": width_px / 2,
        "cy": height_px / 2,
        "k1": 0.0,
        "k2": 0.0,
        "p1": 0.0,
        "p2": 0.0,
        "camera_angle_x": 2 * math.atan(tangent_x),
        "camera_angle_y": 2 * math.atan(tangent_y),
        "up": [0, 1, 0],
        "aabb_scale": 1,
        "scale": 0.5 / (radius * max(tangent_x, tangent_y)),
        "offset": [0.5, 0.5, 0.5],
        "frames": frames,
    }


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """What reading the file back will give, so that tuples are lists on both sides; OptionError for what JSON does not have."""
    converted = {}
    for name, value in values.items():
        try:
            converted[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as cause:
            raise OptionError(
                name, expected="a JSON value (null, bool, finite number, text, list, object)", got=value
            ) from cause
    return converted


def package_versions() -> dict[str, str]:
    """The versions of the packages that results depend on, as far as they are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
