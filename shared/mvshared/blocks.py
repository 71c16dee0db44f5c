"""What is seen of a block of a running network, in both backends alike, and how much arithmetic it is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """A block that begins: its name in the model and its class.

    `depth` counts the blocks that run around it. `inputs` are its arrays by the names of its arguments, `key_values.keys` for
    one that is inside of another. Pictures are (n, h, w, c), tokens (n, l, c). `start` is on the clock of the observation, in
    seconds, which stands still while an observer works.
    """

    name: str
    kind: str
    depth: int
    inputs: Mapping[str, T]
    start: float


@dataclass(frozen=True, kw_only=True)
class Block(Call[T]):
    """A block that ended. `outputs` are its arrays by its name, or `name.field` where it returns several.

    `seconds` include the blocks inside of it, and `flops` do not: two for each of its own multiply-adds in products of
    matrices, convolutions and attention, the rest is not counted.
    """

    outputs: Mapping[str, T]
    seconds: float
    flops: int

    @property
    def output_bytes(self) -> int:
        """Memory of what it returns."""
        outputs: Mapping[str, Any] = self.outputs
        return sum(array.nbytes for array in outputs.values())


class Shaped(Protocol):
    """An array of which only the shape matters."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def own_flops(kind: str, module: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> int:
    """Two for each multiply-add that a module of that class does itself, as `torch.utils.flop_counter` counts them.

    `module` is the layer, for the shape of its weights; arrays are as in `Block`. Classes of other libraries, whose arguments
    have other names than x, count nothing.
    """
    count = _COUNTS.get(kind)
    return 0 if count is None or "x" not in inputs else 2 * count(module, inputs, next(iter(outputs.values())))


def _weighted(module: Any, inputs: Mapping[str, Shaped], out: Shaped) -> int:
    """Of a convolution or a linear layer: every output sums the products with all weights of its channel."""
    shape = module.layer.shape if hasattr(module, "layer") else module.weight.shape  # a quantised layer's weight is packed
    return math.prod(out.shape) * math.prod(shape[1:])


def _attended(module: Any, inputs: Mapping[str, Shaped], out: Shaped) -> int:
    """Queries from tokens x (b, l, c), every `keys` (b, n, m, d) among the inputs."""
    tokens = inputs["x"].shape[1]
    return sum(2 * tokens * math.prod(array.shape) for name, array in inputs.items() if name.endswith("keys"))


def _attended_pixels(module: Any, inputs: Mapping[str, Shaped], out: Shaped) -> int:
    """Every pixel of x (n, h, w, c) to all of its picture."""
    n, h, w, c = inputs["x"].shape
    return 2 * n * (h * w) ** 2 * c


def _attended_tokens(module: Any, inputs: Mapping[str, Shaped], out: Shaped) -> int:
    """Every token of x (b, l, c) to all of its own, hidden ones included."""
    b, tokens, c = inputs["x"].shape
    return 2 * b * tokens**2 * c


def _perceived(module: Any, inputs: Mapping[str, Shaped], out: Shaped) -> int:
    """Latents (b, l, c) to tokens x (b, m, c) and to themselves."""
    b, queries, _ = inputs["latents"].shape
    return 2 * b * queries * (inputs["x"].shape[1] + queries) * module.to_q.weight.shape[0]


_COUNTS: dict[str, Callable[[Any, Mapping[str, Any], Any], int]] = {
    "Linear": _weighted,
    "Conv2d": _weighted,
    "Float32Conv2d": _weighted,
    "QuantizedLinear": _weighted,
    "QuantizedConv2d": _weighted,
    "Attention": _attended,
    "CrossAttention": _attended,
    "KCrossAttention": _attended,
    "SpatialAttention": _attended_pixels,
    "CLIPAttention": _attended_tokens,
    "PerceiverAttention": _perceived,
}
ATTENTION_KINDS = frozenset(kind for kind, count in _COUNTS.items() if count is not _weighted)
