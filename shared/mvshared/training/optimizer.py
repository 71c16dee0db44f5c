"""What both trainers share besides autograd: their result, the EMA's decay, and the flat state that a resumed run needs."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.errors import CheckpointError
from mvshared.training.config import OptimizerConfig
from mvshared.weights import check_names_and_shapes

Weights = dict[str, NDArray[np.float32]]


class StepResult(NamedTuple):
    """The loss of a batch before the update, and the global norm of its gradient before clipping."""

    loss: float
    gradient_norm: float


class TrainerState(NamedTuple):
    """Weights, averaged weights, AdamW's two moments, all by name in checkpoint layout, and how many steps are done."""

    model: Weights
    ema: Weights
    exp_avg: Weights
    exp_avg_sq: Weights
    steps: int


TENSORS = TrainerState._fields[:-1]


def ema_decay(config: OptimizerConfig, steps: int) -> float:
    """The EMA's decay after `steps` steps, smaller at first so that the initial weights are forgotten."""
    return min(config.ema_decay, (1 + steps) / (10 + steps))


def pack_state(state: TrainerState) -> Weights:
    """The state as one flat dictionary, for a file: names such as `ema.conv_in.weight`, and `steps` (1,)."""
    flat = {f"{part}.{name}": array for part in TENSORS for name, array in getattr(state, part).items()}
    return flat | {"steps": np.asarray([state.steps], np.float32)}


def steps_of(flat: Mapping[str, NDArray[np.float32]]) -> int:
    """How many steps are done in the state of `pack_state`'s dictionary. Raises CheckpointError if it does not say."""
    if "steps" not in flat or flat["steps"].shape != (1,):
        raise CheckpointError("is no state of a training run: steps is missing")
    return int(flat["steps"][0])


def unpack_state(flat: Mapping[str, NDArray[np.float32]], shapes: Mapping[str, tuple[int, ...]]) -> TrainerState:
    """The state of `pack_state`'s dictionary, for a network with weights of `shapes`.

    Raises TensorMismatchError if names or shapes are another network's.
    """
    expected: dict[str, tuple[int, ...]] = {f"{part}.{name}": shape for part in TENSORS for name, shape in shapes.items()}
    expected["steps"] = (1,)
    check_names_and_shapes(expected=expected, found={name: array.shape for name, array in flat.items()}, path=None)
    model, ema, exp_avg, exp_avg_sq = ({name: flat[f"{part}.{name}"] for name in shapes} for part in TENSORS)
    return TrainerState(model, ema, exp_avg, exp_avg_sq, steps_of(flat))
