"""The stages of a run, one after the other: which one runs now, and for who wants to know, how long each took and its memory.

The pipeline enters a stage where its work begins, as `with stages("unet"):`. Networks that are needed in one stage only, the
memory that each takes, its time and what to say about a NaN in it all hang on these same places.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

StageName = Literal[
    "pictures", "text_encoder", "image_encoder", "vae_encoder", "condition", "unet", "upscaler", "vae_decoder"
]  # in the order in which a run has them; `condition` is the U-Net's work that is done once, before its steps


class MemoryMeter(Protocol):
    """What a loaded model knows of its device's memory."""

    def memory_peak(self) -> int | None:
        """Most bytes in use since `reset_memory_peak`, once the device has done all that it was asked for; None if unknown."""
        ...

    def reset_memory_peak(self) -> None:
        """Begin to measure anew."""
        ...


class Stage(NamedTuple):
    """A stage that ended: when it began on the clock of its `Stages`, how long it took, with and without the stages inside of
    it, and the most memory in use within, None where that cannot be measured. `step` is that of the sampler around it."""

    name: StageName
    start: float
    seconds: float
    own_seconds: float
    peak_bytes: int | None
    step: int | None


class Stages(threading.local):
    """Marks the stages of a run. Without `on_end` it only remembers which one runs.

    Every thread has its own: one may read the pictures of the next run, or decode a preview, while another computes.

    `name` is the innermost stage that runs now, None outside of all; `what` is what its networks are given, such as "view", and
    `first` the number of the first of them; `step` is the sampler's, from 1. `entry` counts the stages so far. `clock` tells
    seconds.
    """

    def __init__(
        self,
        on_end: Callable[[Stage], None] | None = None,
        *,
        memory: MemoryMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.on_end, self.memory, self.clock = on_end, memory, clock
        self.name: StageName | None = None
        self.what, self.first = "view", 0
        self.step: int | None = None
        self.entry = 0
        self._inside = 0.0  # seconds of stages that ended within the one that runs
        self._peak: int | None = None  # of those

    @contextmanager
    def __call__(self, name: StageName, *, what: str = "view", first: int = 0) -> Iterator[None]:
        """The stage of that name, for views from number `first` on, or for what else there is."""
        outer = self.name, self.what, self.first, self.step
        self.name, self.what, self.first = name, what, first
        self.entry += 1
        try:
            if self.on_end is None:
                yield
            else:
                with self._measured(name, self.on_end):
                    yield
        finally:
            self.name, self.what, self.first, self.step = outer

    @contextmanager
    def _measured(self, name: StageName, on_end: Callable[[Stage], None]) -> Iterator[None]:
        """Reports the stage, unless it fails."""
        step, outer_inside, outer_peak = self.step, self._inside, self._highest()
        if self.memory is not None:
            self.memory.reset_memory_peak()
        self._inside, self._peak, start = 0.0, None, self.clock()
        try:
            yield
        finally:
            peak, seconds = self._highest(), self.clock() - start
            own = seconds - self._inside
            self._inside, self._peak = outer_inside + seconds, outer_peak  # the meter still knows that of this one
        on_end(Stage(name, start, seconds, own, peak, step))

    def _highest(self) -> int | None:
        """The peak of the stage that runs, those within it included."""
        return _larger(self._peak, None if self.memory is None else self.memory.memory_peak())


def _larger(a: int | None, b: int | None) -> int | None:
    return max((x for x in (a, b) if x is not None), default=None)
