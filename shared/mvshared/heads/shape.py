"""The head's surface: signed distances of its parts, and the colours painted on them.

Distance functions after Inigo Quilez (https://iquilezles.org/articles/distfunctions/); the ellipsoid's is his approximation, exact
at the surface to first order. Points are three float32 arrays of one shape; the pairs of a face are folded onto x >= 0.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from mvshared.heads.identity import HeadIdentity, Rgb

Array = NDArray[np.float32]
FAR = np.float32(10.0)


class Part(IntEnum):
    """What a pixel shows."""

    BACKGROUND = 0
    SKIN = 1
    EYE = 2
    BROW = 3
    MOUTH = 4
    HAIR = 5
    HAT = 6
    HAT_BAND = 7
    GLASSES = 8
    CLOTHES = 9
    COLLAR = 10
    ANIMAL_EARS = 11
    BEARD = 12


SURFACES = (
    Part.SKIN,
    Part.EYE,
    Part.HAIR,
    Part.HAT,
    Part.HAT_BAND,
    Part.GLASSES,
    Part.CLOTHES,
    Part.COLLAR,
    Part.ANIMAL_EARS,
    Part.BEARD,
)


def ellipsoid(x: Array, y: Array, z: Array, radii: tuple[float, float, float]) -> Array:
    a, b, c = (np.float32(1 / radius) for radius in radii)
    u, v, w = x * a, y * b, z * c
    k0 = np.sqrt(u * u + v * v + w * w)
    u *= a
    v *= b
    w *= c
    k1 = np.sqrt(u * u + v * v + w * w) + np.float32(1e-6)
    return k0 * (k0 - 1) / k1


def sphere(x: Array, y: Array, z: Array, radius: float) -> Array:
    return np.sqrt(x * x + y * y + z * z) - np.float32(radius)


def capsule(
    x: Array, y: Array, z: Array, start: tuple[float, float, float], end: tuple[float, float, float], r0: float, r1: float
) -> Array:
    """A segment whose radius goes from r0 to r1."""
    ax, ay, az = start
    dx, dy, dz = end[0] - ax, end[1] - ay, end[2] - az
    px, py, pz = x - np.float32(ax), y - np.float32(ay), z - np.float32(az)
    length = dx * dx + dy * dy + dz * dz
    t = np.clip((px * np.float32(dx) + py * np.float32(dy) + pz * np.float32(dz)) / np.float32(length), 0, 1)
    px -= t * np.float32(dx)
    py -= t * np.float32(dy)
    pz -= t * np.float32(dz)
    return np.sqrt(px * px + py * py + pz * pz) - (np.float32(r0) + t * np.float32(r1 - r0))


def ring(x: Array, y: Array, z: Array, radius: float, thickness: float, *, stretch: float = 1.0) -> Array:
    """A torus around the y axis, `stretch` times as long in z."""
    q = np.sqrt(x * x + np.square(z / np.float32(stretch))) - np.float32(radius)
    return np.sqrt(q * q + y * y) - np.float32(thickness)


def disc(x: Array, y: Array, z: Array, radius: float, thickness: float, *, stretch: float = 1.0) -> Array:
    """A disc around the y axis with a round rim, `stretch` times as long in z."""
    q = np.sqrt(x * x + np.square(z / np.float32(stretch))) - np.float32(radius)
    return np.sqrt(np.square(np.maximum(q, 0)) + y * y) - np.float32(thickness)


def smooth_union(a: Array, b: Array, k: float) -> Array:
    h = np.maximum(np.float32(k) - np.abs(a - b), 0) / np.float32(k)
    return np.minimum(a, b) - h * h * np.float32(k / 4)


def smooth_cut(a: Array, b: Array, k: float) -> Array:
    """a without b."""
    return -smooth_union(-a, b, k)


class HeadShape:
    """The distance field of one identity."""

    def __init__(self, identity: HeadIdentity) -> None:
        self.identity = i = identity
        self.eye_z = i.face_z(i.eye_x, i.eye_y) - 0.045
        self.hat_y = i.skull_y + 0.16
        self.dome = tuple(radius + i.hair_volume for radius in i.skull)
        self.hat_dome = tuple(radius + i.hair_volume + 0.035 for radius in i.skull)
        self.parts = tuple(part for part in SURFACES if self._has(part))

    def _has(self, part: Part) -> bool:
        i = self.identity
        match part:
            case Part.HAIR:
                return i.hair_style != "bald"
            case Part.HAT:
                return i.hat_style not in ("none", "headband")
            case Part.HAT_BAND:
                return i.hat_style in ("beanie", "headband", "brim")
            case Part.GLASSES:
                return i.glasses_style != "none"
            case Part.COLLAR:
                return i.collar_style != "none"
            case Part.ANIMAL_EARS:
                return i.animal_ears != "none"
            case Part.BEARD:
                return i.beard or i.moustache
            case _:
                return True

    def distances(self, x: Array, y: Array, z: Array) -> Array:
        """Signed distances (parts, ...) to the surface of each of `self.parts`."""
        fold = np.abs(x)
        functions = {
            Part.SKIN: lambda: self._skin(fold, y, z),
            Part.EYE: lambda: self._eye(fold, y, z),
            Part.HAIR: lambda: self._hair(x, fold, y, z),
            Part.HAT: lambda: self._hat(x, y, z),
            Part.HAT_BAND: lambda: self._hat_band(x, y, z),
            Part.GLASSES: lambda: self._glasses(fold, y, z),
            Part.CLOTHES: lambda: self._clothes(x, y, z),
            Part.COLLAR: lambda: self._collar(x, y, z),
            Part.ANIMAL_EARS: lambda: self._animal_ears(fold, y, z),
            Part.BEARD: lambda: self._beard(fold, y, z),
        }
        return np.stack([functions[part]() for part in self.parts])

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Signed distance to the nearest surface."""
        return self.distances(x, y, z).min(axis=0)

    def _skin(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        d = ellipsoid(x, y - np.float32(i.skull_y), z, i.skull)
        d = smooth_union(d, ellipsoid(x, y - np.float32(i.jaw_y), z - np.float32(0.10), i.jaw), 0.12)
        d = smooth_union(d, sphere(x - np.float32(0.20), y + np.float32(0.13), z - np.float32(0.28), i.cheek_radius), 0.10)
        nose_z = i.face_z(0.0, i.nose_y) + 0.01
        d = smooth_union(d, ellipsoid(x, y - np.float32(i.nose_y), z - np.float32(nose_z), i.nose), 0.05)
        d = smooth_union(d, capsule(x, y, z, (0, -0.2, -0.05), (0, -0.8, -0.05), i.neck_radius, i.neck_radius), 0.06)
        side, size = i.skull[0] - 0.01, i.ear_size
        if i.ear_style == "human":
            ear = ellipsoid(x - np.float32(side), y - np.float32(0.02), z + np.float32(0.02), (0.05 * size, 0.11 * size, 0.075 * size))
        else:
            tip = (side + 0.15 * size, 0.06 + 0.16 * size, -0.10)
            ear = capsule(x, y, z, (side - 0.03, 0.0, 0.0), tip, 0.075 * size, 0.012)
        return smooth_union(d, ear, 0.04)

    def _eye(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        center_x, center_y, center_z = np.float32(i.eye_x), np.float32(i.eye_y), np.float32(self.eye_z)
        return ellipsoid(x - center_x, y - center_y, z - center_z, (*i.eye_radii, 0.075))

    def _face_opening(self, x: Array, y: Array, z: Array, *, height: float, width: float) -> Array:
        """The hole in the hair where the face looks out; `height` is its upper edge."""
        low = -0.75
        return ellipsoid(x, y - np.float32((height + low) / 2), z - np.float32(0.62), (width, (height - low) / 2, 0.62))

    def _hair(self, x: Array, fold: Array, y: Array, z: Array) -> Array:
        i, style = self.identity, self.identity.hair_style
        top = y - np.float32(i.skull_y + 0.02)
        back = z + np.float32(0.02)
        dome = ellipsoid(x, top, back, self.dome)
        if i.hair_ribs and style != "afro":
            dome += np.float32(0.007) * np.sin(np.float32(i.hair_ribs) * np.arctan2(x, back))
        edge = i.eye_y + i.eye_radii[1] + 0.10 + 0.10 * i.hairline
        match style:
            case "bowl":
                brow = i.eye_y + i.eye_radii[1] + 0.02 + 0.04 * i.hairline
                hair = -smooth_union(-dome, y - np.float32(brow) - np.float32(0.35) * (z - np.float32(0.45)), 0.03)
                hair = smooth_cut(hair, self._face_opening(x, y, z, height=brow, width=0.42), 0.03)
            case "bob":
                longer = ellipsoid(x, y + np.float32(0.06), back, (self.dome[0] + 0.03, 0.44, self.dome[2]))
                hair = np.maximum(smooth_union(dome, longer, 0.1), np.float32(-0.38) - y)
                hair = smooth_cut(hair, self._face_opening(x, y, z, height=edge, width=0.38), 0.04)
            case "long":
                mane = ellipsoid(x, y + np.float32(0.28), z + np.float32(0.16), (self.dome[0] + 0.02, 0.62, 0.36))
                hair = smooth_cut(smooth_union(dome, mane, 0.12), self._face_opening(x, y, z, height=edge, width=0.40), 0.04)
            case "mohawk":
                crest = ellipsoid(x, top - np.float32(0.25), back + np.float32(0.05), (0.07, 0.44, 0.52))
                hair = smooth_cut(crest, self._face_opening(x, y, z, height=edge + 0.12, width=0.5), 0.03)
            case "afro":
                ball = sphere(x, y - np.float32(0.20), z + np.float32(0.08), 0.60 + i.hair_volume)
                waves = np.sin(np.float32(20) * x) * np.sin(np.float32(20) * y) * np.sin(np.float32(20) * z)
                ball += np.float32(0.018) * waves
                hair = smooth_cut(ball, self._face_opening(x, y, z, height=edge + 0.04, width=0.42), 0.05)
                hair = np.maximum(hair, np.float32(-0.30) - y)
            case _:
                low = -0.16 - 0.1 * i.hairline
                hair = np.maximum(dome, np.float32(low) - y + np.float32(0.35) * z)
                hair = smooth_cut(hair, self._face_opening(x, y, z, height=edge, width=0.44), 0.04)
        if i.hat_style not in ("none", "headband"):
            return np.maximum(hair, y - np.float32(self.hat_y + 0.03))
        match style:
            case "bun":
                hair = smooth_union(hair, sphere(x, y - np.float32(0.66), z + np.float32(0.16), 0.16), 0.04)
            case "two_buns":
                hair = smooth_union(
                    hair, sphere(fold - np.float32(0.36), y - np.float32(0.52), z + np.float32(0.06), 0.15), 0.03
                )
            case "ponytail":
                hair = smooth_union(hair, capsule(x, y, z, (0, 0.30, -0.55), (0, -0.32, -0.78), 0.14, 0.06), 0.05)
            case "pigtails":
                hair = smooth_union(hair, capsule(fold, y, z, (0.52, 0.10, -0.08), (0.66, -0.34, -0.06), 0.12, 0.05), 0.04)
            case "side_part":
                swoop = ellipsoid(x - np.float32(0.12), y - np.float32(0.46), z - np.float32(0.26), (0.36, 0.14, 0.26))
                hair = smooth_union(hair, swoop, 0.06)
        return hair

    def _hat(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        up = y - np.float32(i.skull_y + 0.04)
        above = np.float32(self.hat_y) - y
        rx, ry, rz = self.hat_dome
        match i.hat_style:
            case "beanie":
                hat = np.maximum(ellipsoid(x, up, z + np.float32(0.02), (rx, ry + 0.03, rz)), above)
                if i.bobble:
                    hat = smooth_union(hat, sphere(x, up - np.float32(ry + 0.05), z + np.float32(0.02), 0.10), 0.02)
                return hat
            case "brim":
                crown = np.maximum(ellipsoid(x, up, z + np.float32(0.02), (rx, ry, rz)), above)
                brim = disc(x, y - np.float32(self.hat_y), z + np.float32(0.02), rx + 0.17, 0.026, stretch=rz / rx)
                return smooth_union(crown, brim, 0.04)
            case _:
                crown = np.maximum(ellipsoid(x, up, z + np.float32(0.02), (rx, ry - 0.03, rz)), above)
                slope = y - np.float32(self.hat_y) + np.float32(0.15) * (z - np.float32(0.5))
                return smooth_union(crown, disc(x, slope, z - np.float32(0.42), 0.36, 0.024), 0.03)

    def _hat_band(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        height = i.skull_y + 0.24 if i.hat_style == "headband" else self.hat_y + (0.0 if i.hat_style == "beanie" else 0.06)
        thickness = {"beanie": 0.075, "brim": 0.035}.get(i.hat_style, 0.045)
        rx, ry, rz = self.dome if i.hat_style == "headband" else self.hat_dome
        shrink = np.sqrt(max(0.1, 1 - ((height - i.skull_y - 0.04) / ry) ** 2))
        radius = rx * shrink - (0.01 if i.hat_style == "headband" else 0.03)
        return ring(x, (y - np.float32(height)) * np.float32(0.75), z + np.float32(0.02), radius, thickness, stretch=rz / rx)

    def _glasses(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        radius = i.eye_radii[0] * i.glasses_radius
        front = self.eye_z + 0.115
        dx, dy, dz = x - np.float32(i.eye_x), y - np.float32(i.eye_y), z - np.float32(front)
        if i.glasses_style == "round":
            flat = np.sqrt(dx * dx + dy * dy)
        else:
            flat = np.sqrt(np.sqrt(np.square(dx * dx) + np.square(dy * dy)))
        q = flat - np.float32(radius)
        rim = np.sqrt(q * q + dz * dz) - np.float32(0.02)
        hinge, y0 = i.eye_x + radius, i.eye_y
        temple = capsule(x, y, z, (hinge, y0, front), (max(i.skull[0] + 0.03, hinge), y0 + 0.02, 0.0), 0.018, 0.018)
        bridge = capsule(x, y, z, (0.0, y0 + 0.02, front + 0.01), (i.eye_x - radius, y0 + 0.02, front), 0.018, 0.018)
        return np.minimum(np.minimum(rim, temple), bridge)

    def _clothes(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        shoulders = ellipsoid(x, y + np.float32(1.0), z + np.float32(0.05), (i.shoulders, 0.40, 0.36))
        return smooth_union(shoulders, capsule(x, y, z, (0, -1.0, -0.05), (0, -1.6, -0.05), 0.45, 0.5), 0.15)

    def _collar(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        back = z + np.float32(0.05)
        match i.collar_style:
            case "ring":
                return ring(x, y + np.float32(0.62), back, i.neck_radius + 0.05, 0.055)
            case "turtleneck":
                tube = np.sqrt(x * x + back * back) - np.float32(i.neck_radius + 0.045)
                return -smooth_union(-tube, np.float32(0.14) - np.abs(y + np.float32(0.60)), 0.05)
            case _:
                scarf = ring(x, (y + np.float32(0.58)) * np.float32(0.8), back, i.neck_radius + 0.08, 0.10)
                return smooth_union(scarf, capsule(x, y, z, (0.12, -0.60, 0.26), (0.16, -0.95, 0.36), 0.07, 0.09), 0.03)

    def _animal_ears(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        top = i.skull_y + i.skull[1]
        match i.animal_ears:
            case "bear":
                return ellipsoid(x - np.float32(0.36), y - np.float32(top - 0.10), z, (0.15, 0.15, 0.07))
            case "cat":
                return capsule(x, y, z * np.float32(1.7), (0.30, top - 0.16, 0.0), (0.40, top + 0.14, 0.0), 0.15, 0.02)
            case _:
                return capsule(x, y, z * np.float32(1.6), (0.17, top - 0.05, 0.0), (0.27, top + 0.17, -0.03), 0.10, 0.085)

    def _beard(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        d = np.full(x.shape, FAR, np.float32)
        if i.beard:
            rx, ry, rz = i.jaw
            chin = ellipsoid(x, y - np.float32(i.jaw_y), z - np.float32(0.10), (rx + 0.03, ry + 0.05, rz + 0.04))
            d = np.maximum(chin, y - np.float32(i.mouth_y - 0.055) - np.float32(0.5) * np.maximum(x - np.float32(0.12), 0))
            d = np.maximum(d, np.float32(-0.02) - z)
        if i.moustache:
            depth = i.face_z(0.0, i.mouth_y) + 0.035
            start, end = (0.03, i.mouth_y + 0.065, depth), (0.15, i.mouth_y + 0.03, depth - 0.06)
            d = np.minimum(d, capsule(x, y, z, start, end, 0.036, 0.012))
        return d

    def paint(self, x: Array, y: Array, z: Array, part: NDArray[np.uint8]) -> tuple[Array, NDArray[np.uint8]]:
        """Colours (n, 3) of surface points (n,), and their parts with brows and mouth told apart from the skin."""
        i = self.identity
        flat: dict[Part, Rgb] = {
            Part.SKIN: i.skin_color,
            Part.EYE: (0.97, 0.97, 0.96),
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
        for key, color in flat.items():
            palette[key] = color
        colors, part = palette[part], part.copy()
        self._paint_skin(x, y, z, part, colors)
        self._paint_eyes(x, y, part, colors)
        if i.stripes:
            striped = (part == Part.CLOTHES) & (np.floor((y + 0.35 * np.square(x)) * i.stripes).astype(np.int64) % 2 == 0)
            colors[striped] = i.stripe_color
        inner = (part == Part.ANIMAL_EARS) & (z > 0.03)
        colors[inner] = 0.5 * colors[inner] + 0.5 * np.array([0.95, 0.62, 0.66], np.float32)
        return colors, part

    def _paint_skin(self, x: Array, y: Array, z: Array, part: NDArray[np.uint8], colors: Array) -> None:
        i = self.identity
        face = np.flatnonzero((part == Part.SKIN) & (z > 0.1))
        u, v = x[face], y[face]
        fold = np.abs(u)
        dx, dy = fold - np.float32(i.eye_x), v - np.float32(i.eye_y)
        blush = i.blush * np.exp(-(np.square(fold - 0.26) + np.square(v + 0.12)) / 0.008)
        tint = np.array([0.94, 0.42, 0.40], np.float32)
        skin = colors[face] + blush[:, None].astype(np.float32) * 0.6 * (tint - colors[face])
        if i.freckles:
            spots = np.sin(90 * u) * np.sin(83 * v + 40 * u) > 0.72
            skin[spots & (fold < 0.34) & (fold > 0.04) & (v < 0.0) & (v > -0.18)] *= np.float32(0.72)
        radial = np.sqrt(np.square(dx / i.eye_radii[0]) + np.square(dy / i.eye_radii[1]))
        skin[(radial < 1.14) & (dy > -0.2 * i.eye_radii[1])] = np.array([0.16, 0.10, 0.09], np.float32)
        along = dx + 0.01
        brow_line = dy - (i.eye_radii[1] + i.brow_height + i.brow_tilt * along - 1.6 * np.square(along))
        brow = (np.abs(brow_line) < i.brow_thickness) & (np.abs(along) < i.eye_radii[0] * 1.0)
        skin[brow] = i.brow_color
        kinds = part[face]
        kinds[brow] = Part.BROW
        mx, my = u, v - np.float32(i.mouth_y)
        curve = {"line": 0.0, "smile": 1.0, "open": 1.0}[i.mouth_style] * i.mouth_curve
        lower = my - curve * np.square(mx)
        if i.mouth_style == "open":
            opening = 0.075 * np.sqrt(np.maximum(0, 1 - np.square(mx / i.mouth_width)))
            mouth = (lower < 0.02) & (lower > 0.02 - opening - 0.005) & (np.abs(mx) < i.mouth_width)
            skin[mouth] = i.mouth_color
            inside = mouth & (lower < 0.008) & (lower > 0.02 - opening + 0.008)
            skin[inside] = np.array([0.30, 0.07, 0.09], np.float32)
        else:
            mouth = (np.abs(lower) < 0.016 * np.sqrt(np.maximum(0, 1.05 - np.square(mx / i.mouth_width)))) & (
                np.abs(mx) < i.mouth_width
            )
            skin[mouth] = i.mouth_color
        kinds[mouth] = Part.MOUTH
        colors[face], part[face] = skin, kinds

    def _paint_eyes(self, x: Array, y: Array, part: NDArray[np.uint8], colors: Array) -> None:
        i = self.identity
        eye = np.flatnonzero(part == Part.EYE)
        side = np.sign(x[eye])
        dx = x[eye] - side * np.float32(i.eye_x) - np.float32(i.gaze[0])
        dy = y[eye] - np.float32(i.eye_y + i.gaze[1])
        radius = np.sqrt(dx * dx + dy * dy) / np.float32(i.iris_radius)
        color = colors[eye]
        ramp = np.clip(1.15 - 0.35 * dy / i.iris_radius, 0.6, 1.4)[:, None].astype(np.float32)
        iris = radius < 1
        color[iris] = np.clip(ramp[iris] * np.asarray(i.iris_color, np.float32), 0, 1)
        color[iris & (radius > 0.86)] *= np.float32(0.5)
        color[radius < i.pupil] = np.array([0.04, 0.04, 0.05], np.float32)
        hx, hy = dx - 0.36 * i.iris_radius, dy - 0.38 * i.iris_radius
        color[hx * hx + hy * hy < (0.27 * i.iris_radius) ** 2] = 1.0
        lid = (y[eye] - i.eye_y) / i.eye_radii[1] > 1 - 2 * i.lid * 0.8
        color[lid & (i.lid > 0.04)] = np.float32(0.86) * np.asarray(i.skin_color, np.float32)
        colors[eye] = color
