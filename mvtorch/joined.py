"""Linear layers of the same input as one product of matrices: their weights lie one after the other in one piece of memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvtorch.observation import is_observed


class JoinedLinears:
    """Some linear layers and the one piece of memory that holds the weights of all, and one that holds their biases, if any.

    The layers keep their names and values, and every layer its own part.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.weight: Tensor | None = _one_piece(self.layers, "weight")
        self.bias = None if layers[0].bias is None else _one_piece(self.layers, "bias")

    def __call__(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """What each of them gives for x (..., inputs): (..., outputs), parts of one tensor.

        None where they must be called: with gradients, when someone looks at them, and for good once they have other weights.
        """
        if torch.is_grad_enabled() or any(map(is_observed, self.layers)) or self.weight is None:
            return None
        if not (self._holds("weight") and (self.bias is None or self._holds("bias"))):
            self.weight = self.bias = None  # which nobody else may need any more
            return None
        return F.linear(x, self.weight, self.bias).split([layer.out_features for layer in self.layers], dim=-1)

    def _holds(self, name: str) -> bool:
        """Whether the layers' parameters of that name are still the ones that lie here."""
        joint = getattr(self, name)
        at = joint.data_ptr()
        for layer in self.layers:
            part = getattr(layer, name) if type(layer) is nn.Linear else None
            if part is None or part.dtype != joint.dtype or part.data_ptr() != at:
                return False
            at += part.nbytes
        return True


def join_linears(layers: Sequence[nn.Module]) -> JoinedLinears | None:
    """Such layers joined; None if there are none, or if some are quantised, which stay as they are."""
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    if not plain or len(plain) != len(layers) or len({layer.bias is None for layer in plain}) > 1:
        return None
    return JoinedLinears(plain)


def _one_piece(layers: Sequence[nn.Linear], name: str) -> Tensor:
    """All layers' parameters of a name in one tensor, of which each layer's is a part from then on."""
    joint = torch.cat([getattr(layer, name).detach() for layer in layers])
    for layer, part in zip(layers, joint.split([layer.out_features for layer in layers]), strict=True):
        setattr(layer, name, nn.Parameter(part))
    return joint
