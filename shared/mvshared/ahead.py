"""Telling of steps as they are done, while the device works at the next one already."""

from collections import deque
from collections.abc import Callable
from typing import Generic

from mvshared.backend import A, Model
from mvshared.stages import Stages


class Reports(Generic[A]):
    """Waits for the steps of a sampler and tells of each; `Model.ahead` says how many may be begun beyond the one told of.

    So a device that is given its work in advance never waits for what is done between the steps, and never has more before it
    than that.
    """

    def __init__(self, model: Model[A], stages: Stages) -> None:
        self._model, self._stages = model, stages
        self._begun: deque[tuple[int, A, Callable[[], None] | None]] = deque()

    def add(self, step: int, x: A, tell: Callable[[], None] | None) -> None:
        """Begin to compute the latents x of a step, from 1; `tell` is called once they are there."""
        self._model.start(x)
        self._begun.append((step, x, tell))
        while len(self._begun) > self._model.ahead:
            self._report()

    def finish(self) -> None:
        """Wait for all steps."""
        while self._begun:
            self._report()

    def _report(self) -> None:
        step, x, tell = self._begun.popleft()
        self._model.wait(x)
        if tell is not None:
            now, self._stages.step = self._stages.step, step
            tell()
            self._stages.step = now
