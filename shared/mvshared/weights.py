"""Weight files: strict reading of safetensors headers, exact checks of names and shapes.

Format: https://github.com/huggingface/safetensors#format - eight bytes of header length (little endian), a JSON header, the
tensors back to back. The header is validated here before any array library sees the file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.config import NetworkConfig, UNetConfig
from mvshared.errors import CheckpointError, OptionError, TensorMismatchError
from mvshared.files import file_stamps
from mvshared.names import own_names
from mvshared.quantization.groups import Packed
from mvshared.quantization.plans import (
    METADATA,
    Layers,
    Quantization,
    check_preset,
    dequantize_weight,
    from_metadata,
    part_of,
    quantized_shapes,
)

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
WEIGHT_DTYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}  # numpy has no bfloat16: its bits
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One entry of a safetensors header; `start` and `end` are byte offsets behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """A validated safetensors header."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


class Stored(NamedTuple):
    """Where a tensor is: the file, its name in there, and its entry in the header."""

    path: Path
    name: str
    info: TensorInfo


def read_header(path: Path | str) -> Header:
    """Read and validate the header of a safetensors file.

    Raises CheckpointError for a missing or truncated file, malformed JSON, duplicate names, unknown dtypes, sizes that do not
    fit the shape, and tensors that overlap, leave gaps or lie outside the file.
    """
    path = Path(path)
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise CheckpointError(f"is no safetensors file: {file_bytes} bytes, at least 8 are needed", path=path)
            header_bytes = int.from_bytes(head, "little")
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"is truncated or no safetensors file: its header should have {header_bytes} bytes, "
                    f"{file_bytes - 8} follow",
                    path=path,
                    hint="copy or download it again",
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from error
    entries = _parse_json(text, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("has a malformed header: __metadata__ must map names to strings", path=path)
    tensors = {name: _tensor_info(name, entry, path) for name, entry in entries.items()}
    _check_layout(tensors, data_bytes=file_bytes - 8 - header_bytes, path=path)
    return Header(tensors=tensors, metadata=metadata)


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"has a malformed header: {twice!r} stands twice", path=path)
        return dict(pairs)

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a malformed header: {error}", path=path) from error
    if not text.startswith(b"{") or not isinstance(entries, dict):
        raise CheckpointError("has a malformed header: it is no JSON object", path=path)
    return entries


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _tensor_info(name: str, entry: Any, path: Path) -> TensorInfo:
    def fault(reason: str) -> CheckpointError:
        return CheckpointError(f"has a malformed header: {name!r} {reason}", path=path)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fault("must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fault(f"has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise fault(f"has the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise fault(f"has the data_offsets {offsets!r}")
    size = DTYPE_BYTES[dtype]
    for length in shape:
        size *= length
    if offsets[1] - offsets[0] != size:
        raise fault(f"needs {size} bytes for {dtype} {shape}, its data_offsets hold {offsets[1] - offsets[0]}")
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=offsets[0], end=offsets[1])


def _check_layout(tensors: Mapping[str, TensorInfo], *, data_bytes: int, path: Path) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            word = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise CheckpointError(f"has a malformed header: {name!r} {word}", path=path)
        position = info.end
    if position != data_bytes:
        raise CheckpointError(
            f"is truncated or has a tail: its tensors need {position} bytes, it holds {data_bytes}",
            path=path,
            hint="copy or download it again",
        )


def check_names_and_shapes(
    *, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path | str | None
) -> None:
    """Raise TensorMismatchError unless names and shapes are the same on both sides."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshaped = [
        f"{name} (expected {list(expected[name])}, got {list(found[name])})"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    if missing or unexpected or misshaped:
        raise TensorMismatchError(path=path, missing=missing, unexpected=unexpected, misshaped=misshaped)


def stored_quantization(paths: Iterable[Path]) -> Quantization:
    """The quantised layers of weight files, by what they say; none for plain ones.

    Raises CheckpointError for a damaged file, and for metadata that are malformed or of another version.
    """
    found: list[Quantization] = []
    for path in paths:
        text = read_header(path).metadata.get(METADATA)
        if text is not None:
            found.append(from_metadata(text, path=path))
    layers = {name: layer for each in found for name, layer in each.layers.items()}
    return Quantization(preset=found[0].preset if found else "", layers=layers)


def choose_quantization(files: Mapping[Any, Sequence[Path]], preset: str | None) -> str | None:
    """How the weights of a model's components are quantised: `preset` as they are read, `stored` and its own name if a file
    is, None for weights of full precision.

    Raises OptionError for another preset than q8 and q4, and for one on top of what is stored.
    """
    stored = sorted({found.preset for paths in files.values() if (found := stored_quantization(paths)).layers})
    if preset is not None:
        check_preset(preset)
        if stored:
            hint = "or load the folder that it was made of"
            raise OptionError("quantize", expected=f"left out: this model is stored as {stored[0]}", got=preset, hint=hint)
    return f"stored {', '.join(stored)}" if stored else preset


def match_tensors(
    paths: Sequence[Path],
    expected: Mapping[str, tuple[int, ...]],
    *,
    unet: UNetConfig | None = None,
    layers: Layers | None = None,
) -> dict[str, Stored]:
    """`{name in the model: where it is stored}` of weight files that together hold exactly the `expected` names and shapes.

    `unet` is the config, if the model is a U-Net. `layers` are the quantised layers that the caller takes as they are stored;
    `expected` has the shapes of their three tensors. A linear layer of a VAE's attention may be stored as a 1x1 convolution
    (o, i, 1, 1): it has to be reshaped as it is read.

    Raises CheckpointError for a damaged file, a tensor that is there twice or holds numbers of the wrong kind, and for
    quantised files that the caller does not take; TensorMismatchError if names or shapes differ.
    """
    layers = layers or {}
    quantization = stored_quantization(paths)
    if quantization.layers and not layers:
        raise CheckpointError(
            f"is quantised ({quantization.preset}), and weights of full precision are needed here",
            path=paths[0],
            hint="use the folder that it was made of",
        )
    stored: dict[str, tuple[Path, TensorInfo]] = {}
    for path in paths:
        for name, info in read_header(path).tensors.items():
            if name in stored:
                raise CheckpointError(f"holds {name!r}, which {stored[name][0].name} holds too", path=path)
            stored[name] = (path, info)
    tensors: dict[str, Stored] = {}
    for name, own in own_names(stored, expected=expected, unet=unet).items():
        path, info = stored[name]
        if own in tensors:
            raise CheckpointError(f"holds one tensor under two names: {tensors[own].name!r} and {name!r}", path=path)
        part = part_of(own, layers)
        allowed: tuple[str, ...] = tuple(WEIGHT_DTYPES) if part is None else ("U32",) if part.kind == "weight" else ("F16",)
        if info.dtype not in allowed:
            which = ", ".join(allowed)
            raise CheckpointError(f"{name!r} must be {'one of ' * (len(allowed) > 1)}{which}, got {info.dtype}", path=path)
        tensors[own] = Stored(path, name, info)
    found = {own: tensor.info.shape for own, tensor in tensors.items()}
    for name, shape in found.items():
        if shape[2:] == (1, 1) and expected.get(name) == shape[:2] and ".mid_block.attentions." in f".{name}":
            found[name] = shape[:2]
    check_names_and_shapes(expected=expected, found=found, path=paths[0] if len(paths) == 1 else paths[0].parent)
    return tensors


def match_network(
    config: NetworkConfig, shapes: Mapping[str, tuple[int, ...]], paths: Sequence[Path], *, layers: Layers
) -> dict[str, Stored]:
    """`match_tensors` for a network whose weights have `shapes`, where these layers are stored quantised."""
    unet = config if isinstance(config, UNetConfig) else None
    return match_tensors(paths, quantized_shapes(shapes, layers), unet=unet, layers=layers)


def read_weights(
    paths: Sequence[Path], expected: Mapping[str, tuple[int, ...]], *, unet: UNetConfig | None = None
) -> dict[str, NDArray[np.float32]]:
    """The tensors of weight files as float32 arrays, by their names in the model. Raises as `match_tensors` does."""
    stored = match_tensors(paths, expected, unet=unet)
    return {name: _read_float32(place).reshape(expected[name]) for name, place in stored.items()}


def read_dequantized(
    paths: Sequence[Path], expected: Mapping[str, tuple[int, ...]], *, unet: UNetConfig | None = None
) -> dict[str, NDArray[np.float32]]:
    """As `read_weights`, where quantised files give the numbers that they stand for."""
    layers = stored_quantization(paths).layers
    stored = match_tensors(paths, quantized_shapes(expected, layers), unet=unet, layers=layers)
    weights = {}
    for name, shape in expected.items():
        part = part_of(name, layers)
        if part is None:
            weights[name] = _read_float32(stored[name]).reshape(shape)
        else:
            packed = Packed(*(_read(stored[f"{part.layer}.{kind}"]) for kind in Packed._fields))
            weights[name] = dequantize_weight(packed, layers[part.layer])
    return weights


def _read(stored: Stored) -> NDArray[Any]:
    """The numbers of a stored tensor, in its shape; those of BF16 as bits."""
    with stored.path.open("rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(data_start + stored.info.start)
        dtype = np.dtype({**WEIGHT_DTYPES, "U32": np.uint32}[stored.info.dtype]).newbyteorder("<")
        return np.frombuffer(file.read(stored.info.end - stored.info.start), dtype).reshape(stored.info.shape)


def _read_float32(stored: Stored) -> NDArray[np.float32]:
    array = _read(stored)
    if stored.info.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def short_name(hashes: Mapping[str, str]) -> str:
    """A part of a file's name that tells weights apart, of what `sha256_of_files` gives."""
    return "-".join(digest[:12] for digest in hashes.values())


def weight_stamps(paths: Iterable[Path]) -> tuple[str, ...]:
    """What tells, without reading them, whether weight files are still those that they were: see `file_stamps`."""
    return tuple(stamp for path in paths for stamp in file_stamps(path))


def sha256_of_files(paths: Iterable[Path]) -> dict[str, str]:
    """`{component/file name: sha256}` of weight files. Raises CheckpointError for one that cannot be read."""
    hashes = {}
    for path in paths:
        try:
            status = path.stat()
            stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            hashes[f"{path.parent.name}/{path.name}"] = _sha256(os.path.realpath(path), stamp)
        except OSError as cause:
            raise CheckpointError(f"cannot be read: {cause.strerror or cause}", path=path) from cause
    return hashes


@cache
def _sha256(path: str, stamp: tuple[int, ...]) -> str:
    """Of a file with that stamp, which is read once: a model of gigabytes may make many runs."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
