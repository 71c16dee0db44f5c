"""The command line as a user meets it: what the commands print, which files they leave, and how they end."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from helpers import BACKENDS, Backend, run_under_two_names, write_tiny_model
from PIL import Image

import mvshared.commands.checkpoints
import mvshared.commands.generate
import mvshared.export
from mvshared import __version__
from mvshared.camera import orbit
from mvshared.checkpoint import read_model_config
from mvshared.cli import cli, run
from mvshared.commands.generate import Reporter, shown_warnings
from mvshared.errors import MvWarning, warn
from mvshared.export import transforms
from mvshared.images import load_image
from mvshared.messages import print_json

MVMLX = str(Path(sys.executable).with_name("mvmlx"))
FIXTURES = Path(__file__).parent / "fixtures"
TINY = ["--model", "tiny", "--device", "cpu"]
RUN_FILES = ["grid.png", "latents.npy", "metadata.json", "transforms.json", "turntable.gif", "view_000.png", "view_001.png"]
HEAVY = {"numpy", "torch", "mlx", "PIL", "safetensors", "tqdm"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def desk(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a picture and a model called `tiny`."""
    (tmp_path / "tiny").symlink_to(models)
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pictures(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("view_*.png"))]


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# Errors speak of the options that there are


def test_arguments_of_python_are_called_by_their_options(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "seed=3").mkdir()
    (desk / "seed=3" / "metadata.json").write_text("{}")
    for arguments, says in (
        (
            f"init gaf seed=3 --from {FIXTURES / 'tiny-imagedream'}",
            "seed=3: is not empty (name another folder, or use --force)",
        ),
        (f"init gaf new --from {FIXTURES / 'tiny-imagedream'} --seed -1", "--seed must be"),
        (
            "generate picture.png --model tiny -o seed=3",
            "seed=3: holds a finished run (name another folder, or overwrite it with",
        ),
        ("-- generate picture.png --model tiny --size 7", "--size must be"),
    ):
        assert run(arguments.split())
        assert f"error: {says}" in capsys.readouterr().err
    assert run(["generate", "picture.png", *TINY, "-o", "done"]) == 0
    document = json.loads((desk / "done/metadata.json").read_text())
    document["parameters"]["size_px"] = 5
    (desk / "done/metadata.json").write_text(json.dumps(document))
    assert run(["generate", "--config", "done", "-o", "new"]) == 2
    assert "error: size_px must be" in capsys.readouterr().err, "nobody has given --size"


# Before weights are read


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("gone.png", 3, "gone.png: no such file"),
        ("picture.png picture.png gone.png", 3, "gone.png"),
        ("picture.png --size 36", 2, "--size must be a multiple of 8"),
        ("picture.png --steps 0", 2, "--steps"),
        ("picture.png --scheduler heun", 2, "--scheduler"),
        ("picture.png --guidance 30", 2, "--guidance"),
        ("picture.png --azimuths 0,1e30 --elevation 5", 4, "camera 1: the azimuth must be"),
        ("picture.png --latents picture.png", 2, "--latents"),
        ("picture.png --normals nowhere", 3, "nowhere"),
        ("picture.png --seed 1 --seed -1", 2, "--seed"),
        ("--config done", 2, "image must be as it was in the run; it has changed"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    arguments: str, code: int, says: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--config" in arguments:
        assert run(["generate", "picture.png", *TINY, "-o", "done"]) == 0
        Image.new("RGB", (30, 40), "red").save("picture.png")
    monkeypatch.setattr(mvshared.commands.generate, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    model = [] if "--config" in arguments else TINY
    assert run(["generate", *arguments.split(), *model, "-o", "new"]) == code
    assert says in capsys.readouterr().err
    assert not (desk / "new").exists()


# Help


def every_command() -> list[tuple[str, click.Command]]:
    return [("", cli), *cli.commands.items()]


@pytest.mark.parametrize(("name", "command"), every_command(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_option_and_what_it_does(
    name: str, command: click.Command, flag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([name, flag] if name else [flag]) == 0
    text = capfd.readouterr().out
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help and all(option in text for option in parameter.opts), parameter.name


def test_without_arguments_the_help_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    captured = capfd.readouterr()
    assert "Commands:" in captured.out and not captured.err


def test_the_version_is_the_packages(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capfd.readouterr().out == f"mvmlx, version {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"], ["generat"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; from mvshared.cli import run; run({arguments!r}); print({HEAVY!r} & sys.modules.keys(), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "set()"


# Generate


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_writes_a_run_and_says_where(backend: Backend, desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "picture.png", *TINY, "--backend", backend, "-o", "out"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "2 views in out (see grid.png)\n"
    assert captured.err == ""
    assert files(desk / "out") == RUN_FILES
    assert load_image(desk / "out" / "view_001.png").shape == (32, 32, 4)
    assert json.loads((desk / "out" / "metadata.json").read_text())["parameters"]["backend"] == backend


def test_a_prompt_alone_makes_views_of_a_text_model(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text_model = ["--model", str(FIXTURES / "tiny-mvdream"), "--device", "cpu", "--backend", "torch"]
    assert run(["generate", "--prompt", "owl " * 75 + "a red owl", *text_model, "--steps", "1"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "4 views in views (see grid.png)\n"
    assert captured.err == "mvmlx: warning: the prompt is longer than 75 tokens; left out is: a red owl\n"
    parameters = json.loads((desk / "views" / "metadata.json").read_text())["parameters"]
    assert (parameters["image"], parameters["negative_prompt"], parameters["guidance"]) == (None, "", 5.0)
    assert run(["generate", "--config", "views", "-o", "again"]) == 0
    assert pictures(desk / "again") == pictures(desk / "views")


def test_several_pictures_and_a_prompt_reach_an_image_model(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image_model = ["--model", str(FIXTURES / "tiny-imagedream"), "--device", "cpu", "--backend", "torch", "--steps", "1"]
    words = ["--prompt", "an owl", "--negative-prompt", "blurry", "--image-scale", "0.5"]
    words += ["--guidance-text", "2", "--guidance-image", "3", "--guidance-interval", "0.1,0.9", "--guidance-rescale", "0.7"]
    words += ["--reference-scale", "1.5"]
    assert run(["generate", "picture.png", "picture.png", *image_model, *words, "--json"]) == 0
    assert [event["event"] for event in events(capfd.readouterr().out)] == ["loaded", "step", "saved"]
    parameters = json.loads((desk / "picture-views" / "metadata.json").read_text())["parameters"]
    picture = str((desk / "picture.png").resolve())
    given = {"image": [picture, picture], "prompt": "an owl", "negative_prompt": "blurry", "image_scale": 0.5}
    given |= {"guidance_text": 2.0, "guidance_image": 3.0, "guidance_interval": [0.1, 0.9], "guidance_rescale": 0.7}
    given |= {"reference_scale": 1.5}
    assert {name: parameters[name] for name in given} == given


def test_without_an_output_folder_the_picture_names_it(desk: Path) -> None:
    assert run(["generate", "picture.png", *TINY]) == 0
    assert files(desk / "picture-views") == RUN_FILES


def test_every_option_reaches_the_run(desk: Path) -> None:
    (desk / "maps").mkdir()
    for index in range(3):
        Image.new("RGB", (48, 48), (128, 128, 250 - index)).save(desk / "maps" / f"{index}.png")
    options = "--normals maps --normal-space world --guidance-normals 2"
    options += " --azimuths 10,20,350 --elevation 15 --steps 3 --guidance 1.5 --eta 0.5 --seed 9 --size 48 --dtype bfloat16"
    options += " --spacing trailing --guidance-every 2 --kv-pooling 2"
    assert run(["generate", "picture.png", *TINY, *options.split(), "-o", "out", "--scheduler", "ddim"]) == 0
    parameters = json.loads((desk / "out" / "metadata.json").read_text())["parameters"]
    given = {"steps": 3, "guidance": 1.5, "eta": 0.5, "seed": 9, "size_px": 48, "dtype": "bfloat16", "scheduler": "ddim"}
    given |= {
        "spacing": "trailing",
        "guidance_every": 2,
        "kv_pooling": 2,
        "guidance_normals": 2.0,
        "guidance_image": None,
        "guidance_interval": [0.0, 1.0],
    }
    assert {name: parameters[name] for name in given} == given
    positions = np.asarray(parameters["cameras"])[:, :3, 3]
    azimuths = np.degrees(np.arctan2(positions[:, 0], positions[:, 2])) % 360
    np.testing.assert_allclose(azimuths, [10, 20, 350], atol=1e-3)
    np.testing.assert_allclose(np.degrees(np.arcsin(positions[:, 1] / np.linalg.norm(positions, axis=1))), 15, atol=1e-3)
    assert parameters["normals"] == str(desk / "maps") and parameters["normals_sha256"]
    assert parameters["normal_space"] == "world"
    files = [argument for index in range(3) for argument in ("--normals", f"maps/{index}.png")]
    options = options.replace("--normals maps", "")
    assert run(["generate", "picture.png", *TINY, *options.split(), *files, "-o", "files"]) == 0
    assert (desk / "files" / "grid.png").read_bytes() == (desk / "out" / "grid.png").read_bytes()
    assert load_image(desk / "out" / "view_002.png").shape == (48, 48, 4)


def test_cameras_of_a_run_can_be_used_again(desk: Path) -> None:
    assert run(["generate", "picture.png", *TINY, "--azimuths", "5,170", "--elevation", "20", "-o", "first"]) == 0
    assert run(["generate", "picture.png", *TINY, "--cameras", "first/transforms.json", "-o", "second"]) == 0
    assert pictures(desk / "first") == pictures(desk / "second")


def test_json_prints_an_event_a_line_in_their_order(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["generate", "picture.png", *TINY, "--backend", "torch", "--seed", "1", "--seed", "2", "--json", "-o", "out"]) == 0
    )
    captured = capfd.readouterr()
    assert captured.err == ""
    found = events(captured.out)
    assert [event["event"] for event in found] == ["loaded", "step", "step", "saved", "step", "step", "saved"]
    loaded = {"model": "tiny", "backend": "torch", "device": "cpu", "dtype": "float32", "quantization": None}
    assert found[0] == {"event": "loaded", **loaded}
    assert [(event["step"], event["steps"]) for event in found if event["event"] == "step"] == [(1, 2), (2, 2)] * 2
    saved = [event for event in found if event["event"] == "saved"]
    assert [(event["folder"], event["seed"], event["views"]) for event in saved] == [("out/seed_1", 1, 2), ("out/seed_2", 2, 2)]


def test_several_seeds_are_the_runs_of_each(desk: Path) -> None:
    assert run(["generate", "picture.png", *TINY, "--seed", "4", "--seed", "5", "--stepwise", "steps", "-o", "both"]) == 0
    assert run(["generate", "picture.png", *TINY, "--seed", "5", "-o", "one"]) == 0
    assert pictures(desk / "both" / "seed_5") == pictures(desk / "one")
    assert pictures(desk / "both" / "seed_4") != pictures(desk / "one")
    assert files(desk / "steps" / "seed_4") == files(desk / "steps" / "seed_5") == ["step_0001.png", "step_0002.png"]


def test_stepwise_writes_a_picture_a_step_and_ends_at_the_result(desk: Path) -> None:
    (desk / "steps").mkdir()
    for name in ("step_0004.png", "step_mine.png"):  # the first one of a run that had more steps
        (desk / "steps" / name).write_bytes(b"")
    assert run(["generate", "picture.png", *TINY, "--steps", "3", "--stepwise", "steps", "-o", "out"]) == 0
    assert files(desk / "steps") == ["step_0001.png", "step_0002.png", "step_0003.png", "step_mine.png"]
    last, result = (load_image(path).astype(np.int16) for path in (desk / "steps" / "step_0003.png", desk / "out" / "grid.png"))
    assert np.abs(last - result).mean() < 0.5  # the last step ends a little before clean latents


@pytest.mark.parametrize("named", ["out", "out/metadata.json"])
def test_config_repeats_a_run_bit_for_bit_from_any_folder(
    named: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--steps", "3", "--guidance", "2.5", "--eta", "0.3", "--seed", "8", "--views", "3"]
    assert run(["generate", "picture.png", *TINY, *arguments, "-o", "out"]) == 0
    (desk / "elsewhere").mkdir()
    monkeypatch.chdir(desk / "elsewhere")
    assert run(["generate", "--config", f"../{named}", "-o", "again"]) == 0
    capfd.readouterr()
    assert run(["generate", "--config", f"../{named}", "--json"]) == 0
    assert [event["event"] for event in events(capfd.readouterr().out)][:2] == ["loaded", "step"]
    assert pictures(desk / "elsewhere" / "out-views") == pictures(desk / "out")
    assert pictures(desk / "elsewhere" / "again") == pictures(desk / "out")
    first, again = (
        json.loads((folder / "metadata.json").read_text()) for folder in (desk / "out", desk / "elsewhere" / "again")
    )
    assert first == again


def test_force_overwrites_a_run_and_keeps_other_files(desk: Path) -> None:
    assert run(["generate", "picture.png", *TINY, "--views", "3", "-o", "out"]) == 0
    (desk / "out" / "notes.txt").write_text("mine")
    before = pictures(desk / "out")
    assert run(["generate", "picture.png", *TINY, "--seed", "1", "-o", "out", "--force"]) == 0
    assert files(desk / "out") == sorted([*RUN_FILES, "notes.txt"])
    assert not set(before) & set(pictures(desk / "out"))


# The other commands


def test_models_lists_the_embedded_ones(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    first = capfd.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"demo: 4 views of 128 pixels, \d+ steps, guidance [\d.]+, \d+\.\d MB, in the package", first)


def test_render_heads_writes_captures_and_keeps_those_that_are_there(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["render-heads", "heads", "--identities", "100000:100002", "--views", "2", "--size", "32", "--processes", "1"]
    assert run(command) == 0
    before = {path: path.read_bytes() for path in (desk / "heads").rglob("*.png")}
    assert len(before) == 2 * 2 * 3  # heads, views, and pictures, normal maps and detail maps
    assert run(command) == 0
    assert {path: path.read_bytes() for path in (desk / "heads").rglob("*.png")} == before
    assert capfd.readouterr().out.splitlines() == ["2 heads rendered, 2 in heads", "0 heads rendered, 2 in heads"]
    more = [*command[:3], "100002:100003", *command[4:]]
    assert run(more) == 0
    assert capfd.readouterr().out == "1 heads rendered, 3 in heads\n"
    for option, says in (
        ("--size", "2 views of 32 pixels, 2 of 64 were asked for"),
        ("--views", "2 views of 32 pixels, 3 of 32"),
    ):
        other = [*more[:3], "100003:100004", *more[4:]]
        other[other.index(option) + 1] = {"--size": "64", "--views": "3"}[option]
        assert run(other) == 7
        assert says in capfd.readouterr().err


def test_train_trains_and_goes_on(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    render = ["render-heads", "heads", "--identities", "100000:100002", "--views", "2", "--size", "32", "--processes", "1"]
    assert run(render) == 0
    config = """
stage = "vae"
steps = {steps}
batch_size = 1
log_every = 1
[data]
folder = "heads"
[vae]
block_out_channels = [8, 8]
layers_per_block = 1
norm_num_groups = 4
"""
    for steps in (2, 4):
        (desk / "vae.toml").write_text(config.format(steps=steps))
        assert run(["train", "vae.toml", "-o", "run", "--device", "cpu"]) == 0
    assert capfd.readouterr().out.splitlines()[1:] == ["trained model in run/model"] * 2
    assert [line.split(",")[0] for line in (desk / "run" / "log.csv").read_text().splitlines()] == ["step", "1", "2", "3", "4"]
    assert files(desk / "run" / "samples") == ["step_000002.png", "step_000004.png"]


def test_evaluate_prints_and_writes_the_same_figures(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", *TINY, "--identities", "0:2", "--steps", "1", "--normals", "-o", "out"]
    command += ["--scheduler", "euler", "--spacing", "trailing", "--together", "3", "--backend", "torch"]
    assert run(command) == 0
    table = capfd.readouterr().out
    for name in ("sheet_01.png", "sheet_100.png"):
        (desk / "out" / name).write_bytes(b"of an evaluation of more heads")
    assert run([*command, "--json"]) == 0
    [document] = events(capfd.readouterr().out)
    assert json.loads((desk / "out" / "evaluation.json").read_text()) == document
    assert not (desk / "out" / ".evaluating").exists()

    assert "2 heads, 4 views each" in table
    for name, figure in document["figures"].items():
        assert re.search(rf"{name} +{figure['mean']:.3f} \+- {figure['std']:.3f}", table)
    assert document["figures"].keys() >= {"normals_iou", "consistency_psnr_db"}
    settings = {"model": "tiny", "identities": [0, 2], "views": 4, "together": 3, "normals": True, "seed": 0, "steps": 1}
    settings |= {"guidance": 2.0, "scheduler": "euler", "spacing": "trailing", "prompt": None, "negative_prompt": None}
    settings |= {"backend": "torch", "dtype": "float32", "quantization": None}
    assert {name: value for name, value in document.items() if name not in ("figures", "shares")} == settings
    for name, share in document["shares"].items():
        assert re.search(rf"{name} +{share:.3f} = \d+ of [28]", table)
    assert load_image(desk / "out" / "sheet_00.png").shape == (2 * 32, 9 * 32, 4)
    assert [path.name for path in (desk / "out").glob("sheet_*")] == ["sheet_00.png"]


def test_an_evaluation_has_the_prompts_that_are_asked_for(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = FIXTURES / "tiny-imagedream"
    command = ["evaluate", "--model", str(model), "--device", "cpu", "--identities", "0:1", "--steps", "1", "--views", "1"]
    command += ["--backend", "torch", "--json"]
    documents = []
    for prompts in ([], ["--negative-prompt", ""], ["--negative-prompt", "hats", "--prompt", "a head"]):
        assert run([*command, *prompts]) == 0
        documents += events(capfd.readouterr().out)
    named = [(document["prompt"], document["negative_prompt"]) for document in documents]
    assert named == [("", read_model_config(model).defaults.negative_prompt), ("", ""), ("a head", "hats")]
    assert len({document["figures"]["psnr_db"]["mean"] for document in documents}) == len(documents)

    assert run(["evaluate", *TINY, "--prompt", "a head"]) == 2
    assert "--prompt must be left out: this model takes no text" in capfd.readouterr().err


def test_an_evaluation_removes_what_one_left_and_no_picture_of_anybody_else(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", *TINY, "--steps", "1", "-o", "out", "--identities"]
    (desk / "out").mkdir()
    (desk / "out" / "sheet_05.png").write_bytes(b"mine")
    assert run([*command, "0:1"]) == 7
    assert "holds sheet_05.png, which no evaluation left there" in capfd.readouterr().err
    assert [path.name for path in (desk / "out").iterdir()] == ["sheet_05.png"]
    (desk / "out" / "sheet_05.png").unlink()
    assert run([*command, "0:1"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(mvshared.export, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run([*command, "1:2"]) == 130
    assert {path.name for path in (desk / "out").iterdir()} == {".evaluating", "sheet_00.png"}  # and no figures of head 0
    assert run([*command, "1:2"]) == 0
    assert {path.name for path in (desk / "out").iterdir()} == {"evaluation.json", "sheet_00.png"}
    document = json.loads((desk / "out" / "evaluation.json").read_text())
    defaults = {"together": 4, "normals": False, "guidance": 2.0, "scheduler": "ddim", "spacing": "leading"}
    assert {name: document[name] for name in defaults} == defaults


def test_figures_of_views_go_with_the_views(desk: Path) -> None:
    command = ["generate", "picture.png", *TINY, "--steps", "1", "--azimuths", "0,90", "-o", "out"]
    assert run([*command, "--upscale", "lanczos"]) == 0
    for folder in ("out", "out/upscaled"):
        assert run(["evaluate", folder, "-o", folder]) == 0
        assert (desk / folder / "sheet.png").exists()
    assert run([*command, "--seed", "1", "--force"]) == 0
    assert not (desk / "out" / "upscaled").exists()
    assert not {"evaluation.json", "sheet.png"} & {path.name for path in (desk / "out").iterdir()}
    assert run(["evaluate", *TINY, "--steps", "1", "--identities", "0:1", "-o", "out"]) == 0
    assert run([*command, "--seed", "1", "--force"]) == 0
    assert {"evaluation.json", "sheet_00.png"} <= {path.name for path in (desk / "out").iterdir()}  # of the model


def test_nor_what_has_another_name(desk: Path) -> None:
    assert run(["generate", "picture.png", *TINY, "--steps", "1", "-o", "Out"]) == 0
    before = {path: path.read_bytes() for path in (desk / "Out").rglob("*.*")}
    for command in (["upscale", "Out"], ["generate", "Out/view_000.png", *TINY]):
        refused = run_under_two_names(desk / "Out", [*command, "-o", "out", "--force"])
        assert (refused.returncode, "which is read, would be removed" in refused.stderr) == (2, True), refused.stderr
    assert {path: path.read_bytes() for path in (desk / "Out").rglob("*.*")} == before


def test_a_run_does_not_remove_what_it_is_made_of(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "picture.png", *TINY, "--steps", "1", "--upscale", "lanczos", "-o", "out"]) == 0
    before = {path: path.read_bytes() for path in (desk / "out").rglob("*.*")}
    (desk / "metadata.json").write_text(
        (desk / "out" / "metadata.json").read_text().replace(str(desk / "picture.png"), str(desk / "out" / "view_000.png"))
    )
    for command in (
        ["generate", "--config", "metadata.json", "-o", "out", "--force"],
        ["generate", "picture.png", *TINY, "--cameras", "out/transforms.json", "-o", "out", "--force"],
        ["generate", "picture.png", *TINY, "--normals", "out", "-o", "out", "--force"],
        ["generate", "out/view_000.png", *TINY, "-o", "out", "--force"],
        ["generate", "out/upscaled/view_000.png", *TINY, "-o", "out", "--force"],
        ["generate", "picture.png", *TINY, "--latents", "out/latents.npy", "-o", "out/../out", "--force"],
        ["upscale", "out", "-o", "out", "--force"],
        ["upscale", "out/view_000.png", "out/view_001.png", "-o", "out", "--force"],
    ):
        capfd.readouterr()
        assert run(command) == 2
        assert re.search("output must be another folder: .*out.*, which is read, would be removed", capfd.readouterr().err)
    assert {path: path.read_bytes() for path in (desk / "out").rglob("*.*")} == before


def test_warnings_of_libraries_are_passed_on_and_our_own_are_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(RuntimeWarning, match="invalid value"), shown_warnings(Reporter(as_json=False, stepwise=None)):
        warnings.warn("invalid value encountered in divide", RuntimeWarning, stacklevel=1)
        warn("too wide")
        warn("too wide")
    assert capfd.readouterr().err == "mvmlx: warning: too wide\n"


def test_cameras_that_views_do_not_follow_are_warned_of(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    poses = orbit([0, 90], 10, radius=3.4)
    lens = transforms(poses, width_px=32, height_px=32, fov_deg=65.0, file_names=["a.png", "b.png"])
    (desk / "lens.json").write_text(json.dumps(lens))
    lens["frames"][0]["camera_angle_x"] = math.radians(30)
    (desk / "lenses.json").write_text(json.dumps(lens))
    for name in [each for each in lens if each.startswith(("fl_", "camera_angle"))]:
        del lens[name]
    (desk / "mixed.json").write_text(json.dumps(lens))
    (desk / "far.json").write_text(json.dumps(np.stack([poses[0], *orbit([90], 10, radius=13.6)]).tolist()))
    aside = poses.copy()
    aside[:, 1, 3] += 2
    (desk / "aside.json").write_text(json.dumps(aside.tolist()))
    rolled = poses.copy()
    rolled[0, :3, :2] = poses[0, :3, 1::-1] * [1, -1]  # a picture in portrait format, held as one in landscape format
    (desk / "rolled.json").write_text(json.dumps(rolled.tolist()))
    (desk / "good.json").write_text(json.dumps(poses.tolist()))
    for name, says in (
        ("lens", "lens.json: has a field of view of 65.0 degrees, and views have that of the model, "),
        ("lenses", "lenses.json: has a field of view of 30.0 to 65.0 degrees, and views have that of the model, "),
        ("mixed", "mixed.json: has a field of view of 30.0 degrees in 1 of 2 views, and views have that of the model, "),
        ("far", "the cameras stand at distances from 3.4 to 13.6, and models know of one"),
        ("rolled", "camera 0 is rolled by 80 degrees, and views are upright"),
        ("aside", "looks 28 degrees past the origin, where views are to have their subject"),
        ("good", ""),
    ):
        assert run(["generate", "picture.png", *TINY, "--steps", "1", "-o", name, "--cameras", f"{name}.json"]) == 0
        err = capfd.readouterr().err
        assert says in err and bool(says) == ("warning" in err), err


# Ends


@pytest.mark.parametrize(("left", "options"), [((2,), "--seed 2 -o out/seed_2"), ((1, 3), "--seed 1 --seed 3 -o out")])
def test_a_call_of_several_seeds_that_was_killed_says_how_to_go_on(
    desk: Path, capsys: pytest.CaptureFixture[str], left: tuple[int, ...], options: str
) -> None:
    command = ["generate", "picture.png", *TINY, "--steps", "1"]
    whole = [*command, "--seed", "1", "--seed", "2", "--seed", "3", "-o", "out"]
    assert run(whole) == 0
    before = {path: path.read_bytes() for path in (desk / "out").glob("*/view_*.png")}
    for seed in left:
        shutil.rmtree(desk / "out" / f"seed_{seed}")
    capsys.readouterr()
    assert run(whole) == 7
    assert (
        f"holds a finished run (if it was this call, {options} makes what is missing; name another folder"
        in capsys.readouterr().err
    )
    assert run([*command, *options.split()]) == 0
    assert {path: path.read_bytes() for path in (desk / "out").glob("*/view_*.png")} == before
    assert run(whole) == 7
    assert "missing" not in capsys.readouterr().err


def test_a_name_that_is_too_long_is_told_as_it_was_given(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seeds in ([], ["--seed", "1", "--seed", "2"]):
        assert run(["generate", "picture.png", *TINY, "-o", 300 * "x", *seeds]) == 7
        assert re.search(r"x(/seed_1)?: cannot be read: File name too long\n$", capsys.readouterr().err)


def test_ctrl_c_ends_a_run_in_one_line_and_leaves_no_half_written_file(desk: Path) -> None:
    command = [MVMLX, "generate", "picture.png", *TINY, "--steps", "500", "--json", "--stepwise", "steps", "-o", "out"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def like_a_shell() -> None:  # what a shell starts in the background ignores Ctrl-C, and so do its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=desk, preexec_fn=like_a_shell, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert errors == "mvmlx: error: interrupted; nothing half-written will be taken for a result\n"
    assert events(rest)[-1]["exit_code"] == 130
    assert not (desk / "out" / "metadata.json").exists()
    for path in (desk / "steps").iterdir():
        load_image(path)


def test_an_interruption_within_compiled_code_is_one(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as cause:
            raise SystemError("returned a result with an exception set") from cause

    monkeypatch.setattr("mvshared.heads.dataset.render_dataset", interrupted)
    assert run(["render-heads", "heads", "--identities", "0:1"]) == 130
    assert capsys.readouterr().err == "mvmlx: error: interrupted; nothing half-written will be taken for a result\n"


def test_a_reader_that_goes_away_is_no_error(desk: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([MVMLX, "models"], cwd=desk, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.stderr == ""


def test_a_fault_of_the_program_is_one_line_and_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: Any) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(mvshared.commands.checkpoints, "list_models", broken)
    assert run(["models"]) == 70
    error = capfd.readouterr().err
    assert error.startswith("mvmlx: error: ZeroDivisionError: division by zero (this is a fault of mvmlx: please report it")
    assert error.count("\n") == 1
    monkeypatch.setenv("MVMLX_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run(["models"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 72.7 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
    ],
)
def test_memory_that_runs_out_is_no_fault_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(mvshared.commands.generate, "generate_views", full)
    monkeypatch.setattr(mvshared.commands.checkpoints, "list_models", full)
    assert run(["generate", "picture.png"]) == 13
    printed = capfd.readouterr().err
    assert "memory ran out" in printed and "--low-memory" in printed and "fault of mvmlx" not in printed
    assert run(["models"]) == 13
    printed = capfd.readouterr().err
    assert printed.endswith("(memory ran out)\n") and "--low-memory" not in printed, "which it has not"


def test_a_file_name_that_the_terminal_cannot_show_is_shown_in_another_way(desk: Path) -> None:
    name = os.fsdecode(b"p\xff.png")
    shutil.copyfile(desk / "picture.png", desk / name)
    command = [MVMLX, "generate", name, "--model", "tiny", "--backend", "torch", "--device", "cpu", "--steps", "1"]
    result = subprocess.run(command, cwd=desk, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert b"p\\udcff-views" in result.stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Köpfe".encode(), "Köpfe"),
        (b"K\xf6pfe", "K\ufffdpfe"),
        ("K\U0001f600".encode(), "K\U0001f600"),
        (b"K\\udcf6", "K\\udcf6"),
    ],
)
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["own", "C"])
def test_json_with_file_names_is_read_by_strict_readers(name: bytes, expected: str, locale: dict[str, str], desk: Path) -> None:
    result = subprocess.run([MVMLX, "evaluate", name, "--json"], cwd=desk, env=os.environ | locale, capture_output=True)
    assert result.returncode == 9 and result.stdout.isascii(), result.stderr
    message = json.loads(result.stdout)["message"]
    assert message.startswith(f"{expected}: ")
    message.encode()  # which lone surrogates do not allow


def test_half_a_character_in_a_text_does_not_reach_strict_readers(capfd: pytest.CaptureFixture[str]) -> None:
    print_json({"prompt": "an \ud800 owl", "figures": [0.1, 1e-300, None]})
    assert capfd.readouterr().out == '{"prompt": "an \\ufffd owl", "figures": [0.1, 1e-300, null]}\n'


QUICK = [MVMLX, "generate", "picture.png", "--model", "tiny", "--backend", "torch", "--device", "cpu", "--steps", "1"]


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX closes streams")
def test_a_run_ends_well_where_nobody_can_be_told(desk: Path) -> None:
    shell = " ".join(QUICK)
    assert subprocess.run(f"{shell} -o closed --json 2>&- >events", cwd=desk, shell=True).returncode == 0
    assert [each["event"] for each in events((desk / "events").read_text())][-1] == "saved"
    assert files(desk / "closed") == RUN_FILES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(desk: Path) -> None:
    assert subprocess.run(f"{MVMLX} generate gone.png 2>/dev/full", cwd=desk, shell=True).returncode == 3


def test_what_a_path_names_is_looked_at_by_who_reads_it() -> None:
    """With the exit code of its kind: click would call a file that may not be read a wrong use of the command line."""
    commands = [command for command in cli.commands.values() if not isinstance(command, click.Group)]
    paths = [each.type for command in commands for each in command.params if isinstance(each.type, click.Path)]
    assert len(paths) > 20
    assert not any(each.readable or each.exists for each in paths)


def test_warnings_of_every_command_are_one_line_each(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def warned(**options: Any) -> None:
        for _ in range(2):
            warnings.warn("something is odd", MvWarning, stacklevel=1)

    monkeypatch.setattr(mvshared.commands.checkpoints, "list_models", warned)
    assert run(["models"]) == 0
    assert capfd.readouterr().err == "mvmlx: warning: something is odd\n"


@pytest.mark.parametrize(("file", "told"), [("b.json", False), ("-", True)])
def test_errors_of_a_benchmark_are_json_only_where_its_results_are(
    capfd: pytest.CaptureFixture[str], file: str, told: bool
) -> None:
    assert run(["benchmark", "nosuch", "--json", file]) == 2
    captured = capfd.readouterr()
    assert bool(captured.out) == told and "nosuch" in captured.err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "locked/model_index.json"), "locked/model_index.json: Permission"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device (there is no room"),
    ],
)
def test_what_the_system_refuses_is_no_fault_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: OSError, message: str
) -> None:
    def refused(**options: Any) -> None:
        raise fault

    monkeypatch.setattr(mvshared.commands.checkpoints, "list_models", refused)
    assert run(["models"]) == 7
    assert capfd.readouterr().err.startswith(f"mvmlx: error: {message}")


def test_warnings_of_libraries_do_not_clutter_a_good_call(desk: Path) -> None:
    command = [MVMLX, "generate", "picture.png", *TINY, "-o", "out"]
    result = subprocess.run(command, cwd=desk, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "2 views in out (see grid.png)\n", "")
