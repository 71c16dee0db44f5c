"""Looking into a running network: every block says what it computed and how long that took.

Parity layer by layer, the search for the first NaN, profiles and pictures of activations are all built on `observe`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn

Observer: TypeAlias = Callable[[str, mx.array, float], None]


@contextmanager
def observe(networks: nn.Module | Mapping[str, nn.Module], fn: Observer) -> Iterator[None]:
    """Call `fn(name, array, seconds)` after every block that runs inside, in the order in which they finish.

    The name is the module's in its network, such as `down_blocks.0.resnets.1`, behind that of the network if several are given;
    both backends have the same. What a block returns as a named tuple has a call per field, `name.field`. Arrays are the
    backend's own, pictures (n, h, w, c), tokens (n, l, c). Seconds count the blocks inside, and not `fn`. Outside of the
    context nothing is slower than without. Not for training with gradient checkpointing, where blocks run twice.

    MLX modules have no hooks: for the time of the context each becomes an instance of a subclass that watches its calls.
    """
    watch = _Watch(fn)
    with ExitStack() as stack:
        for prefix, network in [("", networks)] if isinstance(networks, nn.Module) else networks.items():
            for path, module in network.named_modules():
                name = ".".join(part for part in (prefix, path) if part)
                kind = type(module)
                if name and hasattr(kind, "__call__"):  # noqa: B004 - a list of modules has none
                    stack.callback(_set_class, module, kind)
                    _set_class(module, watch.watched(kind, name))
        yield


class _Watch:
    """Measures nested blocks, and leaves out the time that the observer takes."""

    def __init__(self, fn: Observer) -> None:
        self.fn = fn
        self.spent = 0.0  # in the observer

    def watched(self, kind: type[nn.Module], name: str) -> type[nn.Module]:
        """A class of modules that are `kind` and call the observer."""
        call: Any = kind.__call__

        def watched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter() - self.spent
            out = call(module, *args, **kwargs)
            arrays = list(_arrays(name, out))
            mx.eval([array for _, array in arrays])
            end = time.perf_counter()
            seconds = end - self.spent - start
            for field, array in arrays:
                self.fn(field, array, seconds)
            self.spent += time.perf_counter() - end
            return out

        return type(kind.__name__, (kind,), {"__call__": watched_call})


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)  # a module's own __setattr__ takes everything for a weight


def _arrays(name: str, out: Any) -> Iterator[tuple[str, mx.array]]:
    """Arrays with their names."""
    if isinstance(out, mx.array):
        yield name, out
    elif hasattr(out, "_asdict"):
        for field, value in out._asdict().items():
            yield from _arrays(f"{name}.{field}", value)
    elif isinstance(out, tuple) and len(arrays := [x for x in out if isinstance(x, mx.array)]) == 1:
        yield from _arrays(name, arrays[0])
