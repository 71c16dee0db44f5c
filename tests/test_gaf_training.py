"""Training GAF by its recipe: what the recipe is and refuses, single subjects, and a subject that is learned for real."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, Backend
from PIL import Image
from test_parity_training import loss_of_output
from training_cases import SIZE, V_PREDICTION, run, some_latents, vae_config, write_object, write_objects

import mvshared.training.loop
import mvtorch.model
from mvshared import cli, normals
from mvshared.backend import load
from mvshared.camera import orbit
from mvshared.captures import load_capture, write_capture
from mvshared.checkpoint import find_model, read_model_config, read_vae_config, write_component, write_model_config
from mvshared.conversion.gaf import init_gaf
from mvshared.errors import DatasetError
from mvshared.heads import DEFAULT_FOV_DEG, DEFAULT_RADIUS, render
from mvshared.images import composite, load_image, load_values
from mvshared.metrics import psnr
from mvshared.training import checks
from mvshared.training.config import PLAIN_UNET_LOSS, DataConfig
from mvshared.training.data import ViewBatches
from mvshared.training.initial import UNET_ZEROS, initial_weights
from mvshared.training.log import read_log
from mvshared.training.presets import preset

TINY = Path(__file__).parent / "fixtures" / "tiny-imagedream"
DEMO = find_model("demo")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    init_gaf(TINY, folder / "gaf")
    return folder


@pytest.fixture
def desk(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a GAF model `gaf`, four captures in `captures` and a single one in `subject`."""
    (tmp_path / "gaf").symlink_to(models / "gaf")
    write_objects(tmp_path / "captures")
    write_object(tmp_path / "subject" / "one", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(arguments: str) -> int:
    return cli.run(["train", *arguments.split()])


# The recipe


@pytest.mark.parametrize("damage", ["transparent map", "pictures that are not square"])
def test_a_sample_sheet_cannot_end_a_training(desk: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    for path in sorted((desk / "captures").glob("*/*.png")):
        image = Image.open(path).convert("RGBA")
        if damage == "transparent map" and path.name.startswith("normal_") and path.parent.name == "object_3":
            image.putalpha(0)
        if damage == "pictures that are not square":
            image = image.resize((SIZE, 2 * SIZE))
        image.save(path)
    assert train("--family gaf --from gaf --data captures -o run --steps 1 --batch-size 1 --backend torch --device cpu") == 0
    assert (desk / "run" / "model" / "model_index.json").exists()
    assert (desk / "run" / "samples").exists() == (damage == "transparent map")


def test_maps_in_world_space_are_not_learned_as_if_they_were_in_camera_space(
    desk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = desk / "captures" / "object_0" / "transforms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normal_space": "world"}))
    assert train("--family gaf --from gaf --data captures -o run --steps 1") == DatasetError.exit_code
    assert "normal_space must be 'camera' for a capture, got 'world'" in capfd.readouterr().err


def test_maps_that_do_not_say_that_they_are_in_world_space_are_warned_of_before_anything_is_loaded(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in (desk / "captures").iterdir():
        capture = load_capture(folder)
        for path, pose in zip(capture.normal_paths, capture.poses, strict=True):
            assert path is not None
            pixels = np.asarray(Image.open(path))
            turned = (pixels[..., :3] / 127.5 - 1) @ pose[:3, :3].T
            colours = np.round((turned + 1) * 127.5).clip(0, 255).astype(np.uint8)
            Image.fromarray(np.dstack([colours, pixels[..., 3]])).save(path)

    def load_vae(*_: Any, **__: Any) -> None:
        raise DatasetError("a network is loaded")

    monkeypatch.setattr(mvtorch.model, "load_vae", load_vae)
    assert train("--family gaf --from gaf --data captures -o run --backend torch --device cpu") == DatasetError.exit_code
    warning, error = capfd.readouterr().err.splitlines()
    assert f"learned that generate would refuse: {(desk / 'captures' / 'object_0').resolve()}" in warning
    assert "faces away from the camera" in warning
    assert "as world-space normals they would fit" in warning
    assert warning.endswith("; a capture needs them in camera space")
    assert "a network is loaded" in error


def test_of_captures_with_many_views_a_few_maps_all_around_are_decoded(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All maps of a capture of hundreds of views would take seconds, and gigabytes."""
    capture, read = load_capture(desk / "captures" / "object_0"), list[Any]()
    paths = tuple(path for path in capture.normal_paths for _ in range(9))
    many = capture._replace(normal_paths=paths, poses=np.repeat(capture.poses, 9, axis=0))

    def load(source: Any) -> Any:
        read.append(source)
        return load_values(source)

    monkeypatch.setattr(normals, "load_values", load)
    checks._warn_of_maps([many] * 20, fov_deg=40.0)
    assert set(capture.normal_paths) == set(read)
    assert len(read) <= 8 * 8


def test_the_recipe_is_that_of_the_paper(desk: Path) -> None:
    config = preset("gaf", source="gaf", data="captures", changes={})
    assert (config.steps, config.batch_size, config.data.targets) == (20_000, 64, 4)
    assert (config.optimizer.learning_rate, config.optimizer.final_learning_rate) == (1e-4, 1e-4)
    assert config.data.reference_dropout == 0.1
    assert config.unet is None
    assert config.frozen == ()
    assert Path(config.init_from or "").samefile("gaf")
    assert Path(config.data.folder).samefile("captures")


def test_images_are_dropped_whole_and_normal_maps_apart_from_them(desk: Path) -> None:
    """Tokens and reference frame go together, as guidance drops them; normal maps go by themselves."""
    data = replace(preset("gaf", source="gaf", data="captures", changes={}).data, targets=2)
    latents = some_latents()
    states = np.ones((np.count_nonzero(data.may_be_references(latents.azimuths_deg)), 3, 5), np.float16)
    batches = ViewBatches(latents, data, V_PREDICTION, normal_channels=4, image_states=states)
    drawn = [batches.batch(step, size=40, seed=0) for step in range(50)]
    no_tokens = np.concatenate([~batch.image_states.any((1, 2)) for batch in drawn])  # type: ignore[union-attr]
    no_reference = np.concatenate([~batch.reference.any((1, 2, 3)) for batch in drawn])
    no_normals = np.concatenate([~batch.sample[..., 4:].any((1, 2, 3, 4)) for batch in drawn])
    np.testing.assert_array_equal(no_tokens, no_reference)
    assert np.mean(no_reference) == pytest.approx(0.1, abs=0.02)
    assert np.mean(no_normals) == pytest.approx(0.1, abs=0.02)
    assert np.mean(no_normals & no_reference) == pytest.approx(0.01, abs=0.008)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_latent_of_every_view_counts_the_same_in_the_loss(backend: Backend) -> None:
    random = np.random.default_rng(0)
    target, out = (random.standard_normal((2, 3, 4, 4, 4), dtype=np.float32) for _ in range(2))
    loss = loss_of_output(backend, out, target, PLAIN_UNET_LOSS)
    assert loss == pytest.approx(float(np.mean((out - target) ** 2)), rel=1e-6)


# The command


def test_the_command_trains_by_the_recipe_and_its_options_change_it(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = "--family gaf --from gaf --data captures -o run --device cpu --batch-size 2 --learning-rate 1e-3 --seed 3"
    options = " --dtype float32 --held-out 0.5 --checkpoint-every 1 --no-gradient-checkpointing --prompt owl --steps "
    assert train(command + options + "1") == 0
    said = capfd.readouterr()
    assert said.out == "trained model in run/model\n"
    assert "Warning" not in said.err
    config = json.loads((desk / "run" / "config.json").read_text())
    values = {name: config[name] for name in ("batch_size", "steps", "seed", "dtype", "checkpoint_every", "family")}
    assert values == {
        "batch_size": 2,
        "steps": 1,
        "seed": 3,
        "dtype": "float32",
        "checkpoint_every": 1,
        "family": "gaf",
    }
    assert (config["gradient_checkpointing"], config["data"]["held_out"], config["data"]["prompt"]) == (False, 0.5, "owl")
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["final_learning_rate"]) == (1e-3, 1e-3)
    assert load_image(desk / "run" / "samples" / "step_000001.png").shape[:2] == (2 * SIZE, 9 * SIZE)
    source, trained = (read_model_config(desk / folder).defaults.negative_prompt for folder in ("gaf", "run/model"))
    assert source and not trained
    # the same call from another place goes on; another rate is another run
    assert train(command.replace("from gaf", "from ./gaf") + options + "2") == 0
    assert [row.step for row in read_log(desk / "run" / "log.csv")] == [1, 2]
    assert train(command.replace("1e-3", "1e-4") + options + "3") == 7
    before = "optimizer.learning_rate (was 0.001), optimizer.final_learning_rate (was 0.001)"
    assert f"run: holds a run with other values: {before}" in capfd.readouterr().err


def test_a_run_that_was_killed_goes_on_by_the_same_recipe(desk: Path) -> None:
    config = preset("gaf", source="gaf", data="captures", changes={"steps": 3, "batch_size": 1, "checkpoint_every": 1})
    config = replace(config, data=replace(config.data, targets=2), sample_every=2)

    def kill(model: Path, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, desk / "killed", on_sample=kill)
    assert [row.step for row in read_log(desk / "killed" / "log.csv")] == [1, 2]
    run(config, desk / "killed")
    run(config, desk / "whole")
    states = [(desk / name / "state.safetensors").read_bytes() for name in ("killed", "whole")]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("-o new", 2, "config must be a TOML file, or --family with --from and --data"),
        ("--from gaf --data captures -o new", 2, "config must be a TOML file, or --family with"),
        ("some.toml --family gaf -o new", 2, "family must be left out beside a CONFIG file"),
        ("some.toml --steps 3 -o new", 2, "steps must be left out beside a CONFIG file, which says it all, got 3"),
        ("some.toml --no-gradient-checkpointing -o new", 2, "--gradient-checkpointing must be left out beside a CONFIG"),
        ("--family gaf --data captures -o new", 2, "from must be given with --family: the model to start from"),
        ("--family gaf --from gaf -o new", 2, "data must be given with --family: a folder of captures"),
        ("--family mvdream --from gaf --data captures -o new", 2, "family must be one of gaf, got 'mvdream'"),
        ("--family gaf --from demo --data captures -o new", 2, "from must be the folder of a GAF model, got 'demo, of"),
        ("--family gaf --from gone --data captures -o new", 5, "no such model"),
        ("--family gaf --from captures --data captures -o new", 5, "model_index.json is missing"),
        ("--family gaf --from gaf --data gone -o new", 9, "gone: no such folder"),
        ("--family gaf --from gaf --data subject -o new", 9, "needs at least 2 captures .* has 1 .*held_out 0"),
        ("--family gaf --from gaf --data subject/one --held-out 0 -o new", 9, "is a capture itself"),
        ("--family gaf --from gaf --data captures --steps 0 -o new", 2, "steps must be a whole number of at least 1, got 0"),
        (
            "--family gaf --from gaf --data captures --batch-size 0 -o new",
            2,
            "--batch-size must be a whole number of at least 1",
        ),
        (
            "--family gaf --from gaf --data captures --checkpoint-every 0 -o new",
            2,
            "--checkpoint-every must be a whole number of at least 1",
        ),
        ("--family gaf --from gaf --data captures --learning-rate 0 -o new", 2, "--learning-rate must be above 0"),
        ("--family gaf --from gaf --data captures --learning-rate inf -o new", 2, "--learning-rate must be a finite number"),
        (
            "--family gaf --from gaf --data captures --dtype float64 -o new",
            2,
            "dtype must be float32, float16 or bfloat16",
        ),
        ("--family gaf --from gaf --data captures --seed -1 -o new", 2, "seed must be a whole number of at least 0"),
        ("--family gaf --from gaf --data captures --held-out nan -o new", 2, "--held-out must be 0 to below 1"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(
    desk: Path, capfd: pytest.CaptureFixture[str], arguments: str, code: int, words: str
) -> None:
    assert train(f"{arguments} --device cpu") == code
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert re.search(words, said), said
    assert not (desk / "new").exists()


# Captures


def breaking(change: Callable[[dict[str, Any], int], None], *names: str) -> Callable[[Path], None]:
    """A function that changes the frames of the named captures in a folder."""

    def apply(folder: Path) -> None:
        for name in names:
            path = folder / name / "transforms.json"
            document = json.loads(path.read_text())
            for index, frame in enumerate(document["frames"]):
                change(frame, index)
            path.write_text(json.dumps(document))

    return apply


def without_normals(frame: dict[str, Any], index: int) -> None:
    del frame["normal_file_path"]


def from_behind(frame: dict[str, Any], index: int) -> None:
    frame["transform_matrix"] = orbit([180.0 + index], 10.0)[0].tolist()


def resized(name: str, size_px: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for path in sorted(folder.glob(name)):
            with Image.open(path) as picture:
                picture.resize((size_px, size_px)).save(path)

    return apply


ALL = ("object_0", "object_1", "object_2", "object_3")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (breaking(without_normals, *ALL), "captures: no view has a normal map .* what a GAF model is for .*normals = false"),
        (resized("*/*.png", 24), "view_000.png: width and height must be multiples of 16 for this model, got 24 x 24 pixels"),
        (resized("object_3/view_001.png", 32), "object_3/view_001.png: all pictures must have one size, got 32 x 32 after"),
        (resized("object_0/normal_002.png", 32), "object_0/normal_002.png: all pictures must have one size"),
        (breaking(from_behind, *ALL), "the training captures have no view within .* of the front with 4 others"),
        (breaking(from_behind, "object_3"), "the held-out captures have no view within .* of the front with 4 others"),
    ],
)
def test_captures_that_do_not_fit_are_refused_before_anything_is_loaded(
    desk: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], words: str
) -> None:
    change(desk / "captures")
    monkeypatch.setattr(mvshared.training.loop, "_initial", lambda *_, **__: pytest.fail("loaded"))
    config = preset("gaf", source="gaf", data="captures", changes={"steps": 1, "batch_size": 1})
    with pytest.raises(DatasetError, match=words):
        run(config, desk / "new")
    assert not (desk / "new").exists()


def test_what_captures_lack_in_part_is_said(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    breaking(without_normals, "object_1")(desk / "captures")
    breaking(from_behind, "object_2")(desk / "captures")
    assert train("--family gaf --from gaf --data captures -o run --device cpu --steps 1 --batch-size 1") == 0
    said = capfd.readouterr().err.splitlines()
    assert "mvmlx: warning: 6 of 24 views have no normal map and are learned without" in said
    left_out = f"no view within +-50 degrees of the front with 4 others: {(desk / 'captures' / 'object_2').resolve()}"
    assert f"mvmlx: warning: not learned from, for there is {left_out}" in said


def test_normal_maps_may_be_left_out_where_a_configuration_says_so(desk: Path) -> None:
    breaking(without_normals, *ALL)(desk / "captures")
    config = preset("gaf", source="gaf", data="captures", changes={"steps": 1, "batch_size": 1})
    run(replace(config, data=replace(config.data, normals=False)), desk / "run")


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_single_capture_is_learned_with_none_held_out(desk: Path, stage: str, capfd: pytest.CaptureFixture[str]) -> None:
    if stage == "vae":
        run(vae_config(desk / "subject", data=DataConfig(folder="subject", held_out=0.0), steps=2), desk / "run")
    else:
        assert train("--family gaf --from gaf --data subject --held-out 0 --steps 2 --batch-size 1 -o run --device cpu") == 0
        assert load_image(desk / "run" / "samples" / "step_000002.png").shape[:2] == (SIZE, 9 * SIZE)
    rows = read_log(desk / "run" / "log.csv")
    assert rows[-1].step == 2
    assert [row.held_out_loss for row in rows] == [None] * len(rows)


# A subject that is learned


IDENTITY, VIEW_PX = 100042, 96
AZIMUTHS_DEG = (0.0, 72.0, 144.0, 216.0, 288.0)


def tiny_imagedream(folder: Path) -> Path:
    """An untrained model of ImageDream's kind with the demo model's VAE, whose pictures can be told from each other.

    It predicts v, as Stable Diffusion 2.1 for 768 pixels does: where there is all but only noise, the noise says nothing of the
    picture, and a short training does not get further than that.
    """
    given = read_model_config(TINY)
    assert given.unet.resampler is not None
    unet = replace(
        given.unet,
        in_channels=8,
        out_channels=8,
        block_out_channels=(32, 48),
        attention_levels=(False, True),
        norm_num_groups=8,
        resampler=replace(given.unet.resampler, depth=1),
    )
    for name in ("text_encoder", "image_encoder", "tokenizer", "feature_extractor"):
        shutil.copytree(TINY / name, folder / name)
    shutil.copytree(DEMO / "vae", folder / "vae")
    write_component(folder, "unet", unet, initial_weights(mvtorch.model.network_shapes(unet), seed=0, zeros=UNET_ZEROS))
    defaults = replace(given.defaults, size_px=VIEW_PX, steps=20, negative_prompt="")
    scheduler = replace(given.scheduler, prediction_type="v_prediction")
    parts: dict[str, Any] = {"vae": read_vae_config(DEMO), "scheduler": scheduler, "defaults": defaults, "unet": unet}
    write_model_config(folder, replace(given, family="custom", **parts))
    return folder


@pytest.mark.slow
def test_a_subject_is_learned_to_25_db_and_its_cameras_and_normal_maps_steer_it(tmp_path: Path) -> None:
    poses = orbit(AZIMUTHS_DEG, 10.0, radius=DEFAULT_RADIUS)
    head = render(IDENTITY, poses, size_px=VIEW_PX)
    write_capture(tmp_path / "subject" / "head", head.rgba, head.normals, poses, DEFAULT_FOV_DEG)
    init_gaf(tiny_imagedream(tmp_path / "source"), tmp_path / "gaf")
    command = f"--family gaf --from {tmp_path}/gaf --data {tmp_path}/subject -o {tmp_path}/run --backend torch --device cpu"
    options = "--held-out 0 --steps 600 --batch-size 4 --learning-rate 6e-3 --checkpoint-every 600 --no-gradient-checkpointing"
    assert train(f"{command} {options}") == 0

    truth = composite(head.rgba)
    untrained, trained = (load(folder, backend="torch", device="cpu") for folder in (tmp_path / "gaf", tmp_path / "run/model"))

    def agreement(pipeline: Any, cameras: list[int], normals: list[int], views: list[int]) -> float:
        """Mean PSNR of views made with the cameras and normal maps of some views against the pictures of others."""
        maps = list(head.normals[normals])
        made = pipeline.generate(truth[0], cameras=poses[cameras], normals=maps, guidance=1).images
        return float(np.mean(psnr(made, truth[views])))

    order, turned = [1, 2, 3, 4], [4, 3, 2, 1]
    learned = agreement(trained, order, order, order)
    assert learned >= 25
    assert agreement(trained, turned, turned, turned) >= 25
    assert agreement(trained, turned, turned, order) < 18
    assert agreement(trained, order, turned, order) < learned - 1
    assert agreement(untrained, order, order, order) < 10
