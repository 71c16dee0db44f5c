"""Checkpoints that PyTorch pickled: `.pt`, `.pth`, `.ckpt` and `.bin` files, read as tensors and nothing else."""

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvshared.conversion.raw import RawTensor
from mvshared.errors import CheckpointError

DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
# Where a checkpoint of a training keeps its weights; the upscaler's are the moving average.
WEIGHTS = ("state_dict", "model_ema", "model_state_dict", "module")


class _Inert:
    """Stands for what the original Stable Diffusion files name beside their tensors, and does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Callbacks of a training, and its losses and other numbers, as either version of numpy pickles them.
INERT = ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.dtype"]
INERT += ["numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"]


def read_pickled(path: Path) -> dict[str, RawTensor]:
    """The tensors of a pickled checkpoint by name.

    The unpickler builds tensors, containers and numbers; a file that asks for anything else is refused before it runs.
    Raises CheckpointError.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Inert, name) for name in INERT]):
            warnings.simplefilter("ignore")  # about protocols of pickles that may be refused: it is, or it is not
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as refused:
        # What comes before it, and behind, advises to load the file without this protection.
        reason = str(refused).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].strip()
        reason = reason.partition(" was not an allowed global")[0]
        raise CheckpointError(
            f"is no checkpoint of tensors alone: {reason}", path=path, hint="only files of plain tensors are read"
        ) from refused
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as fault:
        reason = str(fault).partition("\n")[0].strip() or type(fault).__name__
        raise CheckpointError(f"cannot be read as a PyTorch checkpoint: {reason}", path=path) from fault
    if not isinstance(content, Mapping):
        raise CheckpointError(f"must hold tensors by name, got {type(content).__name__}", path=path)
    for key in WEIGHTS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {name: _raw(tensor, path=path) for name, tensor in _tensors(content)}
    if not tensors:
        raise CheckpointError("holds no tensors", path=path)
    return tensors


def _tensors(content: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield name, value


def _raw(tensor: Tensor, *, path: Path) -> RawTensor:
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise CheckpointError(f"holds a tensor of the kind {tensor.dtype}, {tensor.layout}", path=path)

    def read() -> Any:
        flat = tensor.detach().contiguous().reshape(-1)
        return flat.view(BITS[tensor.element_size()]).numpy().reshape(tuple(tensor.shape))

    return RawTensor(dtype=DTYPES[tensor.dtype], shape=tuple(tensor.shape), read=read)
