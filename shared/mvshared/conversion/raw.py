"""Tensors as they are stored: bits that are moved, never computed with, until somebody asks for another dtype.

They are read when they are needed and written one after the other, so that the largest tensor is what a conversion needs of
memory, and whatever is only renamed stays equal bit by bit.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mvshared.errors import CheckpointError
from mvshared.files import atomic_file
from mvshared.quantization.plans import METADATA
from mvshared.weights import DTYPE_BYTES, read_header

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED = {name: stored for stored, name in FLOATS.items()}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A stored tensor: safetensors' name of its dtype, its shape, and a function that reads its bits as unsigned numbers."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @property
    def bytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    """The tensors of a safetensors file, unread. Raises CheckpointError for a malformed file, and for quantised weights."""
    header = read_header(path)
    if METADATA in header.metadata:
        hint = "convert the folder that it was made of, and quantise the result"
        raise CheckpointError("is quantised, and weights of full precision are needed here", path=path, hint=hint)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")

    def reader(first: int, dtype: str, shape: tuple[int, ...]) -> Callable[[], NDArray[Any]]:
        kind = _BITS[DTYPE_BYTES[dtype]]

        def read() -> NDArray[Any]:
            if not prod(shape):
                return np.zeros(shape, kind)
            return np.memmap(path, dtype=kind, mode="r", offset=first, shape=shape or (1,)).reshape(shape)

        return read

    return {
        name: RawTensor(dtype=info.dtype, shape=info.shape, read=reader(start + info.start, info.dtype, info.shape))
        for name, info in header.tensors.items()
    }


def raw_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, RawTensor]:
    """Arrays of float32 as tensors to write."""

    def bits(array: NDArray[Any]) -> Callable[[], NDArray[Any]]:
        return lambda: np.ascontiguousarray(array).view(np.uint32)

    return {name: RawTensor(dtype="F32", shape=array.shape, read=bits(array)) for name, array in arrays.items()}


def cast(tensor: RawTensor, dtype: str, *, name: str) -> RawTensor:
    """The tensor, of the FLOATS or F64, in another of the FLOATS, rounded to the nearest, F64 by way of float32.

    Raises CheckpointError for a value that leaves its range."""
    if tensor.dtype == dtype:
        return tensor

    def read() -> NDArray[Any]:
        given = tensor.read()
        values = _values(given, tensor.dtype)
        with np.errstate(over="ignore"):
            bits = _bits(values, dtype)
        finite = np.isfinite(given.view(np.float64) if tensor.dtype == "F64" else values)
        lost = int((finite & ~np.isfinite(_values(bits, dtype))).sum())
        if lost:
            raise CheckpointError(f"{name}: {lost} values are too large for {FLOATS[dtype]}", hint="use float32 or bfloat16")
        return bits

    return RawTensor(dtype=dtype, shape=tensor.shape, read=read)


def _values(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    bits = np.ascontiguousarray(bits)
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float32)


def _bits(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)  # rounding could make a NaN infinite
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).view(_BITS[DTYPE_BYTES[dtype]])


def shards(tensors: Mapping[str, RawTensor], *, shard_bytes: int) -> list[dict[str, RawTensor]]:
    """The tensors in the order of their names, in groups of at most `shard_bytes`; a larger tensor has one for itself."""
    groups: list[dict[str, RawTensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        if groups[-1] and size + tensors[name].bytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensors[name]
        size += tensors[name].bytes
    return groups


def write_safetensors(
    path: Path,
    tensors: Mapping[str, RawTensor],
    *,
    on_tensor: Callable[[str, int], None] = lambda name, size: None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file, tensor by tensor, as `write_atomic` does; returns its SHA-256.

    `on_tensor` gets the name and the bytes of each, `metadata` is what the file says of itself. Raises OutputError, and
    CheckpointError if a tensor cannot be read.
    """
    with atomic_file(path) as file:
        return _write(file, tensors, on_tensor, {"format": "pt", **(metadata or {})})


def _write(
    file: BinaryIO, tensors: Mapping[str, RawTensor], on_tensor: Callable[[str, int], None], metadata: Mapping[str, str]
) -> str:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, position + tensor.bytes]}
        position += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    for name, part in (("", len(text).to_bytes(8, "little")), ("", text), *_contents(tensors)):
        file.write(part)
        sha256.update(part)
        if name:
            on_tensor(name, len(part))
    return sha256.hexdigest()


def _contents(tensors: Mapping[str, RawTensor]) -> Iterable[tuple[str, bytes]]:
    for name, tensor in tensors.items():
        try:
            bits = tensor.read()
        except OSError as cause:  # which is none of the file that is written
            raise CheckpointError(f"{name!r} cannot be read: {cause.strerror or cause}", path=cause.filename) from cause
        if bits.shape != tensor.shape:
            raise CheckpointError(f"{name!r} has the shape {bits.shape}, {tensor.shape} was announced")
        yield name, np.ascontiguousarray(bits).astype(bits.dtype.newbyteorder("<"), copy=False).tobytes()
