"""Colours of a head's surface: eyes, brows, mouth and patterns are functions of the position on it, sharp at every size."""

import numpy as np
from numpy.typing import NDArray

from mvshared.heads.fields import eye_local
from mvshared.heads.identity import HeadIdentity, Rgb
from mvshared.heads.jit import plain
from mvshared.heads.parts import Part
from mvshared.heads.primitives import Array
from mvshared.heads.shape import HeadShape

Parts = NDArray[np.uint8]

LASH = (0.14, 0.09, 0.09)
PUPIL = (0.04, 0.04, 0.05)
ROSE = (0.95, 0.42, 0.40)
MOUTH_INSIDE = (0.32, 0.07, 0.10)
TONGUE = (0.88, 0.40, 0.42)
LIPS = 0.032  # half the height of a closed mouth, so that it is seen in pictures of 128 pixels
INNER_EAR = (0.95, 0.62, 0.66)


def paint(shape: HeadShape, x: Array, y: Array, z: Array, surface: Parts) -> tuple[Array, Parts]:
    """Colours (n, 3) of surface points (n,), and their parts with brows, mouth, nose and ears told apart from the skin."""
    i = shape.identity
    colors, parts = _palette(i)[surface], surface.copy()
    _paint_skin(shape, x, y, z, parts, colors)
    _paint_eyes(shape, x, y, z, parts, colors)
    hair = np.flatnonzero((parts == Part.HAIR) | (parts == Part.BEARD))
    around = np.arctan2(x[hair], z[hair])
    strands = np.sin(23 * around + 2 * y[hair]) + 0.7 * np.sin(41 * around + 5 * y[hair])
    fade = np.minimum((np.square(x[hair]) + np.square(z[hair])) * 10, 1)  # strands would meet at the pole
    colors[hair] *= (1 + 0.06 * strands * fade)[:, None]
    clothes = np.flatnonzero(parts == Part.CLOTHES)
    colors[clothes[_pattern(i, x[clothes], y[clothes], z[clothes])]] = i.stripe_color
    inner = np.flatnonzero((parts == Part.ANIMAL_EARS) & (z > 0.035))
    colors[inner] = 0.35 * colors[inner] + 0.65 * np.asarray(INNER_EAR, np.float32)
    return colors, parts


def _palette(i: HeadIdentity) -> Array:
    flat: dict[Part, Rgb] = {
        Part.SKIN: i.skin_color,
        Part.EYE: (0.98, 0.98, 0.97),
        Part.HAIR: i.hair_color,
        Part.HAT: i.hat_color,
        Part.HAT_BAND: i.hat_band_color,
        Part.GLASSES: i.glasses_color,
        Part.CLOTHES: i.cloth_color,
        Part.COLLAR: i.collar_color,
        Part.ANIMAL_EARS: i.hair_color,
        Part.BEARD: i.brow_color,
    }
    palette = np.zeros((len(Part), 3), np.float32)
    for part, color in flat.items():
        palette[part] = color
    return palette


def _pattern(i: HeadIdentity, x: Array, y: Array, z: Array) -> NDArray[np.bool_]:
    """Points of the clothes that have the second colour."""
    match i.cloth_pattern:
        case "stripes":
            return np.sin(np.pi * i.pattern_scale * (y + 0.35 * np.square(x))) > 0.1
        case "dots":
            scale = 1.6 * np.pi * i.pattern_scale
            return np.cos(scale * x) * np.cos(scale * (y + 0.35 * np.square(x))) * np.sign(z + 0.05) > 0.45
        case "yoke":
            return y + 0.9 * np.square(x) > -0.72
        case _:
            return np.zeros(x.shape, bool)


def _paint_skin(shape: HeadShape, x: Array, y: Array, z: Array, parts: Parts, colors: Array) -> None:
    i = shape.identity
    head = np.flatnonzero((parts == Part.SKIN) & (y > -0.45))
    fold = np.abs(x[head])
    parts[head[shape.ear(fold, y[head], z[head]) < 0.008]] = Part.EAR
    face = head[(z[head] > 0.1) & (parts[head] == Part.SKIN)]
    u, v = x[face], y[face]
    fold = np.abs(u)
    nose = shape.nose(u, v, z[face])
    rose = i.blush * np.exp(-(np.square(fold - 0.27) + np.square(v - i.eye_y + 0.20)) / 0.007)
    rose += 0.22 * np.clip(1 - nose / 0.03, 0, 1)
    tint = np.asarray(ROSE, np.float32) * (0.35 + 0.65 * max(i.skin_color))  # darker on dark skin
    skin = colors[face] + (0.6 * rose)[:, None] * (tint - colors[face])
    if i.freckles:
        spots = np.sin(64 * u + 9 * v) * np.sin(60 * v + 24 * u) > 0.66
        skin[spots & (fold < 0.34) & (v < i.eye_y - 0.10) & (v > i.eye_y - 0.26)] *= np.float32(0.74)
    kinds = parts[face]
    kinds[nose < 0.008] = Part.NOSE

    along = (fold - i.eye_x - 0.01) / (1.05 * i.eye_radii[0])
    middle = i.eye_y + i.eye_radii[1] + i.brow_height + i.brow_tilt * i.eye_radii[0] * along - i.brow_arch * np.square(along)
    brow = np.abs(v - middle) < i.brow_thickness * np.sqrt(np.maximum(0, 1 - np.square(along)))
    skin[brow], kinds[brow] = i.brow_color, Part.BROW

    across = u / i.mouth_width
    level = v - i.mouth_y - i.mouth_curve * np.square(u)
    round_ends = np.sqrt(np.maximum(0, 1 - np.square(across)))
    if i.mouth_style == "open":
        depth = i.mouth_open * round_ends
        mouth = (level < 0.02) & (level > 0.002 - depth) & (round_ends > 0)
        inside = mouth & (level < 0.002) & (level > 0.022 - depth)
        skin[mouth] = i.mouth_color
        skin[inside] = MOUTH_INSIDE
        skin[inside & (level < -0.60 * i.mouth_open + 1.5 * np.square(u))] = TONGUE
    else:
        mouth = np.abs(level) < LIPS * round_ends
        skin[mouth] = i.mouth_color
    kinds[mouth] = Part.MOUTH
    colors[face], parts[face] = skin, kinds


def _paint_eyes(shape: HeadShape, x: Array, y: Array, z: Array, parts: Parts, colors: Array) -> None:
    i = shape.identity
    eye = np.flatnonzero(parts == Part.EYE)
    side = np.sign(x[eye])
    a, b, _ = plain(eye_local)(np.abs(x[eye]), y[eye], z[eye], shape.measures)
    rx, ry = i.eye_radii
    p, q = a / rx, b / ry
    rim = np.sqrt(p * p + q * q)
    color = colors[eye] * (1 - 0.16 * np.clip(q + 0.15, 0, 1))[:, None]  # the upper lid's shadow on the white

    dx, dy = (a + 0.07 * rx) * side - i.gaze[0], b - i.gaze[1]  # the eyes converge a little
    radius = np.sqrt(dx * dx + dy * dy) / i.iris_radius
    ramp = np.clip(1.08 - 0.42 * dy / i.iris_radius, 0.6, 1.5)[:, None]
    iris = radius < 1
    color[iris] = np.clip(ramp[iris] * np.asarray(i.iris_color, np.float32), 0, 1)
    color[iris & (radius > 0.85)] *= np.float32(0.45)
    color[radius < i.pupil] = PUPIL
    light = 1 if i.light[0] >= 0 else -1
    for place_x, place_y, size in ((0.34 * light, 0.36, 0.30), (-0.36 * light, -0.38, 0.16)):
        glint = np.square(dx - place_x * i.iris_radius) + np.square(dy - place_y * i.iris_radius)
        color[glint < (size * i.iris_radius) ** 2] = 1.0

    edge = 1.0 - 1.5 * i.lid - 0.25 * p * p
    lash = (rim > 0.92 - i.lashes + 0.5 * np.maximum(0.1 - q, 0)) & (q > -0.1)
    if i.lid > 0.05:
        lid = q > edge
        color[lid] = 0.90 * np.asarray(i.skin_color, np.float32)
        lash = (lash & ~lid) | (np.abs(q - edge) < 0.5 * i.lashes)
    color[lash] = LASH
    colors[eye] = color
