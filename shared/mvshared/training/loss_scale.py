"""Dynamic loss scaling for training in float16 (arXiv 1710.03740, section 3.2), in plain numbers.

float16 has no numbers below 6e-8: the loss is multiplied by a power of two before the gradients are taken, which are divided by
it after. Where one of them leaves the range, the step is skipped and the scale halved; after GROWTH_STEPS good ones it doubles.
The constants are those of torch.amp.GradScaler.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
LARGEST_SCALE, SMALLEST_SCALE = 2.0**24, 2.0**-14  # so that 1 / scale, and scale itself in float32, are exact

NAME = "loss_scale"  # in the state of a run


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """The factor, how many steps in a row were good since it changed, and how many were skipped since the start."""

    scale: float = FIRST_SCALE
    good_steps: int = 0
    skipped: int = 0

    def after(self, *, finite: bool) -> "LossScale":
        """What it is after a step whose gradients were finite, or were not and changed nothing."""
        if not finite:
            return LossScale(scale=max(self.scale / 2, SMALLEST_SCALE), skipped=self.skipped + 1)
        if self.good_steps + 1 < GROWTH_STEPS:
            return replace(self, good_steps=self.good_steps + 1)
        return replace(self, scale=min(self.scale * 2, LARGEST_SCALE), good_steps=0)

    @property
    def exhausted(self) -> bool:
        """Whether no smaller scale is left: gradients that are not finite then have another reason."""
        return self.scale <= SMALLEST_SCALE

    def pack(self) -> NDArray[np.float32]:
        """Float32 (3,), exact for powers of two and for counts below 2^24."""
        return np.asarray([self.scale, self.good_steps, self.skipped], np.float32)


def unpack(values: NDArray[np.float32]) -> LossScale:
    """The LossScale of what `pack` gave."""
    return LossScale(scale=float(values[0]), good_steps=int(values[1]), skipped=int(values[2]))
