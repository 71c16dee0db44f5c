"""Safetensors headers: every fault has its name; of 20,000 mutated files none is accepted that is no valid one."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.numpy import save

from mvshared.conversion.raw import read_safetensors
from mvshared.errors import CheckpointError, TensorMismatchError
from mvshared.weights import MAX_HEADER_BYTES, read_dequantized, read_header, read_weights

FILES, SEED = 20_000, 0
TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"1e9", b"null", b"true", b'"F32"', b'"F16"', b'"U8"', b"0", b"9" * 30,
    b"\\u0000", b"\xff", b" ", b"NaN", b"1.5", b'"shape"', b'"dtype"', b'"data_offsets"', b'"a.weight"', b"__metadata__",
]  # fmt: skip


def original() -> bytes:
    rng = np.random.default_rng(0)
    return save(
        {
            "a.weight": rng.standard_normal((3, 4), dtype=np.float32),
            "a.bias": rng.standard_normal(3).astype(np.float16),
            "empty": np.zeros((0, 7), np.float32),
            "scalar": np.array(2.5, np.float32),
            "ids": np.arange(4),
        },
        metadata={"format": "pt"},
    )


def header_of(data: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def with_header(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    header = len(header_of(data)[0])
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(8 + header)] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 64))


def other_length(data: bytes, rng: random.Random) -> bytes:
    length = rng.choice([0, 1, rng.randrange(len(data) + 9), 2**31, 2**63 - 1, 2**64 - 1])
    return length.to_bytes(8, "little") + data[8:]


def splice_token(data: bytes, rng: random.Random) -> bytes:
    header, rest = header_of(data)
    start = rng.randrange(len(header))
    return with_header(header[:start] + rng.choice(TOKENS) + header[start + rng.randint(0, 8) :], rest)


def swap_pieces(data: bytes, rng: random.Random) -> bytes:
    header, rest = header_of(data)
    a, b, c = sorted(rng.randrange(len(header)) for _ in range(3))
    return with_header(header[:a] + header[b:c] + header[a:b] + header[c:], rest)


def change_entry(data: bytes, rng: random.Random) -> bytes:
    """A well-formed header that says something else."""
    header, rest = header_of(data)
    entries = json.loads(header)
    name = rng.choice([key for key in entries if key != "__metadata__"])
    entry = entries[name]
    match rng.randrange(9):
        case 0:
            entry["shape"] = [rng.choice([-1, 0, 1, 3, 2**40, 2**63, 1.0, True, "3", None]) for _ in range(rng.randint(0, 4))]
        case 1:
            entry["data_offsets"] = [rng.choice([-8, 0, 4, 8, 48, 60, len(rest), 2**63, 0.0]) for _ in range(rng.randint(0, 3))]
        case 2:
            entry["dtype"] = rng.choice(["F32", "F16", "BF16", "U8", "BOOL", "F64", "I64", "F128", "", 3, None, "F8_E4M3"])
        case 3:
            shift = rng.choice([-8, -4, 4, 8])
            entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
        case 4:
            del entry[rng.choice(list(entry))]
        case 5:
            entry[rng.choice(["x", "offset", "Shape"])] = 1
        case 6:
            entries["__metadata__"] = rng.choice([{}, {"a": "b"}, {"a": 1}, [], None, "x", {"a": None}])
        case 7:
            entries[rng.choice(["new", "a.bias", ""])] = dict(entry)
        case _:
            del entries[name]
    return with_header(json.dumps(entries).encode() + b" " * rng.randint(0, 8), rest)


def twice(data: bytes, rng: random.Random) -> bytes:
    """A name that stands twice, with what it had or something else."""
    header, rest = header_of(data)
    entries = json.loads(header)
    name = rng.choice(list(entries))
    again = json.dumps({name: entries[rng.choice(list(entries))]})[1:-1].encode()
    return with_header(header.rstrip()[:-1] + b"," + again + b"}", rest)


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bits, truncate, append, other_length, splice_token, swap_pieces, change_entry, change_entry, twice,
]  # fmt: skip


def reference(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in safetensors.deserialize(data)}


def test_the_original_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(original())
    assert len(read_header(tmp_path / "a.safetensors").tensors) == len(reference(original())) == 5


def test_no_mutated_file_is_accepted_unless_it_is_a_valid_one(tmp_path: Path) -> None:
    rng, data, path = random.Random(SEED), original(), tmp_path / "a.safetensors"
    outcomes: Counter[str] = Counter()
    for number in range(FILES):
        mutate = MUTATIONS[number % len(MUTATIONS)]
        mutated = mutate(data, rng)
        path.write_bytes(mutated)
        try:
            header = read_header(path)
        except CheckpointError as refused:
            assert "\n" not in str(refused) and "a.safetensors" in str(refused)
            outcomes[f"{mutate.__name__} refused"] += 1
            continue
        outcomes[f"{mutate.__name__} accepted"] += 1
        expected = reference(mutated)  # raises where the library refuses
        found = read_safetensors(path)
        assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
            name: (dtype, shape) for name, (dtype, shape, _) in expected.items()
        }, mutated[:300]
        for name, (_, _, content) in expected.items():
            assert found[name].read().tobytes() == content
    refused = sum(count for outcome, count in outcomes.items() if outcome.endswith("refused"))
    assert sum(outcomes.values()) == FILES
    assert 0.5 * FILES < refused < FILES, outcomes  # some mutations make another valid file: a name, a number in __metadata__
    for mutate in (truncate, append, twice):
        assert outcomes[f"{mutate.__name__} accepted"] == 0


@pytest.mark.parametrize("depth", [100, 100_000])
def test_nesting_beyond_all_bounds_is_refused(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(b'{"a":' + b"[" * depth + b"]" * depth + b"}", b""))
    with pytest.raises(CheckpointError, match="malformed header"):
        read_header(path)


def entry(start: int = 0, end: int = 8, *, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no safetensors file: 0 bytes, at least 8 are needed"),
    "short": (b"\x08\0\0", "is no safetensors file: 3 bytes"),
    "header beyond the end": ((99).to_bytes(8, "little") + b"{}", "its header should have 99 bytes, 2 follow"),
    "header beyond the limit": ((2**62).to_bytes(8, "little") + b"{}", "its header should have 4611686018427387904 bytes"),
    "no JSON": (with_header(b"{]", b""), "has a malformed header: Expecting property name"),
    "no UTF-8": (with_header(b'{"\xff":1}', b""), "has a malformed header: 'utf-8' codec"),
    "no object": (with_header(b"[1]", b""), "has a malformed header: it is no JSON object"),
    "space before": (with_header(b" {}", b""), "has a malformed header: it is no JSON object"),
    "twice": (with_header(b'{"a":1,"a":2}', b""), "'a' stands twice"),
    "metadata": (with_header(b'{"__metadata__":{"a":1}}', b""), "__metadata__ must map names to strings"),
}
ENTRIES: dict[str, tuple[dict[str, object], int, str]] = {
    "no fields": ({"a": {"dtype": "F32"}}, 0, "'a' must have dtype, shape and data_offsets, and nothing else"),
    "one field more": ({"a": entry() | {"x": 1}}, 8, "and nothing else"),
    "unknown dtype": ({"a": entry(dtype="F31")}, 8, "'a' has the unknown dtype 'F31'"),
    "dtype no text": ({"a": entry(dtype=["F32"])}, 8, "has the unknown dtype"),
    "negative size": ({"a": entry(shape=[-2])}, 8, r"'a' has the shape \[-2\]"),
    "size of true": ({"a": entry(shape=[True])}, 8, r"'a' has the shape \[True\]"),
    "offsets turned round": ({"a": entry(8, 0)}, 8, r"'a' needs 8 bytes for F32 \[2\], its data_offsets hold -8"),
    "offsets for another shape": ({"a": entry(shape=[3])}, 8, r"'a' needs 12 bytes for F32 \[3\], its data_offsets hold 8"),
    "a product beyond all bounds": ({"a": entry(shape=[2**52, 2**52])}, 8, "'a' needs 81129638414606681695789005144064 bytes"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps the tensor before it"),
    "the same place": ({"a": entry(), "b": entry()}, 8, "'b' overlaps the tensor before it"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "'b' leaves a gap before it"),
    "gap at the front": ({"a": entry(4, 12)}, 12, "'a' leaves a gap before it"),
    "truncated": ({"a": entry()}, 7, "is truncated or has a tail: its tensors need 8 bytes, it holds 7"),
    "tail": ({"a": entry()}, 9, "is truncated or has a tail: its tensors need 8 bytes, it holds 9"),
}
FAULTS |= {name: (with_header(json.dumps(given).encode(), bytes(size)), why) for name, (given, size, why) in ENTRIES.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(name: str, tmp_path: Path) -> None:
    content, message = FAULTS[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert caught.value.path == path


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file or directory"):
        read_header(tmp_path / "a.safetensors")


def test_a_header_larger_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER_BYTES + 100)  # of zeros that take no room
    with pytest.raises(CheckpointError, match="its header should have 100000001 bytes"):
        read_header(tmp_path / "a.safetensors")


def test_tensors_without_numbers_may_stand_anywhere_between_others(tmp_path: Path) -> None:
    entries = {"full": (4, 0, 16), "before": (0, 0, 0), "between": (0, 16, 16), "more": (1, 16, 20)}
    header = {name: {"dtype": "F32", "shape": [n], "data_offsets": [first, end]} for name, (n, first, end) in entries.items()}
    (tmp_path / "a.safetensors").write_bytes(with_header(json.dumps(header).encode(), bytes(20)))
    assert read_header(tmp_path / "a.safetensors").tensors.keys() == entries.keys()


# What is read


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_of_every_dtype_are_read_as_they_are(tmp_path: Path, dtype: str) -> None:
    stored = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    safetensors.torch.save_file({"a.weight": stored}, tmp_path / "a.safetensors")
    for read in (read_weights, read_dequantized):
        found = read([tmp_path / "a.safetensors"], {"a.weight": (5, 7)})["a.weight"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, stored.float().numpy())


def test_linear_layers_may_be_stored_as_convolutions_in_a_vae_s_attention_alone(tmp_path: Path) -> None:
    name, other = "decoder.mid_block.attentions.0.to_q.weight", "decoder.mid_block.resnets.0.to_q.weight"
    for each in (name, other):
        safetensors.torch.save_file({each: torch.ones(4, 3, 1, 1)}, tmp_path / f"{each}.safetensors")
    for read in (read_weights, read_dequantized):
        assert read([tmp_path / f"{name}.safetensors"], {name: (4, 3)})[name].shape == (4, 3)
        with pytest.raises(TensorMismatchError, match=r"expected \[4, 3\], got \[4, 3, 1, 1\]"):
            read([tmp_path / f"{other}.safetensors"], {other: (4, 3)})
