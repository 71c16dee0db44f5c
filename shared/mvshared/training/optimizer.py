"""What both trainers share besides autograd: their result, the EMA's decay, and the flat state that a resumed run needs."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.errors import CheckpointError
from mvshared.training import loss_scale
from mvshared.training.config import OptimizerConfig
from mvshared.training.loss_scale import LossScale
from mvshared.weights import check_names_and_shapes

Weights = dict[str, NDArray[np.float32]]


class StepResult(NamedTuple):
    """The loss of a batch before the update, and the global norm of its gradient before clipping.

    Where one of them is not finite, nothing is `learned`; `skipped` says that a smaller loss scale may help, and is taken.
    """

    loss: float
    gradient_norm: float
    skipped: bool = False

    @property
    def learned(self) -> bool:
        """Whether the step changes the weights."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def diverged(self) -> bool:
        """Whether the weights have left what can be trained: no smaller loss scale helps."""
        return not (self.learned or self.skipped)


class TrainerState(NamedTuple):
    """Weights, averaged weights, AdamW's two moments, all by name in checkpoint layout, how many steps are done, and the loss
    scale of a run in float16."""

    model: Weights
    ema: Weights
    exp_avg: Weights
    exp_avg_sq: Weights
    steps: int
    loss_scale: LossScale | None = None


TENSORS = TrainerState._fields[:4]


def step_result(loss: float, gradient_norm: float, scale: LossScale | None) -> StepResult:
    """What a step with this scale came to, None without one; a loss that is not finite itself is no matter of the scale."""
    result = StepResult(loss, gradient_norm)
    return result._replace(skipped=scale is not None and not result.learned and math.isfinite(loss) and not scale.exhausted)


def counted(result: StepResult, steps: int, scale: LossScale | None) -> tuple[int, LossScale | None]:
    """Steps and loss scale after a step; one that failed does not count."""
    if result.diverged:
        return steps, scale
    return steps + 1, None if scale is None else scale.after(finite=result.learned)


def updates(steps: int, scale: LossScale | None) -> int:
    """How many of the steps changed the weights."""
    return steps if scale is None else steps - scale.skipped


def ema_decay(config: OptimizerConfig, steps: int) -> float:
    """The EMA's decay after `steps` updates, smaller at first so that the initial weights are forgotten."""
    return min(config.ema_decay, (1 + steps) / (10 + steps))


def pack_state(state: TrainerState) -> Weights:
    """The state as one flat dictionary, for a file: names such as `ema.conv_in.weight`, `steps` (1,) and `loss_scale` (3,)."""
    flat = {f"{part}.{name}": array for part in TENSORS for name, array in getattr(state, part).items()}
    scale = {} if state.loss_scale is None else {loss_scale.NAME: state.loss_scale.pack()}
    return flat | {"steps": np.asarray([state.steps], np.float32)} | scale


def steps_of(flat: Mapping[str, NDArray[np.float32]]) -> int:
    """How many steps are done in the state of `pack_state`'s dictionary. Raises CheckpointError if it does not say."""
    if "steps" not in flat or flat["steps"].shape != (1,):
        raise CheckpointError("is no state of a training run: steps is missing")
    return int(flat["steps"][0])


def unpack_state(
    flat: Mapping[str, NDArray[np.float32]], shapes: Mapping[str, tuple[int, ...]], *, scaled: bool
) -> TrainerState:
    """The state of `pack_state`'s dictionary, for a network with weights of `shapes`, `scaled` with a loss scale.

    Raises TensorMismatchError if names or shapes are another network's.
    """
    expected: dict[str, tuple[int, ...]] = {f"{part}.{name}": shape for part in TENSORS for name, shape in shapes.items()}
    expected |= {"steps": (1,), **({loss_scale.NAME: (3,)} if scaled else {})}
    check_names_and_shapes(expected=expected, found={name: array.shape for name, array in flat.items()}, path=None)
    model, ema, exp_avg, exp_avg_sq = ({name: flat[f"{part}.{name}"] for name in shapes} for part in TENSORS)
    scale = loss_scale.unpack(flat[loss_scale.NAME]) if scaled else None
    return TrainerState(model, ema, exp_avg, exp_avg_sq, steps_of(flat), scale)
