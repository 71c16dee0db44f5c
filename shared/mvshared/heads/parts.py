"""What the pixels of a head's picture can show."""

from enum import IntEnum


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
