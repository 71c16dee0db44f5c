"""Signed distance functions of simple solids, after Inigo Quilez (https://iquilezles.org/articles/distfunctions/).

Points are three float32 arrays of one shape, or three numbers where numba compiles the functions; lengths are head units. The
ellipsoid's is his approximation, exact at the surface to first order. Every radius must be positive: a radius of 0 gives NaN.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mvshared.heads.jit import COMPILED, compiled_scalar

Array = NDArray[np.floating]  # float32; the stubs of numpy lose the width in arithmetic
Vector = tuple[float, float, float]


@compiled_scalar
def ellipsoid(x: Array, y: Array, z: Array, radii: Vector) -> Array:
    """An ellipsoid around the origin."""
    a, b, c = 1 / radii[0], 1 / radii[1], 1 / radii[2]
    u, v, w = x * a, y * b, z * c
    k0 = np.sqrt(u * u + v * v + w * w)
    u, v, w = u * a, v * b, w * c
    k1 = np.sqrt(u * u + v * v + w * w) + 1e-6
    return k0 * (k0 - 1) / k1


@compiled_scalar
def sphere(x: Array, y: Array, z: Array, radius: float) -> Array:
    """A ball around the origin."""
    return np.sqrt(x * x + y * y + z * z) - radius


@compiled_scalar
def capsule(x: Array, y: Array, z: Array, start: Vector, end: Vector, r0: float, r1: float) -> Array:
    """A segment whose radius goes from r0 to r1."""
    ax, ay, az = start
    dx, dy, dz = end[0] - ax, end[1] - ay, end[2] - az
    px, py, pz = x - ax, y - ay, z - az
    t = np.minimum(np.maximum((px * dx + py * dy + pz * dz) * (1 / (dx * dx + dy * dy + dz * dz)), 0), 1)
    px, py, pz = px - t * dx, py - t * dy, pz - t * dz
    return np.sqrt(px * px + py * py + pz * pz) - (r0 + t * (r1 - r0))


@compiled_scalar
def ring(x: Array, y: Array, z: Array, radius: float, thickness: float, stretch: float = 1.0) -> Array:
    """A torus around the y axis, `stretch` times as long in z."""
    w = z * (1 / stretch)
    q = np.sqrt(x * x + w * w) - radius
    return np.sqrt(q * q + y * y) - thickness


@compiled_scalar
def disc(x: Array, y: Array, z: Array, radius: float, thickness: float, stretch: float = 1.0) -> Array:
    """A disc around the y axis with a round rim, `stretch` times as long in z."""
    w = z * (1 / stretch)
    q = np.maximum(np.sqrt(x * x + w * w) - radius, 0)
    return np.sqrt(q * q + y * y) - thickness


@compiled_scalar
def smooth_union(a: Array, b: Array, k: float) -> Array:
    """Both solids, with a fillet where their distances differ by less than k (polynomial smooth minimum)."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * (0.25 / k)


@compiled_scalar
def smooth_cut(a: Array, b: Array, k: float) -> Array:
    """a without b, the edge rounded over k."""
    return -smooth_union(-a, b, k)


@compiled_scalar
def _sine(x: float) -> float:
    """Taylor's series around the nearest multiple of pi, to 6e-8: compiled loops over calls of libm are not vectorised."""
    half_turns = np.floor(x * (1 / math.pi) + 0.5)
    r = x - half_turns * math.pi
    s = r * r
    series = 1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880 - s * (1 / 39916800)))))
    return r * series * (1 - 2 * (half_turns - 2 * np.floor(half_turns * 0.5)))


@compiled_scalar
def _angle(x: float, z: float) -> float:
    """The arc tangent of x / z over the whole circle, to 2e-8: Abramowitz and Stegun, 4.4.49."""
    a, b = np.abs(x), np.abs(z)
    t = min(a, b) / max(a, b, 1e-30)
    s = t * t
    series = 0.1065626393 + s * (-0.0752896400 + s * (0.0429096138 + s * (-0.0161657367 + s * 0.0028662257)))
    r = t * (1 + s * (-0.3333314528 + s * (0.1999355085 + s * (-0.1420889944 + s * series))))
    r = math.pi / 2 - r if a > b else r
    r = math.pi - r if z < 0 else r
    return -r if x < 0 else r


sine: Callable[[Array], Array] = cast(Any, _sine) if COMPILED else np.sin
angle: Callable[[Array, Array], Array] = cast(Any, _angle) if COMPILED else np.arctan2
