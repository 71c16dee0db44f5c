"""Normal maps: found on disk, read with all their bits, brought into camera space, and checked against the views' cameras.

A pixel stores (n + 1) / 2 of full scale. In camera space x is right, y up and z toward the camera; in world space the axes are
those of `mvshared.camera`, or of the transforms.json beside the maps. docs/normals.md has the whole convention.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvshared.camera import Y_UP_TO_Z_UP, other_lenses, read_transforms
from mvshared.errors import CameraError, ConfigError, ImageError, OptionError, OutputError, warn
from mvshared.export import METADATA, transforms
from mvshared.files import (
    check_folder,
    lock_folder,
    make_folder,
    read_json_object,
    visible,
    with_leftovers,
    write_atomic,
    write_json,
)
from mvshared.images import find_picture, is_picture, load_values, resize_plane, save_png

NormalMap: TypeAlias = str | Path | Image.Image | NDArray[Any]
Normals: TypeAlias = NormalMap | Sequence[NormalMap]
NormalSpace: TypeAlias = Literal["camera", "world"]
Vectors: TypeAlias = NDArray[np.float32]

NO_SURFACE = 128 / 127.5 - 1  # where there is none: colour 128, as in training, 1/255 from a normal of zero
VOID_TOLERANCE = 6.0  # of 255, from mid grey, black and white, for a pixel to show no surface: lossy files blur them
MAP_FILES = re.compile(r"normal_\d{3,}\.png|transforms\.json")
RENDERING = ".rendering"  # beside maps whose transforms.json is still to come
LEFTOVERS = with_leftovers(rf"{MAP_FILES.pattern}|{re.escape(RENDERING)}")  # of maps that were written, killed or not
CAMERA_TOLERANCE_DEG = 1.0
CHECKED_PX = 256  # a map is checked at no more than this size

# Of rendered heads, 8 bits, seen from 30 degrees below to straight above, the lengths are off by 0.002 and 0.1 % of the surface
# faces away. With all cameras off by 30, 45 and 60 degrees it is 2, 9 and 19 % of the worst of four views (medians).
LENGTH_TOLERANCE = 0.1  # median distance of a vector's length from 1
AWAY_COSINE = -0.1  # between a normal and the direction to the camera
AWAY_SHARE = 0.04  # of the surface


class NormalMaps(NamedTuple):
    """Normal maps that were found, not read yet: one source per view.

    What a transforms.json beside them says, None or the usual without: `poses` float32 (v, 4, 4) in the +Y-up world, their
    vertical `fovs_deg`, the `space`, and `world` (3, 3), which turns world-space normals into the +Y-up world.
    """

    sources: tuple[NormalMap, ...]
    poses: NDArray[np.float32] | None = None
    fovs_deg: tuple[float | None, ...] = ()
    space: NormalSpace | None = None
    world: NDArray[np.float64] = np.eye(3)


class _Frames(NamedTuple):
    """The normal maps of a transforms.json: their files, in the order of the frames, and what it says of all of them."""

    paths: list[Path]
    named: bool  # by normal_file_path
    found: NormalMaps


def check_free(folder: Path | str, *, force: bool = False) -> None:
    """Raise OutputError if `write_normals` would refuse the folder for what is there; nothing is changed.

    Maps that a killed run left, without their transforms.json, give way without `force`.
    """
    folder = Path(folder)
    check_folder(folder)
    try:
        there = sorted(path.name for path in folder.iterdir() if MAP_FILES.fullmatch(path.name)) if folder.is_dir() else []
        run, unfinished = (folder / METADATA).exists(), _is_unfinished(folder)
    except OSError as cause:
        raise OutputError(f"cannot be read: {cause.strerror or cause}", path=folder) from cause
    if run:
        raise OutputError("holds a finished run, whose cameras would be lost", path=folder, hint="name another folder")
    if there and not (force or unfinished):
        hint = "name another folder, or overwrite it with force=True"
        raise OutputError(f"holds {there[0]} already", path=folder, hint=hint)


def write_normals(
    folder: Path | str,
    maps: NDArray[np.uint8],
    poses: NDArray[np.float32],
    *,
    fov_deg: float,
    space: NormalSpace,
    force: bool = False,
) -> Path:
    """Write maps uint8 (v, h, w, 3 or 4) as normal_000.png ..., last their transforms.json, which `find_normals` reads.

    `fov_deg` is the vertical field of view of the cameras at poses (v, 4, 4). With `force` the maps that are there go. Raises
    OutputError.
    """
    folder = Path(folder)
    check_free(folder, force=force)
    names = [f"normal_{index:03}.png" for index in range(len(maps))]
    height, width = maps.shape[1:3]
    document = transforms(poses, width_px=width, height_px=height, fov_deg=fov_deg, file_names=names, normal_names=names)
    with ExitStack() as stack:
        stack.callback(lock_folder(make_folder(folder), busy="is being written to by another run"))
        write_atomic(folder / RENDERING, b"")
        try:
            (folder / "transforms.json").unlink(missing_ok=True)  # first, so that it never speaks of other maps
            for path in folder.iterdir():
                if LEFTOVERS.fullmatch(path.name) and path.name != RENDERING:
                    path.unlink()
        except OSError as cause:
            raise OutputError(f"cannot be removed: {cause.strerror or cause}", path=folder) from cause
        for name, pixels in zip(names, maps, strict=True):
            save_png(folder / name, pixels)
        write_json(folder / "transforms.json", document | {"normal_space": space})
        try:
            (folder / RENDERING).unlink()
        except OSError as cause:
            raise OutputError(f"cannot be removed: {cause.strerror or cause}", path=folder / RENDERING) from cause
    return folder


def _is_unfinished(folder: Path) -> bool:
    """Whether maps are there whose run was killed, or is still at work: their cameras are not known."""
    return (folder / RENDERING).exists() and not (folder / "transforms.json").exists()


def find_normals(given: Normals, space: str | None = None) -> NormalMaps:
    """The maps of a folder, of one file, or of a list of files and pictures in memory; nothing of them is decoded.

    A folder's maps are those that its transforms.json names `normal_file_path`; else its normal_*.png by name; else all of
    its pictures. If the transforms.json beside the maps names all of them, it brings their cameras. `space` is "camera" or
    "world", None for what the transforms.json says, and camera space without it.

    Raises OptionError for another kind of argument or space, ImageError for a folder or file that is not there and for maps
    that `write_normals` has not written to their end, ConfigError for a malformed transforms.json.
    """
    if space is not None and space not in get_args(NormalSpace):
        raise OptionError("normal_space", expected="camera or world", got=space)
    maps = _found(given)
    if space is not None and maps.space not in (None, space):
        hint = "leave `normal_space` out"
        raise OptionError("normal_space", expected=f"{maps.space}, as the maps' transforms.json says", got=space, hint=hint)
    return maps._replace(space=space or maps.space or "camera")


def _found(given: Normals) -> NormalMaps:
    if isinstance(given, str | Path) and Path(given).is_dir():
        return _from_folder(Path(given))
    if isinstance(given, str | Path):
        if not Path(given).exists():
            raise ImageError("no such folder or file of normal maps", path=given)
        given = [given]
    if not isinstance(given, Sequence | np.ndarray) or (isinstance(given, np.ndarray) and given.ndim != 4):
        got = f"an array of shape {given.shape}" if isinstance(given, np.ndarray) else given
        raise OptionError("normals", expected="a folder or a list of normal maps", got=got)
    sources = tuple(given)
    paths = [Path(source) for source in sources if isinstance(source, str | Path)]
    folders = {path.parent for path in paths}
    for folder in folders:
        _check_finished(folder)
    if len(paths) < len(sources) or len(folders) != 1:
        return NormalMaps(sources)
    return _with_cameras(paths, _frames(folders.pop()))


def _check_finished(folder: Path) -> None:
    if _is_unfinished(folder):
        hint = "render them again, or wait for it"
        raise ImageError("the run that renders these normal maps has not come to its end", path=folder, hint=hint)


def _from_folder(folder: Path) -> NormalMaps:
    _check_finished(folder)
    frames = _frames(folder)
    if frames is not None and frames.named:
        return frames.found
    try:
        pictures = [path for path in visible(folder.iterdir()) if is_picture(path)]
    except OSError as cause:
        raise ImageError(f"cannot be read: {cause.strerror or cause}", path=folder) from cause
    return _with_cameras([path for path in pictures if path.name.startswith("normal_")] or pictures, frames)


def _with_cameras(paths: list[Path], frames: _Frames | None) -> NormalMaps:
    """The maps, with their cameras if the frames are about every one of them. An MvWarning if they are about none."""
    if frames is None or not paths:
        return NormalMaps(tuple(paths))
    places = {_place(path): index for index, path in enumerate(frames.paths)}
    chosen = [places.get(_place(path)) for path in paths]
    if set(chosen) == {None}:
        warn(f"{paths[0].parent / 'transforms.json'} names none of the normal maps beside it: its cameras are not used")
    if None in chosen:
        return NormalMaps(tuple(paths))
    poses, fovs = frames.found.poses, tuple(frames.found.fovs_deg[index] for index in chosen if index is not None)
    assert poses is not None
    return frames.found._replace(sources=tuple(paths), poses=poses[np.array(chosen)], fovs_deg=fovs)


def _place(path: Path) -> str:
    """Where a file lies, in one form of Unicode: to the file systems of macOS, an umlaut is a letter and its dots."""
    return unicodedata.normalize("NFC", str(path.resolve()))


def _frames(folder: Path) -> _Frames | None:
    """What the folder's transforms.json says of normal maps; None without the file."""
    path = folder / "transforms.json"
    if not path.is_file():
        return None
    document = read_json_object(path)
    cameras = read_transforms(document, path=path)
    frames: list[dict[str, Any]] = document["frames"]
    named = any("normal_file_path" in frame for frame in frames)
    field = "normal_file_path" if named else "file_path"
    chosen = [index for index, frame in enumerate(frames) if isinstance(frame.get(field), str)]
    if any("\0" in frames[index][field] for index in chosen):
        raise ConfigError(f"{field} must be a file name", path=path)
    names = [frames[index][field] for index in chosen]
    paths = [find_picture(folder, name) or folder / name for name in names]  # whoever reads it says that it is not there
    space = document.get("normal_space")
    if space is not None and space not in get_args(NormalSpace):
        raise ConfigError(f"normal_space must be camera or world, got {space!r}", path=path)
    found = NormalMaps(
        sources=tuple(paths),
        poses=cameras.poses[np.array(chosen, dtype=int)],
        fovs_deg=tuple(cameras.fovs_deg[index] for index in chosen),
        space=space,
        world=np.eye(3) if document.get("up") == [0, 1, 0] else Y_UP_TO_Z_UP[:3, :3].T,
    )
    return _Frames(paths, named, found)


def check_cameras(maps: NormalMaps, poses: NDArray[np.float32], *, fov_deg: float) -> None:
    """Compare the cameras of the views, poses (v, 4, 4), with those that a transforms.json gives to the maps.

    Raises OptionError if there is not one map per view, and CameraError if the rotation of one, or the direction in which it
    stands, is off by more than a degree. Another field of view than the model's `fov_deg` is an MvWarning.
    """
    if len(maps.sources) != len(poses):
        raise OptionError("normals", expected=f"one map per view ({len(poses)})", got=f"{len(maps.sources)} maps")
    if maps.poses is None:
        return
    for index, (own, other) in enumerate(zip(maps.poses.astype(np.float64), poses.astype(np.float64), strict=True)):
        turned_deg = _angle_deg((np.trace(own[:3, :3].T @ other[:3, :3]) - 1) / 2)
        moved_deg = _angle_deg(own[:3, 3] @ other[:3, 3] / np.linalg.norm(own[:3, 3]) / np.linalg.norm(other[:3, 3]))
        if max(turned_deg, moved_deg) > CAMERA_TOLERANCE_DEG:
            raise CameraError(
                f"it is {max(turned_deg, moved_deg):.1f} degrees from that of its normal map {_name(maps.sources[index])} in "
                "the transforms.json beside it",
                index=index,
                hint="leave `views`, `azimuths_deg`, `elevation_deg` and `cameras` out, and those of the normal maps are taken",
            )
    if lens := other_lenses(maps.fovs_deg, fov_deg):
        warn(f"the normal maps have a field of view of {lens}, the model's views {fov_deg:.1f}")


def _angle_deg(cosine: float) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def load_normals(maps: NormalMaps, poses: NDArray[np.float32], *, fov_deg: float, size_px: int) -> Vectors:
    """The maps as a model takes them: vectors float32 (v, size_px, size_px, 3) in camera space, seen from poses (v, 4, 4).

    Arrays are uint8, uint16, or float in [0, 1]. Alpha 0 means no surface, partial alpha blends; so do mid grey, black and
    white, which no unit vector has. `fov_deg` is the field of view if the maps' transforms.json says none.

    Raises OptionError and CameraError as `check_cameras` does; ImageError for a map that cannot be read, is not square,
    smaller than the views, of another size than the first, without a surface, no normal map, or of normals that face away
    from the camera; CameraError for such normals in world space.
    """
    check_cameras(maps, poses, fov_deg=fov_deg)
    lenses_deg = [fov_deg if own is None else own for own in maps.fovs_deg] or [fov_deg] * len(maps.sources)
    prepared: list[Vectors] = []
    side = 0
    for index, source in enumerate(maps.sources):
        values = load_values(source)
        _check_size(values, index, source, size_px=size_px, first_px=side)
        side = len(values)
        surface = np.where(is_void(values[..., :3]), 0, values[..., 3:] / np.float32(255))
        vectors = values[..., :3] / np.float32(127.5) - 1
        to_camera = (maps.world.T @ poses[index, :3, :3].astype(np.float64)).astype(np.float32)
        in_camera = vectors if maps.space == "camera" else vectors @ to_camera
        other = vectors @ to_camera if maps.space == "camera" else vectors
        _check_surface(maps, index, in_camera, other, surface[..., 0] >= 0.5, fov_deg=lenses_deg[index])
        prepared.append(_resized(in_camera, surface, size_px))
    return np.stack(prepared)


def is_void(values: Vectors) -> NDArray[np.bool_]:
    """Where colours (h, w, 3) from 0 to 255 are mid grey, black or white, and show no surface, (h, w, 1)."""
    voids = (127.5, 0.0, 255.0)
    return np.logical_or.reduce(
        [(np.abs(values - np.float32(void)) <= VOID_TOLERANCE).all(axis=-1, keepdims=True) for void in voids]
    )


def _resized(vectors: Vectors, surface: Vectors, size_px: int) -> Vectors:
    """Vectors (h, w, 3) at (size_px, size_px), blended with NO_SURFACE by how much surface (h, w, 1) there is."""
    if len(vectors) != size_px:
        planes = [resize_plane(plane, size_px) for plane in (*np.moveaxis(vectors * surface, -1, 0), surface[..., 0])]
        surface = np.clip(planes[3], 0, 1)[..., None].astype(np.float32)
        vectors = (np.stack(planes[:3], -1) / np.maximum(planes[3], 1e-3)[..., None]).clip(-1, 1).astype(np.float32)
    return np.where(surface >= 1, vectors, vectors * surface + np.float32(NO_SURFACE) * (1 - surface)).astype(np.float32)


def _check_size(values: Vectors, index: int, source: NormalMap, *, size_px: int, first_px: int) -> None:
    height, width = values.shape[:2]
    path, view = _path(source), f"the normal map of view {index}"
    if height != width:
        raise ImageError(f"a normal map must be square, got {width} x {height} pixels for view {index}", path=path)
    if first_px and height != first_px:
        raise ImageError(f"{view} has {width} x {height} pixels, those before it have {first_px} x {first_px}", path=path)
    if height < size_px:
        hint = "render the maps at the size of the views or larger, or give a smaller size"
        raise ImageError(f"{view} has {width} x {height} pixels, less than the views' {size_px}", path=path, hint=hint)


def _check_surface(
    maps: NormalMaps, index: int, vectors: Vectors, other: Vectors, solid: NDArray[np.bool_], *, fov_deg: float
) -> None:
    """Whether camera-space vectors (h, w, 3) are normals that the view's camera can see, where there is surface; `other` are
    the vectors if they were in the other space."""
    path, view = _path(maps.sources[index]), f"the normal map of view {index}"
    side = len(vectors)
    if not solid.any():
        raise ImageError(f"{view} shows no surface: all of it is transparent, mid grey, black or white", path=path)
    step = max(1, side // CHECKED_PX)
    inner = _inside(solid)[::step, ::step]
    rows, columns = (axis * step for axis in np.nonzero(inner)) if inner.any() else np.nonzero(solid)
    chosen = vectors[rows, columns]
    if (off := _length_error(chosen)) > LENGTH_TOLERANCE:
        raise ImageError(
            f"{view} holds no unit vectors: half of their lengths are off by {off:.2f} or more",
            path=path,
            hint="is it a photograph, or a depth map? A pixel must store (n + 1) / 2 of full scale",
        )
    tangent = math.tan(math.radians(fov_deg) / 2)
    x, y = ((columns + 0.5) / side * 2 - 1) * tangent, (1 - (rows + 0.5) / side * 2) * tangent
    to_camera = np.stack([-x, -y, np.ones_like(x)], -1)
    to_camera /= np.linalg.norm(to_camera, axis=-1, keepdims=True)
    share = _share_away(chosen, to_camera)
    if share <= AWAY_SHARE:
        return
    text = f"{share:.0%} of the surface in {view} faces away from the camera"
    fits = _share_away(other[rows, columns], to_camera) <= AWAY_SHARE
    if maps.space == "camera":
        way_out = 'as world-space normals they would fit: normal_space="world"' if fits else "are they in world space?"
        raise ImageError(text, path=path, hint=f"camera space has x right, y up, z toward the camera; {way_out}")
    way_out = '; as camera-space normals these would fit: normal_space="camera"' if fits else ""
    raise CameraError(
        text if path is None else f"{text}, {path}", index=index, hint=f"do the cameras belong to the maps?{way_out}"
    )


def _inside(solid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels (h, w) whose neighbours have surface, too: without alpha, others are blended with what is no normal."""
    framed = np.pad(solid, 1, constant_values=True)
    return solid & framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]


def _length_error(vectors: Vectors) -> float:
    return float(np.median(np.abs(np.linalg.norm(vectors, axis=-1) - 1)))


def _share_away(vectors: Vectors, to_camera: NDArray[np.float64]) -> float:
    return float(((vectors * to_camera).sum(axis=-1) < AWAY_COSINE).mean())


def _path(source: NormalMap) -> str | Path | None:
    return source if isinstance(source, str | Path) else None


def _name(source: NormalMap) -> str:
    return Path(source).name if isinstance(source, str | Path) else "in memory"
