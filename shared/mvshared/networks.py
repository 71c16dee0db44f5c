"""The networks of a model: each read when it is first needed, and dropped when its memory is."""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from mvshared.errors import OptionError

Attach: TypeAlias = Callable[[str, Any], Callable[[], None]]


class Networks(Mapping[str, Any]):
    """Networks by component. `networks["unet"]` reads the U-Net if it is not there, `release("unet")` forgets it.

    `loaders` read them; a loader raises CheckpointError for damaged files and TensorMismatchError for others than its
    network's. With `lean`, networks that are read are to take as little memory as they can.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Any]]) -> None:
        self.lean = False
        self._loaders = dict(loaders)
        self._loaded: dict[str, Any] = {}
        self._watchers: list[_Watcher] = []

    def __getitem__(self, component: str) -> Any:
        if component not in self._loaded:
            self._loaded[component] = self._loaders[component]()
            for watcher in self._watchers:
                watcher.begin(component, self._loaded[component])
        return self._loaded[component]

    def __contains__(self, component: object) -> bool:
        return component in self._loaders

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The components that are in memory."""
        return tuple(self._loaded)

    def release(self, *components: str) -> bool:
        """Forget networks, all if none is named; whether one of them was in memory.

        Python looks for cycles only if one of them is still there: among a program's millions of objects that takes a while.
        """
        there = [component for component in components or self.loaded if component in self._loaded]
        left = [_reference(self._loaded[component]) for component in there]
        for component in there:
            for watcher in reversed(self._watchers):
                watcher.end(component)
            del self._loaded[component]
        if any(network() is not None for network in left):
            gc.collect()
        return bool(there)

    @contextmanager
    def watched(self, attach: Attach) -> Iterator[None]:
        """Within the context, `attach(component, network)` is called for every network that is in memory or comes there; what
        it returns is called before the network goes, or at the context's end."""
        watcher = _Watcher(attach)
        self._watchers.append(watcher)
        try:
            for component in self.loaded:  # and no name for the network, which would keep it in memory
                watcher.begin(component, self._loaded[component])
            yield
        finally:
            self._watchers.remove(watcher)
            for component in self.loaded:
                watcher.end(component)


def _reference(network: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(network)
    except TypeError:  # numbers, strings: nothing that has memory to give back
        return lambda: None


class _Watcher:
    """What is attached to the networks that are in memory."""

    def __init__(self, attach: Attach) -> None:
        self.attach = attach
        self.detach: dict[str, Callable[[], None]] = {}

    def begin(self, component: str, network: Any) -> None:
        self.detach[component] = self.attach(component, network)

    def end(self, component: str) -> None:
        self.detach.pop(component, lambda: None)()


@contextmanager
def watched(networks: Any, attach: Attach) -> Iterator[None]:
    """Within the context, `attach(prefix, network)` is called for every one of several networks by name, or for a single one,
    whose prefix is empty; what it returns is called at the end. Of `Networks` also those count that are read later.

    Raises OptionError for what is no network.
    """
    if isinstance(networks, Networks):
        with networks.watched(attach):
            yield
        return
    single = hasattr(networks, "named_modules") or not isinstance(networks, Mapping)  # a module of MLX is a mapping, too
    several = {"": networks} if single else networks
    for network in several.values():
        if not hasattr(network, "named_modules"):
            raise OptionError("model", expected="a pipeline, an upscaler or a network", got=type(network).__name__)
    with ExitStack() as stack:
        for name, network in several.items():
            stack.callback(attach(name, network))
        yield
