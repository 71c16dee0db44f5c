"""The typed errors of mvmlx: one class per thing that a caller might want to tell apart.

Every message says what happened, what is allowed, what was given and what to do. It names arguments as Python does, such as
`size_px=64`, and others than the one that it is about in backticks; the command line prints it in one line, with its own
options for them, and leaves with the class's `exit_code`. docs/exit-codes.md lists them.
"""

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class MvError(Exception):
    """Base of every error that mvmlx raises on purpose.

    Fields: `message` what happened, `hint` what to do about it (may be empty), `exit_code` of the command line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross from worker processes, which pickle them; their constructors take other arguments than `args`."""
        return _restore, (type(self), self.args, vars(self))


def _restore(kind: type[MvError], arguments: tuple[Any, ...], values: dict[str, Any]) -> MvError:
    error = kind.__new__(kind, *arguments)
    vars(error).update(values)
    return error


_PACKAGES = ("mvshared", "mvtorch", "mvmlx")


class MvWarning(UserWarning):
    """Something that a caller gave was used only in part. The command line prints it in one line and goes on."""


def warn(text: str) -> None:
    """Give an MvWarning at the line that called into this project, however deep inside it is noticed."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, MvWarning, stacklevel=level)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line: the first of its text, or its name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


_SHOWN = 1000  # characters of a value in a message


class OptionError(MvError):
    """A parameter has a value that is not allowed. Fields: `name`, `expected`, `got`. Large arrays are told by their shape, and
    of other long values the beginning."""

    exit_code = 2

    def __init__(self, name: str, *, expected: str, got: object, hint: str = "") -> None:
        super().__init__(f"{name} must be {expected}, got {_told(got)}", hint=hint)
        self.name, self.expected, self.got = name, expected, got

    def __reduce__(self) -> tuple[Any, ...]:
        """As other errors; of what cannot be pickled, such as a function or an open file, the text crosses."""
        import pickle  # which the command line starts without

        try:
            pickle.dumps(self.got)
        except Exception:  # whatever that object raises
            restore, (kind, arguments, values) = super().__reduce__()
            return restore, (kind, arguments, {**values, "got": _told(self.got)})
        return super().__reduce__()


def _told(value: object) -> str:
    """A value in a message: as Python writes it, but for large arrays, and no more than a reader can use."""
    try:
        shape: Any = getattr(value, "shape", None)  # numpy's, PyTorch's or MLX's
        if isinstance(shape, tuple) and math.prod(shape) > 8:
            return f"an array of shape {tuple(shape)}"
        text = repr(value)
    except Exception:  # as of a whole number of more than 4300 digits, or of PyTorch's nested tensors, which have no shape
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


class ImageError(MvError):
    """A picture cannot be read or used. Fields: `path` (None for a picture in memory)."""

    exit_code = 3

    def __init__(self, message: str, *, path: Path | str | None = None, hint: str = "") -> None:
        super().__init__(f"{path}: {message}" if path is not None else message, hint=hint)
        self.path = path


class CameraError(MvError):
    """A camera is not a rigid camera-to-world pose. Fields: `index` of the offending view, or None."""

    exit_code = 4

    def __init__(self, message: str, *, index: int | None = None, hint: str = "") -> None:
        super().__init__(f"camera {index}: {message}" if index is not None else message, hint=hint)
        self.index = index


class CheckpointError(MvError):
    """A checkpoint folder or weight file cannot be used. Fields: `path`."""

    exit_code = 5

    def __init__(self, message: str, *, path: Path | str | None = None, hint: str = "") -> None:
        super().__init__(f"{path}: {message}" if path is not None else message, hint=hint)
        self.path = path


class TensorMismatchError(CheckpointError):
    """Names or shapes of a weight file differ from the model's.

    Fields: `missing` and `unexpected` names, `misshaped` as `name (expected, got)` strings. The message shows the first 20.
    """

    shown = 20

    def __init__(
        self,
        *,
        path: Path | str | None,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshaped: Sequence[str] = (),
        hint: str = "is config.json the one of these weights?",
    ) -> None:
        parts = []
        for word, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)):
            if names:
                more = f", and {len(names) - self.shown} more" if len(names) > self.shown else ""
                parts.append(f"{len(names)} {word}: {', '.join(names[: self.shown])}{more}")
        super().__init__(
            "the tensors do not fit the model; " + "; ".join(parts),
            path=path,
            hint=hint,
        )
        self.missing, self.unexpected, self.misshaped = tuple(missing), tuple(unexpected), tuple(misshaped)


class BackendError(MvError):
    """A backend, device or dtype is not there. Fields: `backend`."""

    exit_code = 6

    def __init__(self, message: str, *, backend: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.backend = backend


class OutputError(MvError):
    """An output folder cannot be written, or holds a finished run. Fields: `path`."""

    exit_code = 7

    def __init__(self, message: str, *, path: Path | str, hint: str = "") -> None:
        super().__init__(f"{path}: {message}", hint=hint)
        self.path = path


class ConfigError(MvError):
    """A configuration or metadata file is malformed. Fields: `path`."""

    exit_code = 8

    def __init__(self, message: str, *, path: Path | str | None = None, hint: str = "") -> None:
        super().__init__(f"{path}: {message}" if path is not None else message, hint=hint)
        self.path = path


class DatasetError(MvError):
    """Training or evaluation data is missing or malformed. Fields: `path`."""

    exit_code = 9

    def __init__(self, message: str, *, path: Path | str | None = None, hint: str = "") -> None:
        super().__init__(f"{path}: {message}" if path is not None else message, hint=hint)
        self.path = path


class NumericsError(MvError):
    """A computation left the finite numbers.

    Fields: `where`, a stage or the name of a block; and if they are known the sampling `step` from 1, the first `view` of which
    it is true, as in "view 2", and the `path` of the inputs that it happened with.
    """

    exit_code = 10

    def __init__(
        self,
        message: str,
        *,
        where: str,
        step: int | None = None,
        view: str | None = None,
        path: Path | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(f"{where}: {message}", hint=hint)
        self.where, self.step, self.view, self.path = where, step, view, path


class DownloadError(MvError):
    """A model cannot be downloaded, or is not what it should be. Fields: `repository`."""

    exit_code = 11

    def __init__(self, message: str, *, repository: str, hint: str = "") -> None:
        super().__init__(f"{repository}: {message}", hint=hint)
        self.repository = repository


class MeshError(MvError):
    """A mesh cannot be read or rendered. Fields: `path`, or None."""

    exit_code = 12

    def __init__(self, message: str, *, path: Path | str | None = None, hint: str = "") -> None:
        super().__init__(f"{path}: {message}" if path is not None else message, hint=hint)
        self.path = path


class MemoryBudgetError(MvError):
    """A run does not fit into the memory that it was given. Fields: `needed_bytes` at least, `budget_bytes`, `stage`."""

    exit_code = 13

    def __init__(self, *, needed_bytes: int, budget_bytes: int, stage: str, hint: str = "") -> None:
        needed, budget = (f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.3g} MB" for n in (needed_bytes, budget_bytes))
        super().__init__(f"this run needs at least {needed} in its stage {stage}, the budget is {budget}", hint=hint)
        self.needed_bytes, self.budget_bytes, self.stage = needed_bytes, budget_bytes, stage
