"""The networks of a model: each read when it is first needed, and dropped when its memory is."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Networks(Mapping[str, Any]):
    """Networks by component. `networks["unet"]` reads the U-Net if it is not there, `release("unet")` forgets it.

    `loaders` read them; a loader raises CheckpointError for damaged files and TensorMismatchError for others than its
    network's.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Any]]) -> None:
        self._loaders = dict(loaders)
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, component: str) -> Any:
        if component not in self._loaded:
            self._loaded[component] = self._loaders[component]()
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
        """Forget networks, all if none is named; whether one of them was in memory."""
        there = [component for component in components or self.loaded if component in self._loaded]
        for component in there:
            del self._loaded[component]
        return bool(there)
