"""Arrays that a run computes once from its captures, which can take hours, and keeps in its folder."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.errors import DatasetError, NumericsError
from mvshared.files import remove_others, write_atomic

PART = 64  # captures whose arrays are written together

Arrays = TypeVar("Arrays")  # a named tuple of arrays
Array = TypeVar("Array", bound=NDArray[Any])
AfterEach = Callable[[], object]


def finite(values: Array, what: str, *, where: str) -> Array:
    """The same values, which the network `where` has computed. Raises NumericsError if a number is not finite: no training
    could mend that."""
    if not np.isfinite(values).all():
        kind = " in float16" if values.dtype == np.float16 else ""
        hint = f"are the weights of the {where.replace('_', ' ')} damaged?"
        raise NumericsError(f"{what} are not finite{kind}", where=where, hint=hint)
    return values


def in_half(values: NDArray[np.float32], what: str, *, where: str) -> NDArray[np.float16]:
    """Values in float16, as they are kept. Raises as `finite` does."""
    with np.errstate(over="ignore"):
        return finite(values.astype(np.float16), what, where=where)


def keep(
    path: Path,
    captures: Sequence[Path],
    write: Callable[[Path, list[Path], AfterEach], None],
    join: Callable[[list[Path]], None],
    *,
    desc: str,
) -> None:
    """Make a file of what is computed from captures, in parts: a call after a killed one goes on behind its last part.

    `write(file, some captures, after each)` makes the file of a part, and calls `after each` for every capture; `join(files)`
    makes `path` of them all. `desc` says in the progress bar what is done.
    """
    parts = []
    with tqdm(total=len(captures), desc=desc, unit="capture", disable=None) as progress:
        for start in range(0, len(captures), PART):
            chosen = list(captures[start : start + PART])
            parts.append(path.with_name(f"{path.stem}.{start}-{start + len(chosen)}{path.suffix}"))
            if parts[-1].exists():
                progress.update(len(chosen))
            else:
                write(parts[-1], chosen, progress.update)
    join(parts)
    for part in parts:
        part.unlink()


def kept_arrays(
    path: Path,
    captures: Sequence[Path],
    make: Callable[[list[Path], AfterEach], Arrays],
    join: Callable[[list[Arrays]], Arrays],
    kind: Callable[..., Arrays],
    *,
    replaces: str,
    desc: str,
) -> Arrays:
    """The arrays of a file, which is made as `keep` does if it is not there; others of the pattern `replaces` are removed.

    `make(some captures, after each)` gives a part, `join(parts)` the whole. Raises DatasetError as `load_arrays` does.
    """

    def write(part: Path, chosen: list[Path], after_each: AfterEach) -> None:
        save_arrays(part, make(chosen, after_each))

    def write_joined(parts: list[Path]) -> None:
        save_arrays(path, join([load_arrays(part, kind) for part in parts]))

    if not path.exists():
        keep(path, captures, write, write_joined, desc=desc)
    remove_others(path.parent, replaces, keep=[path.name])
    return load_arrays(path, kind)


def save_arrays(path: Path, arrays: Any) -> None:
    """Write the fields of a named tuple that are not None to one file, atomically. Raises OutputError."""
    encoded = io.BytesIO()
    np.savez(encoded, **{name: array for name, array in arrays._asdict().items() if array is not None})
    write_atomic(path, encoded.getvalue())


def load_arrays(path: Path, kind: Callable[..., Arrays]) -> Arrays:
    """Read what `save_arrays` wrote of a kind of named tuple. Raises DatasetError if the file is no such file."""
    with reading(path, "latents"), path.open("rb") as file, np.load(file) as arrays:
        return kind(**dict(arrays))


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """A context in which a file that a run has kept is read. Raises DatasetError if it is no file of what it should be."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise DatasetError(f"is no file of {what}: {error}", path=path, hint="remove it, it is made anew") from error


def in_one(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Arrays (n, ...) of pictures one after the other. Raises DatasetError unless they have one size."""
    if len(shapes := sorted({array.shape[1:] for array in arrays})) > 1:
        raise DatasetError(f"all pictures must have one size, got {shapes[0]} and {shapes[-1]}")
    return np.concatenate(arrays)
