"""The training loop and its configuration, on tiny data; on PyTorch unless the backend matters."""

import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, assert_close
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from training_cases import (
    OPTIMIZER,
    UNET,
    VAE,
    run,
    toml,
    unet_config,
    vae_config,
    weights_of,
    write_objects,
)

import mvmlx.model
import mvmlx.train
import mvshared.training.loop
import mvshared.training.samples
import mvtorch.model
import mvtorch.train
from mvshared.captures import load_capture
from mvshared.checkpoint import find_model, read_model_config, weight_files
from mvshared.config import GenerationDefaults, SchedulerConfig
from mvshared.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DatasetError,
    MvWarning,
    NumericsError,
    OptionError,
    OutputError,
    TensorMismatchError,
)
from mvshared.heads.dataset import render_dataset
from mvshared.training.config import (
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    UNetLossConfig,
    VAELossConfig,
    load_train_config,
    parse_train_config,
)
from mvshared.training.data import Latents, VAEPictures, find_captures, read_picture
from mvshared.training.kept import load_arrays
from mvshared.training.log import LogRow, TrainingLog, read_log
from mvshared.training.loop import learning_rate, train
from mvshared.training.samples import sample_writer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def vae(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a VAE after a few steps."""
    return run(vae_config(data, steps=2), tmp_path_factory.mktemp("vae") / "run")


def test_the_loss_is_plotted_below_zero_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: scales.append(figure.axes[0].get_yscale()))
    for last in (0.1, -0.2):
        log = TrainingLog(tmp_path, last_step=0)
        for step, loss in ((1, 0.5), (2, last)):
            log.add(LogRow(step, loss, loss, 1.0, 1e-3, 0.1, None, 0))
        assert log.plot()
    assert scales == ["log", "linear"]


# Runs that are interrupted


@pytest.mark.parametrize(("stage", "dtype"), [("vae", "float16"), ("unet", "float32")])
def test_a_run_killed_at_any_point_ends_as_one_that_was_left_alone(
    data: Path, vae: Path, tmp_path: Path, stage: str, dtype: Any
) -> None:
    config = vae_config(data, steps=3, dtype=dtype) if stage == "vae" else unet_config(data, vae, steps=3, dtype=dtype)
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
    leftovers = [tmp_path / f"run/{name}.0a1b2c3d.tmp" for name in (".state.safetensors", "model/vae/.config.json")]
    (tmp_path / "run/.mine.tmp").write_bytes(b"kept")
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    run(vae_config(data), tmp_path / "run")
    assert not any(leftover.exists() for leftover in leftovers)
    assert (tmp_path / "run/.mine.tmp").exists()


def test_a_damaged_state_says_how_the_run_begins_anew(data: Path, tmp_path: Path) -> None:
    config = vae_config(data, steps=1)
    run(config, tmp_path / "run")
    state, whole = tmp_path / "run/state.safetensors", (tmp_path / "run/state.safetensors").read_bytes()
    state.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError) as damaged:
        run(config, tmp_path / "run")
    assert damaged.value.hint == "remove it, and the run begins anew"
    state.unlink()
    run(config, tmp_path / "run")
    assert state.read_bytes() == whole


def test_a_folder_with_the_name_of_a_leftover_stays(data: Path, tmp_path: Path) -> None:
    run(vae_config(data, steps=1), tmp_path / "run")
    (tmp_path / "run/.notes.tmp").mkdir()
    run(vae_config(data, steps=2), tmp_path / "run")
    assert (tmp_path / "run/.notes.tmp").is_dir()


def test_more_steps_continue_a_finished_run_and_fewer_are_refused(data: Path, tmp_path: Path) -> None:
    run(vae_config(data, steps=2), tmp_path / "run")
    run(vae_config(data, steps=3), tmp_path / "run")
    assert [row.step for row in read_log(tmp_path / "run/log.csv")] == [1, 2, 3]
    with pytest.raises(OutputError, match="holds a run of 3 steps, 2 were asked for"):
        run(vae_config(data, steps=2), tmp_path / "run")


def test_a_run_goes_on_with_other_intervals_and_the_same_folder_by_another_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    run(vae_config(data.name, steps=2), tmp_path / "run")
    intervals = {"checkpoint_every": 4, "log_every": 2, "sample_every": 3}
    run(vae_config(f"./{data.name}/", steps=4, **intervals), tmp_path / "run")
    assert unet_config(data, tmp_path, init_from="runs/model/", vae_from="./demo").init_from == "runs/model"
    run(vae_config(data.name, steps=4), tmp_path / "whole")
    assert (tmp_path / "run/state.safetensors").read_bytes() == (tmp_path / "whole/state.safetensors").read_bytes()
    assert [row.step for row in read_log(tmp_path / "run/log.csv")] == [1, 2, 4]


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_detail_counts_in_a_run_and_without_a_detail_map_the_run_is_refused(
    stage: str, data: Path, vae: Path, tmp_path: Path
) -> None:
    def config(folder: Path, weight: float) -> TrainConfig:
        if stage == "vae":
            return vae_config(folder, steps=1, vae_loss=VAELossConfig(detail_weight=weight))
        return unet_config(folder, vae, steps=1, unet_loss=UNetLossConfig(detail_weight=weight))

    losses = []
    for weight in (0.0, 5.0):
        run(config(data, weight), tmp_path / f"{weight}")
        losses.append(read_log(tmp_path / f"{weight}/log.csv")[0].loss)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    without = write_objects(tmp_path / "without")
    for path in without.glob("*/transforms.json"):
        document = json.loads(path.read_text())
        for frame in document["frames"]:
            del frame["detail_file_path"]
        path.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=r"without: no view has a detail map .*detail_weight"):
        run(config(without, 5.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(config(without, 0.0), tmp_path / "run")


def test_the_log_s_seconds_are_those_of_the_steps_alone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def later(seconds: float, result: Any) -> Any:
        nonlocal now
        now += seconds
        return result

    step, save = mvtorch.train.Trainer.step, mvtorch.train.Trainer.state
    monkeypatch.setattr(mvtorch.train.Trainer, "step", lambda self, *given, **named: later(2, step(self, *given, **named)))
    monkeypatch.setattr(mvtorch.train.Trainer, "state", lambda self: later(50, save(self)))
    monkeypatch.setattr(mvshared.training.loop.time, "perf_counter", lambda: now)
    run(vae_config(data, steps=6, log_every=2, sample_every=1), tmp_path / "run", on_sample=lambda *_: later(30, None))
    assert [row.seconds_per_step for row in read_log(tmp_path / "run/log.csv")] == [2, 2, 2]


def test_a_run_with_detail_goes_on_from_the_latents_that_it_has_and_ends_as_one_left_alone(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = unet_config(data, vae, unet_loss=UNetLossConfig(detail_weight=5.0))
    run(config, tmp_path / "whole")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", on_sample=stopped)
    assert load_file(tmp_path / "run/state.safetensors")["steps"] == 2
    monkeypatch.setattr(mvtorch.model, "load_vae", lambda *_, **__: pytest.fail("encoded again"))
    run(config, tmp_path / "run")
    assert (tmp_path / "run/state.safetensors").read_bytes() == (tmp_path / "whole/state.safetensors").read_bytes()
    rows, expected = ([row[:4] for row in read_log(tmp_path / name / "log.csv")] for name in ("run", "whole"))
    assert rows == expected
    latents = [load_arrays(path, Latents) for path in (tmp_path / "run").glob("latents-*.npz")]
    assert len(latents) == 2
    assert all(each.detail is not None and each.detail.any() for each in latents)


def test_latents_without_detail_are_not_taken_for_a_run_with_it(data: Path, vae: Path, tmp_path: Path) -> None:
    run(unet_config(data, vae, steps=1), tmp_path / "run")
    path = tmp_path / "run/config.json"
    document = json.loads(path.read_text())
    document["unet_loss"]["detail_weight"] = 5.0
    path.write_text(json.dumps(document))
    run(unet_config(data, vae, steps=2, unet_loss=UNetLossConfig(detail_weight=5.0)), tmp_path / "run")
    latents = [load_arrays(path, Latents) for path in (tmp_path / "run").glob("latents-*.npz")]
    assert len(latents) == 2
    assert all(each.detail is not None for each in latents)


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


def test_captures_that_are_added_to_a_run_are_learned_from(data: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    run(unet_config(tmp_path / "data", vae, steps=1), tmp_path / "run")
    before = {path.name.split("-")[1]: path for path in (tmp_path / "run").glob("latents-*.npz")}
    shutil.copytree(data / "object_0", tmp_path / "data" / "added")
    run(unet_config(tmp_path / "data", vae, steps=2), tmp_path / "run")
    after = {path.name.split("-")[1]: path for path in (tmp_path / "run").glob("latents-*.npz")}
    assert len(list((tmp_path / "run").glob("latents-*.npz"))) == 2
    assert before["training"] != after["training"] and before["held"] == after["held"]
    assert len(load_arrays(after["training"], Latents).first) - 1 == 4 * 2  # mirrored, too


def test_the_vae_and_the_start_may_be_those_of_a_named_model(tmp_path: Path) -> None:
    render_dataset(tmp_path / "heads", range(100_000, 100_002), views=4, size_px=128, processes=1)
    demo = read_model_config(find_model("demo"))
    options = {"init_from": "demo", "unet": demo.unet, "batch_size": 1, "steps": 1}
    model = run(unet_config(tmp_path / "heads", Path("demo"), **options), tmp_path / "run")
    assert read_model_config(model).vae == demo.vae


def test_a_table_of_the_unet_wants_a_vae_beside_it(data: Path, vae: Path) -> None:
    with pytest.raises(OptionError, match="vae_from must be the model whose VAE is used, beside a table 'unet', got None"):
        unet_config(data, vae, vae_from=None, init_from="demo")


def test_the_losses_of_another_stage_are_refused(data: Path, vae: Path) -> None:
    with pytest.raises(OptionError, match=r"vae_loss\.mse_weight must be left out but for stage 'vae', got 2.0"):
        unet_config(data, vae, vae_loss=VAELossConfig(mse_weight=2.0))


def test_a_run_of_another_config_is_refused_by_the_name_of_the_field(data: Path, tmp_path: Path) -> None:
    run(vae_config(data, steps=1), tmp_path / "run")
    with pytest.raises(OutputError, match=r"other values: batch_size \(was 2\), optimizer.eps \(was 1e-08\)"):
        run(vae_config(data, batch_size=3, optimizer=replace(OPTIMIZER, eps=1e-6)), tmp_path / "run")


def test_a_run_written_before_a_field_existed_goes_on(data: Path, tmp_path: Path) -> None:
    run(vae_config(data, steps=1), tmp_path / "run")
    path = tmp_path / "run/config.json"
    document = json.loads(path.read_text())
    del document["model_dtype"], document["optimizer"]["weight_decay"]
    path.write_text(json.dumps(document))
    run(vae_config(data, steps=2), tmp_path / "run")


def test_a_folder_in_which_the_finder_was_is_free_for_a_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.DS_Store").write_bytes(b"of the Finder")
    run(vae_config(data), tmp_path / "run")
    assert (tmp_path / "run/state.safetensors").exists()


def test_a_folder_with_something_else_is_refused_and_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    (tmp_path / ".backup.tmp").write_text("nor this")
    with pytest.raises(OutputError, match="is not empty and holds no training run"):
        run(vae_config(data), tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        run(vae_config(data), tmp_path / "thesis.tex")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".backup.tmp", "thesis.tex"]


def test_two_runs_in_one_folder_at_once_are_refused(data: Path, tmp_path: Path) -> None:
    tried: list[int] = []

    def train_again(_: Path, step: int) -> None:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(OutputError, match="run: another process trains in it"):
            run(vae_config(data), tmp_path / "run")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        tried.append(step)

    run(vae_config(data), tmp_path / "run", on_sample=train_again)
    assert tried == [3, 4]
    run(vae_config(data, steps=5), tmp_path / "run")  # once it has ended


def test_a_resumed_run_distils_what_it_started_from(data: Path, vae: Path, tmp_path: Path) -> None:
    start = run(unet_config(data, vae, steps=2, seed=5), tmp_path / "start")
    loss = UNetLossConfig(detail_weight=2.0, distill_rest=True)
    config = unet_config(data, vae, init_from=str(start), unet_loss=loss)
    run(config, tmp_path / "whole")

    def end(_: Path, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", on_sample=end)
    run(config, tmp_path / "run")
    whole = weights_of(tmp_path / "whole", "unet")
    for name, array in weights_of(tmp_path / "run", "unet").items():
        np.testing.assert_array_equal(array, whole[name])
    plain = replace(config, unet_loss=replace(loss, distill_rest=False))
    run(plain, tmp_path / "plain")
    assert any((array != whole[name]).any() for name, array in weights_of(tmp_path / "plain", "unet").items())


def test_a_run_is_not_taught_by_other_weights_once_it_has_begun(data: Path, vae: Path, tmp_path: Path) -> None:
    start = run(unet_config(data, vae, steps=2, seed=5), tmp_path / "start")
    loss = UNetLossConfig(detail_weight=2.0, distill_rest=True)
    config = unet_config(data, vae, init_from=str(start), unet_loss=loss)
    run(config, tmp_path / "run")
    run(unet_config(data, vae, steps=3, seed=5), tmp_path / "start")  # its weights are others now
    before = weights_of(tmp_path / "run", "unet")
    with pytest.raises(OutputError, match=re.escape(f"is taught by other weights than those that {start} has now")):
        run(replace(config, steps=5), tmp_path / "run")
    for name, array in weights_of(tmp_path / "run", "unet").items():
        np.testing.assert_array_equal(array, before[name])
    assert run(config, tmp_path / "anew").is_dir()
    other = replace(UNET, block_out_channels=(16, 24))
    with pytest.raises(TensorMismatchError):
        run(replace(config, unet=other), tmp_path / "misfit")
    assert not (tmp_path / "misfit").exists()


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


def test_the_held_out_loss_is_of_four_batches_that_are_drawn_from_another_seed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, list[int]] = {}
    batch = VAEPictures.batch

    def noted(self: VAEPictures, step: int, *, size: int, seed: int) -> Any:
        drawn.setdefault(seed, []).append(step)
        return batch(self, step, size=size, seed=seed)

    monkeypatch.setattr(VAEPictures, "batch", noted)
    run(vae_config(data, steps=2, seed=7), tmp_path / "run")
    assert drawn == {7: [0, 1], 8: [0, 1, 2, 3]}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_files_of_a_trained_model_have_the_dtype_that_was_asked_for(
    dtype: Any, data: Path, vae: Path, tmp_path: Path
) -> None:
    run(vae_config(data, steps=1, model_dtype=dtype), tmp_path / "vae")
    run(unet_config(data, vae, steps=1, model_dtype=dtype), tmp_path / "unet")
    for folder, component in (("vae", "vae"), ("unet", "vae"), ("unet", "unet")):
        assert {array.dtype.name for array in weights_of(tmp_path / folder, component).values()} == {dtype}


def test_what_a_kill_behind_the_last_state_left_out_is_made_up_for(data: Path, vae: Path, tmp_path: Path) -> None:
    def end(_: Path, step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(unet_config(data, vae), tmp_path / "run", on_sample=end)
    seen: list[tuple[Path, int]] = []
    folder = run(unet_config(data, vae), tmp_path / "run", on_sample=lambda model, step: seen.append((model, step)))
    assert seen == [(folder, 4)]


def test_a_sample_that_a_kill_left_out_is_made_up_for(data: Path, vae: Path, tmp_path: Path) -> None:
    config, seen = replace(unet_config(data, vae), checkpoint_every=1, sample_every=2), []

    def end(model: Path, step: int) -> None:
        (model / "unet/config.json").unlink()  # what is written behind a state may be behind it
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", on_sample=end)

    def look(model: Path, step: int) -> None:
        seen.append(step)
        assert (model / "unet/config.json").exists()
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", on_sample=look)
    (tmp_path / "run/samples").mkdir()
    (tmp_path / "run/samples/step_000002.png").touch()  # and is not drawn again
    run(config, tmp_path / "run", on_sample=look)
    assert seen == [2, 4]


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
        np.testing.assert_allclose(array, load_file(weight_files(vae, "vae")[0])[name], atol=1e-7)
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
    for config in (vae_config(data), unet_config(data, data, unet_loss=UNetLossConfig(detail_weight=2.5))):
        (tmp_path / "train.toml").write_text(toml(config))
        assert load_train_config(tmp_path / "train.toml") == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size = 2", "batch_sise = 2", "unknown field 'batch_sise'"),
        ("batch_size = 2", "", "the field 'batch_size' is missing"),
        ("batch_size = 2", "batch_size = 2.5", "batch_size must be a whole number, got 2.5"),
        ("batch_size = 2", "batch_size = true", "batch_size must be a whole number, got True"),
        ("batch_size = 2", "batch_size = 0", "batch_size must be a whole number of at least 1, got 0"),
        ("seed = 0", "seed = -1", "seed must be a whole number of at least 0, got -1"),
        ('dtype = "float32"', 'dtype = "float64"', "dtype must be"),
        ('stage = "vae"', 'stage = "clip"', "stage must be 'vae', 'unet' or 'upscaler', got 'clip'"),
        ('stage = "vae"', 'stage = "unet"', "unet must be a table of UNetConfig fields, and vae_from"),
        ("[vae]", "[voe]", "unknown field 'voe'"),
        ("[data]", "[data]\nfolders = 3", "unknown field 'data.folders'"),
        ("held_out = 0.25", "held_out = 2", "held_out must be 0 to below 1, got 2.0"),
        ("held_out = 0.25", "held_out = 1", "held_out must be 0 to below 1, got 1.0"),
        ("seed = 0", 'seed = 0\nvae_from = "demo"', "vae_from must be left out for stage 'vae', which starts from init_from"),
        ("seed = 0", 'seed = 0\nviews_from = "demo"', "views_from must be left out but for stage 'upscaler', got 'demo'"),
        ("held_out = 0.25", "held_out = nan", "held_out must be a finite number, got nan"),
        (
            "background = [255, 255, 255]",
            "background = [255, 255]",
            "background must be a list of 3, each a whole number, got [255, 255]",
        ),
        ("background = [255, 255, 255]", "background = [255, 255, 256]", "background must be 0 to 255"),
        ("betas = [0.9, 0.99]", "betas = [0.9, 1.0]", "betas must be two numbers from 0 to below 1"),
        ("learning_rate = 0.002", "learning_rate = 0", "learning_rate must be above 0, got 0"),
        ("eps = 1e-08", "eps = -1.0", "eps must be above 0"),
        ("ema_decay = 0.999", "ema_decay = 1.0", "ema_decay must be 0 to below 1"),
        ("border_weight = 0.0", "border_weight = -1.0", "vae_loss.border_weight must be a finite number, at least 0, got -1.0"),
        (
            "[unet_loss]\ndetail_weight = 0.0",
            "[unet_loss]\ndetail_weight = -1.0",
            "unet_loss.detail_weight must be a finite number, at least 0, got -1.0",
        ),
        (
            "[unet_loss]\ndetail_weight = 0.0",
            "[unet_loss]\ndetail_weight = inf",
            "unet_loss.detail_weight must be a finite number, got inf",
        ),
        (
            "[unet_loss]\ndetail_weight = 0.0",
            "[unet_loss]\ndetail_weight = 2.0",
            "unet_loss.detail_weight must be left out but for stage 'unet', got 2.0",
        ),
        ("[unet_loss]\ndetail_weight = 0.0", "[unet_loss]\ndetails = 2.0", "unknown field 'unet_loss.details'"),
        (
            "distill_rest = false",
            "distill_rest = true",
            "unet_loss.distill_rest must be false without a detail_weight above 0, got True",
        ),
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


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [VAELossConfig, UNetLossConfig])
def test_a_loss_takes_no_weight_that_is_negative_or_no_finite_number(loss: Any, weight: float) -> None:
    with pytest.raises(OptionError, match="detail_weight must be a finite number, at least 0"):
        loss(detail_weight=weight)


@pytest.mark.parametrize("loss", [VAELossConfig, UNetLossConfig])
def test_a_loss_takes_no_weight_that_is_infinite_in_float32(loss: Any) -> None:
    assert loss(detail_weight=3e38).detail_weight == 3e38
    with pytest.raises(OptionError, match=r"detail_weight must be finite in float32, got 1e\+300"):
        loss(detail_weight=1e300)


def test_noise_is_not_predicted_where_the_last_timestep_is_noise_alone(data: Path, vae: Path) -> None:
    zero_snr = SchedulerConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    for fine in (zero_snr, replace(zero_snr, prediction_type="epsilon", timestep_spacing="leading")):
        assert unet_config(data, vae, scheduler=fine).scheduler == fine
    with pytest.raises(OptionError, match=r"scheduler\.prediction_type must be v_prediction with rescale_betas_zero_snr"):
        unet_config(data, vae, scheduler=replace(zero_snr, prediction_type="epsilon"))


def test_only_a_start_that_is_trained_can_be_distilled(data: Path, vae: Path) -> None:
    loss = UNetLossConfig(detail_weight=1.0, distill_rest=True)
    with pytest.raises(OptionError, match="init_from must be a model whose outputs are distilled, for distill_rest, got None"):
        unet_config(data, vae, unet_loss=loss)
    assert unet_config(data, vae, unet_loss=loss, init_from="demo").unet_loss.distill_rest


def test_a_missing_table_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the field 'data' is missing"):
        parse_train_config({"stage": "vae", "steps": 1, "batch_size": 1, "vae": {}}, path=tmp_path)
    with pytest.raises(ConfigError, match="data must be an object, got 3"):
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


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_beginning_that_no_weight_s_name_has_is_refused(stage: str, data: Path, vae: Path, tmp_path: Path) -> None:
    config = vae_config(data) if stage == "vae" else unet_config(data, vae)
    with pytest.raises(OptionError, match=r"frozen must be beginnings of names of weights, as of \S+, got 'encodre\.'"):
        run(replace(config, frozen=("encodre.",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


DEFAULTS, VELOCITY = GenerationDefaults(steps=33), SchedulerConfig(prediction_type="v_prediction")


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            "vae",
            {"scheduler": SchedulerConfig(prediction_type="v_prediction")},
            "scheduler must be left out but for stage 'unet'",
        ),
        ("vae", {"first_step_share": 0.5}, "first_step_share must be left out but for stage 'upscaler'"),
        ("vae", {"unet": UNET}, "unet must be left out but for stage 'unet'"),
        ("unet", {"vae": VAE}, "vae must be left out but for stage 'vae'"),
        ("unet", {"generated_captures": 3}, "generated_captures must be left out but for stage 'upscaler'"),
        (
            "unet",
            {"unet": None, "vae_from": None, "init_from": "demo", "scheduler": SchedulerConfig(), "defaults": DEFAULTS},
            "defaults must be left out without a table 'unet': all of the model is that of init_from",
        ),
    ],
)
def test_settings_without_effect_are_refused(stage: str, changes: dict[str, Any], message: str, data: Path, vae: Path) -> None:
    config = vae_config(data) if stage == "vae" else unet_config(data, vae)
    with pytest.raises(OptionError, match=message):
        replace(config, **changes)


def test_a_model_whose_own_steps_are_more_than_its_timesteps_is_refused(data: Path, vae: Path) -> None:
    given = {"scheduler": SchedulerConfig(num_train_timesteps=10), "defaults": replace(DEFAULTS, steps=30)}
    with pytest.raises(
        OptionError, match=r"defaults.steps must be at most num_train_timesteps \(10\), for its samples, got 30"
    ):
        unet_config(data, vae, **given)


def test_a_sample_that_is_not_finite_does_not_end_the_training(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NumericsError("the final latents of view 0 are not finite", where="sampling")

    monkeypatch.setattr(mvshared.training.samples, "_generated", broken)
    config = unet_config(data, vae, steps=1)
    with pytest.warns(MvWarning, match="no sample sheet at step 1: sampling: the final latents of view 0 are not finite"):
        run(config, tmp_path / "run", on_sample=sample_writer(config, tmp_path / "run", backend="torch", device="cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("learning_rate", "held_out", "message"),
    [
        (1e30, 0.25, "loss (nan|inf) and gradient norm (nan|inf) after it, loss (nan|inf) of the averaged weights"),
        (1e30, 0.0, "loss (nan|inf) and gradient norm (nan|inf) after it, loss (nan|inf) of the averaged weights"),
        (1e4, 0.25, r"loss \d\S+ and gradient norm (nan|inf) after it, loss \d\S+ of the averaged weights"),
    ],
)
def test_a_state_that_is_not_finite_is_not_kept(
    learning_rate: float, held_out: float, message: str, backend: str, data: Path, tmp_path: Path
) -> None:
    config = vae_config(data, steps=1)
    config = replace(config, data=replace(config.data, held_out=held_out))
    wild = replace(config, optimizer=replace(config.optimizer, learning_rate=learning_rate, warmup_steps=0))
    with pytest.raises(NumericsError, match=rf"training step 0: {message} \(lower the learning rate, in another"):
        run(wild, tmp_path / "run", backend=backend)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"model", "state.safetensors", "log.csv"}, left


def test_no_sample_is_made_of_weights_that_are_not_finite(data: Path, tmp_path: Path) -> None:
    config = replace(vae_config(data, steps=2), checkpoint_every=2, sample_every=1)
    wild = replace(config, optimizer=replace(config.optimizer, learning_rate=1e30, warmup_steps=0))
    with pytest.raises(NumericsError, match="training step 0: loss"):
        run(wild, tmp_path / "run", on_sample=lambda *_: pytest.fail("a sample"))
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize("name", ["learning_rate", "gradient_clip", "eps", "weight_decay", "final_learning_rate"])
def test_settings_of_the_optimiser_are_finite(name: str) -> None:
    for value in (math.inf, math.nan, 1e300):
        with pytest.raises(OptionError, match=f"{name} must be"):
            replace(OptimizerConfig(), **{name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "foo"}, "stage must be one of vae, unet, upscaler, got 'foo'"),
        ({"steps": 3.5}, "steps must be a whole number of at least 1, got 3.5"),
        ({"seed": True}, "seed must be a whole number of at least 0, got True"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_of_another_kind_are_refused_where_they_are_made(changes: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(OptionError, match=message):
        replace(vae_config(data), **changes)


def test_configs_take_what_python_has_for_numbers_and_folders(data: Path, tmp_path: Path) -> None:
    config = replace(vae_config(data), steps=np.int64(1), data=DataConfig(folder=data, held_out=0.0))  # pyright: ignore[reportArgumentType]
    assert run(config, tmp_path / "run").is_dir()
    text: Any = "1e-3"
    with pytest.raises(OptionError, match="learning_rate must be a number, got '1e-3'"):
        OptimizerConfig(learning_rate=text)
    with pytest.raises(OptionError, match="folder must be the name of a folder, got 3"):
        DataConfig(folder=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match=r"block_out_channels must be a tuple, got \[8, 16\]"):
        replace(VAE, block_out_channels=[8, 16])  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="num_attention_heads must be one entry per level"):
        replace(UNET, num_attention_heads=2)  # pyright: ignore[reportArgumentType]
    table: Any = {"stage": "vae"}
    with pytest.raises(OptionError, match="config must be a TrainConfig, such as load_train_config reads, got 'dict'"):
        train(table, tmp_path / "other")


def test_pictures_that_the_vae_cannot_halve_so_often_are_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    deep = replace(VAE, block_out_channels=(8,) * 8)
    with pytest.raises(DatasetError, match="width and height must be multiples of 128 for this model"):
        run(vae_config(data, vae=deep), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mlx_refuses_bfloat16_on_metal_before_it_encodes_anything(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvshared.training.loop, "kept_latents", lambda *_, **__: pytest.fail("encoded"))
    monkeypatch.setattr(mvmlx.train, "choose_device", lambda device: "gpu")
    monkeypatch.setattr(mvmlx.train.metal, "memory_limits", lambda device: nullcontext())  # there are none without a GPU
    monkeypatch.setattr(mvmlx.model.mx.metal, "is_available", lambda: True)
    with pytest.raises(BackendError, match="use float16 or float32"):
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


RECIPES = sorted((Path(__file__).parents[1] / "examples/demo-model").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_the_demo_models_recipes_are_valid(path: Path) -> None:
    config = load_train_config(path)
    assert config.stage in path.stem and config.data.folder.startswith("data/")
