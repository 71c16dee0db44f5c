"""Runs on disk: the output folder, repeating a run from its metadata.json, and interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, Backend, Recorded, normal_maps, record, write_tiny_model
from PIL import Image
from safetensors.numpy import load_file, save_file

import mvshared.export
from mvshared.backend import load
from mvshared.camera import load_cameras, orbit
from mvshared.checkpoint import WEIGHT_FILE
from mvshared.errors import CheckpointError, ConfigError, MvError, OptionError, OutputError
from mvshared.images import load_image, save_png
from mvshared.memory.plan import PLAIN
from mvshared.pipeline import Pipeline
from mvshared.repetition import repeat
from mvshared.runs import Run, Views, read_run
from mvshared.weights import sha256_of_files

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
MAPS = normal_maps(2)
VIEW_FILES = {"view_000.png", "view_001.png"}
RUN_FILES = VIEW_FILES | {"grid.png", "turntable.gif", "latents.npy", "transforms.json", "metadata.json"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipelines(model_folder: Path) -> dict[Backend, Pipeline[Any]]:
    return {backend: load(model_folder, backend=backend, device="cpu") for backend in BACKENDS}


@pytest.fixture(params=BACKENDS)
def pipeline(request: pytest.FixtureRequest, pipelines: dict[Backend, Pipeline[Any]]) -> Pipeline[Any]:
    return pipelines[request.param]


@pytest.fixture
def recorded(pipelines: dict[Backend, Pipeline[Any]]) -> Recorded:
    return record(pipelines["torch"])


@pytest.fixture(scope="module")
def views(pipelines: dict[Backend, Pipeline[Any]]) -> Views:
    return pipelines["torch"].generate(PIXELS)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    save_png(tmp_path / "picture.png", PIXELS)
    return tmp_path / "picture.png"


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """A folder of two normal maps."""
    (tmp_path / "maps").mkdir()
    for index, pixels in enumerate(MAPS):
        save_png(tmp_path / "maps" / f"normal_{index}.png", pixels)
    return tmp_path / "maps"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The output folder


def test_a_run_leaves_its_views_a_grid_a_turntable_and_its_description(views: Views, tmp_path: Path) -> None:
    folder = views.save(str(tmp_path / "deep" / "out"))
    assert folder == tmp_path / "deep" / "out"
    assert contents(folder).keys() == RUN_FILES
    for name, image in zip(sorted(VIEW_FILES), views.images, strict=True):
        np.testing.assert_array_equal(load_image(folder / name)[..., :3], image)
    np.testing.assert_array_equal(load_image(folder / "grid.png")[..., :3], np.concatenate(list(views.images), axis=1))
    with Image.open(folder / "turntable.gif") as turntable:
        assert getattr(turntable, "n_frames", 1) == 2


def test_transforms_of_a_run_hold_its_cameras_and_name_its_views(views: Views, tmp_path: Path) -> None:
    path = views.save(tmp_path / "out") / "transforms.json"
    cameras = load_cameras(path)
    np.testing.assert_array_equal(cameras.poses, views.cameras)
    assert cameras.fov_deg == pytest.approx(views.parameters.fov_deg)
    assert [frame["file_path"] for frame in json.loads(path.read_text())["frames"]] == sorted(VIEW_FILES)


def test_metadata_of_a_run_holds_every_parameter_and_the_hashes_of_the_weights(
    pipeline: Pipeline[Any], picture: Path, tmp_path: Path
) -> None:
    views = pipeline.generate(picture, steps=3, guidance=1.5, eta=0.25, seed=7, size_px=48)
    document = json.loads((views.save(tmp_path / "out") / "metadata.json").read_text())
    parameters = document["parameters"]
    assert {name: parameters[name] for name in ("steps", "guidance", "eta", "seed", "size_px", "scheduler")} == {
        "steps": 3, "guidance": 1.5, "eta": 0.25, "seed": 7, "size_px": 48, "scheduler": "ddim",
    }  # fmt: skip
    assert (parameters["backend"], parameters["device"], parameters["dtype"]) == (pipeline.model.backend, "cpu", "float32")
    assert (parameters["image"], parameters["normals"], parameters["latents_sha256"]) == (str(picture), None, None)
    np.testing.assert_array_equal(np.asarray(parameters["cameras"], np.float32), views.cameras)
    assert document["weights"] == sha256_of_files(pipeline.model.weight_files)
    assert document["weights"].keys() == {f"unet/{WEIGHT_FILE}", f"vae/{WEIGHT_FILE}"}


def test_a_finished_run_is_overwritten_with_force_only(pipeline: Pipeline[Any], views: Views, tmp_path: Path) -> None:
    folder = views.save(tmp_path / "out")
    before = contents(folder)
    one = pipeline.generate(PIXELS, views=1, steps=1)
    with pytest.raises(OutputError, match="finished run") as caught:
        one.save(folder)
    assert caught.value.exit_code == 7 and contents(folder) == before
    one.save(folder, force=True)
    assert contents(folder).keys() == RUN_FILES - {"view_001.png"}


@pytest.mark.parametrize("writer", ["save_png", "encode_png", "save_turntable", "write_json", "finish"])
@pytest.mark.parametrize("error", [OutputError("disk full", path="x"), KeyboardInterrupt()], ids=["failure", "interrupt"])
def test_a_save_that_breaks_off_leaves_no_finished_run_and_the_next_one_works(
    views: Views, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    views.save(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(mvshared.export, writer, fail)
        with pytest.raises(type(error)):
            views.save(tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "metadata.json").exists()
    for path in (tmp_path / "out").glob("*.png"):
        load_image(path)
    views.save(tmp_path / "out")
    assert contents(tmp_path / "out").keys() == RUN_FILES


def test_a_run_whose_weights_are_gone_leaves_the_run_before_untouched(model_folder: Path, views: Views, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    late = load(tmp_path / "model", backend="torch", device="cpu").generate(PIXELS, steps=1)
    before = contents(views.save(tmp_path / "out"))
    (tmp_path / "model" / "unet" / WEIGHT_FILE).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        late.save(tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == before


def test_weights_that_changed_after_they_were_loaded_are_not_vouched_for(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    late = load(tmp_path / "model", backend="torch", device="cpu").generate(PIXELS, steps=1)
    file = tmp_path / "model" / "vae" / WEIGHT_FILE
    file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"model: weight files have another size or time than when they were loaded"):
        late.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Repeating a run


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 1.0},
        {"guidance": 4.3, "seed": 2**63 - 1},
        {"guidance": 2.1, "eta": 0.3, "steps": 3, "views": 3, "elevation_deg": 17.3},
        {"cameras": orbit([1.1, 2.2, 3.3], [-10, 0.7, 90], radius=1.7), "size_px": 48},
        {"normals": "folder"},
        {"normals": "files", "eta": 1.0},
        {"normals": "files", "guidance_image": 3.3, "guidance_normals": 1.7, "guidance_interval": (0.1, 0.9), "steps": 3},
        {"guidance_rescale": 0.7, "reference_scale": 0.3},
        {"scheduler": "unipc", "spacing": "karras", "steps": 4},
        {"guidance_every": 2, "kv_pooling": 2, "steps": 3},
        {"scheduler": "euler-ancestral", "spacing": "trailing", "steps": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_run_repeats_bit_for_bit_from_its_metadata(
    pipeline: Pipeline[Any], picture: Path, maps: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    forms: dict[str, Any] = {"folder": maps, "files": sorted(maps.iterdir())}
    if "normals" in options:
        options = options | {"normals": forms[options["normals"]]}
    views = pipeline.generate(picture, **options)
    folder = views.save(tmp_path / "out")
    again = repeat(pipeline, read_run(folder / "metadata.json"))
    np.testing.assert_array_equal(again.latents, views.latents, strict=True)
    np.testing.assert_array_equal(again.cameras, views.cameras, strict=True)
    assert again.parameters == views.parameters
    assert contents(again.save(tmp_path / "again")) == contents(folder)


def test_a_run_repeats_from_another_folder(
    model_folder: Path, picture: Path, maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    pipeline = load(model_folder.name, backend="torch", device="cpu")
    monkeypatch.chdir(tmp_path)
    views = pipeline.generate(picture.name, normals=maps.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = read_run(views.save(tmp_path / "out"))
    assert Path(run.parameters.model) == model_folder.resolve()
    again = repeat(load(run.parameters.model, backend="torch", device="cpu"), run)
    np.testing.assert_array_equal(again.latents, views.latents)


def saved_run(recorded: Recorded, tmp_path: Path, image: Any, **options: Any) -> Run:
    """A run that was saved and read back; the record of calls begins after it."""
    folder = recorded.pipeline.generate(image, **options).save(tmp_path / "out")
    recorded.model.calls.clear()
    return read_run(folder)


def test_a_parameter_that_is_none_is_named_with_the_file_that_has_it(recorded: Recorded, picture: Path, tmp_path: Path) -> None:
    folder = recorded.pipeline.generate(picture).save(tmp_path / "out")
    path = folder / "metadata.json"
    document = json.loads(path.read_text())
    document["parameters"]["steps"] = "many"
    path.write_text(json.dumps(document))
    for place in (folder, path):
        with pytest.raises(ConfigError, match=r"metadata\.json: parameters\.steps must be a whole number, got 'man") as caught:
            read_run(place)
        assert caught.value.path == path


@pytest.mark.parametrize("given", ["image", "latents", "normals", "one normal map"])
def test_what_was_given_in_memory_cannot_be_repeated(
    recorded: Recorded, picture: Path, maps: Path, tmp_path: Path, given: str
) -> None:
    options: dict[str, Any] = {
        "image": {"image": PIXELS},
        "latents": {"image": picture, "latents": np.zeros((2, 8, 8, 4), np.float32)},
        "normals": {"image": picture, "normals": list(MAPS)},
        "one normal map": {"image": picture, "normals": [maps / "normal_0.png", MAPS[1]]},
    }
    run = saved_run(recorded, tmp_path, **options[given])
    with pytest.raises(OptionError) as caught:
        repeat(recorded.pipeline, run)
    assert caught.value.name == given.replace("one normal map", "normals")
    assert not recorded.model.calls


@pytest.mark.parametrize("changed", ["image", "normals"])
def test_a_picture_that_changed_is_refused_before_any_work(
    recorded: Recorded, picture: Path, maps: Path, tmp_path: Path, changed: str
) -> None:
    run = saved_run(recorded, tmp_path, picture, normals=maps)
    path = picture if changed == "image" else maps / "normal_1.png"
    pixels = load_image(path)[..., :3]
    pixels[0, 0, 0] ^= 128
    save_png(path, pixels)
    with pytest.raises(MvError, match=f"{changed}.*has changed"):
        repeat(recorded.pipeline, run)
    assert not recorded.model.calls


def test_a_run_from_latents_in_a_file_is_repeated_unless_they_changed(
    pipeline: Pipeline[Any], picture: Path, tmp_path: Path
) -> None:
    first = pipeline.generate(picture, seed=5)
    first.save(tmp_path / "first")
    latents = tmp_path / "first" / "latents.npy"
    np.testing.assert_array_equal(np.load(latents), first.latents)
    views = pipeline.generate(picture, latents=latents)
    run = read_run(views.save(tmp_path / "second"))
    assert run.parameters.latents == str(latents)
    np.testing.assert_array_equal(repeat(pipeline, run).latents, views.latents)
    np.testing.assert_array_equal(pipeline.generate(picture, latents=np.load(latents)).latents, views.latents)
    np.save(latents, first.latents + 1)
    with pytest.raises(OptionError, match="latents must be as it was in the run; it has changed"):
        repeat(pipeline, run)


HUGE = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}".ljust(117) + b"\n"


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 an archive that is cut off", HUGE, None])
def test_latents_that_are_no_file_of_floats_are_refused(
    recorded: Recorded, picture: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "latents.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=r"latents must be an \.npy file of floats"):
        recorded.pipeline.generate(picture, latents=path)
    assert not recorded.model.calls


def test_a_picture_or_a_normal_map_that_is_gone_is_refused(
    recorded: Recorded, picture: Path, maps: Path, tmp_path: Path
) -> None:
    run = saved_run(recorded, tmp_path, picture, normals=maps)
    for path in (maps / "normal_1.png", picture):
        path.unlink()
        with pytest.raises(MvError):
            repeat(recorded.pipeline, run)
    assert not recorded.model.calls


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_other_weights_are_refused(
    model_folder: Path, recorded: Recorded, picture: Path, tmp_path: Path, component: str
) -> None:
    run = saved_run(recorded, tmp_path, picture)
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / component / WEIGHT_FILE
    weights = load_file(path)
    next(iter(weights.values())).flat[0] += 1e-3
    save_file(weights, path)
    other = record(load(tmp_path / "model", backend="torch", device="cpu"))
    with pytest.raises(CheckpointError, match=f"{component}/.*weights have changed"):
        repeat(other.pipeline, run)
    assert not other.model.calls


def test_the_same_weights_with_another_configuration_are_refused(
    model_folder: Path, recorded: Recorded, picture: Path, tmp_path: Path
) -> None:
    run = saved_run(recorded, tmp_path, picture)
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.013}))
    other = record(load(tmp_path / "model", backend="torch", device="cpu"))
    with pytest.raises(OptionError, match="config_sha256"):
        repeat(other.pipeline, run)
    assert not other.model.calls


def test_the_other_backend_is_refused(pipelines: dict[Backend, Pipeline[Any]], picture: Path, tmp_path: Path) -> None:
    run = read_run(pipelines["torch"].generate(picture, steps=1).save(tmp_path / "out"))
    with pytest.raises(OptionError, match="backend"):
        repeat(pipelines["mlx"], run)


PARAMETERS = (
    "model", "family", "backend", "dtype", "device", "image", "image_sha256", "image_scale", "reference_scale",
    "prompt", "negative_prompt", "normals", "normals_sha256", "normal_space", "latents", "latents_sha256", "cameras", "fov_deg",
    "steps", "guidance", "guidance_text", "guidance_image", "guidance_normals", "guidance_interval", "guidance_every",
    "guidance_rescale",
    "scheduler", "spacing", "eta", "kv_pooling", "seed", "size_px", "config_sha256", "upscale", "quantization", "memory",
)  # fmt: skip
NEWER = {"reference_scale": 1.0, "guidance_text": None, "guidance_image": None, "guidance_normals": None,
         "guidance_interval": [0.0, 1.0], "guidance_every": 1, "guidance_rescale": 0.0, "spacing": "leading", "kv_pooling": 1,
         "upscale": None, "quantization": None, "memory": asdict(PLAIN)}  # fmt: skip
DELETED = object()
# Which model "x" is, load() decides; without a space the maps are in their own.
ALLOWED: tuple[Any, ...] = (
    ("model", "x"),
    ("spacing", None),
    ("normal_space", DELETED),
    ("normal_space", None),
    ("memory", {}),
)
WRONG_VALUES: tuple[Any, ...] = (DELETED, None, True, "x", -1, 10**400, [], {}, [None], [[[1.0]]], [["x"]])


def test_a_file_from_before_a_parameter_repeats_with_its_default(
    pipeline: Pipeline[Any], picture: Path, tmp_path: Path
) -> None:
    views = pipeline.generate(picture)
    path = views.save(tmp_path / "out") / "metadata.json"
    document = json.loads(path.read_text())
    assert {name: document["parameters"].pop(name) for name in NEWER} == NEWER
    path.write_text(json.dumps(document))
    again = repeat(pipeline, read_run(path))
    np.testing.assert_array_equal(again.latents, views.latents)
    assert again.parameters == views.parameters


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_edited_parameter_is_refused_in_one_clear_line(
    recorded: Recorded, picture: Path, maps: Path, tmp_path: Path, name: str
) -> None:
    saved_run(recorded, tmp_path, picture, normals=maps)
    path = tmp_path / "out" / "metadata.json"
    document = json.loads(path.read_text())
    assert tuple(document["parameters"]) == PARAMETERS
    for value in WRONG_VALUES:
        parameters = dict(document["parameters"])
        if parameters.pop(name) == value or (name, value) in ALLOWED:
            continue
        if value is DELETED and name in NEWER:
            continue
        path.write_text(json.dumps(document | {"parameters": parameters | ({} if value is DELETED else {name: value})}))
        with pytest.raises(MvError) as caught:
            repeat(recorded.pipeline, read_run(path))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000, value
        assert not recorded.model.calls, value


@pytest.mark.parametrize("weights", [None, [], "x", {}, {f"unet/{WEIGHT_FILE}": 1}, {f"unet/{WEIGHT_FILE}": "0" * 64}])
def test_edited_hashes_of_the_weights_are_refused(recorded: Recorded, picture: Path, tmp_path: Path, weights: Any) -> None:
    saved_run(recorded, tmp_path, picture)
    path = tmp_path / "out" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}))
    with pytest.raises(MvError, match="weights"):
        repeat(recorded.pipeline, read_run(path))
    assert not recorded.model.calls


# Interruptions

# The program says when it is where the signal should find it. A parent that ignores SIGINT would hand that down.
INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import mvshared.export
from mvshared.cli import main
def stall(*_):
    print("saving", flush=True)
    time.sleep(60)
if sys.argv[1]:
    setattr(mvshared.export, sys.argv[1], stall)
sys.argv = ["mvmlx", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize(
    ("stalled", "signal_at", "left"),
    [
        ("", '"event": "step", "step": 3', set()),
        ("save_turntable", "saving", VIEW_FILES | {"grid.png"}),
    ],
)
def test_ctrl_c_leaves_no_half_written_file_and_no_finished_run(
    model_folder: Path, picture: Path, tmp_path: Path, stalled: str, signal_at: str, left: set[str]
) -> None:
    root = Path(__file__).parents[1]
    steps = "1" if stalled else "900"
    arguments = f"generate picture.png --model {model_folder} --backend torch --device cpu -o out --json --steps {steps}"
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, stalled, *arguments.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "shared")))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(signal_at in line for line in lines)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "mvmlx: error: interrupted" in errors and "Traceback" not in errors
    files = contents(tmp_path / "out") if (tmp_path / "out").exists() else {}
    assert files.keys() - {".unfinished"} == left
    for name in files:
        if name.endswith((".png", ".gif")):
            load_image(tmp_path / "out" / name)
