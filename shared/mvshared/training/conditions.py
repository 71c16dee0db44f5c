"""What a U-Net with cross-attention is given beside the views: states of a text, and of the picture that is the reference.

The encoders are not trained: their states are computed once, before the training, and kept in the run folder.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.backend import PACKAGES, choose_backend
from mvshared.checkpoint import weight_files
from mvshared.clip_images import clip_pixels
from mvshared.config import ModelConfig
from mvshared.files import atomic_file, make_folder, remove_others
from mvshared.tokenizer import CLIPTokenizer
from mvshared.training.config import DataConfig
from mvshared.training.data import captures_digest, reading, reference_pictures
from mvshared.weights import sha256_of_files, short_name


class Conditions(NamedTuple):
    """States of the text (l, c), float32, and of every view (n, m, e), float16 on disk, zero for one that is no reference.

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

    Image states are kept in `folder` under the hashes of the encoder's weights and of the captures. Raises CheckpointError and
    DatasetError.
    """
    if model.text_encoder is None:
        return [Conditions() for _ in captures]
    package = importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.model")
    encoders = package.load_encoders(source, device=device)
    ids = CLIPTokenizer(source / "tokenizer")([data.prompt]).ids
    text = encoders.to_numpy(encoders.encode_prompt(ids))[0]
    processor, vision = model.image_processor, model.image_encoder
    if processor is None or vision is None:
        return [Conditions(text=text) for _ in captures]
    key = short_name(sha256_of_files(weight_files(source, "image_encoder")))

    def encode(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        return encoders.to_numpy(encoders.encode_image(clip_pixels(picture, processor)[None]))[0]

    shape = (vision.tokens, vision.hidden_size)
    conditions = []
    for name, folders in captures:
        path = make_folder(folder) / f"image-states-{name}-{key}-{captures_digest(folders)}.npy"
        conditions.append(Conditions(text, _image_states(path, folders, data, shape, encode)))
        remove_others(folder, f"image-states-{name}-*.npy", keep=[path.name])
    return conditions


def _image_states(
    path: Path,
    folders: list[Path],
    data: DataConfig,
    shape: tuple[int, int],
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> NDArray[np.float16]:
    """The states of a file, zeros for what is no reference; if it is not there it is written row by row.

    Raises OutputError, and DatasetError for a file that is no such file.
    """
    if not path.exists():
        rows, pictures = reference_pictures(folders, data)
        references, nothing = dict(pictures), np.zeros(shape, np.float16).tobytes()
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (rows, *shape)}
        progress = tqdm(total=len(references), desc="encoding references", unit="view", disable=None)
        with progress, atomic_file(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for row in range(rows):
                read = references.get(row)
                file.write(nothing if read is None else encode(read()).astype(np.float16).tobytes())
                progress.update(read is not None)
    with reading(path, "image states"):
        return np.load(path, mmap_mode="r")
