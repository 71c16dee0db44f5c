"""What a run leaves behind: transforms.json for 3D trainers.

transforms.json: https://docs.nerf.studio/quickstart/data_conventions.html and the loader of
https://github.com/NVlabs/instant-ngp (src/nerf_loader.cu, docs/nerf_dataset_tips.md).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mvshared.camera import validate_poses
from mvshared.errors import OptionError


def transforms(
    poses: ArrayLike,
    *,
    width_px: int,
    height_px: int,
    fov_deg: float,
    file_names: Sequence[str],
    normal_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The transforms.json document of pictures `file_names`, taken from poses (v, 4, 4) with the vertical field of view.

    The matrices are the poses as they are: OpenGL axes, in a world whose up is +Y. Trainers read that without conversion:
    instant-ngp takes the up axis from `up` and maps the world into its unit cube by `scale` and `offset`, chosen so that what
    the cameras see at the origin fills the cube (its default suits cameras four units away); nerfstudio turns and scales the
    world from the cameras themselves. Pixels are square and the principal point is the centre. `normal_names` become
    `normal_file_path` of the frames, a field of this project that trainers skip.

    Raises CameraError for what is no pose, OptionError for everything else.
    """
    checked = validate_poses(poses)
    for name, value in (("width_px", width_px), ("height_px", height_px)):
        if value < 1:
            raise OptionError(name, expected="at least 1", got=value)
    if not 0 < fov_deg < 180:
        raise OptionError("fov_deg", expected="between 0 and 180", got=fov_deg)
    for name, names in (("file_names", file_names), ("normal_names", normal_names)):
        if names is not None and len(names) != len(checked):
            raise OptionError(name, expected=f"one name per view ({len(checked)})", got=len(names))

    tangent_y = math.tan(math.radians(fov_deg) / 2)
    tangent_x = tangent_y * width_px / height_px
    focal_px = height_px / 2 / tangent_y
    radius = float(np.linalg.norm(checked[:, :3, 3].astype(np.float64), axis=-1).max())
    frames: list[dict[str, Any]] = [
        {"file_path": name, "transform_matrix": pose.tolist()} for name, pose in zip(file_names, checked, strict=True)
    ]
    for frame, normal_name in zip(frames, normal_names or (), strict=normal_names is not None):
        frame["normal_file_path"] = normal_name
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
