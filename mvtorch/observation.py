"""Looking into a running network: every block says what it was given, what it computed and how long that took.

Parity layer by layer, the search for the first NaN, profiles and pictures of activations are all built on `observe_blocks`.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mvshared.blocks import Block, Call, own_flops
from mvshared.networks import watched

Observer: TypeAlias = Callable[[str, Tensor, float], None]
OnEnd: TypeAlias = Callable[[Block[Tensor]], None]
OnStart: TypeAlias = Callable[[Call[Tensor]], None]
Observed: TypeAlias = nn.Module | Mapping[str, Any]


@contextmanager
def observe(networks: Observed, fn: Observer) -> Iterator[None]:
    """Call `fn(name, array, seconds)` after every block that runs inside, in the order in which they finish.

    The name is the module's in its network, such as `down_blocks.0.resnets.1`, behind that of the network if several are given;
    both backends have the same. What a block returns as a named tuple has a call per field, `name.field`. Arrays are the
    backend's own, pictures (n, h, w, c), tokens (n, l, c). Seconds count the blocks inside, and not `fn`. Outside of the
    context nothing is slower than without. Not for training with gradient checkpointing, where blocks run twice.
    """

    def on_end(block: Block[Tensor]) -> None:
        for name, array in block.outputs.items():
            fn(name, array, block.seconds)

    with observe_blocks(networks, on_end):
        yield


@contextmanager
def observe_blocks(networks: Observed, on_end: OnEnd, on_start: OnStart | None = None) -> Iterator[Callable[[], float]]:
    """Call `on_start(call)` before every block that runs inside and `on_end(block)` after it, with its inputs and outputs.

    For the rest see `observe`. The context gives a function that tells the time in seconds on the blocks' own clock, which
    stands still while an observer works.
    """
    watch = _Watch(on_end, on_start)

    def attach(prefix: str, network: nn.Module) -> Callable[[], None]:
        stack = ExitStack()
        watch.devices |= {parameter.device for parameter in network.parameters() if parameter.is_cuda}
        for path, module in network.named_modules():
            name = ".".join(part for part in (prefix, path) if part)
            if name:
                stack.callback(module.register_forward_pre_hook(watch.start(name), with_kwargs=True).remove)
                end = module.register_forward_hook(watch.finish(name), prepend=True, with_kwargs=True, always_call=True)
                stack.callback(end.remove)
        return stack.close

    with watched(networks, attach):
        yield watch.clock


def is_observed(module: nn.Module) -> bool:
    """Whether somebody looks at a module itself now, so that it must be called as it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def any_observed(network: nn.Module) -> bool:
    """Whether somebody looks at a network now, or at a part of it."""
    return any(map(is_observed, network.modules()))


class _Running(threading.local):
    """The calls that run now, the innermost last, and the seconds in the observers; every thread has its own."""

    def __init__(self) -> None:
        self.calls: list[Call[Tensor]] = []
        self.spent = 0.0


class _Watch:
    """Measures nested blocks, and leaves out the time that the observers take."""

    def __init__(self, on_end: OnEnd, on_start: OnStart | None) -> None:
        self.on_end, self.on_start = on_end, on_start
        self.running = _Running()
        self.devices: set[torch.device] = set()  # those that work while Python goes on

    def clock(self) -> float:
        """Seconds without those of the observers."""
        return self.now() - self.running.spent

    def now(self) -> float:
        """The time when all that was launched is done."""
        for device in self.devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def start(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            now = self.now()
            inputs = dict(_inputs(type(module), args, kwargs))
            kind = getattr(module, "kind", type(module).__name__)  # what a packed layer stands for
            call = Call(name=name, kind=kind, depth=len(self.running.calls), inputs=inputs, start=now - self.running.spent)
            self.running.calls.append(call)
            if self.on_start is not None:
                self.on_start(call)
            self.running.spent += self.now() - now

        return hook

    def finish(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any | None) -> None:
            calls = self.running.calls
            if not calls or calls[-1].name != name:  # it had begun when this came to look
                return
            now, call = self.now(), calls.pop()
            if out is None:  # it failed
                return
            outputs = {field: array.detach() for field, array in _outputs(name, out)}
            seconds = now - self.running.spent - call.start
            flops = own_flops(call.kind, module, call.inputs, outputs)
            self.on_end(Block(**vars(call), outputs=outputs, seconds=seconds, flops=flops))
            self.running.spent += self.now() - now

        return hook


def _outputs(name: str, out: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors with their names; pictures, which are (n, c, h, w) inside of the networks, as (n, h, w, c)."""
    if isinstance(out, Tensor):
        yield name, out.permute(0, 2, 3, 1) if out.ndim == 4 else out
    elif hasattr(out, "_asdict") or isinstance(out, Mapping):
        for field, value in (out if isinstance(out, Mapping) else out._asdict()).items():
            yield from _outputs(f"{name}.{field}", value)
    elif isinstance(out, tuple) and len(arrays := [x for x in out if isinstance(x, Tensor)]) == 1:
        yield from _outputs(name, arrays[0])


def _inputs(kind: type[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names of the arguments; pictures as (n, h, w, c), which `pixels` are already."""
    for name, value in _signature(kind).bind(None, *args, **kwargs).arguments.items():
        if isinstance(value, Tensor):
            pictures = value.ndim == 4 and name != "pixels"
            yield "x" if name == "input" else name, value.detach().permute(0, 2, 3, 1) if pictures else value.detach()
        elif name != "self":
            yield from _nested(name, value)


def _nested(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors inside of tuples and lists, among which there are no pictures."""
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping) or hasattr(value, "_asdict"):
        for field, each in (value if isinstance(value, Mapping) else value._asdict()).items():
            yield from _nested(f"{name}.{field}", each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, each in enumerate(value):
            yield from _nested(f"{name}.{number}", each)


@cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)
