"""Pictures of heads from any camera, with normal map, depth and part mask.

Edges are antialiased by tracing four more rays in each pixel that differs from a neighbour in part or colour.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvshared.camera import validate_poses
from mvshared.heads.identity import HeadIdentity, sample_identity
from mvshared.numbers import number, whole

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
    size_px, fov_deg = whole("size_px", size_px, 8, MAX_SIZE_PX), number("fov_deg", fov_deg, 1, 120)
    head = identity if isinstance(identity, HeadIdentity) else sample_identity(identity)
    tracer = Tracer(head)
    together = max(1, RAYS // size_px**2)
    groups = [_render_views(tracer, poses[at : at + together], int(size_px), fov_deg) for at in range(0, len(poses), together)]
    return HeadViews(*(np.concatenate(arrays) for arrays in zip(*groups, strict=True)))


def _render_views(tracer: "Tracer", poses: Array, size_px: int, fov_deg: float) -> HeadViews:
    shape, count, total = (len(poses), size_px, size_px), size_px * size_px, len(poses) * size_px * size_px
    rows, columns = np.divmod(np.arange(count), size_px)
    color, normal = np.zeros((3, total), np.float32), np.zeros((3, total), np.float32)
    coverage, depth = np.zeros(total, np.float32), np.full(total, np.inf, np.float32)
    part = np.zeros(total, np.uint8)
    slopes = (np.tile(slope, len(poses)) for slope in _ray_slopes(rows, columns, size_px, fov_deg))
    hits = _trace(tracer, poses, [count] * len(poses), *slopes)
    color[:, hits.ray], normal[:, hits.ray], coverage[hits.ray] = hits.color, hits.normal, 1
    depth[hits.ray], part[hits.ray] = hits.distance, hits.part

    edges = _edges(part.reshape(shape), color.reshape(3, *shape)).reshape(len(poses), count)
    edge = np.flatnonzero(edges)
    if len(edge):
        fine = _trace_edges(tracer, poses, edges, size_px, fov_deg)
        found = np.maximum(fine.hits, 1)
        color[:, edge], normal[:, edge] = fine.color / found, fine.normal / found
        coverage[edge] = fine.hits / len(EDGE_SAMPLES)
        keep = np.isfinite(depth[edge]) & (fine.hits > 0)
        depth[edge] = np.where(keep, depth[edge], fine.nearest)
        part[edge] = np.where(keep, part[edge], fine.part)

    alpha = np.rint(coverage * 255).astype(np.uint8)
    normal /= np.maximum(np.sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]), 1e-6)
    rgba, normals = np.empty((total, 4), np.uint8), np.empty((total, 4), np.uint8)
    rgba[:, 3] = normals[:, 3] = alpha
    for channel in range(3):
        rgba[:, channel] = np.rint(np.clip(color[channel], 0, 1) * 255)
    for index, pose in enumerate(poses):
        here = slice(index * count, (index + 1) * count)
        in_camera = np.rint((_transform(pose[:3, :3].T, normal[:, here]) + 1) * 127.5)
        in_camera[:, alpha[here] == 0] = 0
        normals[here, :3] = in_camera.T
    return HeadViews(
        rgba=rgba.reshape(*shape, 4), normals=normals.reshape(*shape, 4), depth=depth.reshape(shape), parts=part.reshape(shape)
    )


class EdgePixels(NamedTuple):
    """What the rays of each of n edge pixels hit: the sums of colours and normals (3, n), the number of hits, and the depth and
    the part of the nearest (n,)."""

    color: Array
    normal: Array
    hits: Array
    nearest: Array
    part: NDArray[np.uint8]


def _trace_edges(tracer: "Tracer", poses: Array, edges: NDArray[np.bool_], size_px: int, fov_deg: float) -> EdgePixels:
    """Trace more rays through the pixels (v, h * w) that are true in `edges`."""
    across, down = np.asarray(EDGE_SAMPLES, np.float32).T
    samples = len(EDGE_SAMPLES)
    rows, columns = np.divmod(np.nonzero(edges)[1], size_px)
    slopes = _ray_slopes((rows[:, None] + down).ravel(), (columns[:, None] + across).ravel(), size_px, fov_deg)
    hits = _trace(tracer, poses, [samples * int(number) for number in edges.sum(axis=1)], *slopes)
    values = np.zeros((7, len(rows) * samples), np.float32)
    values[:3, hits.ray], values[3:6, hits.ray], values[6, hits.ray] = hits.color, hits.normal, 1
    sums = values[:, ::samples].copy()
    for sample in range(1, samples):
        sums += values[:, sample::samples]
    distance, kinds = np.full(len(rows) * samples, np.inf, np.float32), np.zeros(len(rows) * samples, np.uint8)
    distance[hits.ray], kinds[hits.ray] = hits.distance, hits.part
    nearest, part = distance[::samples].copy(), kinds[::samples].copy()
    for sample in range(1, samples):
        closer = distance[sample::samples] < nearest
        np.copyto(nearest, distance[sample::samples], where=closer)
        np.copyto(part, kinds[sample::samples], where=closer)
    return EdgePixels(sums[:3], sums[3:6], sums[6], nearest, part)


def _trace(tracer: "Tracer", poses: Array, counts: list[int], x: Array, y: Array) -> "Hits":
    """Hits of rays with camera-space directions (x, y, -1), `counts` of them for each view; their distance is along the
    camera's z axis."""
    slopes = np.stack([x, y, -np.ones_like(x)])
    origins, directions = np.empty_like(slopes), np.empty_like(slopes)
    at = 0
    for pose, count in zip(poses, counts, strict=True):
        here = slice(at, at + count)
        origins[:, here], directions[:, here] = pose[:3, 3:], _transform(pose[:3, :3], slopes[:, here])
        at += count
    lengths = np.sqrt((directions * directions).sum(axis=0))
    hits = tracer.trace(origins, directions / lengths)
    return hits._replace(distance=hits.distance / lengths[hits.ray])


def _transform(matrix: Array, vectors: Array) -> Array:
    """Vectors (3, n) times a matrix (3, 3); not by BLAS, whose threads would compete with those of other processes."""
    return matrix[:, :1] * vectors[0] + matrix[:, 1:2] * vectors[1] + matrix[:, 2:] * vectors[2]


def _ray_slopes(rows: NDArray, columns: NDArray, size_px: int, fov_deg: float) -> tuple[Array, Array]:
    """Camera-space x and y of rays with z = -1 through pixel positions (0 is the centre of the first pixel)."""
    half = math.tan(math.radians(fov_deg) / 2)
    scale = 2 * half / size_px
    x = (columns + 0.5) * scale - half
    y = half - (rows + 0.5) * scale
    return x.astype(np.float32), y.astype(np.float32)


def _edges(part: NDArray[np.uint8], color: Array) -> NDArray[np.bool_]:
    """Pixels (v, h, w) that differ from a neighbour in part or clearly in colour (3, v, h, w)."""
    result = np.zeros(part.shape, bool)
    for axis in (1, 2):
        first, second = [slice(None)] * 3, [slice(None)] * 3
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        before, after = tuple(first), tuple(second)
        step = part[after] != part[before]
        for channel in color:
            step |= np.abs(channel[after] - channel[before]) > 0.10
        result[before] |= step
        result[after] |= step
    return result
