"""The loops of `trace` over rays and points, compiled: they compute what those on NumPy arrays do.

Rays march one by one. What needs distance fields is done in batches that stay in the cache: of each part the points that may
be on it are gathered, and its layers put over them, several points an instruction.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvshared.heads.fields import Measures
from mvshared.heads.grid import BOX, GRID
from mvshared.heads.jit import compiled, entry
from mvshared.heads.layers import apply_layers
from mvshared.heads.primitives import Array

BATCH = 4096
REFINE_STEPS = 64  # few rays, those that skim a surface, take more than ten
HIT = 2e-3
LEAST_STEP = 4e-3
NORMAL_STEP = 4e-3
CORNERS = np.asarray(((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)), np.float32)  # of the tetrahedron of normals
REACHES = (0.07, 0.18)  # where the occlusion is looked up

_0, _1 = np.float32(0), np.float32(1)
_BOX, _VOXELS, _VOXEL = np.float32(BOX), np.float32(GRID / (2 * BOX)), np.float32(2 * BOX / GRID)
_LEAST_MARCH = np.float32(BOX / GRID)


@compiled
def _voxel(x: float, y: float, z: float) -> int:
    i = min(max(int((x + _BOX) * _VOXELS), 0), GRID - 1)
    j = min(max(int((y + _BOX) * _VOXELS), 0), GRID - 1)
    k = min(max(int((z + _BOX) * _VOXELS), 0), GRID - 1)
    return (i * GRID + j) * GRID + k


@compiled
def _march(o: Array, d: Array, low: Array, high: Array, step: Array) -> tuple[Any, Any]:
    """How far a ray goes until it comes near a surface, and where it leaves the box; the first is not less if it does not."""
    near, far = _0, np.float32(np.inf)
    for axis in range(3):
        a, b = (low[axis] - o[axis]) / d[axis], (high[axis] - o[axis]) / d[axis]
        near, far = np.maximum(near, np.fmin(a, b)), np.minimum(far, np.fmax(a, b))
    if not near < far:  # NaN too
        return far, far
    t = near
    while t < far:
        safe = step[_voxel(o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2])]
        if safe < _LEAST_MARCH / 2:
            break
        t += max(safe, _LEAST_MARCH)
    return t, far


@compiled
def _nearest(
    points: Array, candidates: NDArray[np.uint16], layers, m: Measures, distance: Array, owner, scratch, place
) -> None:
    """Distance and owner of each of points (3, n); `scratch` (4, n) and `place` (n,) are overwritten."""
    count = points.shape[1]
    bits = np.empty(count, np.uint16)
    every = np.uint16(0)
    for k in range(count):
        bits[k] = candidates[_voxel(points[0, k], points[1, k], points[2, k])]
        every |= bits[k]
        distance[k] = np.inf
        owner[k] = 0
    x, y, z, own = scratch[0], scratch[1], scratch[2], scratch[3]
    for index in range(len(layers)):
        bit = np.uint16(1 << index)
        if not every & bit:
            continue
        n = 0
        for k in range(count):
            place[n] = k
            n += (bits[k] & bit) != 0
        for k in range(n):
            x[k], y[k], z[k] = points[0, place[k]], points[1, place[k]], points[2, place[k]]
        apply_layers(layers[index], own[:n], x[:n], y[:n], z[:n], m)
        for k in range(n):
            if own[k] < distance[place[k]]:
                distance[place[k]] = own[k]
                owner[place[k]] = index


@entry
def first_hits(
    origins: Array,
    directions: Array,
    low: Array,
    high: Array,
    step: Array,
    candidates: NDArray[np.uint16],
    layers: NDArray[np.int64],
    m: Measures,
) -> tuple[NDArray[np.int64], Array]:
    """Which of rays (n, 3) hit, and how far they go."""
    rays = len(origins)
    hit, length = np.empty(rays, np.bool_), np.empty(rays, np.float32)
    end = np.empty(rays, np.float32)
    waiting = np.empty(rays, np.int64)
    total = 0
    for ray in range(rays):
        hit[ray] = False
        t, far = _march(origins[ray], directions[ray], low, high, step)
        if t < far:
            length[ray], end[ray] = t, far
            waiting[total] = ray
            total += 1
    points, scratch = np.empty((3, BATCH), np.float32), np.empty((4, BATCH), np.float32)
    place, owner = np.empty(BATCH, np.int64), np.empty(BATCH, np.uint8)
    distance, active = np.empty(BATCH, np.float32), np.empty(BATCH, np.int64)
    for at in range(0, total, BATCH):
        count = min(BATCH, total - at)
        active[:count] = waiting[at : at + count]
        for number in range(REFINE_STEPS):
            if count == 0:
                break
            for k in range(count):
                ray = active[k]
                for axis in range(3):
                    points[axis, k] = origins[ray, axis] + length[ray] * directions[ray, axis]
            _nearest(points[:, :count], candidates, layers, m, distance, owner, scratch, place)
            least = np.float32(LEAST_STEP * (1 + number / 8))  # grows, so that rays along a crease come to its end
            left = 0
            for k in range(count):
                ray = active[k]
                if distance[k] < HIT:
                    length[ray] = max(length[ray] + distance[k], _0)
                    hit[ray] = True
                    continue
                # A voxel's width at most: beyond its own voxel a distance may lack a part that is nearer there.
                length[ray] += min(max(distance[k] * np.float32(0.95), least), _VOXEL)
                if length[ray] < end[ray]:
                    active[left] = ray
                    left += 1
            count = left
    found = np.flatnonzero(hit)
    return found, length[found]


@entry
def surface(
    points: Array, candidates: NDArray[np.uint16], soft: Array, layers: NDArray[np.int64], m: Measures
) -> tuple[NDArray[np.uint8], Array, Array]:
    """Owners (n,), unit normals (3, n) and occlusion (n,) of surface points (3, n)."""
    total = points.shape[1]
    owners, normals, occlusion = np.empty(total, np.uint8), np.empty((3, total), np.float32), np.empty(total, np.float32)
    scratch, place = np.empty((4, BATCH), np.float32), np.empty(BATCH, np.int64)
    distance, owner = np.empty(BATCH, np.float32), np.empty(BATCH, np.uint8)
    gradient = np.empty((3, BATCH), np.float32)
    x, y, z, own = scratch[0], scratch[1], scratch[2], scratch[3]
    e = np.float32(NORMAL_STEP)
    for at in range(0, total, BATCH):
        count = min(BATCH, total - at)
        here = points[:, at : at + count]
        _nearest(here, candidates, layers, m, distance, owner, scratch, place)
        owners[at : at + count] = owner[:count]
        gradient[:] = 0
        for index in range(len(layers)):
            n = 0
            for k in range(count):
                place[n] = k
                n += owner[k] == index
            if n == 0:
                continue
            for corner in CORNERS:
                for k in range(n):
                    p = place[k]
                    x[k], y[k], z[k] = here[0, p] + e * corner[0], here[1, p] + e * corner[1], here[2, p] + e * corner[2]
                apply_layers(layers[index], own[:n], x[:n], y[:n], z[:n], m)
                for k in range(n):
                    for axis in range(3):
                        gradient[axis, place[k]] += corner[axis] * own[k]
        for k in range(count):
            a, b, c = gradient[0, k], gradient[1, k], gradient[2, k]
            length = max(np.sqrt(a * a + b * b + c * c), np.float32(1e-9))
            a, b, c = a / length, b / length, c / length
            normals[0, at + k], normals[1, at + k], normals[2, at + k] = a, b, c
            free = _1
            for reach in REACHES:
                r = np.float32(reach)
                lookup = _soft_distance(soft, here[0, k] + r * a, here[1, k] + r * b, here[2, k] + r * c)
                free *= np.float32(0.55) + np.float32(0.45) * min(max(lookup / r, _0), _1)
            occlusion[at + k] = free
    return owners, normals, occlusion


@compiled
def _soft_distance(soft: Array, x: float, y: float, z: float) -> float:
    """`soft` at a point, interpolated."""
    last, half = np.float32(GRID - 1.001), np.float32(0.5)
    px = min(max((x + _BOX) * _VOXELS - half, _0), last)
    py = min(max((y + _BOX) * _VOXELS - half, _0), last)
    pz = min(max((z + _BOX) * _VOXELS - half, _0), last)
    i, j, k = int(px), int(py), int(pz)
    fx, fy, fz = px - np.float32(i), py - np.float32(j), pz - np.float32(k)
    base = (i * GRID + j) * GRID + k
    c00 = soft[base] + fz * (soft[base + 1] - soft[base])
    c01 = soft[base + GRID] + fz * (soft[base + GRID + 1] - soft[base + GRID])
    base += GRID * GRID
    c10 = soft[base] + fz * (soft[base + 1] - soft[base])
    c11 = soft[base + GRID] + fz * (soft[base + GRID + 1] - soft[base + GRID])
    c0, c1 = c00 + fy * (c01 - c00), c10 + fy * (c11 - c10)
    return c0 + fx * (c1 - c0)
