"""Models in the package: stored in eight bits a number, and unpacked to a usual checkpoint folder of float16 when first used.

Unpacked they are like any other folder, to load, to train from and to convert. It lies in the user's cache, named by the hash
of what it was made of; where nothing can be written there, it is a temporary folder of this process.
"""

import atexit
import hashlib
import secrets
import shutil
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvshared.files import user_cache
from mvshared.models import EMBEDDED
from mvshared.quantization.groups import Packed
from mvshared.quantization.plans import dequantize_weight, part_of
from mvshared.weights import stored_quantization

COMPLETE = "model_index.json"


def embedded_source(name: str) -> Path:
    """The folder in the package that an embedded model of that name is stored in."""
    return Path(str(files("mvshared"))) / EMBEDDED[name]


@cache
def embedded_folder(name: str) -> Path:
    """The checkpoint folder of an embedded model, in float16; it is made if it is not there yet.

    Raises CheckpointError for a package whose files are damaged.
    """
    source = embedded_source(name)
    target = user_cache() / f"{name}-{_digest(source)[:16]}"
    if (target / COMPLETE).is_file():
        return target
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        unpack(source, partial)
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not (target / COMPLETE).is_file():  # else another process was faster
            target = Path(tempfile.mkdtemp(prefix="mvmlx-")) / name
            atexit.register(shutil.rmtree, target.parent, ignore_errors=True)
            unpack(source, target)
    return target


def unpack(source: Path, target: Path) -> None:
    """Write a folder like `source`, with the numbers that its quantised weights stand for. Raises OSError, CheckpointError."""
    from safetensors.numpy import save_file

    for path in _files(source):
        written = target / path.relative_to(source)
        written.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(_dequantized(path), written)
        else:
            shutil.copyfile(path, written)


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
    """Of all files, by name and content."""
    found = hashlib.sha256()
    for path in _files(source):
        found.update(f"{path.relative_to(source).as_posix()}\0".encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
