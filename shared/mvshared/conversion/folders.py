"""Folders that are written file by file, and go on where a broken run stopped."""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

from mvshared.checkpoint import WEIGHT_STEMS, Component
from mvshared.conversion.raw import RawTensor, shards, write_safetensors
from mvshared.errors import OptionError, OutputError
from mvshared.files import (
    file_stamps,
    is_empty,
    is_same,
    is_within,
    lock_folder,
    make_folder,
    read_json_object,
    remove_if_empty,
    remove_leftovers,
    visible,
    with_leftovers,
    write_atomic,
    write_json,
)

STATE = ".conversion.json"
DEFAULT_SHARD_BYTES = 5_000_000_000

OnTensor = Callable[[str, int], None]


def check_apart(dest: Path, sources: Sequence[Path]) -> None:
    """Raise OptionError if writing to `dest` could overwrite what is read: the same place, or one inside of the other."""
    for source in sources:
        real = Path(os.path.realpath(source))
        beside = real.is_file() and is_same(real.parent, dest)  # a file may lie where a folder's files are written
        if is_within(dest, real) or (is_within(real, dest) and not beside):
            raise OptionError("dest", expected="another place than the source's", got=str(dest))


class Progress:
    """Which files of a conversion are written; kept in the folder until it is complete. Raises OptionError, OutputError.

    Nothing is written before `writing`.
    """

    def __init__(self, dest: Path, fingerprint: str, *, sources: Sequence[Path], force: bool) -> None:
        check_apart(dest, sources)
        self.dest, self.fingerprint = dest, fingerprint
        self.done: dict[str, str] = {}
        if dest.exists() and not dest.is_dir():
            raise OutputError("is a file, and a folder is needed", path=dest, hint="name another folder")
        begun = (dest / STATE).is_file()
        if not begun and dest.is_dir() and not is_empty(dest, but_for=re.escape(STATE)) and not force:
            raise OutputError("is not empty", path=dest, hint="name another folder, or use force=True")

    def _kept(self, name: str, sha256: str) -> bool:
        path = self.dest / name
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256

    @contextmanager
    def writing(self, components: Collection[str], *, whole: bool = True) -> Iterator[None]:
        """A context in which the folder is this run's alone, and no checkpoint but one that a run can go on with; after it the
        folder is complete. It will have these components, and no others.

        Raises OutputError if another process writes to it, and if it has others already and these are not `whole`, a model that
        takes their place.
        """
        with ExitStack() as stack:
            stack.callback(lock_folder(make_folder(self.dest), busy="is being written to by another run"))
            self._begin(components, whole=whole)
            yield
            (self.dest / STATE).unlink(missing_ok=True)

    def _begin(self, components: Collection[str], *, whole: bool) -> None:
        state = self.dest / STATE
        document = read_json_object(state) if state.is_file() else {}
        if document.get("fingerprint") == self.fingerprint:
            self.done = {name: sha for name, sha in dict(document.get("files", {})).items() if self._kept(name, sha)}
        others = [name for name in get_args(Component) if name not in components and weight_names(self.dest, name)]
        if others and not whole:
            reason = f"holds {', '.join(others)} too, which this would remove, and {', '.join(components)} alone is no model"
            raise OutputError(reason, path=self.dest, hint="write to another folder, and copy what is to be replaced")
        self._save()
        for folder in (self.dest, *(path for path in self.dest.iterdir() if path.is_dir())):
            remove_leftovers(folder)
        (self.dest / "model_index.json").unlink(missing_ok=True)
        for component in others:
            folder = self.dest / component
            remove_weights(self.dest, component, keep=())
            (folder / "config.json").unlink(missing_ok=True)
            remove_if_empty(folder)

    def add(self, name: str, sha256: str) -> None:
        self.done[name] = sha256
        self._save()

    def _save(self) -> None:
        write_json(self.dest / STATE, {"fingerprint": self.fingerprint, "files": self.done})


def fingerprint(paths: Sequence[Path], stored: str | None, family: str, shard_bytes: int) -> str:
    """Of the sources, as far as their sizes and times tell, and of the options."""
    lines = [f"{stored} {family} {shard_bytes}"]
    for path in paths:
        lines += file_stamps(path)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def write_weights(
    dest: Path,
    component: Component,
    tensors: Mapping[str, RawTensor],
    *,
    shard_bytes: int,
    state: Progress,
    on_tensor: OnTensor,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a component in as many files as its size needs; returns how many. `metadata` is what each says of itself."""
    stem = WEIGHT_STEMS[component]
    groups = shards(tensors, shard_bytes=shard_bytes)
    make_folder(dest / component)
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        numbered = f"{stem}-{number:05}-of-{len(groups):05}" if len(groups) > 1 else stem
        name = f"{component}/{numbered}.safetensors"
        places |= dict.fromkeys(group, f"{numbered}.safetensors")
        if name not in state.done:
            state.add(name, write_safetensors(dest / name, group, on_tensor=on_tensor, metadata=metadata))
        else:
            for tensor in group:
                on_tensor(tensor, group[tensor].bytes)
    index_name = f"{stem}.safetensors.index.json"
    if len(groups) > 1:
        size = sum(tensor.bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_json(dest / component / index_name, index)
    # Those of an earlier conversion, which a reader would find first.
    remove_weights(dest, component, keep={*places.values(), index_name if len(groups) > 1 else ""})
    return len(groups)


def weight_names(folder: Path, component: Component) -> list[str]:
    """The files in a checkpoint folder that are a component's weights, whole, in shards or of a variant, their indices, and
    what a killed run has left of them."""
    name = rf"{WEIGHT_STEMS[component]}(\.\w+)?(-\d+-of-\d+)?\.safetensors(\.index(\.\w+)?\.json)?"
    weights, place = with_leftovers(name), folder / component
    return sorted(file.name for file in place.iterdir() if weights.fullmatch(file.name)) if place.is_dir() else []


def remove_weights(folder: Path, component: Component, *, keep: Collection[str]) -> None:
    """Remove a component's weights and their indices from a checkpoint folder, but for those names."""
    for name in weight_names(folder, component):
        if name not in keep:
            (folder / component / name).unlink()


def copy_files(source: Path, dest: Path, *, only: Sequence[str] | None = None) -> None:
    """Copy the files of a folder that are no weights, in the place of all such files there, or those of the given names."""
    make_folder(dest)
    files = {file.name: file for file in visible(source.iterdir()) if file.is_file() and _is_plain(file)}
    for name, file in files.items():
        if only is None or name in only:
            write_atomic(dest / name, file.read_bytes())
    for file in visible(dest.iterdir()) if only is None else ():
        if file.name not in files and _is_plain(file):
            file.unlink()  # a tokenizer is read from whichever of its files are there


def _is_plain(file: Path) -> bool:
    return file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json")
