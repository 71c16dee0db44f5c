"""Pictures of heads: sphere tracing (Hart 1996) from any camera, with normal map, depth and part mask.

Per identity the distance field is sampled once on a coarse grid, so that rays cross empty space by looking distances up; the exact
field is evaluated near surfaces only. Edges are antialiased by tracing four more rays in each pixel whose neighbours differ.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvshared.camera import validate_poses
from mvshared.errors import OptionError
from mvshared.heads.identity import HeadIdentity, sample_identity
from mvshared.heads.shape import HeadShape, Part

DEFAULT_RADIUS = 3.4
DEFAULT_FOV_DEG = 30.0
MAX_SIZE_PX = 2048

BOX = 1.02  # half the width of the cube that holds every head (shoulders are cut at its lower face)
GRID = 48
CHUNK = 16384  # points evaluated together: their arrays stay in the cache
REFINE_STEPS = 64  # few rays, those that skim a surface, take more than ten
HIT = 2e-3
LEAST_STEP = 4e-3
EDGE_SAMPLES = ((-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))  # rotated grid, in pixels

Array = NDArray[np.float32]


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


class _Hits(NamedTuple):
    """Shaded surface points of the rays that hit: indices into the rays, colours, normals (world), distance and part."""

    ray: NDArray[np.int64]
    color: Array
    normal: Array
    distance: Array
    part: NDArray[np.uint8]


def render(
    identity: HeadIdentity | int, cameras: ArrayLike, *, size_px: int, fov_deg: float = DEFAULT_FOV_DEG
) -> HeadViews:
    """Render a head from cameras (v, 4, 4), camera-to-world with OpenGL axes, into square pictures.

    `fov_deg` is the field of view across the picture. The look is fixed to the world: light and colours agree between views.
    Raises CameraError for cameras that are no poses, OptionError for a size outside 8 to 2048 or a field of view outside 1 to 120.
    """
    poses = validate_poses(cameras)
    if not 8 <= size_px <= MAX_SIZE_PX:
        raise OptionError("size_px", expected=f"8 to {MAX_SIZE_PX}", got=size_px)
    if not 1 <= fov_deg <= 120:
        raise OptionError("fov_deg", expected="1 to 120", got=fov_deg)
    head = identity if isinstance(identity, HeadIdentity) else sample_identity(identity)
    tracer = _Tracer(head)
    views = [_render_view(tracer, pose, size_px, fov_deg) for pose in poses]
    return HeadViews(*(np.stack(arrays) for arrays in zip(*views, strict=True)))


def composite(rgba: NDArray[np.uint8], *, background: tuple[int, int, int] = (255, 255, 255)) -> NDArray[np.uint8]:
    """Pictures uint8 (..., 3) of straight-alpha pictures (..., 4) over a plain background."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return np.rint(mixed).astype(np.uint8)


def _render_view(tracer: "_Tracer", pose: Array, size_px: int, fov_deg: float) -> HeadViews:
    count = size_px * size_px
    rows, columns = np.divmod(np.arange(count), size_px)
    hits = tracer.trace(pose, *_ray_slopes(rows, columns, size_px, fov_deg))
    color, normal = np.zeros((count, 3), np.float32), np.zeros((count, 3), np.float32)
    coverage, distance = np.zeros(count, np.float32), np.full(count, np.inf, np.float32)
    part = np.zeros(count, np.uint8)
    color[hits.ray], normal[hits.ray], coverage[hits.ray] = hits.color, hits.normal, 1
    distance[hits.ray], part[hits.ray] = hits.distance, hits.part

    edge = np.flatnonzero(_edges(part.reshape(size_px, size_px), color.reshape(size_px, size_px, 3)))
    if len(edge):
        offsets = np.asarray(EDGE_SAMPLES, np.float32)
        fine = tracer.trace(
            pose,
            *_ray_slopes(
                (rows[edge, None] + offsets[:, 1]).ravel(), (columns[edge, None] + offsets[:, 0]).ravel(), size_px, fov_deg
            ),
        )
        owner = fine.ray // len(offsets)
        sums = np.zeros((len(edge), 7), np.float32)
        np.add.at(sums, owner, np.concatenate([fine.color, fine.normal, np.ones((len(owner), 1), np.float32)], axis=1))
        found = np.maximum(sums[:, 6:], 1)
        color[edge], normal[edge] = sums[:, :3] / found, sums[:, 3:6] / found
        coverage[edge] = sums[:, 6] / len(offsets)
        nearest = np.full(len(edge), np.inf, np.float32)
        np.minimum.at(nearest, owner, fine.distance)
        kinds = np.zeros(len(edge), np.uint8)
        closest = fine.distance == nearest[owner]
        kinds[owner[closest]] = fine.part[closest]
        keep = np.isfinite(distance[edge]) & (sums[:, 6] > 0)
        distance[edge] = np.where(keep, distance[edge], nearest)
        part[edge] = np.where(keep, part[edge], kinds)

    length = np.linalg.norm(normal, axis=1, keepdims=True)
    in_camera = (normal / np.maximum(length, 1e-6)) @ pose[:3, :3]
    alpha = np.rint(coverage * 255).astype(np.uint8)[:, None]
    rgb = np.rint(np.clip(color, 0, 1) * 255).astype(np.uint8)
    normal_rgb = np.where(alpha > 0, np.rint((in_camera + 1) * 127.5), 0).astype(np.uint8)
    shape = (size_px, size_px)
    return HeadViews(
        rgba=np.concatenate([rgb, alpha], axis=1).reshape(*shape, 4),
        normals=np.concatenate([normal_rgb, alpha], axis=1).reshape(*shape, 4),
        depth=distance.reshape(shape),
        parts=part.reshape(shape),
    )


def _ray_slopes(rows: NDArray, columns: NDArray, size_px: int, fov_deg: float) -> tuple[Array, Array]:
    """Camera-space x and y of rays with z = -1 through pixel positions (0 is the centre of the first pixel)."""
    half = math.tan(math.radians(fov_deg) / 2)
    scale = 2 * half / size_px
    x = (columns + 0.5) * scale - half
    y = half - (rows + 0.5) * scale
    return x.astype(np.float32), y.astype(np.float32)


def _edges(part: NDArray[np.uint8], color: Array) -> NDArray[np.bool_]:
    """Pixels (h, w) that differ from a neighbour in part or clearly in colour."""
    result = np.zeros(part.shape, bool)
    for axis in (0, 1):
        step = np.diff(part.astype(np.int16), axis=axis) != 0
        step |= np.abs(np.diff(color, axis=axis)).max(axis=-1) > 0.10
        first, second = [slice(None)] * 2, [slice(None)] * 2
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        result[tuple(first)] |= step
        result[tuple(second)] |= step
    return result


class _Tracer:
    """Finds and shades the surface points of rays."""

    def __init__(self, identity: HeadIdentity) -> None:
        self.shape = HeadShape(identity)
        self.light = np.asarray(identity.light, np.float32)
        centers = ((np.arange(GRID, dtype=np.float32) + 0.5) * (2 * BOX / GRID) - BOX).astype(np.float32)
        x, y, z = (axis.ravel() for axis in np.meshgrid(centers, centers, centers, indexing="ij"))
        field = np.concatenate(
            [self.shape.distance(x[at : at + CHUNK], y[at : at + CHUNK], z[at : at + CHUNK]) for at in range(0, len(x), CHUNK)]
        )
        # Half a voxel's diagonal is the farthest a point can be from its voxel's centre; the field's slope may exceed 1 a little.
        self.margin = math.sqrt(3) * BOX / GRID
        self.grid = (0.8 * field - self.margin).astype(np.float32)

    def trace(self, pose: Array, x: Array, y: Array) -> _Hits:
        """Shade the first surface points of rays with camera-space directions (x, y, -1)."""
        parts = [self._trace_chunk(pose, x[at : at + CHUNK], y[at : at + CHUNK], at) for at in range(0, len(x), CHUNK)]
        return _Hits(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _trace_chunk(self, pose: Array, x: Array, y: Array, first: int) -> _Hits:
        rotation, origin = pose[:3, :3], pose[:3, 3]
        directions = np.stack([x, y, -np.ones_like(x)]).T @ rotation.T
        lengths = np.linalg.norm(directions, axis=1)
        directions = (directions / lengths[:, None]).astype(np.float32)
        ray, near, far = _clip_to_box(origin, directions)
        d = np.ascontiguousarray(directions[ray].T)
        found, t = self._march(origin, d, near, far)
        ray, d = ray[found], d[:, found]
        hit, t = self._refine(origin, d, t, far[found])
        ray, d = ray[hit], np.ascontiguousarray(d[:, hit])
        point = origin[:, None] + t * d
        color, normal, part = self._shade(point, d)
        return _Hits(ray + first, color, normal, (t / lengths[ray]).astype(np.float32), part)

    def _march(self, origin: Array, d: Array, near: Array, far: Array) -> tuple[NDArray[np.int64], Array]:
        """Rays that come near a surface, by index, and how far they went."""
        t = near.copy()
        active = np.arange(len(t))
        reached = []
        scale, least = np.float32(GRID / (2 * BOX)), np.float32(BOX / GRID)
        while len(active):
            position = ((origin[:, None] + t[active] * d[:, active] + np.float32(BOX)) * scale).astype(np.int32)
            np.clip(position, 0, GRID - 1, out=position)
            safe = self.grid[(position[0] * GRID + position[1]) * GRID + position[2]]
            close = safe < least * np.float32(0.5)
            reached.append(active[close])
            active, safe = active[~close], safe[~close]
            t[active] += np.maximum(safe, least)
            active = active[t[active] < far[active]]
        found = np.sort(np.concatenate(reached)) if reached else np.zeros(0, np.int64)
        return found, t[found]

    def _refine(self, origin: Array, d: Array, t: Array, far: Array) -> tuple[NDArray[np.int64], Array]:
        """Sphere tracing with the exact field: rays that hit, by index, and their distances."""
        t = t.copy()
        active = np.arange(len(t))
        hits = []
        for step in range(REFINE_STEPS):
            if not len(active):
                break
            x, y, z = origin[:, None] + t[active] * d[:, active]
            distance = self.shape.distance(x, y, z)
            done = distance < HIT
            least = np.float32(LEAST_STEP * (1 + step / 8))  # grows, so that rays along a crease come to its end
            t[active] += np.where(done, distance, np.maximum(distance * np.float32(0.95), least))
            hits.append(active[done])
            active = active[~done]
            active = active[t[active] < far[active]]
        hit = np.sort(np.concatenate(hits)) if hits else np.zeros(0, np.int64)
        return hit, t[hit]

    def _shade(self, point: Array, d: Array) -> tuple[Array, Array, NDArray[np.uint8]]:
        """Colours (n, 3), normals (n, 3) and parts (n,) of surface points (3, n) seen along d (3, n)."""
        if not point.shape[1]:
            return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), np.zeros(0, np.uint8)
        x, y, z = point
        kinds = np.asarray([int(part) for part in self.shape.parts], np.uint8)
        surface = kinds[self.shape.distances(x, y, z).argmin(axis=0)]
        normal = self._normal(x, y, z)
        base, part = self.shape.paint(x, y, z, surface)
        occlusion = np.ones_like(x)
        for reach in (0.06, 0.16):
            free = self.shape.distance(*(point + np.float32(reach) * normal))
            occlusion *= np.float32(0.45) + np.float32(0.55) * np.clip(free / np.float32(reach), 0, 1)
        lambert = np.clip((self.light @ normal + np.float32(0.25)) / np.float32(1.25), 0, 1)
        sky = np.float32(0.5) + np.float32(0.5) * normal[1]
        shade = occlusion * (np.float32(0.46) + np.float32(0.18) * sky + np.float32(0.50) * lambert)
        color = base * shade[:, None]
        halfway = self.light[:, None] - d
        halfway /= np.linalg.norm(halfway, axis=0)
        gloss = np.clip((halfway * normal).sum(axis=0), 0, 1) ** 40
        strength = np.zeros(len(Part), np.float32)
        strength[[Part.EYE, Part.GLASSES]], strength[[Part.HAIR, Part.HAT]], strength[Part.SKIN] = 0.35, 0.10, 0.06
        color += (strength[part] * gloss * occlusion)[:, None]
        return color.astype(np.float32), normal.T.astype(np.float32), part

    def _normal(self, x: Array, y: Array, z: Array) -> Array:
        """Unit normals (3, n) by differences over a tetrahedron."""
        e = np.float32(4e-3)
        gradient = np.zeros((3, len(x)), np.float32)
        for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            a, b, c = (np.float32(sign) * e for sign in corner)
            gradient += np.asarray(corner, np.float32)[:, None] * self.shape.distance(x + a, y + b, z + c)
        return gradient / np.maximum(np.linalg.norm(gradient, axis=0), np.float32(1e-9))


def _clip_to_box(origin: Array, directions: Array) -> tuple[NDArray[np.int64], Array, Array]:
    """Rays that meet the cube, by index, and where they enter and leave it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (-np.float32(BOX) - origin) / directions, (np.float32(BOX) - origin) / directions
    near = np.fmin(a, b).max(axis=1)
    far = np.fmax(a, b).min(axis=1)
    near = np.maximum(near, 0)
    ray = np.flatnonzero(near < far)
    return ray, near[ray].astype(np.float32), far[ray].astype(np.float32)
