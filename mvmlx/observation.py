"""Looking into a running network: every block says what it was given, what it computed and how long that took.

Parity layer by layer, the search for the first NaN, profiles and pictures of activations are all built on `observe_blocks`.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mvshared.blocks import Block, Call, own_flops
from mvshared.networks import watched

Observer: TypeAlias = Callable[[str, mx.array, float], None]
OnEnd: TypeAlias = Callable[[Block[mx.array]], None]
OnStart: TypeAlias = Callable[[Call[mx.array]], None]
Observed: TypeAlias = nn.Module | Mapping[str, Any]


@contextmanager
def observe(networks: Observed, fn: Observer) -> Iterator[None]:
    """Call `fn(name, array, seconds)` after every block that runs inside, in the order in which they finish.

    The name is the module's in its network, such as `down_blocks.0.resnets.1`, behind that of the network if several are given;
    both backends have the same. What a block returns as a named tuple has a call per field, `name.field`. Arrays are the
    backend's own, pictures (n, h, w, c), tokens (n, l, c). Seconds count the blocks inside, and not `fn`. Outside of the
    context nothing is slower than without. Not for training with gradient checkpointing, where blocks run twice.
    """

    def on_end(block: Block[mx.array]) -> None:
        for name, array in block.outputs.items():
            fn(name, array, block.seconds)

    with observe_blocks(networks, on_end):
        yield


@contextmanager
def observe_blocks(networks: Observed, on_end: OnEnd, on_start: OnStart | None = None) -> Iterator[Callable[[], float]]:
    """Call `on_start(call)` before every block that runs inside and `on_end(block)` after it, with its inputs and outputs.

    For the rest see `observe`. The context gives a function that tells the time in seconds on the blocks' own clock, which
    stands still while an observer works.

    MLX modules have no hooks: for the time of the context each becomes an instance of a subclass that watches its calls. What a
    block is given is evaluated before it begins, and what it returns before it ends, so that each pays for its own work.
    """
    watch = _Watch(on_end, on_start)

    def attach(prefix: str, network: nn.Module) -> Callable[[], None]:
        stack = ExitStack()
        for path, module in network.named_modules():
            name = ".".join(part for part in (prefix, path) if part)
            if name and hasattr(type(module), "__call__"):  # noqa: B004 - a list of modules has none
                _look_at(module, watch, name)
                stack.callback(_let_go, module, watch)
        return stack.close

    with watched(networks, attach):
        yield watch.clock


class _Looked(NamedTuple):
    """What a module is when nobody looks at it, and who does, with the name that it has for them."""

    kind: type[nn.Module]
    watches: Mapping["_Watch", str]


_observed: dict[int, _Looked] = {}  # modules that somebody looks at, by their ids


def _look_at(module: nn.Module, watch: "_Watch", name: str) -> None:
    kind, watches = _observed.get(id(module), _Looked(type(module), {}))
    _show(module, _Looked(kind, {**watches, watch: name}))


def _let_go(module: nn.Module, watch: "_Watch") -> None:
    kind, watches = _observed.get(id(module), _Looked(type(module), {}))  # a module may have two names
    _show(module, _Looked(kind, {each: name for each, name in watches.items() if each is not watch}))


def _show(module: nn.Module, looked: _Looked) -> None:
    """Make a module one that those look at, in whatever order they came and went."""
    kind = looked.kind
    for watch, name in looked.watches.items():
        kind = watch.watched(kind, name)
    object.__setattr__(module, "__class__", kind)  # a module's own __setattr__ takes everything for a weight
    if looked.watches:
        _observed[id(module)] = looked
    else:
        _observed.pop(id(module), None)


def is_observed(module: nn.Module) -> bool:
    """Whether somebody looks at a module itself now, so that it must be called as it is."""
    return id(module) in _observed


def any_observed(network: nn.Module) -> bool:
    """Whether somebody looks at a network now, or at a part of it."""
    return bool(_observed) and any(map(is_observed, network.modules()))


class _Running(threading.local):
    """How many blocks run now, and the seconds in the observers; every thread has its own."""

    depth = 0
    spent = 0.0


class _Watch:
    """Measures nested blocks, and leaves out the time that the observers take."""

    def __init__(self, on_end: OnEnd, on_start: OnStart | None) -> None:
        self.on_end, self.on_start = on_end, on_start
        self.running = _Running()

    def clock(self) -> float:
        """Seconds without those of the observers."""
        return time.perf_counter() - self.running.spent

    def watched(self, kind: type[nn.Module], name: str) -> type[nn.Module]:
        """A class of modules that are `kind` and call the observers."""
        call: Any = kind.__call__
        signature = inspect.signature(call)
        known_as = getattr(kind, "kind", kind.__name__)  # what a layer that is computed in another way stands for

        @wraps(call)  # and so its signature, for whoever looks as well
        def watched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(module, *args, **kwargs).arguments
            inputs = {name: array for key, value in arguments.items() if key != "self" for name, array in _arrays(key, value)}
            mx.eval(list(inputs.values()))
            now = time.perf_counter()
            start = Call(name=name, kind=known_as, depth=self.running.depth, inputs=inputs, start=now - self.running.spent)
            if self.on_start is not None:
                self.on_start(start)
            self.running.depth += 1
            try:
                self.running.spent += time.perf_counter() - now
                out = call(module, *args, **kwargs)
            finally:
                self.running.depth -= 1
            outputs = dict(_outputs(name, out))
            mx.eval(list(outputs.values()))
            now = time.perf_counter()
            seconds = now - self.running.spent - start.start
            flops = own_flops(known_as, module, inputs, outputs)
            self.on_end(Block(**vars(start), outputs=outputs, seconds=seconds, flops=flops))
            self.running.spent += time.perf_counter() - now
            return out

        return type(kind.__name__, (kind,), {"__call__": watched_call})


def _outputs(name: str, out: Any) -> Iterator[tuple[str, mx.array]]:
    """Arrays with their names."""
    if isinstance(out, mx.array):
        yield name, out
    elif hasattr(out, "_asdict"):
        for field, value in out._asdict().items():
            yield from _outputs(f"{name}.{field}", value)
    elif isinstance(out, tuple) and len(arrays := [x for x in out if isinstance(x, mx.array)]) == 1:
        yield from _outputs(name, arrays[0])


def _arrays(name: str, value: Any) -> Iterator[tuple[str, mx.array]]:
    """Arrays, also inside of tuples and lists, by the names of the arguments."""
    if isinstance(value, mx.array):
        yield name, value
    elif isinstance(value, Mapping) or hasattr(value, "_asdict"):
        for field, each in (value if isinstance(value, Mapping) else value._asdict()).items():
            yield from _arrays(f"{name}.{field}", each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, each in enumerate(value):
            yield from _arrays(f"{name}.{number}", each)
