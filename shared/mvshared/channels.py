"""How many channels go into every layer of the two U-Nets, from their configs: both backends are built from this, and what
they take of memory and arithmetic is reckoned from it.

Sources: diffusers' unet_2d_condition.py; crowsonkb/k-diffusion, models/image_v1.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mvshared.config import KUNetConfig, UNetConfig


class LevelPlan(NamedTuple):
    """The blocks of a level (0 is the finest): a resnet per entry of `inputs` (its input channels), with transformers behind
    the first ones. What comes out of each has the level's channels."""

    level: int
    inputs: tuple[int, ...]
    attentions: int

    def layers(self) -> Iterator[tuple[int, bool]]:
        """Input channels of every resnet, and whether a transformer follows it."""
        return ((channels, number < self.attentions) for number, channels in enumerate(self.inputs))


class UNetPlan(NamedTuple):
    """The levels of the multi-view U-Net, in the order in which they run."""

    down: tuple[LevelPlan, ...]
    mid: LevelPlan
    up: tuple[LevelPlan, ...]


def unet_plan(config: UNetConfig) -> UNetPlan:
    """What the multi-view U-Net is built of. On the way up every resnet gets a skip connection beside its input."""
    channels, levels = config.block_out_channels, range(len(config.block_out_channels))
    skips, width = [channels[0]], channels[0]  # channels of the skip connections, and of x
    down, up = [], []
    for level in levels:
        layers = config.layers_per_block[level]
        inputs = (width, *[channels[level]] * (layers - 1))
        down.append(LevelPlan(level, inputs, layers if config.attention_levels[level] else 0))
        width = channels[level]
        skips += [width] * (layers + (level != levels[-1]))
    resnets = 2 if config.mid_attention else 1  # as diffusers' UNetMidBlock2D without attention
    mid = LevelPlan(levels[-1], (width,) * resnets, resnets - 1)
    for level in reversed(levels):
        layers = config.layers_per_block[level] + 1
        inputs = tuple((width if index == 0 else channels[level]) + skips.pop() for index in range(layers))
        up.append(LevelPlan(level, inputs, layers if config.attention_levels[level] else 0))
        width = channels[level]
    return UNetPlan(tuple(down), mid, tuple(up))


class KLevelPlan(NamedTuple):
    """The blocks of a level (0 is the finest) of the upscaler: (in, hidden, out) channels of every resnet."""

    level: int
    resnets: tuple[tuple[int, int, int], ...]


class KUNetPlan(NamedTuple):
    """The levels of the upscaler's U-Net, in the order in which they run."""

    down: tuple[KLevelPlan, ...]
    up: tuple[KLevelPlan, ...]


def upscaler_plan(config: KUNetConfig) -> KUNetPlan:
    """What the upscaler's U-Net is built of. On the way up the first resnet of a level gets a skip connection beside its
    input, but at the coarsest level if that attends."""
    channels, levels, more = config.block_out_channels, range(len(config.block_out_channels)), config.layers_per_block - 1
    down, up = [], []
    for level in levels:
        width, narrower = channels[level], channels[max(0, level - 1)]
        down.append(KLevelPlan(level, ((narrower, width, width), *[(width, width, width)] * more)))
        unskipped = level == levels[-1] and config.attention_levels[level]
        inputs = (width if unskipped else 2 * width, *[width] * more)
        outputs = (*[width] * more, narrower)
        up.append(KLevelPlan(level, tuple((size, width, out) for size, out in zip(inputs, outputs, strict=True))))
    return KUNetPlan(tuple(down), tuple(reversed(up)))
