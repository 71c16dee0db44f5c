"""Wrong calls of the command line: one line that says what to do, the documented exit code, and nothing written.

Every call runs in a folder that holds all kinds of good and damaged files, and a finished run; not a byte of it may change.
"""

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import TINY_MODEL, write_tiny_model
from PIL import Image
from safetensors.numpy import load_file, save_file

import mvshared.backend
from mvshared.camera import orbit
from mvshared.checkpoint import WEIGHT_FILE
from mvshared.cli import run
from mvshared.export import transforms
from mvshared.heads.dataset import render_dataset

GENERATE = "generate picture.png --model tiny -o new"
UNET = f"unet/{WEIGHT_FILE}"


class Call(NamedTuple):
    """A wrong command line, its exit code, and parts of the line that it must print."""

    line: str
    code: int
    says: tuple[str, ...]


def calls(code: int, *rows: tuple[str, str]) -> list[Call]:
    """Calls of one exit code; the parts of a message have ` | ` between them."""
    return [Call(line, code, tuple(says.split(" | "))) for line, says in rows]


CALLS = [
    *calls(
        2,
        ("generat", "No such command | mvmlx --help"),
        ("--verbose", "No such option | mvmlx --help"),
        ("generate --model tiny", "image | a picture to start from | mvmlx generate PICTURE"),
        (f"{GENERATE} --view 4", "No such option | --view"),
        (f"{GENERATE} --views", "--views | requires an argument"),
        (f"{GENERATE} --views 0", "views | 1 to 64 | 0"),
        (f"{GENERATE} --views -1", "views | 1 to 64 | -1"),
        (f"{GENERATE} --views 65", "views | 1 to 64 | 65"),
        (f"{GENERATE} --views four", "--views | four"),
        (f"{GENERATE} --views 2.5", "--views | 2.5"),
        (f"{GENERATE} --azimuths ''", "azimuths | 0,90,180"),
        (f"{GENERATE} --azimuths 0,,90", "azimuths | 0,90,180"),
        (f"{GENERATE} --azimuths left", "azimuths | left | 0,90,180"),
        (f"{GENERATE} --views 2 --azimuths 0,90", "--azimuths | left out where --views is given"),
        (f"{GENERATE} --cameras cameras/good.json --views 2", "--cameras | left out where --views is given"),
        (f"{GENERATE} --cameras cameras/good.json --elevation 10", "--elevation | left out where --cameras is given"),
        (f"{GENERATE} --steps 0", "steps | 1 to 1000 | 0"),
        (f"{GENERATE} --steps 1001", "steps | 1 to 1000 | 1001"),
        (f"{GENERATE} --steps 1.5", "--steps | 1.5"),
        (f"{GENERATE} --guidance 0.5", "guidance | 1 to 20 | 0.5"),
        (f"{GENERATE} --guidance 21", "guidance | 1 to 20 | 21"),
        (f"{GENERATE} --guidance nan", "guidance | 1 to 20 | nan"),
        (f"{GENERATE} --guidance-image 0.5", "--guidance-image | 1 to 20 | 0.5"),
        (f"{GENERATE} --guidance-image 21", "--guidance-image | 1 to 20 | 21"),
        (f"{GENERATE} --guidance-text nan", "--guidance-text | 1 to 20 | nan"),
        (f"{GENERATE} --guidance-text 3", "--guidance-text | left out: this model takes no prompt | 3"),
        (f"{GENERATE} --guidance-normals 0", "--guidance-normals | 1 to 20 | 0"),
        (f"{GENERATE} --guidance-normals 3", "--guidance-normals | left out: no normal maps given | 3"),
        (f"{GENERATE} --guidance-image strong", "--guidance-image | strong"),
        ("generate picture.png --model without-normals -o new --guidance-normals 3", "--guidance-normals | no normal maps"),
        (f"{GENERATE} --guidance-interval 0.5", "--guidance-interval | two numbers from 0 to 1 | 0.5"),
        (f"{GENERATE} --guidance-interval 0,0.5,1", "--guidance-interval | two numbers from 0 to 1"),
        (f"{GENERATE} --guidance-interval 0,2", "--guidance-interval | 0 to 1 | 2"),
        (f"{GENERATE} --guidance-interval -0.1,1", "--guidance-interval | 0 to 1 | -0.1"),
        (f"{GENERATE} --guidance-interval 0,nan", "--guidance-interval | 0 to 1 | nan"),
        (f"{GENERATE} --guidance-interval 0.8,0.2", "--guidance-interval | a start that is not after the end | 0.8"),
        (f"{GENERATE} --guidance-interval early", "guidance-interval | early"),
        (f"{GENERATE} --guidance-rescale 1.1", "--guidance-rescale | 0 to 1 | 1.1"),
        (f"{GENERATE} --guidance-rescale nan", "--guidance-rescale | 0 to 1 | nan"),
        (f"{GENERATE} --reference-scale 2.5", "--reference-scale | 0 to 2 | 2.5"),
        (f"{GENERATE} --reference-scale -1", "--reference-scale | 0 to 2 | -1"),
        (f"{GENERATE} --image-scale 0.5", "--image-scale | 1: this model has no image tokens | 0.5"),
        (f"{GENERATE} --eta -0.1", "--eta | 0 to 1 | -0.1"),
        (f"{GENERATE} --eta 2", "--eta | 0 to 1 | 2"),
        (f"{GENERATE} --prompt owl", "--prompt | left out: this model takes no text | owl"),
        (f"{GENERATE} --negative-prompt dull", "--negative-prompt | left out | dull"),
        (f"{GENERATE} --image-scale 3", "--image-scale | 0 to 2 | 3"),
        ("generate --model tiny --prompt owl -o new", "image | 1 to 8 pictures | 0"),
        (f"generate {'picture.png ' * 9} --model tiny -o new", "image | 1 to 8 pictures | 9"),
        (f"{GENERATE} --scheduler heun", "--scheduler | ddim, euler, | heun"),
        (f"{GENERATE} --kv-pooling 3", "--kv-pooling | from 1 to 2 | 3"),
        (f"{GENERATE} --guidance-every 0", "--guidance-every | from 1 to 1000 | 0"),
        (f"{GENERATE} --spacing uniform", "--spacing | karras | uniform"),
        (f"{GENERATE} --scheduler unipc --eta 0.5", "--eta | 0 with unipc | 0.5"),
        (f"{GENERATE} --seed -1", "--seed | 0 to | -1"),
        (f"{GENERATE} --seed 18446744073709551616", "--seed | 0 to"),
        (f"{GENERATE} --seed 3 --seed 3", "--seed | different for every result"),
        (f"{GENERATE} --seed 1 --seed -1", "--seed | 0 to | -1"),
        ("convert tiny new --shard-gb nan", "--shard-gb | from 0 to | nan"),
        ("benchmark step --views nan", "views | whole numbers | nan"),
        ("benchmark step --views inf", "views | whole numbers | inf"),
        (f"{GENERATE} --seed lucky", "--seed | lucky"),
        (f"{GENERATE} --size 0", "--size | 16 to 2048 | 0"),
        (f"{GENERATE} --size 99999", "--size | 16 to 2048 | 99999"),
        (f"{GENERATE} --size 36", "--size | multiple of 8 | 36"),
        (f"{GENERATE} --dtype float64", "--dtype | float32, float16 or bfloat16 | float64"),
        (f"{GENERATE} --dtype int8", "--dtype | float32, float16 or bfloat16 | int8"),
        (f"{GENERATE} --backend jax", "--backend | auto, mlx or torch | jax"),
        (f"{GENERATE} --normals maps/none", "--normals | one map per view (2) | 0 maps"),
        (f"{GENERATE} --normals maps/one", "--normals | one map per view (2) | 1 maps"),
        (f"{GENERATE} --normals maps/two/0.png", "--normals | one map per view (2) | 1 maps"),
        (f"{GENERATE} --normals maps/two --normal-space tangent", "--normal-space | camera or world | tangent"),
        (f"{GENERATE} --normal-space world", "--normal-space | left out where no normals are given"),
        (f"{GENERATE} --normals maps/posed --normal-space world", "--normal-space | camera, as the maps' transforms.json says"),
        (f"{GENERATE} --elevation 91", "--elevation | 90"),
        (f"{GENERATE} --elevation nan", "--elevation"),
        (f"{GENERATE} --upscale nearest", "--upscale | none, bilinear, lanczos, sd-x2 | nearest"),
        ("generate picture.png --model tiny -o -", "--output | a folder: views do not go to standard output"),
        ("generate picture.png --model without-normals -o new --normals maps/two", "normals | takes no normal maps"),
        ("generate picture.png --config done --model tiny -o new", "left out where --config is given"),
        ("generate --config done --steps 3 -o new", "--steps | left out where --config is given"),
        ("render-heads new --identities abc", "abc | 0:64"),
        ("render-heads new --identities 5:5", "5:5 | 0:64"),
        ("render-heads new --identities 9:3", "9:3 | 0:64"),
        ("render-heads new --identities -1:4", "-1:4 | 0:64"),
        ("render-heads new --identities 0:2 --views 1", "views | at least 2 | 1"),
        ("render-heads new --identities 0:2 --size 0", "size | 0"),
        ("render-heads new --identities 0:2 --size 1000000", "size | 1000000"),
        ("render-heads new --identities 0:2 --processes 0", "processes | 0"),
        ("render-heads new --identities 0:2 --processes -2", "processes | -2"),
        ("evaluate --model tiny --identities 64", "64 | 0:64"),
        ("evaluate --model tiny --identities 0:1 --steps 0", "steps | 1 to 1000 | 0"),
        ("evaluate --model tiny --identities 0:1 --guidance 0", "guidance | 1 to 20 | 0"),
        ("evaluate --model tiny --identities 0:1 --seed -3", "seed | -3"),
        ("evaluate done --steps 3", "steps | left out with FOLDER"),
        ("evaluate --model without-normals --identities 0:1 --normals", "normals | takes no normal maps"),
        ("train", "Missing option | --output"),
        ("train -o new", "config | --family"),
        ("train configs/good.toml", "Missing option | --output"),
    ),
    *calls(
        3,
        ("generate gone.png --model tiny -o new", "gone.png | no such file"),
        (f"{GENERATE} second.png", "second.png | no such file"),
        ("generate pictures --model tiny -o new", "pictures | is a folder"),
        ("generate pictures/empty.png --model tiny -o new", "empty.png | is empty"),
        ("generate pictures/truncated.png --model tiny -o new", "truncated.png | cannot be decoded | damaged"),
        ("generate pictures/truncated.jpg --model tiny -o new", "truncated.jpg | cannot be decoded | damaged"),
        ("generate pictures/text.png --model tiny -o new", "text.png | is no picture | PNG, JPEG"),
        ("generate pictures/huge.png --model tiny -o new", "huge.png | 100,000,000 pixels | smaller"),
        ("generate pictures/clear.png --model tiny -o new", "pictures/clear.png: the picture shows nothing | transparent"),
        (f"{GENERATE} --normals gone", "gone"),
        (f"{GENERATE} --normals maps/bad", "is no picture"),
        (f"{GENERATE} --normals maps/two --normals maps/two", "is a folder"),
        (f"{GENERATE} --normals maps/two --size 64", "view 0 has 32 x 32 pixels, less than the views' 64 | render"),
        (f"{GENERATE} --normals maps/wide", "square | 32 x 24"),
        (f"{GENERATE} --normals maps/mixed", "1.png | 64 x 64 pixels | 32 x 32"),
        (f"{GENERATE} --normals maps/photographs", "photographs | no unit vectors | photograph"),
        (f"{GENERATE} --normals maps/clear", "shows no surface"),
        (f"{GENERATE} --normals maps/behind", "100% of the surface in the normal map of view 0 faces away"),
    ),
    *calls(
        4,
        (f"{GENERATE} --azimuths 0,nan", "azimuth"),
        (f"{GENERATE} --azimuths inf", "azimuth"),
        (f"{GENERATE} --normals maps/two --normal-space world", "camera 1 | faces away | --normal-space camera"),
        (
            f"{GENERATE} --normals maps/posed --azimuths 0,120",
            "camera 1 | 30.0 degrees | leave --views, --azimuths, --elevation and",
        ),
    ),
    *calls(
        5,
        ("generate picture.png --model dmo -o new", "no such model | demo | dmo"),
        ("generate picture.png --model pictures -o new", "pictures | model_index.json is missing"),
        ("generate picture.png --model broken/index -o new", "model_index.json | not a JSON file"),
        ("generate picture.png --model broken/version -o new", "format_version must be 1 | 7"),
        ("generate picture.png --model broken/type -o new", "in_channels must be a whole number | eight"),
        ("generate picture.png --model broken/unknown -o new", "unknown field | dropout | allowed are"),
        ("generate picture.png --model broken/groups -o new", "norm_num_groups | 0"),
        ("generate picture.png --model broken/negative -o new", "block_out_channels | -32"),
        ("generate picture.png --model broken/betas -o new", "beta"),
        ("generate picture.png --model broken/no-weights -o new", "weight file is missing"),
        ("generate picture.png --model broken/truncated -o new", "truncated | copy or download it again"),
        ("generate picture.png --model broken/text -o new", "no safetensors file"),
        ("generate picture.png --model broken/missing -o new", "1 missing: conv_in.bias"),
        ("generate picture.png --model broken/extra -o new", "1 unexpected: more"),
        ("generate picture.png --model broken/shape -o new", "1 mis-shaped: conv_in.bias"),
        ("generate picture.png --model broken/integers -o new", "conv_in.bias | F16, BF16, F32 | I32"),
        ("evaluate --model dmo", "no such model | demo | dmo"),
        ("train configs/no-vae.toml -o new", "weight file is missing"),
        ("generate --config runs/other-weights.json -o new", "weights | changed"),
        ("generate --config runs/no-model.json -o new", "no such model"),
    ),
    *calls(
        6,
        (f"{GENERATE} --backend torch --device cuda:99", "cuda:99"),
        (f"{GENERATE} --backend torch --device gpu", "gpu"),
        (f"{GENERATE} --backend torch --device toaster", "toaster"),
        (f"{GENERATE} --backend mlx --device cuda", "cuda"),
        ("evaluate --model tiny --backend mlx --device toaster", "toaster"),
        ("train configs/good.toml -o new --device toaster", "toaster"),
    ),
    *calls(
        7,
        ("generate picture.png --model tiny -o done", "done | finished run | --force"),
        ("generate picture.png --model tiny -o picture.png", "picture.png | is a file | another folder"),
        ("generate picture.png --model tiny -o picture.png/deeper", "picture.png | is a file | another folder"),
        ("generate picture.png --model tiny -o mine", "view_000.png | no unfinished run"),
        (f"generate picture.png --model tiny -o {'x' * 300}", "File name too long"),
        ("generate picture.png --model tiny -o new/a --stepwise picture.png/deeper", "picture.png | is a file"),
        (f"{GENERATE} --stepwise picture.png", "picture.png | is a file"),
        ("evaluate --model tiny --identities 0:1 -o picture.png", "picture.png | is a file"),
        ("render-heads picture.png --identities 0:2", "picture.png | is a file"),
        ("train configs/good.toml -o picture.png", "picture.png"),
        ("train configs/good.toml -o mine", "mine | not empty | new folder"),
        ("train configs/other.toml -o trained", "trained | batch_size | new folder"),
        ("train configs/fewer.toml -o trained", "trained | 2 steps, 1 were asked for"),
    ),
    *calls(
        8,
        (f"{GENERATE} --cameras gone.json", "gone.json | no such file"),
        (f"{GENERATE} --normals maps/damaged", "damaged/transforms.json | not a JSON file"),
        (f"{GENERATE} --cameras cameras/text.json", "text.json | not a JSON file"),
        (f"{GENERATE} --cameras cameras/keys.json", "keys.json | holds no cameras"),
        (f"{GENERATE} --cameras cameras/none.json", "none.json"),
        (f"{GENERATE} --cameras cameras/shape.json", "shape.json"),
        (f"{GENERATE} --cameras cameras/nan.json", "nan.json | finite"),
        (f"{GENERATE} --cameras cameras/scaled.json", "scaled.json | not orthonormal | remove scale"),
        (f"{GENERATE} --cameras cameras/mirrored.json", "mirrored.json | reflection"),
        (f"{GENERATE} --cameras cameras/words.json", "words.json"),
        ("generate --config gone.json -o new", "gone.json | no such file"),
        ("generate --config pictures/text.png -o new", "not a JSON file"),
        ("generate --config cameras/good.json -o new", "no metadata of a run"),
        ("generate --config runs/version.json -o new", "version must be 1 | 99"),
        ("generate --config runs/unknown.json -o new", "unknown parameters: sampler"),
        ("generate --config runs/missing.json -o new", "missing | seed"),
        ("generate --config runs/wrong.json -o new", "steps | many"),
        ("train gone.toml -o new", "gone.toml | No such file"),
        ("train configs/syntax.toml -o new", "no valid TOML"),
        ("train configs/unknown.toml -o new", "unknown field | momentum"),
        ("train configs/type.toml -o new", "steps must be a whole number | many"),
        ("train configs/range.toml -o new", "learning_rate must be above 0"),
        ("train configs/stage.toml -o new", "stage | decoder"),
    ),
    *calls(
        9,
        ("evaluate gone -o new", "gone: no such folder"),
        ("evaluate mine -o new", "transforms.json: no such file"),
        ("train configs/no-data.toml -o new", "gone: no such folder | render-heads"),
        ("train configs/bad-data.toml -o new", "transforms.json"),
    ),
    *calls(10, ("generate picture.png --model broken/nan -o new", "not finite")),
]

DONE = ["generate", "picture.png", "--model", "tiny", "-o", "done", "--backend", "torch", "--device", "cpu"]
TRAINING = """
stage = "vae"
steps = 2
batch_size = 1
[data]
folder = "heads"
[vae]
block_out_channels = [8, 8]
layers_per_block = 1
norm_num_groups = 4
"""


def picture_bytes(kind: str) -> bytes:
    encoded = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(encoded, kind)
    return encoded.getvalue()


def break_model(source: Path, target: Path, file: str, change: Callable[[Any], Any]) -> None:
    """A copy of a checkpoint with a changed JSON document or changed tensors."""
    shutil.copytree(source, target)
    path = target / file
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change(load_file(path)), path)


def write_pictures(world: Path) -> None:
    folder = world / "pictures"
    folder.mkdir()
    for name, content in {
        "empty.png": b"",
        "truncated.png": picture_bytes("PNG")[:600],
        "truncated.jpg": picture_bytes("JPEG")[:600],
        "text.png": b"this is a letter, not a picture",
    }.items():
        (folder / name).write_bytes(content)
    Image.new("1", (20_000, 6_000)).save(folder / "huge.png")
    Image.new("RGBA", (64, 64), (200, 10, 10, 0)).save(folder / "clear.png")
    write_maps(world / "maps")
    (world / "mine").mkdir()
    shutil.copy(world / "picture.png", world / "mine" / "view_000.png")


def write_maps(maps: Path) -> None:
    """Folders of two normal maps, most of them wrong."""
    facing, behind, sizes = (128, 128, 255), (128, 128, 1), [(32, 32), (32, 32)]
    kinds: dict[str, tuple[tuple[int, ...], list[tuple[int, int]]]] = {
        "none": (facing, []),
        "one": (facing, sizes[:1]),
        "wide": (facing, [(32, 24), (32, 24)]),
        "mixed": (facing, [(32, 32), (64, 64)]),
        "photographs": ((200, 180, 160), sizes),
        "clear": ((*facing, 0), sizes),
        "behind": (behind, sizes),
    }
    for name, (color, pictures) in (kinds | dict.fromkeys(("two", "bad", "posed", "damaged"), (facing, sizes))).items():
        (maps / name).mkdir(parents=True)
        for index, size in enumerate(pictures):
            Image.new("RGBA" if len(color) == 4 else "RGB", size, color).save(maps / name / f"{index}.png")
    (maps / "bad" / "1.png").write_text("no picture")
    document = transforms(orbit([0, 90], 0), width_px=32, height_px=32, fov_deg=49.1, file_names=["0.png", "1.png"])
    (maps / "posed" / "transforms.json").write_text(json.dumps(document | {"normal_space": "camera"}))
    (maps / "damaged" / "transforms.json").write_text("{")


def write_models(world: Path) -> None:
    tiny = write_tiny_model(world / "tiny")
    write_tiny_model(world / "without-normals", replace(TINY_MODEL, unet=replace(TINY_MODEL.unet, in_channels=4)))
    bias = "conv_in.bias"
    changes: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "version": ("model_index.json", lambda index: index | {"format_version": 7}),
        "type": ("unet/config.json", lambda config: config | {"in_channels": "eight"}),
        "unknown": ("unet/config.json", lambda config: config | {"dropout": 0.1}),
        "groups": ("unet/config.json", lambda config: config | {"norm_num_groups": 0}),
        "negative": ("unet/config.json", lambda config: config | {"block_out_channels": [-32, 64]}),
        "betas": ("scheduler/scheduler_config.json", lambda config: config | {"beta_end": 2.0}),
        "missing": (UNET, lambda tensors: {name: value for name, value in tensors.items() if name != bias}),
        "extra": (UNET, lambda tensors: tensors | {"more": np.zeros(3, np.float32)}),
        "shape": (UNET, lambda tensors: tensors | {bias: np.zeros(5, np.float32)}),
        "integers": (UNET, lambda tensors: tensors | {bias: np.zeros(tensors[bias].shape, np.int32)}),
        "nan": (UNET, lambda tensors: tensors | {bias: np.full(tensors[bias].shape, np.nan, np.float32)}),
    }
    for name, (file, change) in changes.items():
        break_model(tiny, world / "broken" / name, file, change)
    for name in ("index", "no-weights", "truncated", "text"):
        shutil.copytree(tiny, world / "broken" / name)
    (world / "broken" / "index" / "model_index.json").write_text("{")
    (world / "broken" / "no-weights" / UNET).unlink()
    (world / "broken" / "text" / UNET).write_text("weights")
    with (world / "broken" / "truncated" / UNET).open("r+b") as file:
        file.truncate(20_000)


def write_cameras(world: Path) -> None:
    folder = world / "cameras"
    folder.mkdir()
    poses = orbit([0, 90], 10, radius=1.0)
    broken = {
        "nan": np.where(np.arange(16).reshape(4, 4) == 3, np.nan, poses[0]),
        "scaled": poses[0] * np.array([2, 2, 2, 1], np.float32),
        "mirrored": poses[0] * np.array([-1, 1, 1, 1], np.float32),
    }
    documents: dict[str, Any] = {name: {"cameras": [matrix.tolist()]} for name, matrix in broken.items()}
    documents |= {
        "good": {"cameras": poses.tolist()},
        "keys": {"poses": poses.tolist()},
        "none": [],
        "shape": [[1, 2, 3]],
        "words": ["front", "left"],
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    (folder / "text.json").write_text("front, left")


def write_runs(world: Path) -> None:
    """Edited metadata of the finished run."""
    (world / "runs").mkdir()
    document = json.loads((world / "done" / "metadata.json").read_text())
    parameters = document["parameters"]
    edited = {
        "version": document | {"version": 99},
        "unknown": document | {"parameters": parameters | {"sampler": "euler"}},
        "missing": document | {"parameters": {name: value for name, value in parameters.items() if name != "seed"}},
        "wrong": document | {"parameters": parameters | {"steps": "many"}},
        "no-model": document | {"parameters": parameters | {"model": "gone"}},
        "other-weights": document | {"weights": dict.fromkeys(document["weights"], "0" * 64)},
    }
    for name, changed in edited.items():
        (world / "runs" / f"{name}.json").write_text(json.dumps(changed))


def write_training(world: Path) -> None:
    folder = world / "configs"
    folder.mkdir()
    edits = {
        "good": ("", ""),
        "other": ("batch_size = 1", "batch_size = 2"),
        "fewer": ("steps = 2", "steps = 1"),
        "syntax": ("steps = 2", "steps = = 2"),
        "unknown": ("[data]", "[optimizer]\nmomentum = 0.9\n[data]"),
        "type": ("steps = 2", 'steps = "many"'),
        "range": ("[data]", "[optimizer]\nlearning_rate = -1.0\n[data]"),
        "stage": ('"vae"', '"decoder"'),
        "no-data": ('"heads"', '"gone"'),
        "bad-data": ('"heads"', '"bad-heads"'),
        "no-vae": ("steps = 2", 'steps = 2\ninit_from = "pictures"'),
    }
    for name, (old, new) in edits.items():
        (folder / f"{name}.toml").write_text(TRAINING.replace(old, new, 1))
    render_dataset(world / "heads", range(100_000, 100_002), views=2, size_px=32, processes=1)
    for name in ("a", "b"):
        (world / "bad-heads" / name).mkdir(parents=True)
        (world / "bad-heads" / name / "transforms.json").write_text('{"frames": [{}]}')


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of good and damaged files."""
    world = tmp_path_factory.mktemp("world")
    (world / "picture.png").write_bytes(picture_bytes("PNG"))
    write_pictures(world)
    write_models(world)
    write_cameras(world)
    write_training(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert run(DONE) == 0
        assert run(["train", "configs/good.toml", "-o", "trained", "--backend", "torch", "--device", "cpu"]) == 0
    write_runs(world)
    return world


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def check_line(text: str, call: Call) -> None:
    assert text.startswith("mvmlx: error: ")
    assert text.count("\n") == 1 and text.endswith("\n")
    missing = [part for part in call.says if part not in text]
    assert not missing, f"{missing} is not in: {text}"
    assert "Traceback" not in text and "report it" not in text


def test_at_least_sixty_kinds_of_wrong_calls_are_tried() -> None:
    assert len({call.line for call in CALLS}) == len(CALLS) >= 60


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.line.replace(GENERATE, "...")[:90])
def test_a_wrong_call_is_refused_in_one_line(
    call: Call, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    before = contents(world)
    code = run(shlex.split(call.line))
    after = contents(world)
    shutil.rmtree(world / "new", ignore_errors=True)
    captured = capfd.readouterr()
    check_line(captured.err, call)
    assert (code, captured.out) == (call.code, "")
    assert after == before


@pytest.mark.parametrize("call", [call for call in CALLS if call.line.startswith(GENERATE)][::6], ids=lambda call: call.line)
def test_with_json_the_error_is_an_event_too(
    call: Call, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    assert run([*shlex.split(call.line), "--json"]) == call.code
    captured = capfd.readouterr()
    check_line(captured.err, call)
    event = json.loads(captured.out.splitlines()[-1])
    assert (event["event"], event["exit_code"]) == ("error", call.code)
    assert f"mvmlx: error: {event['message']}\n" == captured.err


@pytest.mark.parametrize("name", ["mlx", "torch", "auto"])
def test_a_backend_that_is_not_installed_comes_with_the_command_that_installs_it(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(mvshared.backend, "find_spec", lambda library: None)
    assert run([*shlex.split(GENERATE), "--backend", name]) == 6
    check_line(capfd.readouterr().err, Call("", 6, ("installed", "pip install '")))
    assert not (world / "new").exists()


@pytest.mark.parametrize("line", ["benchmark step --against diffusers", "validate tiny --against diffusers"])
def test_without_diffusers_nothing_is_measured_against_it(
    line: str, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(mvshared.backend, "find_spec", lambda library: None if library == "diffusers" else find_spec(library))
    assert run(shlex.split(line)) == 6
    check_line(capfd.readouterr().err, Call("", 6, ("diffusers is not installed", "pip install 'mvmlx[validate]'")))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    (tmp_path / "locked").mkdir(mode=0o500)
    assert run(["generate", "picture.png", "--model", "tiny", "-o", str(tmp_path / "locked" / "out")]) == 7
    check_line(capfd.readouterr().err, Call("", 7, ("no permission",)))


def test_a_folder_that_may_not_be_written_is_refused_before_any_work(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr(mvshared.backend, "load", lambda *_, **__: pytest.fail("loaded"))
    for line in ("generate picture.png --model tiny -o new/out", "evaluate --model tiny -o new", "benchmark --json new/b.json"):
        assert run(shlex.split(line)) == 7
        check_line(capfd.readouterr().err, Call("", 7, ("no permission, or a read-only disk",)))
    assert not (world / "new").exists()


@pytest.mark.parametrize("call", [CALLS[0], CALLS[6], *calls(8, ("generate --config gone.json", "no such file"))])
def test_the_installed_command_does_the_same(call: Call, world: Path) -> None:
    command = [str(Path(sys.executable).with_name("mvmlx")), *shlex.split(call.line)]
    result = subprocess.run(command, cwd=world, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (call.code, "")
    check_line(result.stderr, call)
