"""The head's surface: the signed distance of each of its parts, and which parts matter where.

Points are three float32 arrays of one shape in head units; the pairs of a face are folded onto x >= 0.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from mvshared.heads.identity import HeadIdentity
from mvshared.heads.primitives import Array, Vector, capsule, disc, ellipsoid, ring, smooth_cut, smooth_union, sphere

FAR = 10.0


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
    NOSE = 13
    EAR = 14


class EyeFrame(NamedTuple):
    """Where the eye of positive x sits: the point of the face and the cosine and sine of its turn to the side."""

    x: float
    y: float
    z: float
    cos: float
    sin: float

    def local(self, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
        """Points in the eye's axes: outward from the nose, up, out of the face. x must be folded."""
        dx, dz = x - self.x, z - self.z
        return dx * self.cos - dz * self.sin, y - self.y, dx * self.sin + dz * self.cos


class HeadShape:
    """The distance fields of one identity. `parts` lists those that it has; `distance_of(index, ...)` evaluates one."""

    def __init__(self, identity: HeadIdentity) -> None:
        self.identity = i = identity
        self.hat_y = i.skull_y + 0.17
        self.dome: Vector = (i.skull[0] + i.hair_volume, i.skull[1] + i.hair_volume, i.skull[2] + i.hair_volume)
        self.hat_dome: Vector = (self.dome[0] + 0.035, self.dome[1] + 0.035, self.dome[2] + 0.035)
        self.nose_z = self._face_z(0.0, i.nose_y)
        self.mouth_z = self._face_z(0.0, i.mouth_y)
        eye_z = self._face_z(i.eye_x, i.eye_y)
        slope = (self._face_z(i.eye_x - 0.05, i.eye_y) - self._face_z(i.eye_x + 0.05, i.eye_y)) / 0.1
        turn = 0.7 * math.atan(slope)
        self.eye = EyeFrame(i.eye_x, i.eye_y, eye_z, math.cos(turn), math.sin(turn))
        surfaces: tuple[tuple[Part, Callable[[Array, Array, Array], Array], bool], ...] = (
            (Part.SKIN, self._skin, True),
            (Part.EYE, self._eye, True),
            (Part.HAIR, self._hair, i.hair_style != "bald"),
            (Part.HAT, self._hat, i.hat_style not in ("none", "headband")),
            (Part.HAT_BAND, self._hat_band, i.hat_style in ("beanie", "headband", "brim")),
            (Part.GLASSES, self._glasses, i.glasses_style != "none"),
            (Part.CLOTHES, self._clothes, True),
            (Part.COLLAR, self._collar, i.collar_style != "none"),
            (Part.ANIMAL_EARS, self._animal_ears, i.animal_ears != "none"),
            (Part.BEARD, self._beard, i.beard or i.moustache),
        )
        self.parts = tuple(part for part, _, present in surfaces if present)
        self._functions = tuple(function for _, function, present in surfaces if present)

    def distance_of(self, index: int, x: Array, y: Array, z: Array) -> Array:
        """Signed distance to the surface of `parts[index]`."""
        return self._functions[index](x, y, z)

    def _face_z(self, x: float, y: float) -> float:
        """Depth of the bare face (no nose) at x, y: sphere tracing one ray from the front."""
        px, py, pz = (np.full(1, value, np.float32) for value in (x, y, 1.0))
        for _ in range(24):
            pz = pz - self._face(px, py, pz)
        return float(pz[0])

    def _face(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        d = ellipsoid(x, y - i.skull_y, z, i.skull)
        d = smooth_union(d, ellipsoid(x, y - i.jaw_y, z - 0.10, i.jaw), 0.12)
        return smooth_union(d, sphere(x - 0.20, y + 0.13, z - 0.28, i.cheek_radius), 0.10)

    def nose(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        return ellipsoid(x, y - i.nose_y, z - (self.nose_z + 0.015), i.nose)

    def ear(self, x: Array, y: Array, z: Array) -> Array:
        """The human or elf ear of positive x."""
        side, size = self.identity.skull[0] - 0.01, self.identity.ear_size
        if self.identity.ear_style == "human":
            outer = ellipsoid(x - side, y - 0.02, z + 0.02, (0.055 * size, 0.115 * size, 0.08 * size))
            return smooth_cut(outer, sphere(x - (side + 0.055 * size), y - 0.02, z - 0.035, 0.045 * size), 0.03)
        tip = (side + 0.17 * size, 0.06 + 0.17 * size, -0.10)
        return capsule(x, y, z, (side - 0.03, 0.0, 0.0), tip, 0.08 * size, 0.014)

    def _skin(self, x: Array, y: Array, z: Array) -> Array:
        i, x = self.identity, np.abs(x)
        d = smooth_union(self._face(x, y, z), self.nose(x, y, z), 0.05)
        d = smooth_union(d, capsule(x, y, z, (0, -0.2, -0.05), (0, -0.8, -0.05), i.neck_radius, i.neck_radius), 0.06)
        return smooth_union(d, self.ear(x, y, z), 0.04)

    def _eye(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        a, b, c = self.eye.local(np.abs(x), y, z)
        # The ball's centre is half its depth under the face: the cut there has the radii of the visible eye.
        grow = 1 / math.sqrt(0.75)
        return ellipsoid(a, b, c + 0.5 * i.eye_depth, (i.eye_radii[0] * grow, i.eye_radii[1] * grow, i.eye_depth))

    def _face_opening(
        self, x: Array, y: Array, z: Array, *, height: float, width: float, tilt: float = 0.0, blunt: bool = False
    ) -> Array:
        """The hole in the hair where the face looks out; `height` is its upper edge, `tilt` lifts it to one side, `blunt`
        cuts it straight."""
        low = -0.75
        level = y - (height + low) / 2 + tilt * x if tilt else y - (height + low) / 2
        hole = ellipsoid(x, level, z - 0.62, (width, (height - low) / 2 * (1.5 if blunt else 1.0), 0.62))
        return -smooth_union(-hole, height - y, 0.05) if blunt else hole

    def _hair(self, x: Array, y: Array, z: Array) -> Array:
        i, style = self.identity, self.identity.hair_style
        top, back = y - (i.skull_y + 0.02), z + 0.02
        dome = ellipsoid(x, top, back, self.dome)
        if i.hair_ribs and style != "afro":
            pole = np.minimum((x * x + back * back) * 12, 1)  # the ribs fade where they would meet
            dome += 0.008 * pole * np.sin(i.hair_ribs * np.arctan2(x, back))
        brow = i.eye_y + i.eye_radii[1] + 0.03 + 0.04 * i.hairline
        edge = i.eye_y + i.eye_radii[1] + 0.10 + 0.10 * i.hairline
        match style:
            case "bowl":
                hair = -smooth_union(-dome, y - brow - 0.40 * (z - 0.45), 0.04)
                hair = smooth_cut(hair, self._face_opening(x, y, z, height=brow, width=0.44, blunt=True), 0.03)
            case "fringe":
                hair = np.maximum(dome, -0.20 - y + 0.30 * z)
                hair = smooth_cut(hair, self._face_opening(x, y, z, height=brow, width=0.40, blunt=True), 0.03)
            case "bob":
                longer = ellipsoid(x, y + 0.06, back, (self.dome[0] + 0.04, 0.44, self.dome[2]))
                hair = np.maximum(smooth_union(dome, longer, 0.1), -0.38 - y)
                hair = smooth_cut(hair, self._face_opening(x, y, z, height=edge, width=0.39, blunt=i.hairline < 0.4), 0.04)
            case "long" | "side_part":
                mane = ellipsoid(x, y + 0.28, z + 0.16, (self.dome[0] + 0.02, 0.62, 0.36))
                if style == "side_part":
                    mane = ellipsoid(x, y + 0.02, z + 0.12, (self.dome[0], 0.42, 0.42))
                tilt = i.part_side * 0.55 if style == "side_part" else 0.0
                hair = smooth_union(dome, mane, 0.12)
                hair = smooth_cut(hair, self._face_opening(x, y, z, height=edge - 0.02, width=0.42, tilt=tilt), 0.04)
            case "mohawk":
                crest = ellipsoid(x, top - 0.20, back + 0.05, (0.085, 0.47, 0.54))
                hair = smooth_cut(crest, self._face_opening(x, y, z, height=edge + 0.10, width=0.5), 0.03)
            case "afro":
                ball = sphere(x, y - 0.20, z + 0.08, 0.58 + i.hair_volume)
                ball += 0.018 * np.sin(20 * x) * np.sin(20 * y) * np.sin(20 * z)
                hair = smooth_cut(ball, self._face_opening(x, y, z, height=edge + 0.04, width=0.44), 0.05)
                hair = np.maximum(hair, -0.30 - y)
            case _:
                hair = np.maximum(dome, -0.16 - 0.1 * i.hairline - y + 0.35 * z)
                hair = smooth_cut(hair, self._face_opening(x, y, z, height=edge, width=0.44), 0.04)
        if i.wears_crown:
            hair = np.maximum(hair, y - (self.hat_y + 0.03))
        return self._hair_ends(hair, x, y, z)

    def _hair_ends(self, hair: Array, x: Array, y: Array, z: Array) -> Array:
        """Buns, tails and spikes joined to the hair."""
        i, fold = self.identity, np.abs(x)
        match i.hair_style:
            case "bun":
                return smooth_union(hair, sphere(x, y - (i.skull_y + self.dome[1] + 0.07), z + 0.10, 0.16), 0.04)
            case "two_buns":
                return smooth_union(hair, sphere(fold - 0.40, y - (i.skull_y + 0.44), z + 0.06, 0.175), 0.03)
            case "ponytail":
                high = 0.02 if i.wears_crown else 0.30
                tie = smooth_union(hair, sphere(x, y - high, z + self.dome[2] + 0.03, 0.09), 0.03)
                return smooth_union(tie, capsule(x, y, z, (0, high - 0.06, -0.66), (0, high - 0.62, -0.76), 0.14, 0.05), 0.03)
            case "pigtails":
                tie = smooth_union(hair, sphere(fold - (self.dome[0] + 0.01), y - 0.10, z + 0.08, 0.08), 0.03)
                return smooth_union(tie, capsule(fold, y, z, (0.62, 0.02, -0.08), (0.70, -0.38, -0.06), 0.125, 0.045), 0.03)
            case "spiky":
                base = i.skull_y + 0.02
                ends = (
                    ((0.06, base + 0.34, 0.22), (0.10, base + 0.72, 0.40)),
                    ((0.14, base + 0.36, -0.10), (0.20, base + 0.78, -0.10)),
                    ((0.32, base + 0.22, 0.12), (0.58, base + 0.56, 0.22)),
                    ((0.34, base + 0.12, -0.22), (0.66, base + 0.32, -0.40)),
                    ((0.10, base + 0.20, -0.36), (0.16, base + 0.44, -0.76)),
                )
                for start, end in ends:
                    hair = smooth_union(hair, capsule(fold, y, z, start, end, 0.17, 0.012), 0.04)
                return hair
            case _:
                return hair

    def _hat(self, x: Array, y: Array, z: Array) -> Array:
        i = self.identity
        up, back, above = y - (i.skull_y + 0.04), z + 0.02, self.hat_y - y
        rx, ry, rz = self.hat_dome
        match i.hat_style:
            case "beanie":
                hat = ellipsoid(x, up, back, (rx, ry + 0.03, rz))
                hat += 0.007 * np.minimum((x * x + back * back) * 12, 1) * np.sin(26 * np.arctan2(x, back))
                hat = np.maximum(hat, above)
                return smooth_union(hat, sphere(x, up - (ry + 0.06), back, 0.12), 0.02) if i.bobble else hat
            case "brim":
                crown = np.maximum(ellipsoid(x, up, back, (rx, ry - 0.02, rz)), above)
                dip = y - self.hat_y + 0.10 * np.square(x)
                return smooth_union(crown, disc(x, dip, back, rx + 0.15, 0.028, stretch=rz / rx), 0.04)
            case _:
                crown = np.maximum(ellipsoid(x, up, back, (rx, ry - 0.04, rz)), above)
                crown = smooth_union(crown, sphere(x, up - (ry - 0.04), back, 0.045), 0.02)
                slope = y - self.hat_y + 0.15 * (z - 0.5) + 0.35 * np.square(x)
                return smooth_union(crown, disc(x, slope, z - 0.42, 0.38, 0.026), 0.03)

    def _hat_band(self, x: Array, y: Array, z: Array) -> Array:
        style = self.identity.hat_style
        height = self.identity.skull_y + 0.24 if style == "headband" else self.hat_y + (0.01 if style == "beanie" else 0.07)
        thickness = {"beanie": 0.085, "brim": 0.04}.get(style, 0.05)
        rx, ry, rz = self.dome if style == "headband" else self.hat_dome
        shrink = math.sqrt(max(0.1, 1 - ((height - self.identity.skull_y - 0.04) / ry) ** 2))
        radius = rx * shrink - (0.01 if style == "headband" else 0.03)
        return ring(x, (y - height) * 0.75, z + 0.02, radius, thickness, stretch=rz / rx)

    def _glasses(self, x: Array, y: Array, z: Array) -> Array:
        i, x = self.identity, np.abs(x)
        radius = i.eye_radii[0] * i.glasses_radius
        front = self.eye.z + 0.085
        dx, dy, dz = x - i.eye_x, y - i.eye_y, z - front + 0.25 * (x - i.eye_x)
        if i.glasses_style == "round":
            flat = np.sqrt(dx * dx + dy * dy)
        else:
            flat = np.sqrt(np.sqrt(np.square(dx * dx) + np.square(dy * dy * 1.25)))
        q = flat - radius
        rim = (np.sqrt(q * q + dz * dz) - 0.021) * 0.9
        hinge, level = i.eye_x + radius, i.eye_y + 0.02
        temple = capsule(
            x, y, z, (hinge, level, front - 0.25 * radius), (max(i.skull[0] + 0.02, hinge), level, 0.0), 0.019, 0.019
        )
        bridge = capsule(x, y, z, (0.0, level, front + 0.06), (i.eye_x - radius, level, front + 0.25 * radius), 0.019, 0.019)
        return np.minimum(np.minimum(rim, temple), bridge)

    def _clothes(self, x: Array, y: Array, z: Array) -> Array:
        shoulders = ellipsoid(x, y + 1.0, z + 0.05, (self.identity.shoulders, 0.40, 0.36))
        return smooth_union(shoulders, capsule(x, y, z, (0, -1.0, -0.05), (0, -1.6, -0.05), 0.45, 0.5), 0.15)

    def _collar(self, x: Array, y: Array, z: Array) -> Array:
        radius, back = self.identity.neck_radius, z + 0.05
        match self.identity.collar_style:
            case "ring":
                return ring(x, y + 0.62, back, radius + 0.05, 0.055)
            case "turtleneck":
                tube = np.sqrt(x * x + back * back) - (radius + 0.05)
                return -smooth_union(-tube, 0.14 - np.abs(y + 0.60), 0.06)
            case "shirt":
                flap = ellipsoid(np.abs(x) - 0.13, y + 0.66 - 0.25 * np.abs(x), z - 0.17, (0.13, 0.075, 0.10))
                return smooth_union(ring(x, (y + 0.60) * 0.8, back, radius + 0.04, 0.05), flap, 0.03)
            case _:
                scarf = ring(x, (y + 0.58) * 0.8, back, radius + 0.08, 0.10)
                return smooth_union(scarf, capsule(x, y, z, (0.14, -0.60, 0.24), (0.19, -1.05, 0.36), 0.07, 0.10), 0.03)

    def _animal_ears(self, x: Array, y: Array, z: Array) -> Array:
        x, top = np.abs(x), self.identity.skull_y + self.dome[1]
        match self.identity.animal_ears:
            case "bear":
                return ellipsoid(x - 0.37, y - (top - 0.10), z, (0.19, 0.19, 0.09))
            case "cat":
                return capsule(x, y, z * 1.7, (0.28, top - 0.18, 0.0), (0.42, top + 0.20, 0.0), 0.18, 0.02) * 0.65
            case _:
                return capsule(x, y, z * 1.6, (0.18, top - 0.08, 0.0), (0.32, 0.86, -0.03), 0.09, 0.10) * 0.7

    def _beard(self, x: Array, y: Array, z: Array) -> Array:
        i, x = self.identity, np.abs(x)
        d = np.full(x.shape, FAR, np.float32)
        if i.beard:
            rx, ry, rz = i.jaw
            chin = ellipsoid(x, y - i.jaw_y, z - 0.10, (rx + 0.035, ry + 0.06, rz + 0.05))
            d = -smooth_union(-chin, y - (i.mouth_y - 0.06) - 0.9 * np.maximum(x - 0.11, 0), 0.04)
            d = np.maximum(d, -0.02 - z)
        if i.moustache:
            start, end = (0.03, i.mouth_y + 0.07, self.mouth_z + 0.02), (0.16, i.mouth_y + 0.035, self.mouth_z - 0.03)
            d = np.minimum(d, capsule(x, y, z, start, end, 0.042, 0.014))
        return d
