"""Normal maps of a mesh for given cameras, from an OBJ, PLY or GLB file.

trimesh reads the file and Embree, through trimesh, finds what each ray hits; both come with the extra `mesh`.
"""

import math
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.camera import Y_UP_TO_Z_UP, azimuth_elevation
from mvshared.config import Framing
from mvshared.errors import BackendError, CameraError, MeshError, OptionError
from mvshared.normals import NormalSpace
from mvshared.obj_files import plain_obj

SUFFIXES = (".obj", ".ply", ".glb")
CREASE_DEG = 40.0  # faces that meet at a larger angle have an edge between them, in files without normals of their own
CREASE_FACES = 256  # a vertex of more faces, such as the tip of a fine cone, is an edge for all of them
SAMPLES = 4  # rays across a pixel
RAYS = 2**19  # traced together
LARGEST = 1e12  # of the coordinates; beyond, float32 leaves nothing of a scene
STANDING_DEG = (-20.0, 30.0)  # elevations within which a place for a standing subject has a meaning
PADDED_SHARE = 0.9  # of the frame, for models whose framing says no place for the subject
STEPS = 60  # of the bisection of a scale, to the last bit

Array = NDArray[np.float64]


class Mesh(NamedTuple):
    """Triangles: vertices float64 (n, 3), faces int (f, 3), and a unit normal for each face's corners (f, 3, 3)."""

    vertices: Array
    faces: NDArray[np.int64]
    normals: Array


def load_mesh(path: Path | str, *, up: str = "y") -> Mesh:
    """All triangles of an OBJ, PLY or GLB file, those of a scene where its transforms put them; `up` is its axis, y or z.

    Normals are the file's where it has any; else those of the faces, averaged at every vertex over faces that meet at less
    than CREASE_DEG. Front is +Z of a y-up file and -Y of a z-up one.

    Raises OptionError for another axis, BackendError if trimesh or Embree is not installed, and MeshError for a file that is
    missing, of another kind, damaged, without faces, or has coordinates that are not finite.
    """
    if up not in ("y", "z"):
        raise OptionError("up", expected="y or z", got=up)
    path = Path(path)
    if not path.is_file():
        raise MeshError("is a folder, and a file is needed" if path.is_dir() else "no such file", path=path)
    if path.suffix.lower() not in SUFFIXES:
        hint = f"convert it to one of {', '.join(SUFFIXES)}, by Blender for example"
        raise MeshError(f"is of no kind that can be read: {path.suffix or 'no suffix'}", path=path, hint=hint)
    parts = _geometries(path)
    counts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    mesh = Mesh(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.faces + first for part, first in zip(parts, counts, strict=False)]),
        np.concatenate([part.normals for part in parts]),
    )
    return mesh if up == "y" else _moved(mesh, Y_UP_TO_Z_UP.T)


def _geometries(path: Path) -> list[Mesh]:
    """The parts of the file, each where the scene's transforms put it."""
    trimesh, _ = _libraries()
    kind = path.suffix[1:].lower()
    try:
        # A broken scene graph shows in its transforms; materials and pictures are not needed.
        options: dict[str, Any] = {"skip_materials": True} if kind == "obj" else {}
        content = path.read_bytes()
        file = BytesIO(plain_obj(content) if kind == "obj" else content)
        scene = trimesh.load_scene(file, file_type=kind, process=False, **options)
        nodes = [scene.graph[name] for name in scene.graph.nodes_geometry]
        placed = [(np.asarray(matrix, np.float64), scene.geometry[name]) for matrix, name in nodes]
    except BackendError:
        raise
    except Exception as cause:  # trimesh's parsers meet damaged data with nearly every class of error
        reason = str(cause) or type(cause).__name__
        hint = "the file may be damaged: copy it again"
        if kind == "ply":
            hint += "; or a binary PLY whose faces have different numbers of corners: export it as triangles"
        raise MeshError(f"cannot be read: {reason}", path=path, hint=hint) from cause
    parts = [
        _moved(_with_normals(geometry, path), matrix)
        for matrix, geometry in placed
        if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces)
    ]
    parts = [part for part in parts if len(part.faces)]
    if not parts:
        points = sum(len(geometry.vertices) for _, geometry in placed if not len(getattr(geometry, "faces", ())))
        what = f"is a cloud of {points} points without faces" if points else "holds no faces with an area"
        raise MeshError(what, path=path, hint="a surface is needed: make a mesh of it first")
    return parts


def _libraries() -> tuple[Any, Any]:
    """trimesh and its intersector of rays. Raises BackendError if they are not installed."""
    try:
        import trimesh
        from trimesh.ray.ray_pyembree import RayMeshIntersector
    except ImportError as cause:
        name = (cause.name or "trimesh").partition(".")[0]
        raise BackendError(f"{name} is not installed", backend="mesh", hint="pip install 'mvmlx[mesh]'") from cause
    return trimesh, RayMeshIntersector


def _with_normals(geometry: Any, path: Path) -> Mesh:
    """A part of the file, without triangles of no area, with normals at the corners."""
    trimesh, _ = _libraries()
    vertices, faces = np.array(geometry.vertices, np.float64), np.array(geometry.faces, np.int64)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise MeshError(f"a face names vertex {faces.max()} of {len(vertices)}", path=path, hint="the file may be damaged")
    used = vertices[faces]
    if not (np.abs(used) < LARGEST).all():  # false for NaN, too
        raise MeshError(f"has coordinates that are NaN, infinite, or beyond {LARGEST:g}", path=path)
    given = np.array(geometry.vertex_normals, np.float64)
    # trimesh computes what a file lacks. Normals that are those say nothing of edges.
    computed = trimesh.Trimesh(vertices, faces, process=False).vertex_normals
    own = given.shape == vertices.shape and not np.allclose(given, computed, atol=1e-3)
    crossed = np.cross(used[:, 1] - used[:, 0], used[:, 2] - used[:, 0])
    kept = np.linalg.norm(crossed, axis=-1) > 0
    faces, flat = faces[kept], _unit(crossed[kept])
    if not own:
        return Mesh(vertices, faces, _creased(vertices, faces, flat))
    corners = np.nan_to_num(given[faces])
    zero = np.linalg.norm(corners, axis=-1, keepdims=True) < 1e-6
    return Mesh(vertices, faces, _unit(np.where(zero, flat[:, None], corners)))


def _creased(vertices: Array, faces: NDArray[np.int64], flat: Array) -> Array:
    """Normals (f, 3, 3) of corners: the mean, weighted by angle, of the unit face normals `flat` (f, 3) around the vertex that
    are within CREASE_DEG of the corner's own."""
    points = vertices[faces]
    ahead, behind = _unit(np.roll(points, -1, axis=1) - points), _unit(np.roll(points, 1, axis=1) - points)
    weights = np.arccos(np.clip((ahead * behind).sum(axis=-1), -1, 1)).ravel()
    # The same place may be several vertices, at a seam of the texture.
    _, place = np.unique(points.reshape(-1, 3), axis=0, return_inverse=True)
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place)
    starts, size = (np.cumsum(counts) - counts)[place[order]], counts[place[order]]
    normals = np.repeat(flat, 3, axis=0)
    sums = normals.copy()
    blocks = np.flatnonzero(size <= CREASE_FACES)
    limits = np.searchsorted(np.cumsum(size[blocks]), np.arange(0, size[blocks].sum() + 1, 2**22), side="left")
    for block in np.split(blocks, limits[1:]):
        if not len(block):
            continue
        reach = size[block]
        inside = np.arange(reach.sum()) - np.repeat(np.cumsum(reach) - reach, reach)
        others = order[np.repeat(starts[block], reach) + inside]
        mine = np.repeat(order[block], reach)
        near = (normals[others] * normals[mine]).sum(axis=-1) >= math.cos(math.radians(CREASE_DEG))
        weighted = normals[others] * (weights[others] * near)[:, None]
        sums[order[block]] = np.add.reduceat(weighted, np.cumsum(reach) - reach, axis=0)
    lost = np.linalg.norm(sums, axis=-1, keepdims=True) < 1e-9
    return _unit(np.where(lost, normals, sums)).reshape(-1, 3, 3)


def _unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300)


def _moved(mesh: Mesh, matrix: Array) -> Mesh:
    """The mesh transformed by a matrix (4, 4), without triangles that it flattens to nothing."""
    linear = matrix[:3, :3]
    vertices = mesh.vertices @ linear.T + matrix[:3, 3]
    if np.linalg.det(linear) == 0:
        return Mesh(vertices, mesh.faces[:0], mesh.normals[:0])
    return Mesh(vertices, mesh.faces, _unit(mesh.normals @ np.linalg.inv(linear)))


def fit_mesh(mesh: Mesh, poses: NDArray[np.float32], *, fov_deg: float, framing: Framing) -> Mesh:
    """The mesh moved and scaled so that it fills the frame of cameras at poses (v, 4, 4) as `framing` says.

    In mode `subject` the middle of its lower side is on the framing's bottom line, seen from the cameras' median elevation and
    whatever the azimuth, and it is as large as the framing's height and width allow. In other modes the centre of its box is
    the origin, and the view in which it is largest shows it on 90 percent of the frame. Raises MeshError for a mesh that is a
    point.
    """
    used = mesh.vertices[np.unique(mesh.faces)]
    low, high = used.min(axis=0), used.max(axis=0)
    extent = (high - low).max()
    if not extent > 0:
        raise MeshError("has no extent")
    tangent = math.tan(math.radians(fov_deg) / 2)
    stand = azimuth_elevation(poses)
    radius, elevation_deg = float(np.median(stand.radii)), float(np.median(stand.elevations_deg))
    origin, base = (low + high) / 2, np.zeros(3)
    if framing.mode == "subject":
        origin[1] = low[1]
        points = (used - origin) / extent
        profile = np.stack([np.hypot(points[:, 0], points[:, 2]), points[:, 1]])
        elevation = math.radians(min(max(elevation_deg, STANDING_DEG[0]), STANDING_DEG[1]))
        line = tangent * (1 - 2 * framing.bottom)
        base[1] = line * radius / (math.cos(elevation) + line * math.sin(elevation))
        scale = _largest(lambda s: _stands(s * profile + base[:2, None], radius, elevation, tangent, framing), radius)
    else:
        points = (used - origin) / extent
        scale = _largest(lambda s: _is_seen(s * points, poses.astype(np.float64), tangent * PADDED_SHARE), radius)
    return mesh._replace(vertices=(mesh.vertices - origin) * (scale / extent) + base)


def _largest(fits: Any, limit: float) -> float:
    """The largest scale up to twice the limit that fits, where every smaller one does."""
    low, high = 0.0, 2 * limit
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _stands(profile: Array, radius: float, elevation: float, tangent: float, framing: Framing) -> bool:
    """Whether what turns about the y axis at distances and heights (2, n) stays in the framing's width and below its top."""
    around, height = profile
    cosine, sine = math.cos(elevation), math.sin(elevation)
    middle = radius - height * sine
    wide = tangent * framing.width
    if (middle <= around * cosine).any() or (around**2 > wide**2 * (middle**2 - (around * cosine) ** 2)).any():
        return False
    top = tangent * (1 - 2 * (framing.bottom - framing.height))
    # Of a circle around the axis the nearest or the farthest point is highest in the picture.
    return all((height * cosine - side * around * sine <= top * (middle - side * around * cosine)).all() for side in (1, -1))


def _is_seen(points: Array, poses: Array, tangent: float) -> bool:
    """Whether all points (n, 3) are within that tangent of the axis of each camera, across and up."""
    for pose in poses:
        x, y, z = ((points - pose[:3, 3]) @ pose[:3, :3]).T
        if (np.maximum(np.abs(x), np.abs(y)) > -z * tangent).any():
            return False
    return True


class NormalRenderer:
    """Renders a mesh: what its rays hit is set up once for all views."""

    def __init__(self, mesh: Mesh) -> None:
        trimesh, intersector = _libraries()
        # The normals are the mesh's own, for triangles in its order.
        self.rays = intersector(trimesh.Trimesh(mesh.vertices, mesh.faces, process=False))
        self.corners, self.normals = mesh.vertices[mesh.faces], mesh.normals
        self.flat = _unit(np.cross(self.corners[:, 1] - self.corners[:, 0], self.corners[:, 2] - self.corners[:, 0]))

    def render_all(
        self, poses: Iterable[NDArray[np.float32]], *, size_px: int, fov_deg: float, space: NormalSpace
    ) -> NDArray[np.uint8]:
        """The maps uint8 (v, size_px, size_px, 4) from poses (v, 4, 4), each as `render` makes it."""
        options: Any = {"size_px": size_px, "fov_deg": fov_deg, "space": space}
        return np.stack([self.render(pose, index=index, **options) for index, pose in enumerate(poses)])

    def render(
        self, pose: NDArray[np.float32], *, index: int, size_px: int, fov_deg: float, space: NormalSpace
    ) -> NDArray[np.uint8]:
        """The normal map uint8 (size_px, size_px, 4) from a pose (4, 4), with the share of the surface in a pixel as alpha.

        No normal faces away from the camera: the back of a surface has that of its front, turned around, and where an
        interpolated normal looks past the outline of coarse triangles it is bent back. Raises CameraError with the view's
        `index` if nothing of the mesh is in the frame.
        """
        rotation, position = pose[:3, :3].astype(np.float64), pose[:3, 3].astype(np.float64)
        tangent = math.tan(math.radians(fov_deg) / 2)
        steps = ((np.arange(size_px * SAMPLES) + 0.5) / (size_px * SAMPLES) * 2 - 1) * tangent
        rows = max(1, RAYS // (size_px * SAMPLES**2))
        summed, covered = [], []
        for first in range(0, size_px, rows):
            y, x = np.meshgrid(-steps[first * SAMPLES : (first + rows) * SAMPLES], steps, indexing="ij")
            slopes = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3)
            hits = self._hits(position, _unit(slopes @ rotation.T)) @ rotation
            samples = hits.reshape(-1, SAMPLES, size_px, SAMPLES, 3)
            summed.append(samples.sum(axis=(1, 3)))
            covered.append(samples.any(axis=-1).mean(axis=(1, 3)))
        alpha = np.concatenate(covered)[..., None]
        if not alpha.any():
            raise CameraError("sees nothing of the mesh", index=index, hint="let the mesh be fitted, or move the camera")
        sums = np.concatenate(summed)
        vectors = _unit(sums if space == "camera" else sums @ rotation.T)
        values = np.where(alpha > 0, np.rint((vectors + 1) * 127.5), 128)
        return np.concatenate([values, np.rint(alpha * 255)], axis=-1).astype(np.uint8)

    def _hits(self, origin: Array, directions: Array) -> Array:
        """World-space normals (n, 3) of what rays with unit directions (n, 3) hit, 0 for those that hit nothing."""
        found = self.rays.intersects_first(np.broadcast_to(origin, directions.shape), directions)
        hit = found >= 0
        triangle, ray = found[hit], directions[hit]
        normal = _unit((self.normals[triangle] * self._places(origin, ray, triangle)[..., None]).sum(axis=1))
        flat = self.flat[triangle]
        normal = np.where((normal == 0).all(axis=-1, keepdims=True), flat, normal)
        # The file's normals tell the front from the back; the winding of its faces may say the opposite.
        flat = np.where((flat * normal).sum(axis=-1, keepdims=True) < 0, -flat, flat)
        normal = np.where((flat * ray).sum(axis=-1, keepdims=True) > 0, -normal, normal)
        away = (normal * ray).sum(axis=-1, keepdims=True)
        bent = normal - ray * away
        normal = np.where(away > 0, np.where(np.linalg.norm(bent, axis=-1, keepdims=True) < 1e-6, -ray, bent), normal)
        result = np.zeros_like(directions)
        result[hit] = _unit(normal)
        return result

    def _places(self, origin: Array, rays: Array, triangle: NDArray[np.int64]) -> Array:
        """Barycentric coordinates (n, 3) of where rays (n, 3) meet their triangles (Moeller and Trumbore, 1997)."""
        first, second, third = self.corners[triangle].swapaxes(0, 1)
        one, two, offset = second - first, third - first, origin - first
        across = np.cross(rays, two)
        volume = (one * across).sum(axis=-1)
        safe = np.where(volume == 0, 1, volume)
        u = (offset * across).sum(axis=-1) / safe
        v = (rays * np.cross(offset, one)).sum(axis=-1) / safe
        places = np.clip(np.stack([1 - u - v, u, v], axis=-1), 0, 1)
        places[volume == 0] = 1 / 3
        return places / places.sum(axis=-1, keepdims=True)
