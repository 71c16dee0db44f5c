"""Signed distance functions of simple solids, after Inigo Quilez (https://iquilezles.org/articles/distfunctions/).

Points are three float32 arrays of one shape, or three numbers where numba compiles the functions; lengths are head units. The
ellipsoid's is his approximation, exact at the surface to first order. Every radius must be positive: a radius of 0 gives NaN.
"""

import numpy as np
from numpy.typing import NDArray

from mvshared.heads.jit import compiled

Array = NDArray[np.floating]  # float32; the stubs of numpy lose the width in arithmetic
Vector = tuple[float, float, float]


@compiled
def ellipsoid(x: Array, y: Array, z: Array, radii: Vector) -> Array:
    """An ellipsoid around the origin."""
    a, b, c = 1 / radii[0], 1 / radii[1], 1 / radii[2]
    u, v, w = x * a, y * b, z * c
    k0 = np.sqrt(u * u + v * v + w * w)
    u, v, w = u * a, v * b, w * c
    k1 = np.sqrt(u * u + v * v + w * w) + 1e-6
    return k0 * (k0 - 1) / k1


@compiled
def sphere(x: Array, y: Array, z: Array, radius: float) -> Array:
    """A ball around the origin."""
    return np.sqrt(x * x + y * y + z * z) - radius


@compiled
def capsule(x: Array, y: Array, z: Array, start: Vector, end: Vector, r0: float, r1: float) -> Array:
    """A segment whose radius goes from r0 to r1."""
    ax, ay, az = start
    dx, dy, dz = end[0] - ax, end[1] - ay, end[2] - az
    px, py, pz = x - ax, y - ay, z - az
    t = np.minimum(np.maximum((px * dx + py * dy + pz * dz) * (1 / (dx * dx + dy * dy + dz * dz)), 0), 1)
    px, py, pz = px - t * dx, py - t * dy, pz - t * dz
    return np.sqrt(px * px + py * py + pz * pz) - (r0 + t * (r1 - r0))


@compiled
def ring(x: Array, y: Array, z: Array, radius: float, thickness: float, stretch: float = 1.0) -> Array:
    """A torus around the y axis, `stretch` times as long in z."""
    w = z * (1 / stretch)
    q = np.sqrt(x * x + w * w) - radius
    return np.sqrt(q * q + y * y) - thickness


@compiled
def disc(x: Array, y: Array, z: Array, radius: float, thickness: float, stretch: float = 1.0) -> Array:
    """A disc around the y axis with a round rim, `stretch` times as long in z."""
    w = z * (1 / stretch)
    q = np.maximum(np.sqrt(x * x + w * w) - radius, 0)
    return np.sqrt(q * q + y * y) - thickness


@compiled
def smooth_union(a: Array, b: Array, k: float) -> Array:
    """Both solids, with a fillet where their distances differ by less than k (polynomial smooth minimum)."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * (0.25 / k)


@compiled
def smooth_cut(a: Array, b: Array, k: float) -> Array:
    """a without b, the edge rounded over k."""
    return -smooth_union(-a, b, k)
