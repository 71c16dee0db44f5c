"""Cases for the tests of `benchmarks.compare`; each runs in a worker's process."""

import os
import sys
from pathlib import Path

from benchmarks.worker import Prepared
from mvshared.errors import MvError


def logging(*, name: str, file: str) -> Prepared:
    """Appends its name to the file at every call, prints, and says its process's number as its views."""

    def call() -> None:
        print("something that is no answer")
        with Path(file).open("a") as log:
            log.write(f"{name} ")

    return Prepared(call, lambda: {"views": os.getpid(), "device": f"of {name}"})


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
