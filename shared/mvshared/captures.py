"""Captures: folders of pictures with known cameras, which training and evaluation read.

A capture is a folder with a transforms.json in the convention of nerfstudio and instant-ngp. A frame may also have a
`normal_file_path`, a normal map in camera space: (n + 1) / 2 * 255 with x right, y up, z toward the camera; a
`detail_file_path`, a grey picture of how much a pixel counts in a loss beside its surroundings; and a
`depth_file_path`, depth along the optical axis, for evaluation: a float32 .npy file (h, w), infinite where nothing is, or
nerfstudio's PNG of 16 bits of grey, in thousandths of the poses' unit and 0 where nothing is.
"""

import io
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError

from mvshared.camera import lens_doubt, read_transforms, validate_poses
from mvshared.consistency import foreground
from mvshared.errors import ConfigError, DatasetError, OptionError, OutputError
from mvshared.export import transforms
from mvshared.files import is_empty, read_json_object, remove_if_empty, write_atomic, write_json
from mvshared.images import composite, find_picture, load_image, orientation, quiet_pillow, what_can_be_read

METADATA = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})  # of a PNG, that may say how it is turned
TRAINING_PART = "transforms_train.json"  # of Blender's data sets, which have others for validation and tests
PNG = b"\x89PNG\r\n\x1a\n"
DEPTH_FILES = "is no .npy file of floats and no PNG of 16 bits of grey"
FILE_FIELDS = ("file_path", "normal_file_path", "mask_path", "depth_file_path", "detail_file_path")  # of a frame
PNG_LEVEL = 1  # of zlib: a third of the time of its default, for files that are a seventh larger


class Capture(NamedTuple):
    """Pictures of one object and their cameras, in the order of the file's frames.

    `normal_paths`, `mask_paths`, `depth_paths` and `detail_paths` have None for a frame without; `poses` float32 (v, 4, 4) are
    those of `mvshared.camera`; `fov_deg` is the vertical field of view, None if the file says none or the views differ;
    `lens_doubt` says why the lens is not one pinhole camera's with the middle of the picture on its axis, if so.
    """

    image_paths: tuple[Path, ...]
    normal_paths: tuple[Path | None, ...]
    mask_paths: tuple[Path | None, ...]
    poses: NDArray[np.float32]
    fov_deg: float | None
    depth_paths: tuple[Path | None, ...]
    detail_paths: tuple[Path | None, ...]
    lens_doubt: str = ""


class CaptureViews(NamedTuple):
    """Decoded pictures of a capture, all of one size: `pictures` uint8 (v, h, w, 3) over white, `masks` bool (v, h, w) of the
    object, `depth` float32 (v, h, w) or None."""

    pictures: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    depth: NDArray[np.float32] | None


def load_capture(folder: Path | str) -> Capture:
    """The capture in `folder`, from its transforms.json; the pictures are found, not decoded.

    File paths are relative to the folder; they may lack the extension, as in Blender's files, and may have the backslashes of
    Windows. The world is turned to +Y up (see `camera.read_transforms`); lens distortion and `applied_transform`, which lead
    back to the original scan, are ignored.

    Raises DatasetError for a folder, file or field that is missing or malformed, with the path.
    """
    folder = Path(folder)
    if not folder.is_dir():
        reason = "is a file, and a folder with a transforms.json is needed" if folder.exists() else "no such folder"
        raise DatasetError(reason, path=folder)
    path = folder / "transforms.json"
    if not path.exists() and (folder / TRAINING_PART).is_file():
        raise DatasetError("no such file", path=path, hint=f"copy {TRAINING_PART} to it")
    document = read_json_object(path, error=DatasetError)
    if document.get("normal_space", "camera") != "camera":
        space = document["normal_space"]
        raise DatasetError(f"normal_space must be 'camera' for a capture, got {space!r}", path=path)
    # The frames' fields are checked before their files, so that the message is about the first cause.
    read_transforms(document, path=path, error=DatasetError)
    frames: list[Mapping[str, Any]] = document["frames"]
    images = []
    for index, frame in enumerate(frames):
        image = _frame_file(folder, frame, "file_path", index)
        if image is None:
            raise DatasetError(f"frame {index} has no file_path", path=path)
        images.append(image)
    normals, masks, depths, details = (
        tuple(_frame_file(folder, frame, field, index) for index, frame in enumerate(frames)) for field in FILE_FIELDS[1:]
    )
    size = size_px(images[0])
    cameras = read_transforms(document, path=path, size_px=size, error=DatasetError)
    doubt = lens_doubt(document, size_px=size) or cameras.fov_doubt
    return Capture(tuple(images), normals, masks, cameras.poses, cameras.fov_deg, depths, details, doubt)


def files_elsewhere(folder: Path) -> list[Path]:
    """The files of a capture that do not lie in its folder, or are hidden there, as its transforms.json names them.

    Nothing if that is malformed.
    """
    try:
        document = read_json_object(folder / "transforms.json")
    except ConfigError:
        return []
    frames = document.get("frames")
    known = [each for each in frames if isinstance(each, dict)] if isinstance(frames, list) else []
    named = [frame[field] for frame in known for field in FILE_FIELDS if field in frame]
    away = [name for name in named if isinstance(name, str) and "\0" not in name and _is_elsewhere(name)]
    return [found for name in away if (found := find_picture(folder, name)) is not None]


def _is_elsewhere(name: str) -> bool:
    """Whether a relative path is none, leads out of its folder, or to what is hidden in it."""
    name = name.replace("\\", "/")  # as `find_picture` does
    return os.path.isabs(name) or any(part.startswith(".") for part in os.path.normpath(name).split(os.sep))


def read_views(capture: Capture) -> CaptureViews:
    """Decode the pictures, masks and depths of a capture.

    The object is where the mask is light (1, if it has no values but 0 and 1), else where alpha is above a half, else what a
    plain background leaves, else everything. Depth is used if every frame has it.

    Raises DatasetError for files that differ in size, show nothing or hold no depth; ImageError for those that are no pictures.
    """
    rgba = [load_image(path) for path in capture.image_paths]
    first = rgba[0].shape
    pictures, masks = [], []
    for path, mask_path, picture in zip(capture.image_paths, capture.mask_paths, rgba, strict=True):
        _check_size(path, picture, first)
        pictures.append(composite(picture, (255, 255, 255)))
        if mask_path is not None:
            given = load_image(mask_path)
            _check_size(mask_path, given, first)
            values = composite(given, (0, 0, 0)).max(axis=-1)
            mask = values >= (1 if values.max() == 1 else 128)
        elif picture[..., 3].min() < 128:
            mask = picture[..., 3] >= 128
        else:
            mask = foreground(pictures[-1][None])[0]
        if not mask.any():
            nothing = "shows nothing" if mask_path is None else "shows nothing: no value of its 0 to 255 is 128 or more"
            raise DatasetError(nothing, path=mask_path or path)
        masks.append(mask)
    depths = [_load_depth(path, first) for path in capture.depth_paths if path is not None]
    depth = np.stack(depths) if len(depths) == len(rgba) else None
    return CaptureViews(np.stack(pictures), np.stack(masks), depth)


def write_capture(
    folder: Path | str,
    rgba: NDArray[np.uint8],
    normals: NDArray[np.uint8] | None,
    poses: ArrayLike,
    fov_deg: float,
    *,
    detail: NDArray[np.uint8] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write pictures uint8 (v, h, w, 4), normal maps uint8 (v, h, w, 3 or 4) and detail maps uint8 (v, h, w) as a capture.

    All of it or nothing: the folder holds view_000.png ..., normal_000.png ..., detail_000.png ... and transforms.json. It is
    written under a temporary name beside `folder` and renamed; `folder` must not exist, or be empty but for what macOS leaves.
    `fov_deg` is the vertical field of view, `fields` are more fields of transforms.json.

    Raises OptionError and CameraError for what does not fit together, OutputError for what cannot be written.
    """
    folder = Path(folder)
    checked = validate_poses(poses)
    if rgba.dtype != np.uint8 or rgba.ndim != 4 or rgba.shape[-1] != 4 or len(rgba) != len(checked):
        raise OptionError("rgba", expected=f"uint8 ({len(checked)}, h, w, 4)", got=(rgba.dtype.name, rgba.shape))
    views, height, width = rgba.shape[:3]
    if normals is not None and (normals.dtype != np.uint8 or normals.shape not in (rgba.shape, (*rgba.shape[:3], 3))):
        raise OptionError("normals", expected=f"uint8 {rgba.shape} or with 3 channels", got=(normals.dtype.name, normals.shape))
    if detail is not None and (detail.dtype != np.uint8 or detail.shape != rgba.shape[:3]):
        raise OptionError("detail", expected=f"uint8 {rgba.shape[:3]}", got=(detail.dtype.name, detail.shape))
    names = {kind: [f"{kind}_{index:03}.png" for index in range(views)] for kind in ("view", "normal", "detail")}
    maps = {kind: each for kind, each in (("view", rgba), ("normal", normals), ("detail", detail)) if each is not None}
    pictures = {name: picture for kind, each in maps.items() for name, picture in zip(names[kind], each, strict=True)}
    document = transforms(
        checked,
        width_px=width,
        height_px=height,
        fov_deg=fov_deg,
        file_names=names["view"],
        normal_names=names["normal"] if "normal" in maps else None,
        detail_names=names["detail"] if "detail" in maps else None,
    )

    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        if folder.exists() and (not folder.is_dir() or not is_empty(folder)):
            raise OutputError("exists already", path=folder, hint="name a new folder, or remove this one first")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            for name, picture in pictures.items():
                encoded = io.BytesIO()
                Image.fromarray(picture).save(encoded, "PNG", compress_level=PNG_LEVEL)
                write_atomic(temporary / name, encoded.getvalue())
            write_json(temporary / "transforms.json", {**document, **(fields or {})})
            if folder.exists():
                remove_if_empty(folder)
            os.replace(temporary, folder)
        except BaseException as failed:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(failed.__cause__, OSError):  # about a file in there, which nobody would find
                raise failed.__cause__ from None
            raise
    except OSError as cause:
        raise OutputError(f"cannot be written: {cause.strerror or cause}", path=folder) from cause


def size_px(path: Path) -> tuple[int, int]:
    """Width and height of a picture once it is upright, from its header. Raises DatasetError if it is none."""
    try:
        with quiet_pillow(), Image.open(path) as image:
            # Pillow turns the size of a TIFF itself, and would decode a PNG to look for metadata behind its pixels.
            known = image.format == "TIFF" or (image.format == "PNG" and METADATA.isdisjoint(image.info))
            return (image.height, image.width) if not known and orientation(image) >= 5 else image.size
    except UnidentifiedImageError as cause:
        raise DatasetError("is no picture that can be read", path=path, hint=what_can_be_read(path)) from cause
    except (OSError, ValueError, Image.DecompressionBombError) as cause:
        raise DatasetError(f"is no picture that can be read: {cause}", path=path) from cause


def _frame_file(folder: Path, frame: Mapping[str, Any], field: str, index: int) -> Path | None:
    """The file that a frame's field names, None without the field; DatasetError if it is not there, but for depth."""
    if field not in frame:
        return None
    name = frame[field]
    if not isinstance(name, str) or not name or "\0" in name:
        raise DatasetError(f"frame {index}: {field} must be a file name, got {name!r}", path=folder / "transforms.json")
    found = find_picture(folder, name)
    if found is not None:
        return found
    if field == "depth_file_path":  # whoever reads it says so
        return folder / name
    raise DatasetError(f"frame {index}: {field} names a file that is not there", path=folder / name)


def _check_size(path: Path, picture: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    if picture.shape[:2] != shape[:2]:
        sizes = f"{picture.shape[1]} x {picture.shape[0]} pixels, the first picture {shape[1]} x {shape[0]}"
        raise DatasetError(f"has {sizes}", path=path, hint="all pictures and masks of a capture must have one size")


def _thousandths(file: BinaryIO) -> NDArray[np.float32]:
    """Depth (h, w) in a PNG of 16 bits of grey, infinite for 0, as nerfstudio's depth_unit_scale_factor has it by default.
    Raises ValueError for another PNG."""
    with Image.open(file, formats=["PNG"]) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"mode {image.mode}")
        stored = np.asarray(image, np.float32)
    return np.where(stored > 0, stored / 1000, np.float32(np.inf))


def _load_depth(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        with path.open("rb") as file:
            is_png = file.read(len(PNG)) == PNG
            file.seek(0)
            depth = _thousandths(file) if is_png else np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile, MemoryError, SyntaxError, Image.DecompressionBombError) as cause:
        reason = f"{cause.strerror or cause}" if isinstance(cause, OSError) else DEPTH_FILES
        hint = "without depth_file_path in the transforms.json depth is estimated"
        raise DatasetError(reason, path=path, hint=hint) from cause
    if not isinstance(depth, np.ndarray) or not np.issubdtype(depth.dtype, np.floating) or depth.shape != shape[:2]:
        raise DatasetError(f"must hold floats of shape {shape[:2]}", path=path)
    with np.errstate(over="ignore"):
        depth = depth.astype(np.float32)
    if not (depth > 0).all() or not np.isfinite(depth).any():
        raise DatasetError("must be positive in float32, infinite where nothing is, and finite somewhere", path=path)
    return depth
