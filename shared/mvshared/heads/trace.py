"""Rays against a head: sphere tracing (Hart 1996, "Sphere tracing") and the shading of what they hit.

Per identity the distance fields are sampled once on a coarse grid. Rays cross empty space by looking distances up; near
surfaces the exact field is evaluated, but only of those parts that can be the nearest one somewhere in the point's voxel.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.heads import loops
from mvshared.heads.grid import BOX, CHUNK, GRID, HeadGrid
from mvshared.heads.identity import HeadIdentity
from mvshared.heads.jit import COMPILED
from mvshared.heads.loops import CORNERS, HIT, LEAST_STEP, NORMAL_STEP, REACHES, REFINE_STEPS
from mvshared.heads.paint import paint
from mvshared.heads.parts import Part
from mvshared.heads.primitives import Array
from mvshared.heads.shape import HeadShape

SKY = (0.60, 0.61, 0.66)
GROUND = (0.50, 0.44, 0.42)
KEY = (0.50, 0.47, 0.43)
GLOSS = {Part.EYE: 0.30, Part.GLASSES: 0.40, Part.HAIR: 0.12, Part.HAT: 0.06, Part.SKIN: 0.05, Part.NOSE: 0.10}


class Hits(NamedTuple):
    """Shaded surface points of the rays that hit: indices into the rays, colours and world normals (3, n), distance along the
    ray and part (n,)."""

    ray: NDArray[np.int64]
    color: Array
    normal: Array
    distance: Array
    part: NDArray[np.uint8]


class Tracer:
    """Finds and shades the surface points of rays."""

    def __init__(self, identity: HeadIdentity) -> None:
        self.shape = HeadShape(identity)
        self.light = np.asarray(identity.light, np.float32)
        self.kinds = np.asarray([int(part) for part in self.shape.parts], np.uint8)
        self.grid = HeadGrid(self.shape)

    def trace(self, origins: Array, directions: Array) -> Hits:
        """Shade the first surface points of rays from `origins` (3, n) along unit `directions` (3, n)."""
        ray, t = self._first_hits(origins, directions)
        color, normal = np.empty((3, len(ray)), np.float32), np.empty((3, len(ray)), np.float32)
        part = np.empty(len(ray), np.uint8)
        for at in range(0, len(ray), CHUNK):
            here = slice(at, at + CHUNK)
            d = directions[:, ray[here]]
            color[:, here], normal[:, here], part[here] = self._shade(origins[:, ray[here]] + t[here] * d, d)
        return Hits(ray, color, normal, t, part)

    def _first_hits(self, origins: Array, directions: Array) -> tuple[NDArray[np.int64], Array]:
        """Rays that hit, by index, and their distances."""
        if COMPILED:
            grid = self.grid
            starts, ways = np.ascontiguousarray(origins.T, np.float32), np.ascontiguousarray(directions.T, np.float32)
            return loops.first_hits(
                starts, ways, grid.low, grid.high, grid.step, grid.candidates, self.shape.layers, self.shape.measures
            )
        starts = []
        for at in range(0, directions.shape[1], CHUNK):
            here = slice(at, at + CHUNK)
            ray, near, far = self._clip(origins[:, here], directions[:, here])
            found, t = self._march(origins[:, here][:, ray], directions[:, here][:, ray], near, far)
            starts.append((ray[found] + at, t, far[found]))
        ray, t, far = (np.concatenate(arrays) for arrays in zip(*starts, strict=True))
        # All rays are refined together: the last steps, for a few rays each, would otherwise be mostly overhead.
        hit, t = self._refine(origins[:, ray], directions[:, ray], t, far)
        return ray[hit], t

    def _clip(self, origins: Array, directions: Array) -> tuple[NDArray[np.int64], Array, Array]:
        """Rays that meet the head's box, by index, and where they enter and leave it."""
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (self.grid.low[:, None] - origins) / directions, (self.grid.high[:, None] - origins) / directions
        near = np.maximum(np.fmin(a, b).max(axis=0), 0)
        far = np.fmax(a, b).min(axis=0)
        ray = np.flatnonzero(near < far)
        return ray, near[ray], far[ray]

    def _voxel(self, points: Array) -> NDArray[np.int32]:
        """Indices (n,) of the voxels of points (3, n) in the box."""
        cell = ((points + np.float32(BOX)) * np.float32(GRID / (2 * BOX))).astype(np.int32)
        np.clip(cell, 0, GRID - 1, out=cell)
        return (cell[0] * GRID + cell[1]) * GRID + cell[2]

    def _march(self, origins: Array, d: Array, near: Array, far: Array) -> tuple[NDArray[np.int64], Array]:
        """Rays that come near a surface, by index, and how far they went."""
        t = near.copy()
        active = np.arange(len(t))
        reached = []
        least = np.float32(BOX / GRID)
        while len(active):
            safe = self.grid.step[self._voxel(origins[:, active] + t[active] * d[:, active])]
            close = safe < least / 2
            reached.append(active[close])
            active, safe = active[~close], safe[~close]
            t[active] += np.maximum(safe, least)
            active = active[t[active] < far[active]]
        found = np.sort(np.concatenate(reached)) if reached else np.zeros(0, np.int64)
        return found, t[found]

    def _nearest(self, points: Array) -> tuple[Array, NDArray[np.uint8]]:
        """Distance (n,) of points (3, n) in the box to the surface, and which of the shape's parts is there."""
        candidates = self.grid.candidates[self._voxel(points)]
        distance = np.full(points.shape[1], np.inf, np.float32)
        owner = np.zeros(points.shape[1], np.uint8)
        for index in range(len(self.kinds)):
            here = np.flatnonzero(candidates & np.uint16(1 << index))
            if len(here):
                own = self.shape.distance_of(index, *points[:, here])
                closer = own < distance[here]
                here = here[closer]
                distance[here], owner[here] = own[closer], index
        return distance, owner

    def _refine(self, origins: Array, d: Array, t: Array, far: Array) -> tuple[NDArray[np.int64], Array]:
        """Sphere tracing with the exact field: rays that hit, by index, and their distances."""
        t = t.copy()
        active = np.arange(len(t))
        hits = []
        for step in range(REFINE_STEPS):
            if not len(active):
                break
            pieces = [active[at : at + CHUNK] for at in range(0, len(active), CHUNK)]
            distance = np.concatenate([self._nearest(origins[:, piece] + t[piece] * d[:, piece])[0] for piece in pieces])
            done = distance < HIT
            least = np.float32(LEAST_STEP * (1 + step / 8))  # grows, so that rays along a crease come to its end
            # A voxel's width at most: beyond its own voxel a distance may lack a part that is nearer there.
            ahead = np.clip(distance * np.float32(0.95), least, np.float32(2 * BOX / GRID))
            t[active] += np.where(done, distance, ahead)
            hits.append(active[done])
            active = active[~done]
            active = active[t[active] < far[active]]
        hit = np.sort(np.concatenate(hits)) if hits else np.zeros(0, np.int64)
        return hit, np.maximum(t[hit], 0)  # a camera inside the head sees what is right before it

    def _shade(self, points: Array, d: Array) -> tuple[Array, Array, NDArray[np.uint8]]:
        """Colours (3, n), normals (3, n) and parts (n,) of surface points (3, n) seen along d (3, n)."""
        owner, normal, occlusion = self._surface(points)
        base, part = paint(self.shape, points[0], points[1], points[2], self.kinds[owner])
        lambert = np.clip(((self.light[:, None] * normal).sum(axis=0) + np.float32(0.25)) / np.float32(1.25), 0, 1)
        up = np.float32(0.5) + np.float32(0.5) * normal[1]
        halfway = self.light[:, None] - d
        halfway /= np.sqrt((halfway * halfway).sum(axis=0))
        gloss = np.clip((halfway * normal).sum(axis=0), 0, 1) ** 40
        strength = np.zeros(len(Part), np.float32)
        strength[list(GLOSS)] = list(GLOSS.values())
        shine = strength[part] * gloss * occlusion
        color = np.empty_like(normal)
        for channel in range(3):
            sky, ground, key = SKY[channel], GROUND[channel], KEY[channel]
            shade = occlusion * (ground + (sky - ground) * up + key * lambert)
            color[channel] = base[:, channel] * shade + shine
        return color, normal, part

    def _surface(self, points: Array) -> tuple[NDArray[np.uint8], Array, Array]:
        """Owners (n,), unit normals (3, n) and occlusion (n,) of surface points (3, n)."""
        if COMPILED:
            points = np.ascontiguousarray(points, np.float32)
            return loops.surface(points, self.grid.candidates, self.grid.soft, self.shape.layers, self.shape.measures)
        _, owner = self._nearest(points)
        normal = self._normal(points, owner)
        occlusion = np.ones(points.shape[1], np.float32)
        for reach in REACHES:
            free = self._soft_distance(points + np.float32(reach) * normal)
            occlusion *= np.float32(0.55) + np.float32(0.45) * np.clip(free / np.float32(reach), 0, 1)
        return owner, normal, occlusion

    def _soft_distance(self, points: Array) -> Array:
        """Distance (n,) to the head without glasses at points (3, n), interpolated from the grid: enough for occlusion."""
        position = np.clip((points + np.float32(BOX)) * np.float32(GRID / (2 * BOX)) - np.float32(0.5), 0, GRID - 1.001)
        cell = position.astype(np.int32)
        fx, fy, fz = position - cell
        base = (cell[0] * GRID + cell[1]) * GRID + cell[2]
        along_x = []
        for dx in (0, GRID * GRID):
            along_y = []
            for dy in (0, GRID):
                first = self.grid.soft[base + (dx + dy)]
                along_y.append(first + fz * (self.grid.soft[base + (dx + dy + 1)] - first))
            along_x.append(along_y[0] + fy * (along_y[1] - along_y[0]))
        return along_x[0] + fx * (along_x[1] - along_x[0])

    def _normal(self, points: Array, owner: NDArray[np.uint8]) -> Array:
        """Unit normals (3, n) of the owning parts, by differences over a tetrahedron."""
        e = np.float32(NORMAL_STEP)
        gradient = np.zeros(points.shape, np.float32)
        for index in np.unique(owner):
            here = np.flatnonzero(owner == index)
            for corner in CORNERS[:, :, None]:
                gradient[:, here] += corner * self.shape.distance_of(int(index), *(points[:, here] + e * corner))
        return gradient / np.maximum(np.sqrt((gradient * gradient).sum(axis=0)), np.float32(1e-9))
