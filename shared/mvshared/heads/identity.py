"""Who a head is: all of its proportions, parts and colours, drawn from one integer.

Lengths are head units: the skull's radius is about a half, the origin is between skull and chin, +Y is up, the face looks to
+Z. Colours are RGB in [0, 1] as displayed, before shading.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from mvshared.numbers import whole

Rgb = tuple[float, float, float]
HairStyle = Literal[
    "bald", "short", "bowl", "fringe", "bob", "long", "bun", "two_buns", "mohawk", "afro", "ponytail", "side_part",
    "pigtails", "spiky",
]  # fmt: skip
HatStyle = Literal["none", "beanie", "brim", "cap", "headband"]
EarStyle = Literal["human", "elf"]
AnimalEars = Literal["none", "cat", "bear", "rabbit"]
GlassesStyle = Literal["none", "round", "square"]
CollarStyle = Literal["none", "ring", "turtleneck", "scarf", "shirt"]
ClothPattern = Literal["plain", "stripes", "dots", "yoke"]
MouthStyle = Literal["line", "smile", "open"]

SEED = 20_240_607  # separates these random numbers from any other use of the same integers

SKIN = ((0.98, 0.86, 0.77), (0.94, 0.76, 0.62), (0.87, 0.66, 0.50), (0.72, 0.50, 0.35), (0.54, 0.35, 0.24), (0.42, 0.27, 0.19))
FANTASY_SKIN = ((0.60, 0.82, 0.52), (0.55, 0.70, 0.90), (0.80, 0.66, 0.90))
HAIR = (
    (0.19, 0.16, 0.17), (0.33, 0.22, 0.15), (0.45, 0.28, 0.15), (0.70, 0.38, 0.16), (0.88, 0.70, 0.36), (0.80, 0.80, 0.82),
    (0.52, 0.30, 0.70), (0.95, 0.52, 0.68), (0.16, 0.58, 0.52), (0.24, 0.38, 0.80),
)  # fmt: skip
IRIS = ((0.24, 0.42, 0.80), (0.20, 0.58, 0.40), (0.42, 0.26, 0.14), (0.46, 0.34, 0.70), (0.50, 0.56, 0.60), (0.70, 0.48, 0.16))
CLOTH = (
    (0.86, 0.22, 0.24), (0.95, 0.58, 0.16), (0.96, 0.82, 0.30), (0.32, 0.72, 0.36), (0.18, 0.56, 0.60), (0.22, 0.40, 0.82),
    (0.50, 0.32, 0.72), (0.95, 0.56, 0.72), (0.22, 0.23, 0.27), (0.94, 0.93, 0.90), (0.60, 0.60, 0.68), (0.58, 0.38, 0.24),
)  # fmt: skip
# Below hats and animals' ears.
COVERED_HAIR: tuple[HairStyle, ...] = ("bald", "short", "bowl", "fringe", "bob", "long", "ponytail", "pigtails", "side_part")


@dataclass(frozen=True, kw_only=True)
class HeadIdentity:
    """Everything that distinguishes a head. Radii and offsets in head units, angles in radians, amounts in [0, 1]."""

    skull: tuple[float, float, float]  # radii
    jaw: tuple[float, float, float]  # radii
    jaw_y: float
    cheek_radius: float
    neck_radius: float
    shoulders: float
    nose: tuple[float, float, float]  # radii
    nose_y: float
    ear_style: EarStyle
    ear_size: float
    eye_x: float
    eye_y: float
    eye_radii: tuple[float, float]  # of the part outside the face
    eye_depth: float
    iris_radius: float
    pupil: float  # share of the iris
    gaze: tuple[float, float]
    lid: float  # share of the eye that the upper lid covers
    lashes: float  # thickness of the line of lashes, share of the eye's radius
    brow_height: float
    brow_tilt: float
    brow_arch: float
    brow_thickness: float
    mouth_style: MouthStyle
    mouth_y: float
    mouth_width: float
    mouth_curve: float
    mouth_open: float  # height of an open mouth
    blush: float
    freckles: float
    beard: bool
    moustache: bool
    hair_style: HairStyle
    hair_volume: float
    hairline: float
    hair_ribs: int  # 0 is smooth
    part_side: float  # of a side parting, -1 or 1
    hat_style: HatStyle
    bobble: bool
    animal_ears: AnimalEars
    glasses_style: GlassesStyle
    glasses_radius: float
    collar_style: CollarStyle
    cloth_pattern: ClothPattern
    pattern_scale: float  # repeats per head unit
    skin_color: Rgb
    hair_color: Rgb
    brow_color: Rgb
    iris_color: Rgb
    mouth_color: Rgb
    hat_color: Rgb
    hat_band_color: Rgb
    glasses_color: Rgb
    cloth_color: Rgb
    stripe_color: Rgb
    collar_color: Rgb
    light: tuple[float, float, float]  # unit vector toward the key light, fixed in the world

    @property
    def skull_y(self) -> float:
        """Height of the skull's centre."""
        return 0.10

    @property
    def wears_crown(self) -> bool:
        """Whether a hat covers the top of the head."""
        return self.hat_style not in ("none", "headband")


def sample_identity(number: int) -> HeadIdentity:
    """The head of a number: the same on every machine. Raises OptionError for a negative number."""
    random = np.random.default_rng([SEED, whole("identity", number, 0)])

    def between(low: float, high: float) -> float:
        return float(random.uniform(low, high))

    def chance(probability: float) -> bool:
        return bool(random.random() < probability)

    def pick(options: tuple, weights: tuple[float, ...] | None = None):
        shares = None if weights is None else np.asarray(weights) / sum(weights)
        return options[int(random.choice(len(options), p=shares))]

    def shade(color: Rgb, amount: float = 0.05) -> Rgb:
        r, g, b = (float(np.clip(value + random.uniform(-amount, amount), 0.04, 1)) for value in color)
        return r, g, b

    skin = shade(pick(FANTASY_SKIN) if chance(0.06) else pick(SKIN), 0.03)
    hair = shade(pick(HAIR, (3, 3, 3, 2, 3, 2, 1, 1, 1, 1)))
    hair_style = pick(
        get_args(HairStyle),
        (1, 2, 1.5, 1.5, 2, 2.5, 1.5, 1.5, 1, 1.5, 1.5, 2, 1.5, 1.5),
    )
    hat_style = pick(("none", "beanie", "brim", "cap", "headband"), (6, 1.3, 1, 1, 0.7))
    animal_ears = pick(("none", "cat", "bear", "rabbit"), (7, 1, 1, 0.7))
    if hat_style not in ("none", "headband"):
        animal_ears = "none"
        if hair_style not in COVERED_HAIR:
            hair_style = pick(COVERED_HAIR)
    elif hat_style == "headband" and hair_style == "afro":  # so since headbands were for all: a number stays its head
        hair_style = "short"
    if animal_ears != "none" and hair_style not in COVERED_HAIR:
        hair_style = pick(COVERED_HAIR)
    cloth = shade(pick(CLOTH))
    stripe = pick(CLOTH)
    if np.abs(np.subtract(cloth, stripe)).sum() < 0.5:
        stripe = (0.95, 0.94, 0.92) if sum(cloth) < 1.8 else (0.25, 0.26, 0.32)
    skull = (between(0.44, 0.52), between(0.46, 0.54), between(0.47, 0.53))
    eye_size = between(0.105, 0.135)
    azimuth, height = math.radians(between(-40, 40)), math.radians(between(35, 60))
    mouth_style = pick(("line", "smile", "open"), (2, 3, 2))
    identity = HeadIdentity(
        skull=skull,
        jaw=(between(0.30, 0.42), between(0.24, 0.32), between(0.32, 0.38)),
        jaw_y=between(-0.24, -0.17),
        cheek_radius=between(0.13, 0.19),
        neck_radius=between(0.15, 0.21),
        shoulders=between(0.60, 0.76),
        nose=(between(0.045, 0.085), between(0.045, 0.09), between(0.05, 0.10)),
        nose_y=between(-0.12, -0.06),
        ear_style="elf" if chance(0.15) else "human",
        ear_size=between(0.85, 1.25),
        eye_x=between(0.175, 0.205),
        eye_y=between(0.03, 0.09),
        eye_radii=(eye_size, eye_size * between(0.92, 1.2)),
        eye_depth=between(0.07, 0.09),
        iris_radius=eye_size * between(0.55, 0.70),
        pupil=between(0.42, 0.6),
        gaze=(between(-0.015, 0.015), between(-0.012, 0.012)),
        lid=between(0.08, 0.3) if chance(0.45) else 0.0,
        lashes=between(0.12, 0.24),
        brow_height=between(0.05, 0.085),
        brow_tilt=between(-0.30, 0.16),
        brow_arch=between(0.005, 0.04),
        brow_thickness=between(0.016, 0.032),
        mouth_style=mouth_style,
        mouth_y=between(-0.30, -0.25),
        mouth_width=between(0.10, 0.15) if mouth_style == "line" else between(0.12, 0.175),
        mouth_curve=between(-1.2, 1.0) if mouth_style == "line" else between(1.6, 3.2),
        mouth_open=between(0.08, 0.13),
        blush=between(0.2, 0.7) if chance(0.4) else 0.0,
        freckles=1.0 if chance(0.12) else 0.0,
        beard=chance(0.1),
        moustache=chance(0.08),
        hair_style=hair_style,
        hair_volume=between(0.05, 0.10),
        hairline=between(0.0, 1.0),
        hair_ribs=int(random.integers(12, 22)) if chance(0.45) else 0,
        part_side=1.0 if chance(0.5) else -1.0,
        hat_style=hat_style,
        bobble=chance(0.6),
        animal_ears=animal_ears,
        glasses_style=pick(("none", "round", "square"), (7, 1.8, 1.2)),
        glasses_radius=between(1.25, 1.4),
        collar_style=pick(("none", "ring", "turtleneck", "scarf", "shirt"), (2, 1.5, 1.3, 1.2, 1.2)),
        cloth_pattern=pick(("plain", "stripes", "dots", "yoke"), (5, 2.5, 1.2, 1)),
        pattern_scale=between(6.0, 10.0),
        skin_color=skin,
        hair_color=hair,
        brow_color=shade(hair, 0.02),
        iris_color=shade(pick(IRIS)),
        mouth_color=shade(pick(((0.66, 0.24, 0.24), (0.80, 0.34, 0.36), (0.50, 0.20, 0.20)))),
        hat_color=shade(pick(CLOTH)),
        hat_band_color=shade(pick(CLOTH)),
        glasses_color=pick(((0.10, 0.10, 0.12), (0.75, 0.16, 0.20), (0.20, 0.26, 0.62), (0.82, 0.62, 0.20))),
        cloth_color=cloth,
        stripe_color=stripe,
        collar_color=shade(pick(CLOTH)),
        light=(math.cos(height) * math.sin(azimuth), math.sin(height), math.cos(height) * math.cos(azimuth)),
    )
    if np.abs(np.subtract(identity.brow_color, skin)).sum() < 0.45:  # brows and bald heads must stay readable
        identity = replace(identity, brow_color=(0.24, 0.15, 0.10) if sum(skin) > 1.0 else (0.72, 0.66, 0.60))
    if np.linalg.norm(np.subtract(identity.mouth_color, skin)) < 0.5:  # and mouths
        identity = replace(identity, mouth_color=(0.42, 0.12, 0.14) if sum(skin) > 1.3 else (0.93, 0.55, 0.55))
    return _with_ponytail_shown(identity)


def _with_ponytail_shown(head: HeadIdentity) -> HeadIdentity:
    """The head with a headband if it has a ponytail, and with none if it has not: the front does not show a ponytail, and what
    no picture shows of a back could only be guessed. Nobody has a ponytail under a hat."""
    if head.wears_crown:
        return replace(head, hair_style="short") if head.hair_style == "ponytail" else head
    if head.hair_style != "ponytail":
        return replace(head, hat_style="none")
    band = head.hat_band_color
    if np.abs(np.subtract(band, head.hair_color)).sum() < 0.6:  # it must be seen
        band = (0.95, 0.94, 0.92) if sum(head.hair_color) < 1.8 else (0.25, 0.26, 0.32)
    return replace(head, hat_style="headband", hat_band_color=band)
