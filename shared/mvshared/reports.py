"""Telling of steps as they are done, while the next one is put together already."""

from collections.abc import Callable
from typing import Generic

from mvshared.backend import A, Model
from mvshared.stages import Stages


class Reports(Generic[A]):
    """Begins the steps of a sampler, waits for them, and tells of each.

    Where `Model.defers`, a step is waited for when the next one has been put together, so that the device does not wait for
    that. The next one is begun behind the telling: MLX hands its device only a part of a step in advance and waits for the
    rest, so that with a step begun before, all that is told of would come a step late.
    """

    def __init__(self, model: Model[A], stages: Stages) -> None:
        self._model, self._stages = model, stages
        self._begun: tuple[int, A, Callable[[], None] | None] | None = None

    def add(self, step: int, x: A, tell: Callable[[], None] | None) -> None:
        """Begin to compute the latents x of a step, from 1; `tell` is called once they are there."""
        self.finish()
        self._model.start(x)
        self._begun = step, x, tell
        if not self._model.defers:
            self.finish()

    def finish(self) -> None:
        """Wait for the step that was begun and tell of it."""
        if self._begun is None:
            return
        (step, x, tell), self._begun = self._begun, None
        self._model.wait(x)
        if tell is not None:
            now, self._stages.step = self._stages.step, step
            tell()
            self._stages.step = now
