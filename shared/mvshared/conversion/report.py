"""What a conversion tells of itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvshared.conversion.raw import RawTensor


@dataclass(frozen=True, kw_only=True)
class Written:
    """A component, or a whole file, as it was written: how many files and tensors, and how many tensors of each dtype."""

    component: str
    files: int
    tensors: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion made.

    `names` are the new names by the old, per component; `left_out` says why tensors were not taken; `missing` are components
    that the family needs and no source had: the folder cannot be loaded without them. `guessed` is the other family that the
    same tensors can be of, if nothing said which it is, else None.
    """

    folder: Path
    family: str
    written: tuple[Written, ...]
    names: Mapping[str, Mapping[str, Sequence[str]]]
    left_out: Mapping[str, str]
    missing: tuple[str, ...]
    guessed: str | None = None


def written(component: str, tensors: Mapping[str, RawTensor], *, files: int) -> Written:
    """The account of tensors that were written."""
    dtypes = Counter(tensor.dtype for tensor in tensors.values())
    return Written(component=component, files=files, tensors=len(tensors), dtypes=dict(sorted(dtypes.items())))
