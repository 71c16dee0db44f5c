"""What a U-Net with cross-attention is given beside the views: states of a text, and of the picture that is the reference.

The encoders are not trained: their states are computed once, before the training, and kept in the run folder.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import PACKAGES, choose_backend
from mvshared.checkpoint import weight_files
from mvshared.clip_images import clip_pixels
from mvshared.config import ModelConfig
from mvshared.files import atomic_file, make_folder, remove_others
from mvshared.tokenizer import CLIPTokenizer
from mvshared.training.config import DataConfig
from mvshared.training.data import captures_digest, reference_pictures
from mvshared.training.kept import finite, in_half, keep, reading
from mvshared.weights import sha256_of_files, short_name


class Conditions(NamedTuple):
    """States of the text (l, c), float32, and of the views that may be references (r, m, e), float16 on disk.

    None for a U-Net without text, or without image tokens. Views are in the order of `Latents`.
    """

    text: NDArray[np.float32] | None = None
    image_states: NDArray[np.float16] | None = None


def encode_conditions(
    source: Path,
    model: ModelConfig,
    data: DataConfig,
    captures: Sequence[tuple[str, list[Path]]],
    folder: Path,
    *,
    backend: str,
    device: str,
) -> list[Conditions]:
    """Conditions for each of the named lists of captures, from the encoders in the folder `source`.

    Image states are kept in `folder` under the hashes of the encoder's weights and of the captures. Raises CheckpointError,
    DatasetError, and NumericsError for states that are not finite.
    """
    if model.text_encoder is None:
        return [Conditions() for _ in captures]
    package = importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.model")
    encoders = package.load_encoders(source, device=device)
    ids = CLIPTokenizer(source / "tokenizer")([data.prompt]).ids
    text = finite(encoders.to_numpy(encoders.encode_prompt(ids))[0], "states of the prompt", where="text_encoder")
    processor, vision = model.image_processor, model.image_encoder
    if processor is None or vision is None:
        return [Conditions(text=text) for _ in captures]
    key = short_name(sha256_of_files(weight_files(source, "image_encoder")))

    def encode(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        return encoders.to_numpy(encoders.encode_image(clip_pixels(picture, processor)[None]))[0]

    shape = (vision.tokens, vision.hidden_size)
    conditions = []
    for name, folders in captures:
        path = make_folder(folder) / f"reference-states-{name}-{key}-{captures_digest(folders)}.npy"
        conditions.append(Conditions(text, _image_states(path, folders, data, shape, encode)))
        remove_others(folder, f"reference-states-{name}-*.npy", keep=[path.name])
    return conditions


def _image_states(
    path: Path,
    folders: list[Path],
    data: DataConfig,
    shape: tuple[int, int],
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> NDArray[np.float16]:
    """The states of a file; if it is not there it is written as `keep` does. They stay on disk until they are used.

    Raises OutputError, DatasetError for a file that is no such file, and NumericsError.
    """

    def write(part: Path, chosen: list[Path], after_each: Callable[[], object]) -> None:
        states = list[NDArray[np.float16]]()
        for capture in chosen:
            what = f"states of the pictures in {capture}"
            states += [in_half(encode(read()), what, where="image_encoder") for read in reference_pictures(capture, data)]
            after_each()
        _write_states([np.stack(states) if states else np.empty((0, *shape), np.float16)], part)

    def join(parts: list[Path]) -> None:
        _write_states([_read_states(part) for part in parts], path)

    if not path.exists():
        keep(path, folders, write, join, desc="encoding references")
    return _read_states(path)


def _write_states(parts: Sequence[NDArray[np.float16]], path: Path) -> None:
    """One array (n, m, e) of several, written without all of them in memory."""
    with atomic_file(path) as file:
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False}
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


def _read_states(path: Path) -> NDArray[np.float16]:
    with reading(path, "image states"):
        return np.load(path, mmap_mode="r")
