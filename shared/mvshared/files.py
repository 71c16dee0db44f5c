"""Files on disk: read strictly, written whole or not at all."""

import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from mvshared.errors import CheckpointError, ConfigError, DatasetError, OutputError

COPY_BYTES = 1 << 24
LEFT_OVER_S = 3600.0  # since when what is half-written has not changed whose process must be gone
OF_MACOS = re.compile(r"\.DS_Store|\._.+", re.DOTALL)  # in folders that were looked at, and on disks of other systems

FileError = type[CheckpointError] | type[ConfigError] | type[DatasetError]


def read_json_object(path: Path | str, *, error: FileError = ConfigError) -> dict[str, Any]:
    """The JSON object in a UTF-8 file. Raises `error` as `read_json` does, and for a file that holds anything else."""
    document = read_json(path, error=error)
    if not isinstance(document, dict):
        raise error(f"must hold a JSON object, got {type(document).__name__}", path=path)
    return document


def read_json(path: Path | str, *, error: FileError = ConfigError) -> Any:
    """The JSON document in a UTF-8 file, with or without a byte order mark.

    Raises `error` for a file that is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as cause:
        raise error("no such file", path=path) from cause
    except OSError as cause:
        raise error(f"cannot be read: {cause.strerror or cause}", path=path) from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"is not a JSON file in UTF-8: {cause}", path=path) from cause


def make_folder(path: Path | str) -> Path:
    """Make a folder and those above it, unless they are there; returns its path. Raises OutputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as cause:
        raise _is_file(path) from cause
    except OSError as cause:
        raise OutputError(f"cannot be made: {cause.strerror or cause}", path=path) from cause
    return path


def check_folder(path: Path | str) -> None:
    """Raise OutputError if no folder can be made there, or written to: before work whose result it is for. Nothing is made."""
    path = Path(path)
    try:
        there = next((part for part in (path, *path.parents) if part.exists() or part.is_symlink()), None)
        broken = there is not None and not there.exists()
    except OSError as cause:
        raise OutputError(f"cannot be read: {cause.strerror or cause}", path=path) from cause
    if there is not None and broken:
        raise OutputError("is a link to what is not there", path=there, hint="name another folder")
    if there is not None and not there.is_dir():
        raise _is_file(there)
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        raise OutputError("cannot be written: no permission, or a read-only disk", path=there, hint="name another folder")


def lock_folder(path: Path, *, busy: str | None) -> Callable[[], None]:
    """Keep a folder for this process until the function that is returned is called, or the process ends, however it does.

    Raises OutputError, saying `busy`, if another process has it; with None it waits. On Windows, and on file systems without
    locks, it is not kept.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        return lambda: None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # whoever reads or writes it says so
        return lambda: None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
    except BlockingIOError as cause:
        os.close(descriptor)
        raise OutputError(str(busy), path=path) from cause
    except OSError:  # no locks there
        os.close(descriptor)
        return lambda: None
    return partial(os.close, descriptor)


def _is_file(path: Path) -> OutputError:
    return OutputError("is a file, and a folder is needed", path=path, hint="name another folder")


def write_atomic(path: Path | str, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part of it.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed; after a failure the temporary
    file is gone and the old file untouched. Raises OutputError.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write piece by piece, which gets its name as `write_atomic` says. Raises OutputError.

    Pipes and devices are written to as they are. In the place of a symbolic link there is a file then, as after any renaming:
    what the link named may be another checkpoint's.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                yield file
            return
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as cause:  # numpy's says how much of an array was written, and no more
        reason = cause.strerror or f"no room on the disk, perhaps ({cause})"
        raise OutputError(f"cannot be written: {reason}", path=path) from cause


def copy_file(source: Path, dest: Path) -> None:
    """Copy what is in a file, and not its time or permissions; `dest` gets it as `write_atomic` says. Raises OutputError."""
    with atomic_file(dest) as copy:
        for block in _blocks(source, dest):
            copy.write(block)


def _blocks(source: Path, dest: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            yield from iter(partial(file.read, COPY_BYTES), b"")
    except OSError as cause:
        raise OutputError(f"cannot be copied: {source} cannot be read: {cause.strerror or cause}", path=dest) from cause


def copy_folder(source: Path, dest: Path) -> None:
    """Copy the files in a folder, and in those in it, one by one as `copy_file` does. Raises OutputError."""
    paths = visible(source.iterdir())
    make_folder(dest)
    for path in paths:
        (copy_folder if path.is_dir() else copy_file)(path, dest / path.name)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder, as the file system tells: on most Macs names in letters of another case do.
    False where one is not there."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path, even of what is not there yet, is that of a folder or leads into it."""
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))  # which takes links that go in a circle, too
    return path.is_relative_to(folder) or any(is_same(part, folder) for part in (path, *path.parents))


def visible(paths: Iterable[Path]) -> list[Path]:
    """Those whose names are not hidden, in order: what begins with a dot in a folder is the system's, and no file of a user's.
    macOS leaves a .DS_Store where a folder was looked at, and on other disks a ._name beside every file."""
    return sorted(path for path in paths if not path.name.startswith("."))


def is_empty(folder: Path, *, but_for: str | None = None) -> bool:
    """Whether nothing is in a folder but what macOS leaves in any, and what a killed `atomic_file` has left of files that match
    `but_for`."""
    return _only_litter(folder.iterdir(), but_for)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder in which nothing is but what macOS leaves in any. Raises OSError, also for what another process adds."""
    found = list(folder.iterdir())
    if _only_litter(found):
        for path in found:
            path.unlink(missing_ok=True)  # on other disks a ._name goes with its file
        folder.rmdir()


def _only_litter(paths: Iterable[Path], but_for: str | None = None) -> bool:
    """Whether all of these are files that `is_empty` passes over."""
    passed = OF_MACOS.pattern if but_for is None else rf"{OF_MACOS.pattern}|{_leftover_of(but_for)}"
    return all(re.fullmatch(passed, path.name, re.DOTALL) and not path.is_dir() for path in paths)


def with_leftovers(names: str) -> re.Pattern[str]:
    """The pattern of file names that match `names`, and of what a killed `atomic_file` has left of such files."""
    return re.compile(rf"(?:{names})|{_leftover_of(names)}")


def _leftover_of(names: str) -> str:
    """What `atomic_file` calls files that match `names` while it writes them."""
    return rf"\.(?:{names})\.[0-9a-f]{{8}}\.tmp"


def remove_leftovers(folder: Path, names: str = ".+", *, unchanged_s: float = 0.0) -> None:
    """Remove what killed `atomic_file`s have left of files in a folder that match `names`, as far as that can be removed. What
    another process may be writing there must have an age, since when nothing was added to what goes."""
    left = re.compile(_leftover_of(names))
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # renamed or removed in the meantime
            if left.fullmatch(path.name) and not path.is_dir() and time.time() - path.stat().st_mtime >= unchanged_s:
                path.unlink()


def file_stamps(path: Path) -> list[str]:
    """Path, size and time of a file, or of every file in a folder in the order of their names, but for hidden ones."""
    files = [str(path)]
    if path.is_dir():
        files = sorted(os.path.join(place, name) for place, names in _walk(path) for name in names)
    present = [(file, os.stat(file)) for file in files if os.path.isfile(file)]
    return [f"{file} {status.st_size} {status.st_mtime_ns}" for file, status in present]


def _walk(path: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Every folder in one, behind links too, and the names in it that are no folders; what is hidden, and a link to
    a folder above, is left out."""
    real = os.path.realpath(path)
    if real in above:
        return
    with os.scandir(path) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    yield str(path), [entry.name for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from _walk(path / entry.name, (*above, real))


def remove_others(folder: Path, pattern: str, *, keep: Collection[str]) -> None:
    """Remove the files in a folder that match, but for those names."""
    for file in folder.glob(pattern):
        if file.name not in keep:
            file.unlink()


def write_json(path: Path | str, document: Mapping[str, Any]) -> None:
    """Write a JSON object with `write_atomic`, indented, in UTF-8.

    Raises OutputError for a file that cannot be written and for values that JSON does not have (NaN, infinity, arrays).
    """
    try:
        text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
        # A file name that is no UTF-8 reaches Python as lone surrogates; their backslash form is JSON's own escape.
        data = (text + "\n").encode(errors="backslashreplace")
    except (TypeError, ValueError) as cause:
        raise OutputError(f"cannot be written as JSON: {cause}", path=path) from cause
    write_atomic(path, data)


def user_cache() -> Path:
    """This project's folder in the user's cache, in the folder for temporary files for a user without a home."""
    return _base_folder("XDG_CACHE_HOME", ".cache") / "mvmlx"


def user_data() -> Path:
    """This project's folder among the user's data, in the folder for temporary files for a user without a home."""
    return _base_folder("XDG_DATA_HOME", ".local/share") / "mvmlx"


def _base_folder(variable: str, at_home: str) -> Path:
    """A folder of the XDG Base Directory Specification, by which relative paths in these variables are to be ignored."""
    given = os.environ.get(variable, "")
    return Path(given) if os.path.isabs(given) else user_home() / at_home


def user_home() -> Path:
    """The user's home, or the folder for temporary files for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())
