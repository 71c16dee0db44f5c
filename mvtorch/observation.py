"""Looking into a running network: every block says what it computed and how long that took.

Parity layer by layer, the search for the first NaN, profiles and pictures of activations are all built on `observe`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Observer: TypeAlias = Callable[[str, Tensor, float], None]


@contextmanager
def observe(networks: nn.Module | Mapping[str, nn.Module], fn: Observer) -> Iterator[None]:
    """Call `fn(name, array, seconds)` after every block that runs inside, in the order in which they finish.

    The name is the module's in its network, such as `down_blocks.0.resnets.1`, behind that of the network if several are given;
    both backends have the same. What a block returns as a named tuple has a call per field, `name.field`. Arrays are the
    backend's own, pictures (n, h, w, c), tokens (n, l, c). Seconds count the blocks inside, and not `fn`. Outside of the
    context nothing is slower than without. Not for training with gradient checkpointing, where blocks run twice.
    """
    watch = _Watch(fn)
    with ExitStack() as stack:
        for prefix, network in [("", networks)] if isinstance(networks, nn.Module) else networks.items():
            for path, module in network.named_modules():
                name = ".".join(part for part in (prefix, path) if part)
                if name:
                    stack.callback(module.register_forward_pre_hook(watch.start).remove)
                    stack.callback(module.register_forward_hook(watch.finish(name), prepend=True).remove)
        yield


class _Watch:
    """Measures nested blocks, and leaves out the time that the observer takes."""

    def __init__(self, fn: Observer) -> None:
        self.fn = fn
        self.starts: list[float] = []
        self.spent = 0.0  # in the observer

    def start(self, *args: Any) -> None:
        self.starts.append(_now() - self.spent)

    def finish(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            end = _now()
            seconds = end - self.spent - self.starts.pop()
            for field, array in _arrays(name, out):
                self.fn(field, array.detach(), seconds)
            self.spent += _now() - end

        return hook


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _arrays(name: str, out: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors with their names; pictures, which are (n, c, h, w) inside of the networks, as (n, h, w, c)."""
    if isinstance(out, Tensor):
        yield name, out.permute(0, 2, 3, 1) if out.ndim == 4 else out
    elif hasattr(out, "_asdict") or isinstance(out, Mapping):
        for field, value in (out if isinstance(out, Mapping) else out._asdict()).items():
            yield from _arrays(f"{name}.{field}", value)
    elif isinstance(out, tuple) and len(arrays := [x for x in out if isinstance(x, Tensor)]) == 1:
        yield from _arrays(name, arrays[0])
