"""What transformers makes of texts and pictures, with a folder's own files: what `mvmlx validate` compares inputs with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvshared.tokenizer import NO_LIMIT
from mvtorch.diffusers_model import library


class TextInputs:
    """transformers' CLIPTokenizer of a folder, as diffusers' pipelines use it.

    Fields: `added`, the tokens that were added to its vocabulary. Raises BackendError if diffusers or transformers is not
    installed.
    """

    def __init__(self, folder: Path) -> None:
        # Version 4 has another one under the shorter name, which splits texts differently.
        self._tokenizer: Any = library("transformers").CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
        self._concepts: Any = library("diffusers.loaders").TextualInversionLoaderMixin()
        self.added = tuple(sorted(self._tokenizer.get_added_vocab()))

    def __call__(self, texts: Sequence[str], *, max_length: int) -> NDArray[np.int64]:
        """Token ids (n, length) of n texts, padded and cut to the tokenizer's length, or `max_length` if it names none."""
        length = self._tokenizer.model_max_length
        if length > NO_LIMIT:
            length = max_length
        whole = [self._expanded(text) for text in texts]
        encoded = self._tokenizer(whole, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return encoded.input_ids.astype(np.int64)

    def _expanded(self, text: str) -> str:
        """A text with every vector of its concepts (textual inversion)."""
        if not any(token in text for token in self.added):  # diffusers would warn of the length
            return text
        return self._concepts.maybe_convert_prompt(text, self._tokenizer)


def clip_pixels(folder: Path, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Normalised pixels (s, s, 3) of a picture (h, w, 3) by transformers' CLIPImageProcessor of a folder, resized by Pillow.

    Raises BackendError if transformers is not installed.
    """
    transformers = library("transformers")
    # Version 5 has another one under the old name where torchvision is installed, which resizes differently.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind.from_pretrained(folder / "feature_extractor")
    pixels = processor(picture, return_tensors="np", input_data_format="channels_last").pixel_values[0]
    return np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float32)
