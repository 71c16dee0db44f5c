"""Pinhole projection with square pixels: rays, points, samples. Cameras are those of `mvshared.camera`."""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def rays(shape: tuple[int, ...], fov_deg: float) -> Floats:
    """Directions float32 (h, w, 3) through the centres of pixels, in camera space with z = -1: times depth, they are points."""
    height, width = shape
    pitch = 2 * math.tan(math.radians(fov_deg) / 2) / height
    x = (np.arange(width) + 0.5 - width / 2) * pitch
    y = (height / 2 - 0.5 - np.arange(height)) * pitch
    across, up = np.meshgrid(x, y)
    return np.stack([across, up, np.full_like(across, -1)], axis=-1).astype(np.float32)


def unproject(depth: Floats, pose: NDArray[np.floating], fov_deg: float) -> Floats:
    """World points float32 (h, w, 3) of depth (h, w) along the optical axis of a pose (4, 4)."""
    directions = rays(depth.shape, fov_deg) @ pose[:3, :3].T.astype(np.float32)
    return (pose[:3, 3].astype(np.float32) + depth[..., None] * directions).astype(np.float32)


def project(
    points: Floats, pose: NDArray[np.floating], shape: tuple[int, ...], fov_deg: float
) -> tuple[Floats, Floats, Floats]:
    """Column, row and depth (...) of world points (..., 3); 0 is the centre of the first pixel. Behind the camera the depth is
    not positive and the position means nothing."""
    height, width = shape
    pitch = np.float32(2 * math.tan(math.radians(fov_deg) / 2) / height)
    single = pose.astype(np.float32)
    local = ((points - single[:3, 3]) @ single[:3, :3]).astype(np.float32, copy=False)
    z = -local[..., 2]
    scale = 1 / (np.where(z > 0, z, np.inf) * pitch)
    x, y = (width - 1) / 2 + local[..., 0] * scale, (height - 1) / 2 - local[..., 1] * scale
    return x.astype(np.float32, copy=False), y.astype(np.float32, copy=False), z


def corners(x: Floats, y: Floats, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], Floats, Floats, NDArray[np.bool_]]:
    """Flat index of the upper left one of the four pixels around positions (...), how far right and below it they are, and
    whether all four exist. Positions without them get the first pixel."""
    height, width = shape
    inside = (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    column = np.minimum(np.where(inside, x, 0).astype(np.int64), max(width - 2, 0))
    row = np.minimum(np.where(inside, y, 0).astype(np.int64), max(height - 2, 0))
    right, below = (np.where(inside, a - whole, 0).astype(np.float32) for a, whole in ((x, column), (y, row)))
    return row * width + column, right, below, inside


def sample(layers: Floats, x: Floats, y: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Bilinear samples (..., c) of layers (h, w, c), at least 2 x 2, and whether they lie inside."""
    height, width = layers.shape[:2]
    first, right, below, inside = corners(x, y, (height, width))
    flat, right, below = layers.reshape(height * width, -1), right[..., None], below[..., None]
    upper = flat[first] + (flat[first + 1] - flat[first]) * right
    lower = flat[first + width] + (flat[first + width + 1] - flat[first + width]) * right
    return (upper + (lower - upper) * below).astype(np.float32, copy=False), inside
