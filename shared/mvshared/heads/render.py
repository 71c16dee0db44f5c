"""Pictures of heads from any camera, with normal map, depth and part mask.

Edges are antialiased by tracing four more rays in each pixel that differs from a neighbour in part or colour.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvshared.camera import validate_poses
from mvshared.errors import OptionError
from mvshared.heads.identity import HeadIdentity, sample_identity

if TYPE_CHECKING:
    from mvshared.heads.trace import Hits, Tracer

Array = NDArray[np.floating]  # float32

DEFAULT_RADIUS = 3.4
DEFAULT_FOV_DEG = 30.0
MAX_SIZE_PX = 2048
RAYS = 2**18  # traced together; more save no overhead and cost memory

EDGE_SAMPLES = ((-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))  # rotated grid, in pixels


class HeadViews(NamedTuple):
    """Views of one head.

    `rgba` uint8 (v, h, w, 4), straight alpha; `normals` uint8 (v, h, w, 4), camera space, (n + 1) / 2 * 255 with x right, y up,
    z toward the camera; `depth` float32 (v, h, w) along the optical axis in head units, inf where there is nothing; `parts`
    uint8 (v, h, w), values of `Part`.
    """

    rgba: NDArray[np.uint8]
    normals: NDArray[np.uint8]
    depth: Array
    parts: NDArray[np.uint8]


def render(identity: HeadIdentity | int, cameras: ArrayLike, *, size_px: int, fov_deg: float = DEFAULT_FOV_DEG) -> HeadViews:
    """Render a head from cameras (v, 4, 4), camera-to-world with OpenGL axes, into square pictures.

    `fov_deg` is the field of view across the picture. The look is fixed to the world: light and colours agree between views.
    Raises CameraError for cameras that are no poses; OptionError for a size outside 8 to 2048, a field of view outside 1 to
    120 and a negative identity.
    """
    from mvshared.heads.trace import Tracer  # loads numba, which takes longer than all of mvshared

    poses = validate_poses(cameras)
    if isinstance(size_px, bool) or not isinstance(size_px, int | np.integer) or not 8 <= size_px <= MAX_SIZE_PX:
        raise OptionError("size_px", expected=f"a whole number, 8 to {MAX_SIZE_PX}", got=size_px)
    if not 1 <= fov_deg <= 120:
        raise OptionError("fov_deg", expected="1 to 120", got=fov_deg)
    head = identity if isinstance(identity, HeadIdentity) else sample_identity(identity)
    tracer = Tracer(head)
    together = max(1, RAYS // size_px**2)
    groups = [_render_views(tracer, poses[at : at + together], int(size_px), fov_deg) for at in range(0, len(poses), together)]
    return HeadViews(*(np.concatenate(arrays) for arrays in zip(*groups, strict=True)))


def composite(rgba: NDArray[np.uint8], *, background: tuple[int, int, int] = (255, 255, 255)) -> NDArray[np.uint8]:
    """Pictures uint8 (..., 3) of straight-alpha pictures (..., 4) over a plain background."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return np.rint(mixed).astype(np.uint8)


def _render_views(tracer: "Tracer", poses: Array, size_px: int, fov_deg: float) -> HeadViews:
    shape, count = (len(poses), size_px, size_px), size_px * size_px
    pixels = np.arange(len(poses) * count)
    view, rest = np.divmod(pixels, count)
    rows, columns = np.divmod(rest, size_px)
    color, normal = np.zeros((len(pixels), 3), np.float32), np.zeros((len(pixels), 3), np.float32)
    coverage, depth = np.zeros(len(pixels), np.float32), np.full(len(pixels), np.inf, np.float32)
    part = np.zeros(len(pixels), np.uint8)
    hits = _trace(tracer, poses, view, *_ray_slopes(rows, columns, size_px, fov_deg))
    color[hits.ray], normal[hits.ray], coverage[hits.ray] = hits.color, hits.normal, 1
    depth[hits.ray], part[hits.ray] = hits.distance, hits.part

    edge = np.flatnonzero(_edges(part.reshape(shape), color.reshape(*shape, 3)))
    if len(edge):
        across, down = np.asarray(EDGE_SAMPLES, np.float32).T
        samples = len(EDGE_SAMPLES)
        slopes = _ray_slopes((rows[edge, None] + down).ravel(), (columns[edge, None] + across).ravel(), size_px, fov_deg)
        fine = _trace(tracer, poses, np.repeat(view[edge], samples), *slopes)
        owner = fine.ray // samples
        sums = np.zeros((len(edge), 7), np.float32)
        np.add.at(sums, owner, np.concatenate([fine.color, fine.normal, np.ones((len(owner), 1), np.float32)], axis=1))
        found = np.maximum(sums[:, 6:], 1)
        color[edge], normal[edge] = sums[:, :3] / found, sums[:, 3:6] / found
        coverage[edge] = sums[:, 6] / samples
        nearest = np.full(len(edge), np.inf, np.float32)
        np.minimum.at(nearest, owner, fine.distance)
        kinds = np.zeros(len(edge), np.uint8)
        closest = fine.distance == nearest[owner]
        kinds[owner[closest]] = fine.part[closest]
        keep = np.isfinite(depth[edge]) & (sums[:, 6] > 0)
        depth[edge] = np.where(keep, depth[edge], nearest)
        part[edge] = np.where(keep, part[edge], kinds)

    length = np.linalg.norm(normal, axis=1, keepdims=True)
    unit = (normal / np.maximum(length, 1e-6)).reshape(len(poses), count, 3)
    in_camera = np.stack([one @ pose[:3, :3] for one, pose in zip(unit, poses, strict=True)]).reshape(-1, 3)
    alpha = np.rint(coverage * 255).astype(np.uint8)[:, None]
    rgb = np.rint(np.clip(color, 0, 1) * 255).astype(np.uint8)
    normal_rgb = np.where(alpha > 0, np.rint((in_camera + 1) * 127.5), 0).astype(np.uint8)
    return HeadViews(
        rgba=np.concatenate([rgb, alpha], axis=1).reshape(*shape, 4),
        normals=np.concatenate([normal_rgb, alpha], axis=1).reshape(*shape, 4),
        depth=depth.reshape(shape),
        parts=part.reshape(shape),
    )


def _trace(tracer: "Tracer", poses: Array, view: NDArray[np.int64], x: Array, y: Array) -> "Hits":
    """Hits of rays of the given views with camera-space directions (x, y, -1), their distance along the camera's z axis."""
    slopes = np.stack([x, y, -np.ones_like(x)])
    directions = np.concatenate([pose[:3, :3] @ slopes[:, view == index] for index, pose in enumerate(poses)], axis=1)
    lengths = np.sqrt((directions * directions).sum(axis=0))
    hits = tracer.trace(poses[view, :3, 3].T, directions / lengths)
    return hits._replace(distance=hits.distance / lengths[hits.ray])


def _ray_slopes(rows: NDArray, columns: NDArray, size_px: int, fov_deg: float) -> tuple[Array, Array]:
    """Camera-space x and y of rays with z = -1 through pixel positions (0 is the centre of the first pixel)."""
    half = math.tan(math.radians(fov_deg) / 2)
    scale = 2 * half / size_px
    x = (columns + 0.5) * scale - half
    y = half - (rows + 0.5) * scale
    return x.astype(np.float32), y.astype(np.float32)


def _edges(part: NDArray[np.uint8], color: Array) -> NDArray[np.bool_]:
    """Pixels (v, h, w) that differ from a neighbour in part or clearly in colour."""
    result = np.zeros(part.shape, bool)
    for axis in (1, 2):
        step = np.diff(part.astype(np.int16), axis=axis) != 0
        step |= np.abs(np.diff(color, axis=axis)).max(axis=-1) > 0.10
        first, second = [slice(None)] * 3, [slice(None)] * 3
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        result[tuple(first)] |= step
        result[tuple(second)] |= step
    return result
