"""The training loop, its configuration and its batches, on tiny data; on PyTorch unless the backend matters."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, TINY_UNET, TINY_VAE, assert_close
from numpy.typing import NDArray
from safetensors.numpy import load_file

import mvmlx.train
import mvshared.training.loop
import mvtorch.model
import mvtorch.train
from mvshared.camera import camera_vectors, mirror_poses, orbit
from mvshared.captures import load_capture, write_capture
from mvshared.checkpoint import read_model_config, weight_file
from mvshared.config import SchedulerConfig
from mvshared.errors import (
    BackendError,
    ConfigError,
    DatasetError,
    NumericsError,
    OptionError,
    OutputError,
    TensorMismatchError,
)
from mvshared.schedule import alphas_cumprod
from mvshared.training.config import DataConfig, OptimizerConfig, TrainConfig, load_train_config, parse_train_config
from mvshared.training.data import Latents, VAEPictures, ViewBatches, encode_captures, find_captures, read_normals, read_picture
from mvshared.training.initial import LOGVAR, UNET_ZEROS, initial_vae_weights, initial_weights
from mvshared.training.log import LogRow, TrainingLog, read_log
from mvshared.training.loop import learning_rate, train

ROOT = Path(__file__).resolve().parent.parent
AZIMUTHS = (0.0, 40.0, 90.0, 180.0, 270.0, 320.0)
SIZE = 16
VAE = replace(TINY_VAE, block_out_channels=(8, 16), mid_block_add_attention=False)
UNET = replace(
    TINY_UNET, in_channels=8, camera_dim=16, reference_frame=True, cross_attention_dim=None, block_out_channels=(16, 32)
)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=2)


def write_object(folder: Path, number: int) -> None:
    """A capture of a coloured ball beside the axis, with normal maps."""
    poses = orbit(AZIMUTHS, 10.0)
    across, down = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    rgba = np.zeros((len(AZIMUTHS), SIZE, SIZE, 4), np.uint8)
    normals = np.full((len(AZIMUTHS), SIZE, SIZE, 4), (128, 128, 128, 0), np.uint8)
    colour = np.random.default_rng(number).integers(60, 255, 3)
    for view, azimuth in enumerate(np.radians(AZIMUTHS)):
        x, y = (across - 0.3 * np.sin(azimuth)) / 0.6, -down / 0.6
        z = np.sqrt(np.clip(1 - x**2 - y**2, 0, None))
        inside = x**2 + y**2 < 1
        rgba[view, inside] = np.append(colour, 255)
        rgba[view, inside & (z < 0.5), :3] //= 2
        rgba[view, inside & (x > 0.2) & (y > 0.2), view % 3] = 0  # so that it differs from its mirror image
        normals[view, inside] = np.stack([(value[inside] + 1) / 2 * 255 for value in (x, y, z, np.ones_like(z))], axis=-1)
    write_capture(folder, rgba, normals, poses, 40.0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(4):
        write_object(folder / f"object_{number}", number)
    return folder


def vae_config(folder: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": "vae",
        "data": DataConfig(folder=str(folder), held_out=0.25, targets=2),
        "steps": 4,
        "batch_size": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "sample_every": 3,
        "optimizer": OPTIMIZER,
        "vae": VAE,
    }
    return TrainConfig(**(values | changes))


def unet_config(folder: Path, vae: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": "unet",
        "vae": None,
        "vae_from": str(vae),
        "unet": UNET,
        "scheduler": SchedulerConfig(prediction_type="v_prediction"),
    }
    return vae_config(folder, **(values | changes))


def run(config: TrainConfig, folder: Path, *, backend: str = "torch", **options: Any) -> Path:
    return train(config, folder, backend=backend, device="cpu", **options)


@pytest.fixture(scope="session")
def vae(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a VAE after a few steps."""
    return run(vae_config(data, steps=2), tmp_path_factory.mktemp("vae") / "run")


def toml(config: TrainConfig) -> str:
    """The configuration as TOML, which has no null."""

    def lines(values: dict[str, Any]) -> list[str]:
        return [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]

    document = {name: value for name, value in asdict(config).items() if value is not None}
    tables = {name: value for name, value in document.items() if isinstance(value, dict)}
    plain = {name: value for name, value in document.items() if name not in tables}
    return "\n".join([*lines(plain), *(line for name, table in tables.items() for line in (f"[{name}]", *lines(table)))])


def weights_of(run_folder: Path, component: str) -> dict[str, NDArray[Any]]:
    return load_file(weight_file(run_folder / "model", component))  # type: ignore[arg-type]


# Runs that are interrupted


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_run_killed_at_any_point_ends_as_one_that_was_left_alone(data: Path, vae: Path, tmp_path: Path, stage: str) -> None:
    config = vae_config(data, steps=3) if stage == "vae" else unet_config(data, vae, steps=3)
    (tmp_path / "config.toml").write_text(toml(config))
    done = subprocess.run(
        [sys.executable, ROOT / "tests/kill_training.py", tmp_path / "config.toml", tmp_path, "1" if stage == "vae" else "2"],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 8
    assert [kill for kill in kills if kill["different"]] == []


def test_what_a_killed_run_left_half_written_is_removed(data: Path, tmp_path: Path) -> None:
    run(vae_config(data), tmp_path / "run")
    leftovers = [tmp_path / "run/.state.safetensors.0a1b.tmp", tmp_path / "run/model/vae/.config.json.0a1b.tmp"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    run(vae_config(data), tmp_path / "run")
    assert not any(leftover.exists() for leftover in leftovers)


def test_more_steps_continue_a_finished_run_and_fewer_are_refused(data: Path, tmp_path: Path) -> None:
    run(vae_config(data, steps=2), tmp_path / "run")
    run(vae_config(data, steps=3), tmp_path / "run")
    assert [row.step for row in read_log(tmp_path / "run/log.csv")] == [1, 2, 3]
    with pytest.raises(OutputError, match="holds a run of 3 steps, 2 were asked for"):
        run(vae_config(data, steps=2), tmp_path / "run")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = VAEPictures.batch

    def poisoned(self: VAEPictures, step: int, *, size: int, seed: int) -> Any:
        batch = healthy(self, step, size=size, seed=seed)
        return batch._replace(pixels=batch.pixels * np.float32("nan")) if (step, seed) == (3, 0) else batch

    monkeypatch.setattr(VAEPictures, "batch", poisoned)
    with pytest.raises(NumericsError, match="training step 3: loss nan"):
        run(vae_config(data), tmp_path / "run")
    assert load_file(tmp_path / "run/state.safetensors")["steps"] == 2
    monkeypatch.undo()
    run(vae_config(data), tmp_path / "run")
    run(vae_config(data), tmp_path / "whole")
    assert (tmp_path / "run/state.safetensors").read_bytes() == (tmp_path / "whole/state.safetensors").read_bytes()
    steps = [row.step for row in read_log(tmp_path / "run/log.csv")]
    assert steps == [1, 2, 3, 4]


def test_a_run_of_another_config_is_refused_by_the_name_of_the_field(data: Path, tmp_path: Path) -> None:
    run(vae_config(data, steps=1), tmp_path / "run")
    with pytest.raises(OutputError, match="holds a run with other values of batch_size, optimizer"):
        run(vae_config(data, batch_size=3, optimizer=replace(OPTIMIZER, eps=1e-6)), tmp_path / "run")


def test_a_run_written_before_a_field_existed_goes_on(data: Path, tmp_path: Path) -> None:
    run(vae_config(data, steps=1), tmp_path / "run")
    path = tmp_path / "run/config.json"
    document = json.loads(path.read_text())
    del document["model_dtype"], document["optimizer"]["weight_decay"]
    path.write_text(json.dumps(document))
    run(vae_config(data, steps=2), tmp_path / "run")


def test_a_folder_with_something_else_is_refused_and_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    (tmp_path / ".backup.tmp").write_text("nor this")
    with pytest.raises(OutputError, match="is not empty and holds no training run"):
        run(vae_config(data), tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        run(vae_config(data), tmp_path / "thesis.tex")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".backup.tmp", "thesis.tex"]


def test_the_state_of_another_network_is_refused(data: Path, tmp_path: Path) -> None:
    run(vae_config(data, steps=1), tmp_path / "a")
    run(vae_config(data, steps=1, vae=replace(VAE, latent_channels=3)), tmp_path / "b")
    (tmp_path / "a/state.safetensors").write_bytes((tmp_path / "b/state.safetensors").read_bytes())
    with pytest.raises(TensorMismatchError, match="mis-shaped"):
        run(vae_config(data, steps=2), tmp_path / "a")


# What a run leaves


def test_a_finished_unet_run_is_a_checkpoint_that_loads(data: Path, vae: Path, tmp_path: Path) -> None:
    seen: list[tuple[Path, int]] = []
    folder = run(unet_config(data, vae), tmp_path / "run", on_sample=lambda model, step: seen.append((model, step)))
    assert seen == [(folder, 3), (folder, 4)]
    config = read_model_config(folder)
    assert config.unet == UNET
    assert config.vae.latents_mean is not None
    model = mvtorch.model.load_model(folder, device="cpu")
    assert model.config == config
    state = load_file(tmp_path / "run/state.safetensors")
    for name, array in weights_of(tmp_path / "run", "unet").items():
        np.testing.assert_array_equal(array, state[f"ema.{name}"])
    rows = read_log(tmp_path / "run/log.csv")
    assert [row.step for row in rows] == [1, 2, 3, 4]
    assert [row.held_out_loss is not None for row in rows] == [False, True, False, True]


def test_latents_of_the_trained_model_have_mean_0_and_deviation_1(data: Path, vae: Path, tmp_path: Path) -> None:
    folder = run(unet_config(data, vae, steps=1), tmp_path / "run")
    model = mvtorch.model.load_model(folder, device="cpu")
    training, _ = find_captures(data, held_out=0.25)
    pixels = [read_picture(p, background=(255, 255, 255)).pixels for f in training for p in load_capture(f).image_paths]
    both = np.stack([*pixels, *(picture[:, ::-1] for picture in pixels)])
    latents = model.to_numpy(model.encode_latents(both))
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=0.01)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=0.01)


def test_captures_are_encoded_once(data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(unet_config(data, vae, steps=1), tmp_path / "run")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(mvtorch.model, "load_vae", forbidden)
    run(unet_config(data, vae, steps=2), tmp_path / "run")
    with pytest.raises(AssertionError, match="encoded again"):
        run(unet_config(data, vae, steps=2), tmp_path / "new")


def test_training_starts_from_the_weights_of_init_from(data: Path, vae: Path, tmp_path: Path) -> None:
    still = OptimizerConfig(learning_rate=1e-30, final_learning_rate=0.0, weight_decay=0.0)
    run(vae_config(data, steps=1, init_from=str(vae), optimizer=still), tmp_path / "run")
    for name, array in weights_of(tmp_path / "run", "vae").items():
        np.testing.assert_allclose(array, load_file(weight_file(vae, "vae"))[name], atol=1e-7)
    with pytest.raises(TensorMismatchError, match="mis-shaped"):
        run(vae_config(data, init_from=str(vae), vae=replace(VAE, latent_channels=3)), tmp_path / "other")


def test_the_loss_of_the_vae_falls(data: Path, tmp_path: Path) -> None:
    config = vae_config(data, steps=60, checkpoint_every=60, log_every=10, optimizer=replace(OPTIMIZER, learning_rate=1e-2))
    run(config, tmp_path / "run")
    losses = [row.loss for row in read_log(tmp_path / "run/log.csv")]
    assert losses[-1] < 0.75 * losses[0]


def test_the_loss_of_the_unet_falls(data: Path, vae: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=5e-3, warmup_steps=5)
    config = unet_config(data, vae, steps=100, checkpoint_every=100, log_every=20, optimizer=optimizer, batch_size=4)
    run(config, tmp_path / "run")
    losses = [row.loss for row in read_log(tmp_path / "run/log.csv")]
    assert losses[-1] < 0.87 * losses[0]


def test_both_backends_end_with_the_same_weights(data: Path, vae: Path, tmp_path: Path) -> None:
    smooth = replace(OPTIMIZER, eps=1e-2)  # see test_parity_training
    for stage, config in (("vae", vae_config(data)), ("unet", unet_config(data, vae))):
        folders = {name: tmp_path / f"{stage}-{name}" for name in BACKENDS}
        for name, folder in folders.items():
            run(replace(config, optimizer=smooth), folder, backend=name)
        ours, theirs = (weights_of(folders[name], stage) for name in ("mlx", "torch"))
        assert ours.keys() == theirs.keys()
        assert_close(*(np.concatenate([w[name].ravel() for name in sorted(w)]) for w in (ours, theirs)), rms=1e-4)


# Configuration


def test_a_file_gives_the_configuration_that_was_written(data: Path, tmp_path: Path) -> None:
    for config in (vae_config(data), unet_config(data, data)):
        (tmp_path / "train.toml").write_text(toml(config))
        assert load_train_config(tmp_path / "train.toml") == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size = 2", "batch_sise = 2", "unknown field 'batch_sise'"),
        ("batch_size = 2", "", "the field 'batch_size' is missing"),
        ("batch_size = 2", "batch_size = 2.5", "batch_size must be int, got 2.5"),
        ("batch_size = 2", "batch_size = true", "batch_size must be int, got True"),
        ("batch_size = 2", "batch_size = 0", "batch_size must be at least 1, got 0"),
        ("seed = 0", "seed = -1", "seed must be at least 0, got -1"),
        ('dtype = "float32"', 'dtype = "float64"', "dtype must be"),
        ('stage = "vae"', 'stage = "clip"', "stage must be"),
        ('stage = "vae"', 'stage = "unet"', "unet must be a table of UNetConfig fields, and vae_from"),
        ("[vae]", "[voe]", "unknown field 'voe'"),
        ("[data]", "[data]\nfolders = 3", "unknown field 'data.folders'"),
        ("held_out = 0.25", "held_out = 2", "held_out must be 0 to 1, got 2.0"),
        ("held_out = 0.25", "held_out = nan", "held_out must be float, got nan"),
        ("background = [255, 255, 255]", "background = [255, 255]", "background must be"),
        ("background = [255, 255, 255]", "background = [255, 255, 256]", "background must be 0 to 255"),
        ("betas = [0.9, 0.99]", "betas = [0.9, 1.0]", "betas must be two numbers from 0 to below 1"),
        ("learning_rate = 0.002", "learning_rate = 0", "learning_rate must be above 0, got 0"),
        ("eps = 1e-08", "eps = -1.0", "eps must be above 0"),
        ("ema_decay = 0.999", "ema_decay = 1.0", "ema_decay must be 0 to below 1"),
        ("norm_num_groups = 8", "norm_num_groups = 3", "block_out_channels must be multiples of norm_num_groups"),
        ("batch_size = 2", "batch_size = ", "is no valid TOML"),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_field_and_the_file(
    data: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = toml(vae_config(data))
    assert old in text
    path = tmp_path / "train.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as raised:
        load_train_config(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_missing_table_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the field 'data' is missing"):
        parse_train_config({"stage": "vae", "steps": 1, "batch_size": 1, "vae": {}}, path=tmp_path)
    with pytest.raises(ConfigError, match="must hold an object, got 3"):
        parse_train_config({"stage": "vae", "steps": 1, "batch_size": 1, "vae": {}, "data": 3}, path=tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_train_config(tmp_path / "none.toml")


# The schedule of the learning rate, and the log


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(config, step=step, steps=25) for step in range(25)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[14] == pytest.approx(0.55)  # half-way from step 4 to step 24
    assert rates[24] == pytest.approx(0.1)
    assert all(after < before for before, after in pairwise(rates[4:]))


def test_a_schedule_without_warm_up_or_with_a_single_step_is_fine() -> None:
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=0)
    assert learning_rate(config, step=0, steps=1) == 1.0
    assert learning_rate(replace(config, warmup_steps=10), step=0, steps=3) == pytest.approx(0.1)


def test_the_log_drops_what_came_after_the_last_state(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, last_step=0)
    rows = [LogRow(step, 1 / 3 + step, None if step % 2 else 0.1, 2.0, 1e-3, 0.5) for step in range(1, 6)]
    for row in rows:
        log.add(row)
    resumed = TrainingLog(tmp_path, last_step=3)
    assert resumed.rows == rows[:3]
    resumed.add(rows[3])
    assert read_log(tmp_path / "log.csv") == rows[:4]


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n1,x\n")
    with pytest.raises(ConfigError, match="is no training log"):
        TrainingLog(tmp_path, last_step=3)


# Captures and batches


def test_the_last_captures_are_held_out_and_both_sides_have_one(data: Path) -> None:
    names = [path.name for path in sorted(data.iterdir())]
    for share, count in ((0.0, 1), (0.25, 1), (0.5, 2), (1.0, 3)):
        training, held_out = find_captures(data, held_out=share)
        assert [path.name for path in (*training, *held_out)] == names
        assert len(held_out) == count


def test_a_folder_with_fewer_than_two_captures_is_refused(tmp_path: Path) -> None:
    write_object(tmp_path / "one", 1)
    with pytest.raises(DatasetError, match="needs at least 2 captures"):
        find_captures(tmp_path, held_out=0.1)


def test_pictures_are_put_on_the_background_and_normals_on_zero(data: Path) -> None:
    capture = load_capture(data / "object_0")
    picture = read_picture(capture.image_paths[0], background=(0, 255, 51))
    np.testing.assert_allclose(picture.pixels[0, 0], [-1, 1, -0.6], atol=1e-6)
    assert picture.alpha[0, 0] == 0
    assert picture.alpha[SIZE // 2, SIZE // 2] == 1
    assert capture.normal_paths[0] is not None
    normals = read_normals(capture.normal_paths[0]).pixels
    np.testing.assert_allclose(normals[0, 0], 0, atol=0.005)
    assert normals[SIZE // 2, SIZE // 2, 2] > 0.9


def test_mirror_images_have_mirrored_cameras_and_normals(data: Path) -> None:
    """A point, its mirror image, and the direction of a normal, seen by a camera and by the mirrored one."""
    latents = encode_captures([data / "object_0"], DataConfig(folder="", mirror=True), lambda pixels: pixels)
    views = len(AZIMUTHS)
    np.testing.assert_array_equal(latents.first, [0, views, 2 * views])
    np.testing.assert_array_equal(latents.images[views:], latents.images[:views, :, ::-1])
    np.testing.assert_array_equal(latents.normals[views:], latents.normals[:views, :, ::-1] * [-1, 1, 1])
    np.testing.assert_allclose(np.cos(np.radians(latents.azimuths_deg[views:])), np.cos(np.radians(AZIMUTHS)), atol=1e-6)
    np.testing.assert_allclose(np.sin(np.radians(latents.azimuths_deg[views:])), -np.sin(np.radians(AZIMUTHS)), atol=1e-6)
    poses = orbit(AZIMUTHS, 10.0)
    np.testing.assert_allclose(latents.cameras[:views], camera_vectors(poses), atol=1e-6)
    np.testing.assert_allclose(latents.cameras[views:], camera_vectors(mirror_poses(poses)), atol=1e-6)
    for vector, w in ((np.array([0.2, 0.1, -0.3]), 1.0), (np.array([0.6, 0.0, 0.8]), 0.0)):
        seen = (np.linalg.inv(poses) @ np.append(vector, w))[:, :3]
        mirrored = (np.linalg.inv(mirror_poses(poses)) @ np.append(vector * [-1, 1, 1], w))[:, :3]
        np.testing.assert_allclose(mirrored, seen * [-1, 1, 1], atol=1e-6)


def test_without_mirror_images_every_capture_is_encoded_once(data: Path) -> None:
    latents = encode_captures([data / "object_0"], DataConfig(folder="", mirror=False), lambda pixels: pixels)
    assert len(latents.images) == len(AZIMUTHS)


def test_views_without_a_normal_map_have_zero_normals(data: Path) -> None:
    latents = encode_captures([data / "object_0"], DataConfig(folder="", normals=False), lambda pixels: pixels)
    assert not latents.normals.any()


def test_latents_come_back_from_their_file_and_other_files_are_refused(tmp_path: Path) -> None:
    latents = some_latents()
    latents.save(tmp_path / "latents.npz")
    for saved, loaded in zip(latents, Latents.load(tmp_path / "latents.npz"), strict=True):
        np.testing.assert_array_equal(loaded, saved, strict=True)
    whole = (tmp_path / "latents.npz").read_bytes()
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = (
        b"",
        b"nonsense",
        whole[:100],
        whole[:-30],
        (tmp_path / "other.npz").read_bytes(),
        (tmp_path / "array.npy").read_bytes(),
    )
    for content in contents:
        (tmp_path / "latents.npz").write_bytes(content)
        with pytest.raises(DatasetError, match="is no file of latents"):
            Latents.load(tmp_path / "latents.npz")


def some_latents(objects: int = 3, views: int = 6) -> Latents:
    random, n = np.random.default_rng(0), objects * views
    return Latents(
        random.standard_normal((n, 4, 4, 4)).astype(np.float16),
        random.standard_normal((n, 4, 4, 4)).astype(np.float16),
        random.standard_normal((n, 16)).astype(np.float32),
        np.tile(np.linspace(-150, 150, views), objects).astype(np.float32),
        np.arange(0, n + 1, views),
    )


V_PREDICTION = SchedulerConfig(prediction_type="v_prediction")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sample_and_target_of_a_batch_give_back_the_latents_of_its_views(prediction_type: Any) -> None:
    latents, scheduler = some_latents(), SchedulerConfig(prediction_type=prediction_type)
    config = DataConfig(folder="", targets=3, reference_dropout=0.0, normals_dropout=0.0)
    batch = ViewBatches(latents, config, scheduler, normal_channels=4).batch(5, size=8, seed=1)
    assert {array.dtype for array in batch} == {np.dtype(np.float32)}
    alphas = alphas_cumprod(scheduler)[batch.timesteps.astype(int)][:, None, None, None, None]
    noisy = batch.sample[..., :4]
    if prediction_type == "epsilon":
        clean = (noisy - np.sqrt(1 - alphas) * batch.target) / np.sqrt(alphas)
    else:
        clean = np.sqrt(alphas) * noisy - np.sqrt(1 - alphas) * batch.target
    objects = set()
    for number in range(8):
        rows = [int(np.argmin(np.abs(latents.images - view).mean((1, 2, 3)))) for view in clean[number]]
        (reference,) = np.flatnonzero((latents.images == batch.reference[number]).all((1, 2, 3)))
        assert len({*rows, reference}) == 4, "views repeat"
        assert len({row // 6 for row in (*rows, reference)}) == 1, "views are of different objects"
        assert abs(latents.azimuths_deg[reference]) <= config.reference_max_azimuth_deg
        np.testing.assert_allclose(clean[number], latents.images[rows], atol=0.02)
        np.testing.assert_array_equal(batch.sample[number, ..., 4:], latents.normals[rows])
        np.testing.assert_array_equal(batch.camera[number], latents.cameras[rows])
        objects.add(rows[0] // 6)
    assert objects == {0, 1, 2}


def test_references_and_normals_are_dropped_as_often_as_configured_and_independently() -> None:
    config = DataConfig(folder="", targets=2, reference_dropout=0.3, normals_dropout=0.6)
    batches = ViewBatches(some_latents(), config, V_PREDICTION, normal_channels=4)
    drawn = [batches.batch(step, size=20, seed=0) for step in range(50)]
    no_reference = np.concatenate([~batch.reference.any((1, 2, 3)) for batch in drawn])
    no_normals = np.concatenate([~batch.sample[..., 4:].any((1, 2, 3, 4)) for batch in drawn])
    assert np.mean(no_reference) == pytest.approx(0.3, abs=0.05)
    assert np.mean(no_normals) == pytest.approx(0.6, abs=0.05)
    assert np.mean(no_reference & no_normals) == pytest.approx(0.18, abs=0.05)


def test_every_timestep_can_be_drawn() -> None:
    config = DataConfig(folder="", targets=2)
    batches = ViewBatches(some_latents(), config, SchedulerConfig(num_train_timesteps=5), normal_channels=0)
    drawn = np.concatenate([batches.batch(step, size=20, seed=0).timesteps for step in range(5)])
    assert set(drawn) == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_batches_depend_on_the_seed_and_the_step_only(data: Path) -> None:
    config = DataConfig(folder=str(data), targets=2)
    folders, _ = find_captures(data, held_out=0.25)
    makers = [
        lambda: ViewBatches(some_latents(), config, V_PREDICTION, normal_channels=4),
        lambda: VAEPictures(folders, config, latent_channels=4, downscale=2),
    ]
    for make in makers:
        once, again = make(), make()
        expected = once.batch(7, size=3, seed=2)
        again.batch(0, size=5, seed=9)
        for actual, array in zip(again.batch(7, size=3, seed=2), expected, strict=True):
            np.testing.assert_array_equal(actual, array)
        assert not np.array_equal(again.batch(8, size=3, seed=2)[0], expected[0])
        assert not np.array_equal(again.batch(7, size=3, seed=3)[0], expected[0])


def test_batches_for_the_vae_mix_pictures_and_normal_maps_and_their_mirror_images(data: Path) -> None:
    capture = load_capture(data / "object_1")
    pictures = [read_picture(path, background=(255, 255, 255)).pixels for path in capture.image_paths]
    maps = [read_normals(path).pixels for path in capture.normal_paths if path is not None]
    originals = {"picture": pictures, "normals": maps}
    originals |= {"mirrored picture": [picture[:, ::-1] for picture in pictures]}
    originals |= {"mirrored normals": [picture[:, ::-1] * np.array([-1, 1, 1], np.float32) for picture in maps]}
    source = VAEPictures([data / "object_1"], DataConfig(folder=""), latent_channels=4, downscale=2)
    counts = dict.fromkeys(originals, 0)
    for step in range(10):
        for pixels in source.batch(step, size=40, seed=0).pixels:
            kinds = [kind for kind, known in originals.items() if any(np.array_equal(pixels, other) for other in known)]
            assert kinds, "a picture that is none of the capture's"
            counts[kinds[0]] += 1
    assert 0.08 < (counts["normals"] + counts["mirrored normals"]) / 400 < 0.18
    assert min(counts.values()) > 5, counts


def test_pictures_of_different_sizes_are_refused(data: Path, tmp_path: Path) -> None:
    rgba = np.full((2, 8, 8, 4), 255, np.uint8)
    write_capture(tmp_path / "small", rgba, None, orbit((0.0, 90.0), 0.0), 40.0)
    source = VAEPictures([data / "object_0", tmp_path / "small"], DataConfig(folder=""), latent_channels=4, downscale=2)
    with pytest.raises(DatasetError, match="one size"):
        source.batch(0, size=32, seed=0)


def test_captures_without_a_frontal_view_or_enough_targets_are_refused() -> None:
    latents = some_latents()
    for config in (DataConfig(folder="", targets=6), DataConfig(folder="", reference_max_azimuth_deg=1.0)):
        with pytest.raises(DatasetError, match="no capture has a view within"):
            ViewBatches(latents, config, V_PREDICTION, normal_channels=4)


# Initial weights


def test_initial_weights_follow_from_seed_and_name_and_are_the_same_for_both_backends() -> None:
    for ours, theirs in (
        (mvmlx.train.vae_weight_shapes(VAE), mvtorch.train.vae_weight_shapes(VAE)),
        (mvmlx.train.unet_weight_shapes(UNET), mvtorch.train.unet_weight_shapes(UNET)),
    ):
        assert ours == theirs
        weights, reordered = initial_weights(ours, seed=3), initial_weights(dict(reversed(theirs.items())), seed=3)
        for name, array in weights.items():
            np.testing.assert_array_equal(reordered[name], array, strict=True)
        other = initial_weights(ours, seed=4)
        assert not np.array_equal(other["conv_in.weight" if "conv_in.weight" in ours else "quant_conv.weight"], 0)
        assert any(not np.array_equal(other[name], array) for name, array in weights.items())


def test_initial_weights_have_the_spread_of_their_inputs_and_the_zeros_that_were_asked_for() -> None:
    shapes = mvtorch.train.unet_weight_shapes(UNET)
    weights = initial_weights(shapes, seed=0, zeros=UNET_ZEROS)
    zero = {name for name, array in weights.items() if not array.any()}
    assert {name for name in zero if name.endswith(".weight")} == {
        name for name in shapes if name.endswith((".conv2.weight", ".proj_out.weight")) or name == "conv_out.weight"
    }
    assert {name for name in shapes if name.endswith(".bias")} <= zero
    np.testing.assert_array_equal(weights["conv_norm_out.weight"], 1)
    kernel = weights["mid_block.resnets.0.conv1.weight"]
    bound = (32 * 9) ** -0.5
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_a_vae_starts_with_a_narrow_posterior_and_half_of_its_first_filters_blind_to_grey() -> None:
    shapes = mvtorch.train.vae_weight_shapes(VAE)
    weights, plain = initial_vae_weights(shapes, seed=0), initial_weights(shapes, seed=0)
    np.testing.assert_array_equal(weights["quant_conv.bias"], [0] * 4 + [LOGVAR] * 4)
    filters = weights["encoder.conv_in.weight"]
    np.testing.assert_allclose(filters[4:].sum(1), 0, atol=1e-6)
    np.testing.assert_array_equal(filters[:4], plain["encoder.conv_in.weight"][:4])
    changed = {name for name in shapes if not np.array_equal(weights[name], plain[name])}
    assert changed == {"quant_conv.bias", "encoder.conv_in.weight"}


def test_mlx_refuses_bfloat16_before_it_encodes_anything(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvshared.training.loop, "encode_captures", lambda *_: pytest.fail("encoded"))
    with pytest.raises(OptionError, match="train with the torch backend"):
        run(unet_config(data, vae, dtype="bfloat16"), tmp_path / "run", backend="mlx")


def test_a_run_that_is_refused_leaves_no_folder_and_no_other_config(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError):
        train(vae_config(data), tmp_path / "run", backend="torch", device="toaster")
    with pytest.raises(DatasetError):
        run(vae_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(vae_config(data, steps=2), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(OutputError, match="2 steps, 1 were asked for"):
        run(vae_config(data, steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
