"""Camera poses: orbits around the object, checks, the conditioning vector of MVDream, and files of cameras.

World: +Y up, the object's front faces +Z. A pose is a camera-to-world matrix with OpenGL axes: x right, y up, z backwards.
Azimuth 0 looks at the front, azimuth 90 stands on +X; a positive elevation looks down from above. This is the convention of
https://github.com/bytedance/MVDream (mvdream/camera_utils.py) before its conversion to Blender's Z-up world.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvshared.errors import CameraError, ConfigError, OptionError
from mvshared.files import FileError, read_json
from mvshared.numbers import number, whole

# Poses copied from text with four decimals must pass; a scale of a thousandth or a shear must not.
TOLERANCE = 1e-3
# Below this distance from the origin a position has no direction that float32 files would keep.
MIN_RADIUS = 1e-6
# So many turns nobody means, and far larger numbers have no digits left for where in a turn a camera stands.
MAX_AZIMUTH_DEG = 1e6

LENS = ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y")  # fields of transforms.json
PINHOLES = ("PINHOLE", "OPENCV", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "FULL_OPENCV")  # with or without distortion
# Fields by which instant-ngp knows lenses that are no pinholes, beside is_fisheye.
PANORAMAS = ("equirectangular", "latlong", "orthographic", "ftheta_p0")
LENS_TOLERANCE = 0.05  # shares of a picture by which lenses of scans are off
FOCAL_TOLERANCE = 0.01  # between the frames of a file
DISTANCE_TOLERANCE = 0.01
AIM_TOLERANCE_DEG = 5.0
ROLL_TOLERANCE_DEG = 15.0  # around where a camera looks
FOV_TOLERANCE_DEG = 1.0

Y_UP_TO_Z_UP = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
MIRROR_X = np.diag([-1.0, 1.0, 1.0, 1.0])


class Orbit(NamedTuple):
    """Where cameras stand, one float64 number per view: degrees in [0, 360), degrees in [-90, 90], distance from the origin."""

    azimuths_deg: NDArray[np.float64]
    elevations_deg: NDArray[np.float64]
    radii: NDArray[np.float64]


class CameraFile(NamedTuple):
    """Poses float32 (v, 4, 4) of a file in its order, and their vertical fields of view in degrees, None where it says none."""

    poses: NDArray[np.float32]
    fovs_deg: tuple[float | None, ...]

    @property
    def fov_deg(self) -> float | None:
        """The field of view if the file says one for all of them, the middle one if their focal lengths are nearly the same:
        telephones focus anew for every picture, which changes them by a few thousandths."""
        known = [fov for fov in self.fovs_deg if fov is not None]
        if not known or len(known) < len(self.fovs_deg):
            return None
        least, most = min(known), max(known)
        near = math.tan(math.radians(most) / 2) <= (1 + FOCAL_TOLERANCE) * math.tan(math.radians(least) / 2)
        return (least + most) / 2 if near else None

    @property
    def fov_doubt(self) -> str:
        """Why `fov_deg` is None if all of them have one; nothing otherwise."""
        known = [fov for fov in self.fovs_deg if fov is not None]
        if self.fov_deg is not None or len(known) < len(self.fovs_deg):
            return ""
        return f"all frames must have one field of view, and theirs are {min(known):.1f} to {max(known):.1f} degrees"


def even_azimuths(views: int, *, start_deg: float = 0.0, span_deg: float = 360.0) -> list[float]:
    """Azimuths in degrees of `views` cameras, `span_deg / views` apart; the end of the span is left out.

    MVDream's get_camera, by index: a float range may yield one view too many. Raises OptionError.
    """
    views = whole("views", views, 1)
    start_deg = number("start_deg", start_deg, -MAX_AZIMUTH_DEG, MAX_AZIMUTH_DEG)
    span_deg = number("span_deg", span_deg, -MAX_AZIMUTH_DEG, MAX_AZIMUTH_DEG)
    return [start_deg + index * span_deg / views for index in range(views)]


def orbit(azimuths_deg: ArrayLike, elevation_deg: ArrayLike, *, radius: float = 1.0) -> NDArray[np.float32]:
    """Poses float32 (v, 4, 4) of cameras that look at the origin from `azimuths_deg` (v,), in degrees.

    `elevation_deg` is one number in [-90, 90] or one per view; azimuths are at most 1e6 either way. At the poles the azimuth
    still turns the camera: the right vector (cosA, 0, -sinA) follows from it and not from a cross product with the world's up,
    which is 0 there.

    Raises CameraError with the view's index; OptionError for the radius and for a single elevation.
    """
    azimuths = _numbers(azimuths_deg, "azimuths_deg")
    elevations = _numbers(elevation_deg, "elevation_deg")
    if azimuths.ndim != 1 or not len(azimuths):
        raise CameraError(f"azimuths_deg must be a list of at least one number, got shape {azimuths.shape}")
    if elevations.ndim == 0:
        if not -90 <= elevations <= 90:
            raise OptionError("elevation_deg", expected="-90 to 90", got=float(elevations))
        elevations = np.full_like(azimuths, elevations)
    if elevations.shape != azimuths.shape:
        raise CameraError(
            f"elevation_deg must be one number or one per view ({len(azimuths)}), got shape {elevations.shape}",
        )
    radius = number("radius", radius, MIN_RADIUS, 1 / MIN_RADIUS)
    for index, (azimuth, elevation) in enumerate(zip(azimuths, elevations, strict=True)):
        if not abs(azimuth) <= MAX_AZIMUTH_DEG:
            expected = f"a finite number of degrees, at most {MAX_AZIMUTH_DEG:g} either way"
            raise CameraError(f"the azimuth must be {expected}, got {azimuth}", index=index)
        if not -90 <= elevation <= 90:
            raise CameraError(f"the elevation must be -90 to 90 degrees, got {elevation}", index=index)

    a, e = np.radians(np.remainder(azimuths, 360.0)), np.radians(elevations)
    zero = np.zeros_like(a)
    right = np.stack([np.cos(a), zero, -np.sin(a)], axis=-1)
    up = np.stack([-np.sin(e) * np.sin(a), np.cos(e), -np.sin(e) * np.cos(a)], axis=-1)
    back = np.stack([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)], axis=-1)
    poses = np.zeros((len(a), 4, 4))
    poses[:, :3, :] = np.stack([right, up, back, radius * back], axis=-1)
    poses[:, 3, 3] = 1
    return poses.astype(np.float32)


def validate_poses(cameras: ArrayLike) -> NDArray[np.float32]:
    """The same cameras as float32 (v, 4, 4), checked to be rigid camera-to-world poses away from the origin.

    To within 1e-3 per entry the last row is 0 0 0 1 and the rotation is orthonormal, with determinant +1 (OpenGL axes are
    right-handed); the distance from the origin is at least 1e-6, since the models see only its direction.

    Raises CameraError with the index of the first bad view.
    """
    given = _numbers(cameras, "cameras")
    if given.ndim != 3 or given.shape[1:] != (4, 4) or not len(given):
        raise CameraError(
            f"cameras must have shape (views, 4, 4) with at least one view, got {given.shape}",
            hint="give a list of 4x4 camera-to-world matrices, even for a single view",
        )
    for index, pose in enumerate(given):
        _check_pose(pose, index)
    return given.astype(np.float32)


def as_poses(cameras: ArrayLike, radius: float) -> NDArray[np.float32]:
    """Poses float32 (v, 4, 4) from matrices (v, 4, 4) or from pairs (azimuth_deg, elevation_deg), which stand at `radius`.

    Raises CameraError as `validate_poses` and `orbit` do; OptionError for the radius.
    """
    if isinstance(cameras, str | os.PathLike):
        hint = "mvshared.camera.load_cameras reads a file; give its poses"
        raise CameraError(f"cameras must be real numbers, got the name {os.fspath(cameras)!r}", hint=hint)
    given = _numbers(cameras, "cameras")
    if given.ndim == 2 and given.shape[1] == 2:
        return orbit(given[:, 0], given[:, 1], radius=radius)
    if given.ndim == 3:
        return validate_poses(given)
    raise CameraError(
        f"cameras must have shape (views, 4, 4) or (views, 2), got {given.shape}",
        hint="give camera-to-world matrices or (azimuth_deg, elevation_deg) pairs",
    )


def camera_vectors(poses: ArrayLike) -> NDArray[np.float32]:
    """MVDream's conditioning vectors float32 (v, 16) of poses (v, 4, 4).

    The position is scaled to the unit sphere, the world turned to Blender's Z-up, the matrix flattened by rows. Radius and
    field of view do not enter. Source: bytedance/MVDream, mvdream/camera_utils.py.

    Raises CameraError for what is no pose.
    """
    normalised = validate_poses(poses).astype(np.float64)
    normalised[:, :3, 3] /= np.linalg.norm(normalised[:, :3, 3], axis=-1, keepdims=True)
    return (Y_UP_TO_Z_UP @ normalised).reshape(-1, 16).astype(np.float32)


def azimuth_elevation(poses: ArrayLike) -> Orbit:
    """Where the cameras of poses (v, 4, 4) stand; the inverse of `orbit`. Straight above and below the azimuth is that of the
    right vector. Which way a camera looks does not enter elsewhere. Raises CameraError for what is no pose."""
    checked = validate_poses(poses).astype(np.float64)
    x, y, z = checked[:, 0, 3], checked[:, 1, 3], checked[:, 2, 3]
    radii, horizontal = np.linalg.norm(checked[:, :3, 3], axis=-1), np.hypot(x, z)
    at_pole = horizontal < 1e-7 * radii
    azimuths = np.where(at_pole, np.arctan2(-checked[:, 2, 0], checked[:, 0, 0]), np.arctan2(x, z))
    wrapped = np.remainder(np.degrees(azimuths), 360.0)
    # A remainder of a tiny negative number rounds to 360 itself.
    return Orbit(np.where(wrapped == 360.0, 0.0, wrapped), np.degrees(np.arctan2(y, horizontal)), radii)


def from_front_deg(azimuths_deg: ArrayLike) -> NDArray[np.float64]:
    """Azimuths float64 (v,) from -180 to below 180, where the front is 0 and the subject's left side above it."""
    return np.remainder(np.asarray(azimuths_deg, dtype=np.float64) + 180, 360) - 180


def front_view(poses: ArrayLike) -> int:
    """The index of the first view of poses (v, 4, 4) that is nearest to the front, by azimuth. Raises CameraError for what is
    no pose."""
    return int(np.argmin(np.abs(from_front_deg(azimuth_elevation(poses).azimuths_deg))))


def mirror_poses(poses: ArrayLike) -> NDArray[np.float32]:
    """Poses float32 (v, 4, 4) from which the object's mirror image (x to -x) looks like the horizontally flipped pictures.

    M @ pose @ M with M = diag(-1, 1, 1, 1): the left M mirrors the world, the right one flips the picture; the result is
    again a right-handed pose, with the azimuth negated. Raises CameraError for what is no pose.
    """
    return (MIRROR_X @ validate_poses(poses) @ MIRROR_X).astype(np.float32)


def load_cameras(path: Path | str, *, radius: float = 1.0) -> CameraFile:
    """Cameras of a JSON file: a transforms.json (see `read_transforms`), or a list of 4x4 poses or of (azimuth_deg,
    elevation_deg) pairs, alone or as `{"cameras": [...]}`. Pairs stand at `radius`; poses of a list have the +Y-up world.

    Raises ConfigError, with the path, for whatever the file has wrong; OptionError for the radius.
    """
    document = read_json(path)
    if isinstance(document, dict) and "frames" in document:
        return read_transforms(document, path=path)
    cameras = document.get("cameras") if isinstance(document, dict) else document
    if not isinstance(cameras, list):
        raise ConfigError("holds no cameras", path=path, hint='write {"cameras": [[azimuth_deg, elevation_deg], ...]}')
    try:
        poses = as_poses(cameras, radius)
    except CameraError as cause:
        raise ConfigError(cause.message, path=path, hint=cause.hint) from cause
    return CameraFile(poses, (None,) * len(poses))


def read_transforms(
    document: Mapping[str, Any],
    *,
    path: Path | str,
    size_px: tuple[int, int] | None = None,
    error: FileError = ConfigError,
) -> CameraFile:
    """Cameras of a transforms.json document (nerfstudio, instant-ngp, Blender's NeRF files), in the order of its frames.

    The file's world is turned to +Y up. Its up axis is instant-ngp's field `up`, an axis of +Y or +Z; without the field it is
    +Z, as nerfstudio and Blender have it, and the front is taken to face -Y, as Blender's front view has it.
    `size_px` (width, height) stands in for missing `w` and `h`; without either the pictures are taken to be square.

    Raises `error` with `path` for whatever is wrong in the document.
    """
    frames = document.get("frames")
    if not isinstance(frames, list) or not frames:
        raise error("has no frames", path=path)
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or "transform_matrix" not in frame:
            raise error(f"frame {index} has no transform_matrix", path=path)
    try:
        poses = validate_poses([frame["transform_matrix"] for frame in frames])
    except CameraError as cause:
        if cause.index is None:
            _name_frame(frames, path=path, error=error)
        raise error(cause.message, path=path, hint=cause.hint) from cause
    up = document.get("up", [0, 0, 1])
    if up == [0, 0, 1]:
        poses = (Y_UP_TO_Z_UP.T @ poses).astype(np.float32)
    elif up != [0, 1, 0]:
        raise error(f"up must be [0, 1, 0] or [0, 0, 1], got {up!r}", path=path)
    fovs = (_vertical_fov_deg(_lens(document, frame), size_px, path=path, error=error) for frame in frames)
    return CameraFile(poses, tuple(fovs))


def _name_frame(frames: Sequence[Mapping[str, Any]], *, path: Path | str, error: FileError) -> None:
    """Raise `error` about the first frame whose matrix is no 4x4 numbers."""
    for index, frame in enumerate(frames):
        try:
            shape = _numbers(frame["transform_matrix"], "transform_matrix").shape
        except CameraError as cause:
            raise error(f"frame {index}: {cause.message}", path=path) from cause
        if shape != (4, 4):
            raise error(f"frame {index}: transform_matrix must have shape (4, 4), got {shape}", path=path)


def _lens(document: Mapping[str, Any], frame: Mapping[str, Any]) -> dict[str, Any]:
    """A frame's fields over those of its document. What a frame says of the lens stands for itself: its fl_x is not
    overruled by a fl_y or an angle of the document."""
    inherited = document.items()
    if any(name in frame for name in LENS):
        inherited = [(name, value) for name, value in inherited if name not in LENS]
    return {**dict(inherited), **frame}


def lens_doubt(document: Mapping[str, Any], *, size_px: tuple[int, int]) -> str:
    """Why the lens in a checked transforms.json document is none that the cameras here can have; nothing if it is.

    They are pinholes with square pixels, the middle of the picture on their axis (cx and cy are in pixels of w and h, and say
    nothing without them). `size_px` is (width, height) of the pictures, which may be smaller or larger than w and h, in
    proportion.
    """
    for index, frame in enumerate(document["frames"]):
        fields = _lens(document, frame)
        model = fields.get("camera_model", "PINHOLE")
        if fields.get("is_fisheye", False) is not False:
            return f"frame {index}: is_fisheye must be false, got {fields['is_fisheye']!r}"
        if others := [name for name in PANORAMAS if fields.get(name, False) is not False]:
            return f"frame {index}: {others[0]} must be left out, which makes the lens another than a pinhole"
        if model not in PINHOLES:
            return f"frame {index}: camera_model must be one of {', '.join(PINHOLES)}, got {model!r}"
        width, height = (fields.get(name, size) for name, size in zip(("w", "h"), size_px, strict=True))
        own = index > 0 and ("w" in frame or "h" in frame)  # of another picture than the one that `size_px` is of
        if not own and abs(width / height * size_px[1] / size_px[0] - 1) > LENS_TOLERANCE:
            sizes = f"{width} x {height}, the picture has {size_px[0]} x {size_px[1]} pixels"
            return f"frame {index}: w and h must be in proportion to the picture: they are {sizes}"
        for name, side, size in (("cx", "w", width), ("cy", "h", height)):
            value = fields.get(name, size / 2) if side in fields else size / 2
            least = (0.5 - LENS_TOLERANCE) * size
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= size - least:
                middle = f"{size / 2:g}, the middle of the picture, give or take {LENS_TOLERANCE:.0%} of it"
                return f"frame {index}: {name} must be {middle}, got {value!r}"
        across, down = (_focal_px(fields, axis, size) for axis, size in (("x", width), ("y", height)))
        if across is not None and down is not None and abs(across[1] / down[1] - 1) > LENS_TOLERANCE:
            return f"frame {index}: pixels must be square, and {across[0]} and {down[0]} are of others"
    return ""


def _focal_px(fields: Mapping[str, Any], axis: str, size: float) -> tuple[str, float] | None:
    """What checked fields say of one axis in words, and its focal length in pixels; its angle counts without it alone, as in
    instant-ngp: add-ons write angles of the sensor beside focal lengths of the picture."""
    if (focal := fields.get(f"fl_{axis}")) is not None:
        return f"fl_{axis} {focal:g}", focal
    if (angle := fields.get(f"camera_angle_{axis}")) is not None:
        return f"camera_angle_{axis} {angle:g}", size / 2 / math.tan(angle / 2)
    return None


def doubt_of(poses: NDArray[np.float32]) -> str:
    """Why models, whose views have their subject in the middle and from one distance, are not made for cameras with these
    poses (v, 4, 4); nothing if they are."""
    positions = poses[:, :3, 3].astype(np.float64)
    distances = np.linalg.norm(positions, axis=-1)
    if distances.max() > (1 + DISTANCE_TOLERANCE) * distances.min():
        nearest, farthest = distances.min(), distances.max()
        return f"the cameras stand at distances from {nearest:.3g} to {farthest:.3g}, and models know of one"
    cosines = (poses[:, :3, 2] * positions).sum(-1) / distances  # the third axis points away from what a camera looks at
    angles_deg = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    worst = int(angles_deg.argmax())
    if angles_deg[worst] > AIM_TOLERANCE_DEG:
        return f"camera {worst} looks {angles_deg[worst]:.0f} degrees past the origin, where views are to have their subject"
    return _roll_doubt(poses)


def _roll_doubt(poses: NDArray[np.float32]) -> str:
    right = poses[:, :3, 0].astype(np.float64)
    rolls_deg = np.degrees(np.arcsin(np.clip(np.abs(right[:, 1]), 0, 1)))
    worst = int(rolls_deg.argmax())
    if rolls_deg[worst] <= ROLL_TOLERANCE_DEG:
        return ""
    reason = f"camera {worst} is rolled by {rolls_deg[worst]:.0f} degrees, and views are upright"
    # With the third axis up, as files have it that say nothing, what was horizontal along the second has no third component.
    upright = np.abs(right[:, 2]).max() < math.sin(math.radians(ROLL_TOLERANCE_DEG))
    return f'{reason}: is +Y up in its transforms.json, without "up": [0, 1, 0]?' if upright else reason


def other_lenses(fovs_deg: Sequence[float | None], fov_deg: float) -> str:
    """Which vertical fields of view are others than a model's, such as "30.0 to 65.0 degrees in 2 of 3 views"; nothing if none
    is, give or take FOV_TOLERANCE_DEG. None is an unknown one."""
    others = [fov for fov in fovs_deg if fov is not None and abs(fov - fov_deg) > FOV_TOLERANCE_DEG]
    if not others:
        return ""
    least, most = f"{min(others):.1f}", f"{max(others):.1f}"
    lens = f"{least if least == most else f'{least} to {most}'} degrees"
    return lens if len(others) == len(fovs_deg) else f"{lens} in {len(others)} of {len(fovs_deg)} views"


def _vertical_fov_deg(
    fields: Mapping[str, Any], size_px: tuple[int, int] | None, *, path: Path | str, error: FileError
) -> float | None:
    """Vertical field of view in degrees from a frame's fields over its file's; None if they say nothing of the lens."""
    values: dict[str, float] = dict(zip(("w", "h"), size_px, strict=True)) if size_px else {}
    for name in ("w", "h", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y"):
        if name in fields:
            value, limit = fields[name], math.pi if name.startswith("camera_angle") else 1e9
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value < limit:
                raise error(f"{name} must be a number from 1e-6 to below {limit:g}, got {value!r}", path=path)
            values[name] = value
    focal = values.get("fl_y", values.get("fl_x"))
    if focal is not None and "h" in values:
        return math.degrees(2 * math.atan(values["h"] / 2 / focal))
    if "camera_angle_y" in values:
        return math.degrees(values["camera_angle_y"])
    if "camera_angle_x" in values:
        height_per_width = values["h"] / values["w"] if "w" in values and "h" in values else 1.0
        return math.degrees(2 * math.atan(math.tan(values["camera_angle_x"] / 2) * height_per_width))
    return None


def _numbers(values: ArrayLike | Sequence[Any], name: str) -> NDArray[np.float64]:
    """Real numbers as float64, or CameraError: numpy alone would take strings, booleans and ragged lists."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as cause:
        raise CameraError(f"{name} must be numbers in a regular shape: {cause}") from cause
    if array.dtype.kind not in "iuf":
        raise CameraError(f"{name} must be real numbers, got {array.dtype}")
    return array.astype(np.float64)


def _check_pose(pose: NDArray[np.float64], index: int) -> None:
    if not np.isfinite(pose).all() or np.abs(pose).max() > np.finfo(np.float32).max:
        raise CameraError("the pose has entries that are no finite float32 numbers", index=index)
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > TOLERANCE:
        raise CameraError(
            f"the last row must be 0 0 0 1, got {' '.join(f'{x:g}' for x in pose[3])}",
            index=index,
            hint="matrices are written by rows, with the position in the last column",
        )
    rotation, position = pose[:3, :3], pose[:3, 3]
    error = np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > TOLERANCE:
        raise CameraError(
            f"the rotation is not orthonormal: an entry of RᵀR is off by {error:.3g}, {TOLERANCE:g} is allowed",
            index=index,
            hint="remove scale and shear from the upper left 3x3",
        )
    if np.linalg.det(rotation) < 0:
        raise CameraError(
            "the rotation is a reflection (determinant -1)",
            index=index,
            hint="OpenGL axes are right-handed: columns x right, y up, z backwards",
        )
    if np.linalg.norm(position) < MIN_RADIUS:
        raise CameraError(
            f"the camera is at the origin, closer than {MIN_RADIUS:g}",
            index=index,
            hint="the models need the direction of its position; move it away from the object",
        )
