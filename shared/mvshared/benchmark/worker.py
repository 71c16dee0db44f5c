"""The process of one case: prepares it, then times one call for every line of stdin; at its end, what there is to say of it.

The array libraries, and even numpy, are imported by the case alone, so that a peak of memory is the case's own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

from mvshared.benchmark.measure import cpu_seconds
from mvshared.errors import MvError


class Prepared(NamedTuple):
    """What a case's function returns: the call to be timed, which waits for its device, and then fields of a Row by name; the
    calls are made in the context `within`, which is entered once."""

    call: Callable[[], Any]
    facts: Callable[[], dict[str, Any]]
    within: AbstractContextManager[Any] = nullcontext()


def serve(prepare: Callable[..., Prepared], arguments: dict[str, Any]) -> None:
    """Answer every line of stdin with the seconds and the CPU seconds of one call, and the end of stdin with the facts, as JSON
    lines. A line that is not empty is the file that the call's result, a numpy array, is saved in."""
    # Whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    prepared = prepare(**arguments)
    with prepared.within:
        for line in sys.stdin:
            start, cpu_start = time.perf_counter(), cpu_seconds()
            result = prepared.call()
            seconds = time.perf_counter() - start, cpu_seconds() - cpu_start
            if line.strip():
                import numpy as np

                np.save(line.strip(), result, allow_pickle=False)
            answers.write(f"{json.dumps(seconds)}\n")
    answers.write(f"{json.dumps(prepared.facts())}\n")


def main() -> None:
    """Serve the case of the command line: module, function, and arguments as JSON."""
    module, function, arguments = sys.argv[1:]
    try:
        serve(getattr(import_module(module), function), json.loads(arguments))
    except MvError as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
