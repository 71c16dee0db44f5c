"""The process of one case: prepares it, then times one call for every line of stdin; at its end, what there is to say of it.

The array libraries, and even numpy, are imported by the case alone, so that a peak of memory is the case's own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from mvshared.errors import MvError


class Prepared(NamedTuple):
    """What a case's function returns: the call to be timed, which waits for its device, and then fields of a Row by name."""

    call: Callable[[], object]
    facts: Callable[[], dict[str, Any]]


def serve(prepare: Callable[..., Prepared], arguments: dict[str, Any]) -> None:
    """Answer every line of stdin with the seconds of one call, and the end of stdin with the facts, as JSON lines."""
    # Whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    prepared = prepare(**arguments)
    for _ in sys.stdin:
        start = time.perf_counter()
        prepared.call()
        print(json.dumps(time.perf_counter() - start), file=answers)
    print(json.dumps(prepared.facts()), file=answers)


if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    try:
        serve(getattr(import_module(module), function), json.loads(arguments))
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
