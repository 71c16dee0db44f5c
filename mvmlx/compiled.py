"""Calls of networks as compiled functions, which fuse what is computed number by number."""

from collections.abc import Callable
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mvmlx.observation import any_observed

# MLX knows a compiled function by its address, and one that is no more is forgotten by the thread alone that called it last:
# elsewhere another at that address would be taken for it. A number among the arguments tells them apart.
_numbers = count()


class CompiledCalls:
    """The compiled methods of a model's networks, each made when it is first called.

    MLX traces a function anew for other shapes and for other arguments that are no arrays, and here for other options of the
    network's attention. Weights are inputs, so that they may change. Not compiled are networks in training and those whose
    blocks somebody looks at.
    """

    def __init__(self, *, worthwhile: bool) -> None:
        self.worthwhile = worthwhile
        self._functions: dict[tuple[int, Any, str], Callable[..., mx.array]] = {}

    def __call__(self, network: Any, method: str = "__call__") -> Callable[..., mx.array]:
        """A method of a network that has `attention_options`."""
        function: Callable[..., mx.array] = getattr(network, method)
        if not self.worthwhile or network.training or any_observed(network):
            return function
        key = id(network), network.attention_options, method
        if key not in self._functions:
            self._functions[key] = _compiled(network, function)
        return self._functions[key]

    def forget(self) -> None:
        """Keep no network in memory."""
        self._functions.clear()


def _compiled(network: nn.Module, function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A method of a network, compiled."""
    number = next(_numbers)

    def numbered(_: int, *args: Any, **kwargs: Any) -> mx.array:
        return function(*args, **kwargs)

    compiled = mx.compile(numbered, inputs=network.state)

    def call(*args: Any, **kwargs: Any) -> mx.array:
        weights = network.parameters()
        try:
            return compiled(number, *args, **kwargs)
        except BaseException:  # Ctrl-C too
            # MLX traces with placeholders in the place of the weights, and leaves them there when that is cut short.
            network.update(weights)
            raise

    return call
