"""The error classes: what they say, and that they survive the way back from a worker process."""

import pickle
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

from mvshared.errors import (
    BackendError,
    CameraError,
    CheckpointError,
    ConfigError,
    DatasetError,
    DownloadError,
    ImageError,
    MemoryBudgetError,
    MeshError,
    MvError,
    NumericsError,
    OptionError,
    OutputError,
    TensorMismatchError,
)

ERRORS = [
    MvError("it failed", hint="do better"),
    OptionError("views", expected="1 to 64", got=0, hint="try 4"),
    ImageError("is empty", path=Path("a.png")),
    CameraError("is a reflection", index=3, hint="turn it"),
    CheckpointError("is truncated", path="unet"),
    TensorMismatchError(path="unet", missing=["a"], unexpected=["b"], misshaped=["c (expected [1], got [2])"]),
    BackendError("is not installed", backend="mlx"),
    OutputError("is a file", path="out"),
    ConfigError("is no JSON", path="x.json"),
    DatasetError("has no captures", path="data"),
    NumericsError("NaN", where="sampling"),
    DownloadError("has no such revision", repository="owner/name"),
    MeshError("holds no faces", path="head.obj", hint="make a mesh of it first"),
    MemoryBudgetError(needed_bytes=3 * 10**9, budget_bytes=10**9, stage="unet", hint='quantize="q4"'),
]


def test_every_class_is_tried() -> None:
    known = {MvError, *MvError.__subclasses__(), *CheckpointError.__subclasses__()}
    assert {type(error) for error in ERRORS} == known


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_from_a_worker_process_as_it_was(error: MvError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_a_value_that_cannot_be_pickled_comes_back_as_its_text() -> None:
    for value in (lambda: 3, (number for number in range(3))):
        error = OptionError("on_step", expected="a function", got=[value])
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.name, copy.got) == (OptionError, str(error), "on_step", repr([value]))
        assert error.got == [value]


def test_of_a_long_value_the_beginning_is_told() -> None:
    error = OptionError("views", expected="1", got=[0] * 1_000_000)
    assert str(error).startswith("views must be 1, got [0, 0, ") and str(error).endswith("0, ... (3000000 characters)")
    assert len(str(error)) < 1100 and len(error.got) == 1_000_000  # pyright: ignore[reportArgumentType]
    assert str(OptionError("views", expected="1", got=10**5000)) == "views must be 1, got a value of type int"


@pytest.mark.parametrize("shape", [("batch", None), RuntimeError("no shape")], ids=["symbols", "none"])
def test_a_value_whose_shape_is_not_of_numbers_is_told_by_its_type(shape: object) -> None:
    """As of an array of another library, or of a nested tensor."""

    class Odd:
        @property
        def shape(self) -> object:
            if isinstance(shape, Exception):
                raise shape
            return shape

    assert str(OptionError("image", expected="a picture", got=Odd())) == "image must be a picture, got a value of type Odd"


def test_a_long_list_of_tensors_is_cut() -> None:
    error = TensorMismatchError(path=None, missing=[f"layer{index}" for index in range(30)])
    assert "30 missing: layer0" in str(error) and "and 10 more" in str(error) and "layer20" not in str(error)
    assert len(error.missing) == 30


def test_an_array_is_told_by_its_shape() -> None:
    poses = np.tile(np.eye(4, dtype=np.float32), (8, 1, 1))
    assert (
        str(OptionError("cameras", expected="left out", got=poses))
        == "cameras must be left out, got an array of shape (8, 4, 4)"
    )
    for array in (torch.eye(4)[None], mx.eye(4)[None]):
        assert str(OptionError("cameras", expected="left out", got=array)).endswith("got an array of shape (1, 4, 4)")
    assert "<PIL.Image" in str(OptionError("prompt", expected="a text", got=Image.new("RGB", (16, 16))))
    assert str(OptionError("views", expected="1", got=np.int64(3))) == f"views must be 1, got {np.int64(3)!r}"
