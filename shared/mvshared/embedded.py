"""Models in the package: stored in eight bits a number, and unpacked to a usual checkpoint folder of float16 when first used.

Unpacked they are like any other folder, to load, to train from and to convert. It lies in the user's cache, named by the hash
of what it was made of; where nothing can be written there, it is a temporary folder of this process. A folder with files that
are missing or cut off, as cleaners and power cuts leave them, is made anew.
"""

import atexit
import hashlib
import secrets
import shutil
import tempfile
import time
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvshared.errors import CheckpointError, OutputError
from mvshared.files import make_folder, read_json_object, user_cache, visible, write_atomic, write_json
from mvshared.models import EMBEDDED
from mvshared.quantization.groups import Packed
from mvshared.quantization.plans import dequantize_weight, part_of
from mvshared.weights import stored_quantization

SIZES = ".sizes.json"  # of the files of an unpacked folder, written last
_VERSION = 1  # of the unpacking: raise it when the same files give other numbers
_LEFT_OVER_DAYS = {"folder": 30, "partial": 1}  # after which folders of other versions and of killed processes are removed


def embedded_source(name: str) -> Path:
    """The folder in the package that an embedded model of that name is stored in."""
    return Path(str(files("mvshared"))) / EMBEDDED[name]


def embedded_folder(name: str) -> Path:
    """The checkpoint folder of an embedded model, in float16; it is made if it is not there yet, or not any more.

    Raises CheckpointError for a package whose files are damaged, OutputError if neither the cache nor the folder for temporary
    files has room.
    """
    folder = _made(name)
    if not _is_complete(folder):  # a cleaner came while this process ran
        _made.cache_clear()
        folder = _made(name)
    return folder


@cache
def _made(name: str) -> Path:
    source = embedded_source(name)
    target = user_cache() / f"{name}-{_digest(source)[:16]}"
    if _is_complete(target):
        return target
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        unpack(source, partial)
        _put(partial, target)
        _remove_left_over(name, target)
    except (OSError, OutputError):
        if not _is_complete(target):  # else another process was faster
            target = Path(tempfile.mkdtemp(prefix="mvmlx-")) / name
            atexit.register(shutil.rmtree, target.parent, ignore_errors=True)
            unpack(source, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def unpack(source: Path, target: Path) -> None:
    """Write a folder like `source`, with the numbers that its quantised weights stand for.

    Raises OutputError for what cannot be written, CheckpointError for a damaged source.
    """
    from safetensors.numpy import save

    sizes = {}
    for path in _files(source):
        name = path.relative_to(source)
        content = save(_dequantized(path)) if path.suffix == ".safetensors" else path.read_bytes()
        write_atomic(make_folder((target / name).parent) / name.name, content)
        sizes[name.as_posix()] = len(content)
    write_json(target / SIZES, sizes)


def _is_complete(folder: Path) -> bool:
    """Whether all that was unpacked is there, in full length."""
    try:
        sizes = read_json_object(folder / SIZES, error=CheckpointError)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, CheckpointError):
        return False


def _put(partial: Path, target: Path) -> None:
    """Give an unpacked folder its name, in the place of one that is not complete. Raises OSError if another process did."""
    if target.exists() and not _is_complete(target):
        damaged = partial.with_name(f"{partial.name[:-4]}.damaged.tmp")
        target.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    partial.rename(target)


def _remove_left_over(name: str, used: Path) -> None:
    """Remove old folders of other versions of the model, and what killed processes were writing."""
    for pattern, kind in ((f"{name}-*", "folder"), (f".{name}-*.tmp", "partial")):
        for folder in used.parent.glob(pattern):
            if folder != used and time.time() - folder.stat().st_mtime > 86400 * _LEFT_OVER_DAYS[kind]:
                shutil.rmtree(folder, ignore_errors=True)


def _dequantized(path: Path) -> dict[str, NDArray[np.float16]]:
    """The tensors of a file."""
    from safetensors.numpy import load_file

    layers = stored_quantization([path]).layers
    stored = load_file(path)
    weights = {name: array.astype(np.float16) for name, array in stored.items() if part_of(name, layers) is None}
    for name, layer in layers.items():
        packed = Packed(*(stored[f"{name}.{kind}"] for kind in Packed._fields))
        weights[f"{name}.weight"] = dequantize_weight(packed, layer).astype(np.float16)
    return weights


def _digest(source: Path) -> str:
    """Of all files, by name and content, and of how they are unpacked."""
    found = hashlib.sha256(f"{_VERSION}\0".encode())
    for path in _files(source):
        found.update(f"{path.relative_to(source).as_posix()}\0".encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    return visible(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
