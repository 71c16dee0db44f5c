"""CLIP's tokenizer, from a checkpoint's tokenizer folder: text to token ids of one length.

Byte-level BPE as in transformers' CLIPTokenizer (openai/CLIP, simple_tokenizer.py), run by the tokenizers library. Special
tokens are whatever the folder's JSON files say: Stable Diffusion 1.5 pads with the end token, 2.1 with "!", and then every "!"
of a text is the padding's token too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mvshared.config import CLIPTextConfig
from mvshared.errors import CheckpointError, OptionError, warn
from mvshared.files import read_json_object

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
MAX_LENGTH = 77
NO_LIMIT = 1_000_000  # above it a length stands for none: transformers writes 1e30


class Tokens(NamedTuple):
    """Token ids int64 (b, max_length), and what of each text did not fit, empty where all of it did."""

    ids: NDArray[np.int64]
    cut: tuple[str, ...]

    def warn_of_cuts(self, *names: str) -> None:
        """An MvWarning about every text that did not fit, by its name."""
        room = self.ids.shape[1] - 2
        for name, cut in zip(names, self.cut, strict=True):
            if cut:
                warn(f"the {name} is longer than {room} tokens; left out is: {cut}")


class CLIPTokenizer:
    """The tokenizer of a folder with vocab.json and merges.txt, or tokenizer.json.

    Tokens that were added to the vocabulary are read too: added_tokens.json, `added_tokens_decoder` in tokenizer_config.json,
    and `added_tokens` in tokenizer.json. The token of a concept of several vectors (textual inversion, arXiv 2208.01618) stands
    for all of them, which are called token_1, token_2 and so on, as in diffusers' pipelines.
    Fields: `max_length`, the tokens per text, start and end included; `bos_token_id`, `eos_token_id`, `pad_token_id`;
    `largest_id`, the largest of all tokens.
    """

    def __init__(self, folder: Path | str) -> None:
        """Read the folder. Raises CheckpointError for files that are missing or malformed."""
        folder = Path(folder)
        settings = _settings(folder)
        special = {name: _token(folder, settings.get(name, content)) for name, content in SPECIAL_TOKENS.items()}
        self.max_length = _max_length(folder, settings)
        self._tokenizer = _bpe(folder, unk_token=special["unk_token"].content)
        self._several = _of_several_vectors(_add_tokens(self._tokenizer, folder, settings))
        vocabulary = self._tokenizer.get_vocab()
        for name, token in special.items():
            if token.content not in vocabulary:
                raise CheckpointError(f"the {name} {token.content!r} is not in the vocabulary", path=folder)
        self._tokenizer.add_special_tokens(list(special.values()))
        ids = {name: vocabulary[token.content] for name, token in special.items()}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids["bos_token"], ids["eos_token"], ids["pad_token"]
        self.largest_id = max(vocabulary.values())

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Start token, the text's tokens as far as they fit, end token, padding. Raises OptionError for what is no text."""
        ids = np.full((len(texts), self.max_length), self.pad_token_id, np.int64)
        cut = []
        for row, text in zip(ids, texts, strict=True):
            if not isinstance(text, str):
                raise OptionError("prompt", expected="a text", got=text)
            if any("\ud800" <= character <= "\udfff" for character in text):
                hint = "is the terminal's locale UTF-8?"
                raise OptionError("prompt", expected="a text of characters, and has bytes that are none", got=text, hint=hint)
            text, encoding = self._encoded(text)
            room = self.max_length - 2
            kept = encoding.ids[:room]
            row[: len(kept) + 2] = [self.bos_token_id, *kept, self.eos_token_id]
            cut.append(text[encoding.offsets[room][0] :] if len(encoding.ids) > room else "")
        return Tokens(ids, tuple(cut))

    def _encoded(self, text: str) -> tuple[str, Encoding]:
        """The text with every vector of its concepts, and its encoding."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        short = {token for token in encoding.tokens if token in self._several}
        if not short:
            return text, encoding
        for token in sorted(short):
            text = text.replace(token, self._several[token])
        return text, self._tokenizer.encode(text, add_special_tokens=False)


def load_tokenizer(folder: Path, text: CLIPTextConfig | None) -> CLIPTokenizer:
    """The tokenizer in a checkpoint folder. Raises CheckpointError if it is missing or does not fit the text encoder."""
    tokenizer = CLIPTokenizer(folder / "tokenizer")
    if text is not None and tokenizer.max_length > text.max_position_embeddings:
        places = text.max_position_embeddings
        reason = f"has {tokenizer.max_length} tokens, the text encoder has {places} positions"
        raise CheckpointError(reason, path=folder / "tokenizer")
    if text is not None and tokenizer.largest_id >= text.vocab_size:
        reason = f"has token ids up to {tokenizer.largest_id}, the text encoder knows {text.vocab_size} tokens"
        raise CheckpointError(reason, path=folder / "tokenizer")
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """What the folder's JSON files say of special tokens and lengths; the older file of special tokens counts more."""
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            document = read_json_object(folder / name, error=CheckpointError)
            settings |= {field: value for field, value in document.items() if value is not None}
    return settings


def _token(folder: Path, value: Any, *, special: bool = True) -> AddedToken:
    """A special token, or another one that was added: its text, or an object with `content` and how it is matched."""
    fields = value if isinstance(value, dict) else {"content": value}
    options = {name: fields[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in fields}
    content = fields.get("content")
    if not isinstance(content, str) or not content or not all(isinstance(option, bool) for option in options.values()):
        raise CheckpointError(f"a special token must be a text or an object with content, got {value!r}", path=folder)
    return AddedToken(content, special=special, **({"normalized": False} | options))


def _add_tokens(tokenizer: Tokenizer, folder: Path, settings: dict[str, Any]) -> set[str]:
    """Add tokens, with their ids in the vocabulary or else the next ones; all that the files say were added."""
    path, whole = folder / "added_tokens.json", folder / "tokenizer.json"
    plain = read_json_object(path, error=CheckpointError) if path.exists() else {}
    listed = read_json_object(whole, error=CheckpointError).get("added_tokens") if whole.exists() else []
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise CheckpointError(f"added_tokens must be a list of objects, got {listed!r}", path=whole)
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or not all(isinstance(each, dict) for each in decoder.values()):
        raise CheckpointError(f"added_tokens_decoder must map ids to objects, got {decoder!r}", path=folder)
    added = {text: (number, AddedToken(text)) for text, number in plain.items()}
    for number, fields in decoder.items():
        token = _token(folder, fields, special=bool(fields.get("special", False)))
        added[token.content] = (int(number) if number.isdecimal() else number, token)
    for fields in listed:  # of transformers 5, which leaves older files beside it as they were
        token = _token(folder, fields, special=bool(fields.get("special", False)))
        added.setdefault(token.content, (fields.get("id"), token))
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for text, (_, token) in added.items() if text in known and not token.special])  # whole, then
    new = [pair for text, pair in added.items() if text not in known]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number, _ in new):
        raise CheckpointError("an added token's id must be a whole number", path=folder)
    for number, token in sorted(new, key=lambda pair: pair[0]):
        tokenizer.add_tokens([token])
        given = tokenizer.token_to_id(token.content)
        if given != number:
            raise CheckpointError(
                f"the added token {token.content!r} must have the next id, {given}, got {number}", path=folder
            )
    return set(added)


def _of_several_vectors(added: set[str]) -> dict[str, str]:
    """The tokens that stand for more than themselves, and what for: "<cat> <cat>_1 <cat>_2"."""
    several = {}
    for token in added:
        vectors = [token]
        while f"{token}_{len(vectors)}" in added:
            vectors.append(f"{token}_{len(vectors)}")
        if len(vectors) > 1:
            several[token] = " ".join(vectors)
    return several


def _max_length(folder: Path, settings: dict[str, Any]) -> int:
    value = settings.get("model_max_length", MAX_LENGTH)
    if not isinstance(value, int | float) or not value >= 3:
        raise CheckpointError(f"model_max_length must be a number of at least 3, got {value!r}", path=folder)
    return MAX_LENGTH if value > NO_LIMIT else int(value)


def _bpe(folder: Path, *, unk_token: str) -> Tokenizer:
    vocab, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    try:
        if vocab.exists() and merges.exists():
            tokenizer = Tokenizer(
                BPE.from_file(str(vocab), str(merges), unk_token=unk_token, end_of_word_suffix="</w>", fuse_unk=False)
            )
        elif whole.exists():
            tokenizer = Tokenizer.from_file(str(whole))
            tokenizer.no_truncation()
            tokenizer.no_padding()
        else:
            raise CheckpointError("has neither vocab.json and merges.txt nor tokenizer.json", path=folder)
    except CheckpointError:
        raise
    except Exception as cause:  # the library raises nothing more special
        raise CheckpointError(f"is no tokenizer: {cause}", path=folder) from cause
    if not isinstance(tokenizer.model, BPE):
        raise CheckpointError(f"must hold a BPE tokenizer, got {type(tokenizer.model).__name__}", path=whole)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer
