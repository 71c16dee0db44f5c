"""Cases for the tests of `mvshared.benchmark.compare`; each runs in a worker's process."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mvshared.benchmark.worker import Prepared
from mvshared.errors import MvError


def logging(*, name: str, file: str) -> Prepared:
    """Appends its name to the file at every call, prints, and says its process's number as what it made."""

    def call() -> None:
        print("something that is no answer")
        with Path(file).open("a") as log:
            log.write(f"{name} ")

    return Prepared(call, lambda: {"made": os.getpid(), "device": f"of {name}"})


def refusing(*, backend: str) -> Prepared:
    """Cannot be prepared."""
    raise MvError("this machine is made of wood", hint=f"{backend} needs metal")


def failing_in_the_third_call() -> Prepared:
    """Answers two calls."""
    answers = iter([1, 2])
    return Prepared(lambda: next(answers), dict)


def ending_without_a_word() -> Prepared:
    """Ends its process in the first call, as a crash of a library does."""
    return Prepared(lambda: os._exit(7), dict)


def failing_in_its_facts() -> Prepared:
    """Answers every call, and then has nothing to say."""
    return Prepared(lambda: None, lambda: sys.exit("no facts"))


def computing(*, values: list[float], dtype: str = "float32") -> Prepared:
    """Returns these numbers."""
    return Prepared(lambda: np.array(values), lambda: {"dtype": dtype, "device": "cpu"})


def changing(*, values: list[list[float]]) -> Prepared:
    """Returns one after the other, and the last one from then on."""
    calls = iter([*values, *[values[-1]] * 100])
    return Prepared(lambda: np.array(next(calls)), lambda: {"dtype": "float32", "device": "cpu"})


def compiled_before(*, folder: str) -> Prepared:
    """Fails where its folder has a half-written file in it."""

    def call() -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if (Path(folder) / "half-written.so").exists():
            sys.exit("file too short")

    return Prepared(call, dict)


def within_a_context() -> Prepared:
    """Says how often its context was entered and left at every call, and at the end."""
    seen, facts = {"entered": 0, "left": 0}, []

    @contextmanager
    def within() -> Iterator[None]:
        seen["entered"] += 1
        yield
        seen["left"] += 1

    return Prepared(
        lambda: facts.append(tuple(seen.values())), lambda: {"variant": str([*facts, tuple(seen.values())])}, within()
    )


def environment() -> Prepared:
    """Says what its process was given."""
    given = {"variant": os.environ.get("OMP_NUM_THREADS", ""), "dtype": os.environ.get("CASE", "")}
    return Prepared(lambda: None, lambda: given | {"device": tempfile.mkdtemp()})
