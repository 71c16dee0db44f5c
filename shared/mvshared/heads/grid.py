"""A head's distance fields sampled once on a coarse grid: how far rays may step, and which parts matter where."""

import math

import numpy as np
from numpy.typing import NDArray

from mvshared.heads.fields import Measures
from mvshared.heads.jit import COMPILED, entry
from mvshared.heads.layers import apply_layers
from mvshared.heads.parts import Part
from mvshared.heads.primitives import Array
from mvshared.heads.shape import HeadShape

BOX = 1.02  # half the width of the cube that holds every head (shoulders are cut at its lower face)
GRID = 48
CHUNK = 16384  # points evaluated together: their arrays stay in the cache
HALF_DIAGONAL = math.sqrt(3) * BOX / GRID  # the farthest a point can be from its voxel's centre
SLOPE = 1.25  # bound on the slope of the fields, which exceeds 1 a little where ellipsoids are flat

BLOCK = 4  # voxels along the edge of a block, whose parts are found together
BLOCKS = GRID // BLOCK
BLOCK_HALF_DIAGONAL = (BLOCK - 1) * HALF_DIAGONAL  # from its centre to those of its voxels in the corners


class HeadGrid:
    """What is known of each of GRID^3 voxels, flat arrays in the order of x, y, z.

    `step` float32 is how far every point of a voxel is from any surface at least, negative where one may be in it;
    `candidates` uint16 has the bits of those of the shape's parts that can be the nearest somewhere in the voxel; `soft`
    float32 is the distance of its centre to the head without glasses. `low` and `high` (3,) bound the voxels with a surface.
    """

    def __init__(self, shape: HeadShape) -> None:
        # Frames are left out of the occlusion: they would darken the eyes behind them.
        solid = np.array([part != Part.GLASSES for part in shape.parts])
        centers = ((np.arange(GRID, dtype=np.float32) + 0.5) * (2 * BOX / GRID) - BOX).astype(np.float32)
        if COMPILED:
            self.step, self.soft = np.empty(GRID**3, np.float32), np.empty(GRID**3, np.float32)
            self.candidates = np.empty(GRID**3, np.uint16)
            _sample(centers, shape.layers, solid, shape.measures, self.step, self.soft, self.candidates)
        else:
            self.step, self.soft, self.candidates = _sampled(shape, centers, solid)
        near = np.argwhere((self.step < 0).reshape(GRID, GRID, GRID))
        self.low = (near.min(axis=0) * (2 * BOX / GRID) - BOX).astype(np.float32)
        self.high = ((near.max(axis=0) + 1) * (2 * BOX / GRID) - BOX).astype(np.float32)


def _sampled(shape: HeadShape, centers: Array, solid: NDArray[np.bool_]) -> tuple[Array, Array, NDArray[np.uint16]]:
    count = len(shape.parts)
    x, y, z = (axis.ravel() for axis in np.meshgrid(centers, centers, centers, indexing="ij"))
    fields = np.empty((count, len(x)), np.float32)
    for at in range(0, len(x), CHUNK):
        here = slice(at, at + CHUNK)
        for index in range(count):
            fields[index, here] = shape.distance_of(index, x[here], y[here], z[here])
    nearest = fields.min(axis=0)
    candidates = np.zeros(len(x), np.uint16)
    for index in range(count):
        candidates |= (fields[index] < nearest + 2 * SLOPE * HALF_DIAGONAL).astype(np.uint16) << index
    return (nearest / SLOPE - HALF_DIAGONAL).astype(np.float32), fields[solid].min(axis=0), candidates


@entry
def _sample(
    centers: Array,
    layers: NDArray[np.int64],
    solid: NDArray[np.bool_],
    m: Measures,
    step: Array,
    soft: Array,
    candidates: NDArray[np.uint16],
) -> None:
    """As `_sampled`; parts that are too far from a block of voxels to be candidates in it are left out there."""
    count, size = len(layers), BLOCK**3
    x, y, z = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    own = np.empty((count, size), np.float32)
    nearest, nearest_solid = np.empty(size, np.float32), np.empty(size, np.float32)
    coarse = np.empty((count, BLOCKS**3), np.float32)
    bx, by, bz = np.empty(BLOCKS**3, np.float32), np.empty(BLOCKS**3, np.float32), np.empty(BLOCKS**3, np.float32)
    for block in range(BLOCKS**3):
        i, j, k = block // BLOCKS**2, block // BLOCKS % BLOCKS, block % BLOCKS
        bx[block] = (centers[i * BLOCK] + centers[i * BLOCK + BLOCK - 1]) / 2
        by[block] = (centers[j * BLOCK] + centers[j * BLOCK + BLOCK - 1]) / 2
        bz[block] = (centers[k * BLOCK] + centers[k * BLOCK + BLOCK - 1]) / 2
    for index in range(count):
        apply_layers(layers[index], coarse[index], bx, by, bz, m)
    for block in range(BLOCKS**3):
        i, j, k = block // BLOCKS**2, block // BLOCKS % BLOCKS, block % BLOCKS
        first = (i * BLOCK * GRID + j * BLOCK) * GRID + k * BLOCK
        reach = np.float32(np.inf)
        for index in range(count):
            if solid[index]:
                reach = min(reach, coarse[index, block])
        reach += 2 * SLOPE * (BLOCK_HALF_DIAGONAL + HALF_DIAGONAL)
        for voxel in range(size):
            x[voxel] = centers[i * BLOCK + voxel // BLOCK**2]
            y[voxel] = centers[j * BLOCK + voxel // BLOCK % BLOCK]
            z[voxel] = centers[k * BLOCK + voxel % BLOCK]
        nearest[:], nearest_solid[:] = np.inf, np.inf
        for index in range(count):
            if coarse[index, block] >= reach:
                continue
            apply_layers(layers[index], own[index], x, y, z, m)
            for voxel in range(size):
                nearest[voxel] = min(nearest[voxel], own[index, voxel])
            if solid[index]:
                for voxel in range(size):
                    nearest_solid[voxel] = min(nearest_solid[voxel], own[index, voxel])
        for voxel in range(size):
            at = first + (voxel // BLOCK**2 * GRID + voxel // BLOCK % BLOCK) * GRID + voxel % BLOCK
            bits = 0
            for index in range(count):
                if coarse[index, block] < reach and own[index, voxel] < nearest[voxel] + 2 * SLOPE * HALF_DIAGONAL:
                    bits |= 1 << index
            candidates[at] = bits
            step[at] = nearest[voxel] / SLOPE - HALF_DIAGONAL
            soft[at] = nearest_solid[voxel]
