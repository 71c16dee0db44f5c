"""What the command line says beside its results, in lines on standard error."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from mvshared.errors import MvWarning


def say(text: str) -> None:
    """Print a line about the command to standard error, if that can be written to."""
    with suppress(OSError):
        click.echo(f"mvmlx: {text}", err=True)


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """A context in which each MvWarning is printed once, when it is raised, in one line."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if not issubclass(category, MvWarning):
            usual(message, category, *rest)
        elif str(message) not in said:
            said.add(str(message))
            say(f"warning: {message}")

    usual = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", MvWarning)
        warnings.showwarning = show
        yield
