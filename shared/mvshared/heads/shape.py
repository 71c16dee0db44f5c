"""The head's surface: which layers of distance fields make up each of its parts, and their measures."""

import math

import numpy as np

from mvshared.heads.fields import Layer, Measures, face_depth
from mvshared.heads.identity import HeadIdentity
from mvshared.heads.layers import distance
from mvshared.heads.parts import Part
from mvshared.heads.primitives import Array, Vector

HAIR = {
    "bald": (),
    "short": (Layer.SHORT,),
    "bowl": (Layer.BOWL,),
    "fringe": (Layer.FRINGE,),
    "bob": (Layer.BOB,),
    "long": (Layer.LONG,),
    "bun": (Layer.SHORT, Layer.BUN),
    "two_buns": (Layer.SHORT, Layer.TWO_BUNS),
    "mohawk": (Layer.MOHAWK,),
    "afro": (Layer.AFRO,),
    "ponytail": (Layer.SHORT, Layer.PONYTAIL),
    "side_part": (Layer.SIDE_PART,),
    "pigtails": (Layer.SHORT, Layer.PIGTAILS),
    "spiky": (Layer.SHORT, Layer.SPIKES),
}
HAT = {"none": (), "beanie": (Layer.BEANIE,), "brim": (Layer.BRIM,), "cap": (Layer.CAP,), "headband": ()}
GLASSES = {"none": (), "round": (Layer.ROUND_GLASSES,), "square": (Layer.SQUARE_GLASSES,)}
COLLAR = {
    "none": (),
    "ring": (Layer.RING_COLLAR,),
    "turtleneck": (Layer.TURTLENECK,),
    "scarf": (Layer.SCARF,),
    "shirt": (Layer.SHIRT,),
}
ANIMAL_EARS = {"none": (), "cat": (Layer.CAT_EARS,), "bear": (Layer.BEAR_EARS,), "rabbit": (Layer.RABBIT_EARS,)}


class HeadShape:
    """The distance fields of one identity. `parts` lists those that it has; `distance_of(index, ...)` evaluates one.

    `layers` int64 (parts, n) has the numbers of each part's layers, -1 after the last; `measures` are what they need.
    """

    def __init__(self, identity: HeadIdentity) -> None:
        self.identity = identity
        self.measures = _measures(identity)
        layers = _layers(identity)
        self.parts = tuple(layers)
        self.layers = np.full((len(layers), max(map(len, layers.values()))), -1, np.int64)
        for row, numbers in zip(self.layers, layers.values(), strict=True):
            row[: len(numbers)] = numbers
        self._nose = np.array([Layer.NOSE], np.int64)
        self._ear = np.array([Layer.HUMAN_EAR if identity.ear_style == "human" else Layer.ELF_EAR], np.int64)

    def distance_of(self, index: int, x: Array, y: Array, z: Array) -> Array:
        """Signed distance to the surface of `parts[index]`."""
        return distance(self.layers[index], x, y, z, self.measures)

    def nose(self, x: Array, y: Array, z: Array) -> Array:
        return distance(self._nose, x, y, z, self.measures)

    def ear(self, x: Array, y: Array, z: Array) -> Array:
        """The human or elf ear of positive x."""
        return distance(self._ear, x, y, z, self.measures)


def _layers(i: HeadIdentity) -> dict[Part, tuple[Layer, ...]]:
    """The layers of the parts that a head has, in the order of the parts' candidates."""
    hair = HAIR[i.hair_style]
    if i.hair_style == "bob" and i.hairline < 0.4:
        hair = (Layer.BLUNT_BOB,)
    if i.wears_crown and hair:
        hair = (hair[0], Layer.UNDER_HAT, *hair[1:])
    if hair and i.hair_style not in ("mohawk", "afro"):
        hair = (Layer.DOME, Layer.RIBS, *hair) if i.hair_ribs else (Layer.DOME, *hair)
    beard = (Layer.BEARD,) if i.beard else (Layer.NOTHING,)
    layers: dict[Part, tuple[Layer, ...]] = {
        Part.SKIN: (Layer.SKIN, Layer.HUMAN_EARS if i.ear_style == "human" else Layer.ELF_EARS),
        Part.EYE: (Layer.EYES,),
        Part.HAIR: hair,
        Part.HAT: (Layer.BEANIE, Layer.BOBBLE) if i.hat_style == "beanie" and i.bobble else HAT[i.hat_style],
        Part.HAT_BAND: (Layer.HAT_BAND,) if i.hat_style in ("beanie", "headband", "brim") else (),
        Part.GLASSES: GLASSES[i.glasses_style],
        Part.CLOTHES: (Layer.CLOTHES,),
        Part.COLLAR: COLLAR[i.collar_style],
        Part.ANIMAL_EARS: ANIMAL_EARS[i.animal_ears],
        Part.BEARD: (*beard, Layer.MOUSTACHE) if i.moustache else beard if i.beard else (),
    }
    return {part: numbers for part, numbers in layers.items() if numbers}


def _measures(i: HeadIdentity) -> Measures:
    hat_y = i.skull_y + 0.17
    dome: Vector = (i.skull[0] + i.hair_volume, i.skull[1] + i.hair_volume, i.skull[2] + i.hair_volume)
    hat_dome: Vector = (dome[0] + 0.035, dome[1] + 0.035, dome[2] + 0.035)
    headband = i.hat_style == "headband"
    band_y = i.skull_y + 0.24 if headband else hat_y + (0.01 if i.hat_style == "beanie" else 0.07)
    rx, ry, rz = dome if headband else hat_dome
    shrink = math.sqrt(max(0.1, 1 - ((band_y - i.skull_y - 0.04) / ry) ** 2))

    def depth(x: float, y: float) -> float:
        """Depth of the bare face (no nose)."""
        return float(face_depth(x, y, i.skull, i.skull_y, i.jaw, i.jaw_y, i.cheek_radius))

    slope = (depth(i.eye_x - 0.05, i.eye_y) - depth(i.eye_x + 0.05, i.eye_y)) / 0.1
    turn = 0.7 * math.atan(slope)
    grow = 1 / math.sqrt(0.75)
    return Measures(
        skull=i.skull,
        skull_y=i.skull_y,
        jaw=i.jaw,
        jaw_y=i.jaw_y,
        cheek_radius=i.cheek_radius,
        nose=i.nose,
        nose_y=i.nose_y,
        nose_z=depth(0.0, i.nose_y),
        neck_radius=i.neck_radius,
        ear_size=i.ear_size,
        eye=(i.eye_x, i.eye_y, depth(i.eye_x, i.eye_y)),
        eye_cos=math.cos(turn),
        eye_sin=math.sin(turn),
        eye_ball=(i.eye_radii[0] * grow, i.eye_radii[1] * grow, i.eye_depth),
        mouth_y=i.mouth_y,
        mouth_z=depth(0.0, i.mouth_y),
        shoulders=i.shoulders,
        dome=dome,
        hair_ribs=float(i.hair_ribs),
        hair_volume=i.hair_volume,
        hair_brow=i.eye_y + i.eye_radii[1] + 0.03 + 0.04 * i.hairline,
        hair_edge=i.eye_y + i.eye_radii[1] + 0.10 + 0.10 * i.hairline,
        hairline=i.hairline,
        part_tilt=i.part_side * 0.55,
        tail_y=0.02 if i.wears_crown else 0.30,
        hat_dome=hat_dome,
        hat_y=hat_y,
        band_y=band_y,
        band_radius=rx * shrink - (0.01 if headband else 0.03),
        band_thickness={"beanie": 0.085, "brim": 0.04}.get(i.hat_style, 0.05),
        band_stretch=rz / rx,
        glasses_radius=i.eye_radii[0] * i.glasses_radius,
    )
