"""Networks made ready for inference on a CPU: weights in the layout that oneDNN computes in, made once and not on every call.

`pack_network` exchanges layers of a network that has its weights. The operators are private ones of PyTorch, those that its
compiler emits; where they are missing or refuse, layers stay as they are. docs/speed.md has what each part brings.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mvshared.errors import first_line
from mvshared.process_memory import trim_heap
from mvtorch import winograd
from mvtorch.layers import FeedForward, Float32Conv2d, Upsample
from mvtorch.observation import is_observed
from mvtorch.onednn import Packed, linear, linear_times, packed_matrix
from mvtorch.packed_convolutions import PackedConv2d, PackedFloat32Conv2d, PackedUpsample

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FREED_BYTES = 128_000_000
_FEED_FORWARD_ROWS = 1024  # tokens at a time: their hidden states stay in the cache

_log = logging.getLogger(__name__)
_told: set[str] = set()


class PackedLinear(Packed):
    """A linear layer with a packed weight."""

    kind = "Linear"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.weight, layer.bias)
        self.matrix = packed_matrix(layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        return linear(x, self.matrix, self.bias)


class PackedHalves(Packed):
    """A linear layer in two halves: values, and the gates that they are multiplied with."""

    kind = "Linear"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.weight, layer.bias)
        self.values, self.gates = (packed_matrix(half) for half in layer.weight.detach().chunk(2))
        self.value_bias, self.gate_bias = (None, None) if self.bias is None else self.bias.chunk(2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        return torch.cat([linear(x, self.values, self.value_bias), linear(x, self.gates, self.gate_bias)], dim=-1)

    def gated(self, x: Tensor) -> Tensor:
        """Values times the GELU of the gates, (..., o / 2)."""
        gates = linear(x, self.gates, self.gate_bias, activation="gelu")
        return linear_times(x, gates, self.values, self.value_bias)


class PackedFeedForward(FeedForward):
    """GEGLU and a linear layer, some tokens at a time, with GELU and product inside of the products of matrices.

    Layer by layer while one of them is observed.
    """

    kind = "FeedForward"

    def __init__(self, feed_forward: FeedForward) -> None:
        nn.Module.__init__(self)
        self.net = feed_forward.net
        gate: Any = self.net[0]
        gate.proj = PackedHalves(gate.proj)
        self.net[2] = PackedLinear(self.net[2])  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to (..., channels)."""
        gate, last = self.net[0], self.net[2]
        proj: Any = gate.proj
        if any(map(is_observed, (gate, proj, last))):
            return super().forward(x)
        parts = [last(proj.gated(rows)) for rows in x.flatten(0, -2).split(_FEED_FORWARD_ROWS)]
        return torch.cat(parts).view(x.shape)


def pack_network(network: nn.Module, *, lean: bool = False) -> None:
    """Exchange the layers of a network on a CPU, one after the other: there is never a second copy of all weights.

    With `lean` its weights take no more memory than before, and wide convolutions and upsampling more time.

    A packed network is for inference, it has no weights to save or to train. Other devices, dtypes and layers stay as they
    are, and so does all that PyTorch cannot pack, which is logged once per process.
    """
    freed = 0
    try:
        for size in _exchange(network, lean=lean):
            freed += size
            if freed > _FREED_BYTES:  # which the C library would keep until the network is packed
                trim_heap()
                freed = 0
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        _tell_once(f"this PyTorch packs no weights for the CPU, and networks are slower: {first_line(error)}")


def added_bytes(network: nn.Module) -> int:
    """How much more memory a network's weights take once they are packed, and not lean."""
    added = 0
    for module in network.modules():
        # 16 numbers for 9 weights: Winograd's matrices, and four kernels of 2x2 after upsampling where that is not tiled.
        upsamples = type(module) is Upsample
        for conv in module.children():
            if type(conv) is nn.Conv2d and _can_pack(conv) and winograd.is_for(conv) != upsamples:
                added += 7 * conv.weight.nbytes // 9
    return added


def _exchange(module: nn.Module, *, lean: bool) -> Iterator[int]:
    """Bytes of the weights of every layer that was exchanged. Nothing here keeps weights of layers that are gone."""
    for name, child in module.named_children():
        kind: Any = _KINDS.get(type(child))
        if kind is None or not _can_pack(child):
            yield from _exchange(child, lean=lean)
        else:
            size = sum(weight.nbytes for weight in child.parameters())
            if type(child) is nn.Conv2d and not lean and winograd.is_for(child):
                kind = winograd.WinogradConv2d
            options: dict[str, Any] = {"lean": lean} if type(child) is Upsample else {}
            module._modules[name] = kind(child, **options)
            del child
            yield size


_KINDS = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    Float32Conv2d: PackedFloat32Conv2d,
    Upsample: PackedUpsample,
    FeedForward: PackedFeedForward,
}


def _can_pack(module: nn.Module) -> bool:
    """Whether a layer is on the CPU, or nowhere yet, in a dtype that can be packed, and nothing inside is quantised."""
    if any(weight.device.type not in ("cpu", "meta") or weight.dtype not in _DTYPES for weight in module.parameters()):
        return False
    return all(type(child) in (nn.Linear, nn.Conv2d, Float32Conv2d) for child in module.modules() if hasattr(child, "weight"))


def _tell_once(message: str) -> None:
    """Log a warning, once in this process."""
    if message not in _told:
        _told.add(message)
        _log.warning(message)
