"""numba where it is installed: without it every function stays plain Python and works on NumPy arrays.

NUMBA_DISABLE_JIT=1 in the environment has the same effect as no numba.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable)

try:
    import numba
except ImportError:
    numba: Any = None

COMPILED = numba is not None and not numba.config.DISABLE_JIT
# Division as NumPy has it: a check for zero in every loop would keep it from being vectorised.
OPTIONS = {"error_model": "numpy", "nogil": True}
COMPILED_MODULES = ("fields", "grid", "jit", "layers", "loops", "parts", "primitives")


def compiled(function: Function) -> Function:
    """`function` compiled to be called by other compiled functions; the function itself without numba."""
    return numba.njit(**OPTIONS)(function) if COMPILED else function


def compiled_scalar(function: Function) -> Function:
    """As `compiled`, for a function of one point: it becomes part of the loops that call it, so that these take several points
    an instruction."""
    return numba.njit(forceinline=True, **OPTIONS)(function) if COMPILED else function


def compiled_inline(function: Function) -> Function:
    """As `compiled`, with the function's text put in the place of each call."""
    return numba.njit(inline="always", **OPTIONS)(function) if COMPILED else function


def entry(function: Function) -> Function:
    """As `compiled`, for what Python calls: its machine code is kept on disk for the next process."""
    if not COMPILED:
        return function
    try:
        result = numba.njit(cache=True, **OPTIONS)(function)
        # numba compares the time of the function's own file alone, and the functions that it calls are in others.
        files = result._cache._cache_file
        files._source_stamp = f"{files._source_stamp} {_sources()}"
        result._cache.save_overload = _forgiving(result._cache.save_overload)
    except (RuntimeError, AttributeError):  # no folder can be written, or this numba keeps its files in another way
        return compiled(function)
    return result


def _forgiving(save: Callable) -> Callable:
    """`save`, but without its error where the disk has no room: code that is not kept is compiled again."""

    @functools.wraps(save)
    def saved(*arguments: Any) -> None:
        with contextlib.suppress(OSError):
            save(*arguments)

    return saved


def plain(function: Function) -> Function:
    """The Python of a compiled function, to call it with NumPy arrays."""
    return getattr(function, "py_func", function)


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for name in COMPILED_MODULES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()
