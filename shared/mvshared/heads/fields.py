"""The signed distance fields that heads are made of, each a layer over what the layers before it have left.

A layer takes the distance so far `d`, the point and the measures of the head, and returns the distance with itself added or
cut out. Points are three float32 arrays of one shape in head units, or three numbers where numba compiles the layers, so
there is no branch here on anything but by their choice. The pairs of a face are folded onto x >= 0.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from mvshared.heads.jit import compiled_scalar, entry
from mvshared.heads.primitives import (
    Array,
    Vector,
    angle,
    capsule,
    disc,
    ellipsoid,
    ring,
    sine,
    smooth_cut,
    smooth_union,
    sphere,
)  # fmt: skip

FAR = 10.0


class Measures(NamedTuple):
    """A head's measures as the layers need them, in head units; what a head does not have is any number."""

    skull: Vector  # radii
    skull_y: float
    jaw: Vector  # radii
    jaw_y: float
    cheek_radius: float
    nose: Vector  # radii
    nose_y: float
    nose_z: float
    neck_radius: float
    ear_size: float
    eye: Vector  # the point of the face where the eye of positive x sits
    eye_cos: float  # of its turn to the side
    eye_sin: float
    eye_ball: Vector  # radii
    mouth_y: float
    mouth_z: float
    shoulders: float
    dome: Vector  # radii of the hair
    hair_ribs: float
    hair_volume: float
    hair_brow: float  # height of the hair's lower edge over the brows
    hair_edge: float  # and where it leaves the forehead free
    hairline: float
    part_tilt: float
    tail_y: float
    hat_dome: Vector  # radii
    hat_y: float
    band_y: float
    band_radius: float
    band_thickness: float
    band_stretch: float
    glasses_radius: float


class Layer(IntEnum):
    """The layers by number. The first of a part's layers ignores the distance so far."""

    SKIN = 0
    HUMAN_EARS = 1
    ELF_EARS = 2
    EYES = 3
    DOME = 4
    RIBS = 5
    BOWL = 6
    FRINGE = 7
    BOB = 8
    BLUNT_BOB = 9
    LONG = 10
    SIDE_PART = 11
    MOHAWK = 12
    AFRO = 13
    SHORT = 14
    UNDER_HAT = 15
    BUN = 16
    TWO_BUNS = 17
    PONYTAIL = 18
    PIGTAILS = 19
    SPIKES = 20
    BEANIE = 21
    BOBBLE = 22
    BRIM = 23
    CAP = 24
    HAT_BAND = 25
    ROUND_GLASSES = 26
    SQUARE_GLASSES = 27
    CLOTHES = 28
    RING_COLLAR = 29
    TURTLENECK = 30
    SHIRT = 31
    SCARF = 32
    BEAR_EARS = 33
    CAT_EARS = 34
    RABBIT_EARS = 35
    NOTHING = 36
    BEARD = 37
    MOUSTACHE = 38
    NOSE = 39
    HUMAN_EAR = 40
    ELF_EAR = 41


@compiled_scalar
def eye_local(x: Array, y: Array, z: Array, m: Measures) -> tuple[Array, Array, Array]:
    """Points in the eye's axes: outward from the nose, up, out of the face. x must be folded."""
    dx, dz = x - m.eye[0], z - m.eye[2]
    return dx * m.eye_cos - dz * m.eye_sin, y - m.eye[1], dx * m.eye_sin + dz * m.eye_cos


@compiled_scalar
def face(x: Array, y: Array, z: Array, skull: Vector, skull_y: float, jaw: Vector, jaw_y: float, cheek_radius: float) -> Array:
    """The bare face without a nose. x must be folded."""
    d = ellipsoid(x, y - skull_y, z, skull)
    d = smooth_union(d, ellipsoid(x, y - jaw_y, z - 0.10, jaw), 0.12)
    return smooth_union(d, sphere(x - 0.20, y + 0.13, z - 0.28, cheek_radius), 0.10)


@entry
def face_depth(x: Any, y: Any, skull: Vector, skull_y: float, jaw: Vector, jaw_y: float, cheek_radius: float) -> Any:
    """z of the bare face at the numbers x and y: sphere tracing one ray from the front."""
    z: Any = 1.0
    for _ in range(24):
        z = z - face(x, y, z, skull, skull_y, jaw, jaw_y, cheek_radius)
    return z


@compiled_scalar
def nose(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return ellipsoid(x, y - m.nose_y, z - (m.nose_z + 0.015), m.nose)


@compiled_scalar
def human_ear(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    """The ear of positive x."""
    side, size = m.skull[0] - 0.01, m.ear_size
    outer = ellipsoid(x - side, y - 0.02, z + 0.02, (0.055 * size, 0.115 * size, 0.08 * size))
    return smooth_cut(outer, sphere(x - (side + 0.055 * size), y - 0.02, z - 0.035, 0.045 * size), 0.03)


@compiled_scalar
def elf_ear(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    """The ear of positive x."""
    side, size = m.skull[0] - 0.01, m.ear_size
    tip = (side + 0.17 * size, 0.06 + 0.17 * size, -0.10)
    return capsule(x, y, z, (side - 0.03, 0.0, 0.0), tip, 0.08 * size, 0.014)


@compiled_scalar
def skin(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    x = np.abs(x)
    d = smooth_union(face(x, y, z, m.skull, m.skull_y, m.jaw, m.jaw_y, m.cheek_radius), nose(d, x, y, z, m), 0.05)
    neck = capsule(x, y, z, (0.0, -0.2, -0.05), (0.0, -0.8, -0.05), m.neck_radius, m.neck_radius)
    return smooth_union(d, neck, 0.06)


@compiled_scalar
def human_ears(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return smooth_union(d, human_ear(d, np.abs(x), y, z, m), 0.04)


@compiled_scalar
def elf_ears(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return smooth_union(d, elf_ear(d, np.abs(x), y, z, m), 0.04)


@compiled_scalar
def eyes(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    a, b, c = eye_local(np.abs(x), y, z, m)
    # The ball's centre is half its depth under the face: the cut there has the radii of the visible eye.
    return ellipsoid(a, b, c + 0.5 * m.eye_ball[2], m.eye_ball)


@compiled_scalar
def opening(x: Array, y: Array, z: Array, height: float, width: float) -> Array:
    """The hole in the hair where the face looks out; `height` is its upper edge."""
    low = -0.75
    return ellipsoid(x, y - (height + low) / 2, z - 0.62, (width, (height - low) / 2, 0.62))


@compiled_scalar
def blunt_opening(x: Array, y: Array, z: Array, height: float, width: float) -> Array:
    """The same hole, cut straight above."""
    low = -0.75
    hole = ellipsoid(x, y - (height + low) / 2, z - 0.62, (width, (height - low) / 2 * 1.5, 0.62))
    return -smooth_union(-hole, height - y, 0.05)


@compiled_scalar
def dome(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return ellipsoid(x, y - (m.skull_y + 0.02), z + 0.02, m.dome)


@compiled_scalar
def ribs(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    back = z + 0.02
    pole = np.minimum((x * x + back * back) * 12, 1)  # the ribs fade where they would meet
    return d + 0.008 * pole * sine(m.hair_ribs * angle(x, back))


@compiled_scalar
def bowl(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    hair = -smooth_union(-d, y - m.hair_brow - 0.40 * (z - 0.45), 0.04)
    return smooth_cut(hair, blunt_opening(x, y, z, m.hair_brow, 0.44), 0.03)


@compiled_scalar
def fringe(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    hair = np.maximum(d, -0.20 - y + 0.30 * z)
    return smooth_cut(hair, blunt_opening(x, y, z, m.hair_brow, 0.40), 0.03)


@compiled_scalar
def bob_hair(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    longer = ellipsoid(x, y + 0.06, z + 0.02, (m.dome[0] + 0.04, 0.44, m.dome[2]))
    return np.maximum(smooth_union(d, longer, 0.1), -0.38 - y)


@compiled_scalar
def bob(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return smooth_cut(bob_hair(d, x, y, z, m), opening(x, y, z, m.hair_edge, 0.39), 0.04)


@compiled_scalar
def blunt_bob(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return smooth_cut(bob_hair(d, x, y, z, m), blunt_opening(x, y, z, m.hair_edge, 0.39), 0.04)


@compiled_scalar
def long(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    hair = smooth_union(d, ellipsoid(x, y + 0.28, z + 0.16, (m.dome[0] + 0.02, 0.62, 0.36)), 0.12)
    return smooth_cut(hair, opening(x, y, z, m.hair_edge - 0.02, 0.42), 0.04)


@compiled_scalar
def side_part(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    hair = smooth_union(d, ellipsoid(x, y + 0.02, z + 0.12, (m.dome[0], 0.42, 0.42)), 0.12)
    tilted = y + m.part_tilt * x  # lifts the hole to one side
    return smooth_cut(hair, opening(x, tilted, z, m.hair_edge - 0.02, 0.42), 0.04)


@compiled_scalar
def mohawk(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    crest = ellipsoid(x, y - (m.skull_y + 0.22), z + 0.07, (0.085, 0.47, 0.54))
    return smooth_cut(crest, opening(x, y, z, m.hair_edge + 0.10, 0.5), 0.03)


@compiled_scalar
def afro(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    ball = sphere(x, y - 0.20, z + 0.08, 0.58 + m.hair_volume)
    ball = ball + 0.018 * sine(20 * x) * sine(20 * y) * sine(20 * z)
    return np.maximum(smooth_cut(ball, opening(x, y, z, m.hair_edge + 0.04, 0.44), 0.05), -0.30 - y)


@compiled_scalar
def short(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    hair = np.maximum(d, -0.16 - 0.1 * m.hairline - y + 0.35 * z)
    return smooth_cut(hair, opening(x, y, z, m.hair_edge, 0.44), 0.04)


@compiled_scalar
def under_hat(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return np.maximum(d, y - (m.hat_y + 0.03))


@compiled_scalar
def bun(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return smooth_union(d, sphere(x, y - (m.skull_y + m.dome[1] + 0.07), z + 0.10, 0.16), 0.04)


@compiled_scalar
def two_buns(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return smooth_union(d, sphere(np.abs(x) - 0.40, y - (m.skull_y + 0.44), z + 0.06, 0.175), 0.03)


@compiled_scalar
def ponytail(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    tie = smooth_union(d, sphere(x, y - m.tail_y, z + m.dome[2] + 0.03, 0.09), 0.03)
    tail = capsule(x, y, z, (0.0, m.tail_y - 0.06, -0.66), (0.0, m.tail_y - 0.62, -0.76), 0.14, 0.05)
    return smooth_union(tie, tail, 0.03)


@compiled_scalar
def pigtails(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    x = np.abs(x)
    tie = smooth_union(d, sphere(x - (m.dome[0] + 0.01), y - 0.10, z + 0.08, 0.08), 0.03)
    return smooth_union(tie, capsule(x, y, z, (0.62, 0.02, -0.08), (0.70, -0.38, -0.06), 0.125, 0.045), 0.03)


@compiled_scalar
def spikes(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    x, y = np.abs(x), y - (m.skull_y + 0.02)
    d = smooth_union(d, capsule(x, y, z, (0.06, 0.34, 0.22), (0.10, 0.72, 0.40), 0.17, 0.012), 0.04)
    d = smooth_union(d, capsule(x, y, z, (0.14, 0.36, -0.10), (0.20, 0.78, -0.10), 0.17, 0.012), 0.04)
    d = smooth_union(d, capsule(x, y, z, (0.32, 0.22, 0.12), (0.58, 0.56, 0.22), 0.17, 0.012), 0.04)
    d = smooth_union(d, capsule(x, y, z, (0.34, 0.12, -0.22), (0.66, 0.32, -0.40), 0.17, 0.012), 0.04)
    return smooth_union(d, capsule(x, y, z, (0.10, 0.20, -0.36), (0.16, 0.44, -0.76), 0.17, 0.012), 0.04)


@compiled_scalar
def hat_crown(x: Array, y: Array, z: Array, m: Measures, lift: float) -> Array:
    rx, ry, rz = m.hat_dome
    return ellipsoid(x, y - (m.skull_y + 0.04), z + 0.02, (rx, ry + lift, rz))


@compiled_scalar
def beanie(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    back = z + 0.02
    pole = np.minimum((x * x + back * back) * 12, 1)
    hat = hat_crown(x, y, z, m, 0.03) + 0.007 * pole * sine(26 * angle(x, back))
    return np.maximum(hat, m.hat_y - y)


@compiled_scalar
def bobble(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return smooth_union(d, sphere(x, y - (m.skull_y + 0.10 + m.hat_dome[1]), z + 0.02, 0.12), 0.02)


@compiled_scalar
def brim(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    rx, rz = m.hat_dome[0], m.hat_dome[2]
    crown = np.maximum(hat_crown(x, y, z, m, -0.02), m.hat_y - y)
    return smooth_union(crown, disc(x, y - m.hat_y + 0.10 * x * x, z + 0.02, rx + 0.15, 0.028, rz / rx), 0.04)


@compiled_scalar
def cap(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    crown = np.maximum(hat_crown(x, y, z, m, -0.04), m.hat_y - y)
    crown = smooth_union(crown, sphere(x, y - (m.skull_y + m.hat_dome[1]), z + 0.02, 0.045), 0.02)
    slope = y - m.hat_y + 0.15 * (z - 0.5) + 0.35 * x * x
    return smooth_union(crown, disc(x, slope, z - 0.42, 0.38, 0.026), 0.03)


@compiled_scalar
def hat_band(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return ring(x, (y - m.band_y) * 0.75, z + 0.02, m.band_radius, m.band_thickness, m.band_stretch)


@compiled_scalar
def frames(x: Array, y: Array, z: Array, flat: Array, m: Measures) -> Array:
    """Glasses whose lenses' rims are where `flat`, a distance from the lens's middle, is their radius. x must be folded."""
    radius, front, level = m.glasses_radius, m.eye[2] + 0.085, m.eye[1] + 0.02
    q, dz = flat - radius, z - front + 0.25 * (x - m.eye[0])
    rim = (np.sqrt(q * q + dz * dz) - 0.021) * 0.9
    hinge = m.eye[0] + radius
    ear = (max(m.skull[0] + 0.02, hinge), level, 0.0)
    temple = capsule(x, y, z, (hinge, level, front - 0.25 * radius), ear, 0.019, 0.019)
    bridge = capsule(x, y, z, (0.0, level, front + 0.06), (m.eye[0] - radius, level, front + 0.25 * radius), 0.019, 0.019)
    return np.minimum(np.minimum(rim, temple), bridge)


@compiled_scalar
def round_glasses(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    x = np.abs(x)
    dx, dy = x - m.eye[0], y - m.eye[1]
    return frames(x, y, z, np.sqrt(dx * dx + dy * dy), m)


@compiled_scalar
def square_glasses(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    x = np.abs(x)
    dx, dy = x - m.eye[0], y - m.eye[1]
    a, b = dx * dx, dy * dy * 1.25
    return frames(x, y, z, np.sqrt(np.sqrt(a * a + b * b)), m)


@compiled_scalar
def clothes(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    shoulders = ellipsoid(x, y + 1.0, z + 0.05, (m.shoulders, 0.40, 0.36))
    return smooth_union(shoulders, capsule(x, y, z, (0.0, -1.0, -0.05), (0.0, -1.6, -0.05), 0.45, 0.5), 0.15)


@compiled_scalar
def ring_collar(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return ring(x, y + 0.62, z + 0.05, m.neck_radius + 0.05, 0.055)


@compiled_scalar
def turtleneck(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    back = z + 0.05
    tube = np.sqrt(x * x + back * back) - (m.neck_radius + 0.05)
    return -smooth_union(-tube, 0.14 - np.abs(y + 0.60), 0.06)


@compiled_scalar
def shirt(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    x = np.abs(x)
    flap = ellipsoid(x - 0.13, y + 0.66 - 0.25 * x, z - 0.17, (0.13, 0.075, 0.10))
    return smooth_union(ring(x, (y + 0.60) * 0.8, z + 0.05, m.neck_radius + 0.04, 0.05), flap, 0.03)


@compiled_scalar
def scarf(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    loop = ring(x, (y + 0.58) * 0.8, z + 0.05, m.neck_radius + 0.08, 0.10)
    return smooth_union(loop, capsule(x, y, z, (0.14, -0.60, 0.24), (0.19, -1.05, 0.36), 0.07, 0.10), 0.03)


@compiled_scalar
def bear_ears(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return ellipsoid(np.abs(x) - 0.37, y - (m.skull_y + m.dome[1] - 0.10), z, (0.19, 0.19, 0.09))


@compiled_scalar
def cat_ears(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    top = m.skull_y + m.dome[1]
    return capsule(np.abs(x), y, z * 1.7, (0.28, top - 0.18, 0.0), (0.42, top + 0.20, 0.0), 0.18, 0.02) * 0.65


@compiled_scalar
def rabbit_ears(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    top = m.skull_y + m.dome[1]
    return capsule(np.abs(x), y, z * 1.6, (0.18, top - 0.08, 0.0), (0.32, 0.86, -0.03), 0.09, 0.10) * 0.7


@compiled_scalar
def nothing(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    return x * 0 + FAR


@compiled_scalar
def beard(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    rx, ry, rz = m.jaw
    chin = ellipsoid(x, y - m.jaw_y, z - 0.10, (rx + 0.035, ry + 0.06, rz + 0.05))
    hair = -smooth_union(-chin, y - (m.mouth_y - 0.06) - 0.9 * np.maximum(np.abs(x) - 0.11, 0), 0.04)
    return np.maximum(hair, -0.02 - z)


@compiled_scalar
def moustache(d: Array, x: Array, y: Array, z: Array, m: Measures) -> Array:
    start, end = (0.03, m.mouth_y + 0.07, m.mouth_z + 0.02), (0.16, m.mouth_y + 0.035, m.mouth_z - 0.03)
    return np.minimum(d, capsule(np.abs(x), y, z, start, end, 0.042, 0.014))
