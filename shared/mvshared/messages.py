"""What the command line says beside its results, in lines on standard error, and its results as JSON."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import click

from mvshared.errors import MvWarning

_SURROGATES = re.compile("[\udc80-\udcff]+|[\ud800-\udfff]")  # bytes of a file name, and any others


def say(text: str) -> None:
    """Print a line about the command to standard error, if that can be written to."""
    with suppress(OSError):
        click.echo(f"mvmlx: {text}", err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a JSON object in a line of ASCII on standard output.

    Bytes of a file name that are no text in the locale's encoding reach Python as lone surrogates, which strict readers of JSON
    refuse: they are read as UTF-8 here, with U+FFFD for those that are none.
    """
    text = json.dumps(document, ensure_ascii=False)
    click.echo(json.dumps(json.loads(_SURROGATES.sub(_as_utf8, text))))


def _as_utf8(found: re.Match[str]) -> str:
    try:
        return found[0].encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:  # half of a character, and no byte of a file name
        return "\N{REPLACEMENT CHARACTER}"


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
