"""Linear layers of the same input as one product of matrices: their weights lie one after the other in one piece of memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvtorch.cpu_norms import is_observed


class JoinedLinears:
    """Some linear layers and the one piece of memory that holds the weights of all, and one that holds their biases, if any.

    The layers keep their names and values, and every layer its own part.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.weight = _one_piece(self.layers, "weight")
        self.bias = None if layers[0].bias is None else _one_piece(self.layers, "bias")

    def __call__(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """What each of them gives for x (..., inputs): (..., outputs), parts of one tensor.

        None where they must be called: with gradients, when someone looks at them, and if they have other weights by now.
        """
        if torch.is_grad_enabled() or any(map(is_observed, self.layers)) or not self._are_in_place():
            return None
        return F.linear(x, self.weight, self.bias).split([layer.out_features for layer in self.layers], dim=-1)

    def _are_in_place(self) -> bool:
        """Whether the layers still have the weights that lie here."""
        end = self.weight.data_ptr()
        for layer in self.layers:
            weight = layer.weight
            if type(layer) is not nn.Linear or weight.dtype != self.weight.dtype or weight.data_ptr() != end:
                return False
            end += weight.nbytes
        if self.bias is None:
            return True
        end = self.bias.data_ptr()
        for layer in self.layers:
            if layer.bias.dtype != self.bias.dtype or layer.bias.data_ptr() != end:
                return False
            end += layer.bias.nbytes
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
