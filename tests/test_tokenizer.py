"""The tokenizer against transformers' CLIPTokenizer, and what is refused."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

from mvshared.config import CLIPTextConfig
from mvshared.errors import CheckpointError, OptionError
from mvshared.tokenizer import CLIPTokenizer, load_tokenizer

FOLDER = Path(__file__).parent / "fixtures" / "tiny-mvdream" / "tokenizer"
COUNT = 2000
VERSION_4 = transformers.__version__.startswith("4.")
# Letters, marks that NFC joins, letters whose lower case is longer, joined emoji, digits that are no ASCII, control characters,
# spaces of all kinds, scripts without spaces, contractions, special tokens and what only looks like them.
PIECES = [
    *"abc ABC  xyz", *"éñüßİ\u0131\u017fKÅ", "A\u030a", "e\u0301\u0323", *"🙂🏽", "👩\u200d👩\u200d👧", *"!!!??..,,''\"",
    *"0129½²٣", *"漢字かな한국어", *"عربहिไทย", "\x00", "\x01", "\x1f", "\x7f", "\x85", "\u2028", "\u200b", "\u00a0", "\ufeff",
    "\t", "\r\n", "\ud7ff", "\U0010ffff", "'s", "'T", "'re", "'ve ", "'m", "'ll", "'d",
    "<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "<|", "|>", "</w>", "owl", "<owl>", "kåt", " <owl> ", "KÅT",
]  # fmt: skip


def texts() -> list[str]:
    """Seeded texts from nothing to far more than fits."""
    source = random.Random(0)
    fixed = ["", " ", "a", "!", "a red owl, 3d asset", "x" * 500, "owl " * 200, "🙂" * 100, "<|endoftext|>", "a<|endoftext|>b"]
    return fixed + ["".join(source.choices(PIECES, k=source.choice([1, 3, 10, 40, 120]))) for _ in range(COUNT - len(fixed))]


def token(content: str) -> dict[str, Any]:
    """A special token as in the folders of Stable Diffusion."""
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def variant(folder: Path, **files: Any) -> Path:
    """A copy of the folder with some JSON files replaced, or left out where None."""
    shutil.copytree(FOLDER, folder)
    for name, document in files.items():
        (folder / f"{name}.json").unlink(missing_ok=True)
        if document is not None:
            (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def stable_diffusion(pad_token: str) -> dict[str, Any]:
    start, end = token("<|startoftext|>"), token("<|endoftext|>")
    return {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad_token}


def of_transformers(folder: Path) -> Any:
    """Its tokenizer in Rust, which is version 5's CLIPTokenizer, too."""
    module: Any = transformers
    return module.CLIPTokenizerFast.from_pretrained(folder)


def one_file(folder: Path, *, added: Sequence[str] = ()) -> Path:
    """The folder as transformers saves it: one tokenizer.json."""
    tokenizer = of_transformers(FOLDER)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    for beside in ("vocab.json", "merges.txt"):  # which transformers before 5 saves, too
        (folder / beside).unlink(missing_ok=True)
    return folder


FOLDERS = {
    "as it is": lambda path: FOLDER,
    "Stable Diffusion 2.1": lambda path: variant(path, special_tokens_map=stable_diffusion("!")),
    "Stable Diffusion 1.5": lambda path: variant(path, special_tokens_map=stable_diffusion("<|endoftext|>")),
    "no settings": lambda path: variant(path, special_tokens_map=None, tokenizer_config=None),
    "one file": one_file,
    "added tokens": lambda path: variant(path, added_tokens={"<owl>": 525, "kåt": 526}),
    "added tokens of the vocabulary": lambda path: variant(
        path,
        vocab=json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8")) | {"<owl>": 525, "kåt": 526},
        added_tokens={"<owl>": 525, "kåt": 526},
    ),
    "one file with added tokens": lambda path: one_file(path, added=["<owl>", "kåt"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_token_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path / "tokenizer")
    oracle = of_transformers(folder)
    # Version 4 finds special tokens of a folder without their settings only as they are written.
    given = [text for text in texts() if not (VERSION_4 and "<|ENDOFTEXT|>" in text)]
    expected = oracle(given, padding="max_length", max_length=77, truncation=True, return_tensors="np")["input_ids"]
    tokenizer = CLIPTokenizer(folder)
    ids = tokenizer(given).ids
    assert ids.dtype == np.int64
    wrong = [text for text, own, other in zip(given, ids, expected, strict=True) if (own != other).any()]
    assert not wrong, f"{len(wrong)} of {len(given)}, such as {wrong[0]!a}"
    assert tokenizer.pad_token_id == oracle.pad_token_id


def test_what_does_not_fit_is_reported() -> None:
    tokenizer = CLIPTokenizer(FOLDER)
    tokens = tokenizer(["owl " * 74 + "small", "owl " * 75 + "small Owl", "owl"])
    assert tokens.cut == ("", "small Owl", "")
    assert tokens.ids.shape == (3, 77)
    assert (tokens.ids[:, 0] == tokenizer.bos_token_id).all()
    assert (tokens.ids[:2, -1] == tokenizer.eos_token_id).all()
    assert (tokens.ids[2, 3:] == tokenizer.pad_token_id).all()


def test_the_padding_is_the_folder_s_own(tmp_path: Path) -> None:
    assert CLIPTokenizer(FOLDER).pad_token_id == 0
    other = variant(tmp_path / "other", special_tokens_map=stable_diffusion("<|endoftext|>"))
    assert CLIPTokenizer(other).pad_token_id == CLIPTokenizer(other).eos_token_id != 0


def test_the_length_is_the_folder_s_own(tmp_path: Path) -> None:
    for length, expected in ((5, 5), (1e30, 77)):
        folder = variant(tmp_path / str(length), tokenizer_config={"model_max_length": length})
        assert CLIPTokenizer(folder)(["owl " * 99]).ids.shape == (1, expected)


def test_lone_surrogates_are_no_characters() -> None:
    with pytest.raises(OptionError, match=r"prompt must be a text of characters.*is the terminal's locale UTF-8"):
        CLIPTokenizer(FOLDER)(["owl \udcff"])


def test_what_is_no_text_is_refused() -> None:
    wrong: Any = [b"owl"]
    with pytest.raises(OptionError, match="prompt must be a text, got b'owl'"):
        CLIPTokenizer(FOLDER)(wrong)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab": None}, "neither vocab.json and merges.txt nor tokenizer.json"),
        ({"vocab": {"a": "b"}}, "is no tokenizer"),
        ({"vocab": {"a": 0, "<|endoftext|>": 1}}, "out of vocabulary"),
        ({"vocab": None, "tokenizer": {"version": "1.0"}}, "is no tokenizer"),
        ({"special_tokens_map": {"pad_token": "[PAD]"}}, r"the pad_token '\[PAD\]' is not in the vocabulary"),
        ({"special_tokens_map": {"pad_token": {"text": "!"}}}, "must be a text or an object with content"),
        ({"special_tokens_map": {"pad_token": token("!") | {"lstrip": 1}}}, "must be a text or an object with content"),
        ({"special_tokens_map": ["!"]}, "must hold a JSON object"),
        ({"added_tokens": {"<owl>": 527}}, "the added token '<owl>' must have the next id, 525, got 527"),
        ({"added_tokens": {"<owl>": "525"}}, "an added token's id must be a whole number"),
        ({"tokenizer_config": {"added_tokens_decoder": ["<owl>"]}}, "added_tokens_decoder must map ids to objects"),
        ({"tokenizer_config": {"model_max_length": 2}}, "model_max_length must be a number of at least 3, got 2"),
        ({"tokenizer_config": {"model_max_length": "77"}}, "model_max_length must be a number"),
    ],
)
def test_broken_folders_are_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        CLIPTokenizer(variant(tmp_path / "broken", **files))


def test_tokens_added_by_the_config_are_those_of_the_older_file(tmp_path: Path) -> None:
    """In one folder of plain files; transformers' own class takes them from there where it saved them as one file."""
    older = CLIPTokenizer(variant(tmp_path / "older", added_tokens={"<owl>": 525}))
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    decoder = {"525": {"content": "<owl>", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}}
    newer = CLIPTokenizer(variant(tmp_path / "newer", tokenizer_config=config | {"added_tokens_decoder": decoder}))
    assert newer.largest_id == older.largest_id == 525
    np.testing.assert_array_equal(newer(texts()).ids, older(texts()).ids)


def test_a_tokenizer_with_tokens_that_the_text_encoder_does_not_know_is_refused(tmp_path: Path) -> None:
    text = CLIPTextConfig(vocab_size=525, eos_token_id=524)
    assert load_tokenizer(FOLDER.parent, text).largest_id == 524
    variant(tmp_path / "tokenizer", added_tokens={"<owl>": 525})
    with pytest.raises(CheckpointError, match="has token ids up to 525, the text encoder knows 525 tokens"):
        load_tokenizer(tmp_path, text)


CONCEPTS = ("<cat>", "<cat>_1", "<cat>_2", "<dog>", "mat_1")
CONCEPT_TEXTS = ("a <cat> on a mat", "<dog>", "", "<cat> and <cat>, <dog>s", "an owl", "<cat>_1 alone", "x" * 99 + " <cat>")


@pytest.mark.parametrize("beside", [(), ("vocab.json", "merges.txt")])
def test_concepts_are_expanded_as_diffusers_expands_them(beside: tuple[str, ...], tmp_path: Path) -> None:
    folder = one_file(tmp_path / "tokenizer", added=CONCEPTS)
    for name in beside:  # which transformers leaves there, and reads no more
        shutil.copy(FOLDER / name, folder)
    theirs, ours = of_transformers(folder), CLIPTokenizer(folder)
    for text in CONCEPT_TEXTS:
        expanded = TextualInversionLoaderMixin().maybe_convert_prompt(text, theirs)
        expected = theirs(expanded, padding="max_length", truncation=True, max_length=ours.max_length).input_ids
        assert ours([text]).ids.tolist() == [expected], text
