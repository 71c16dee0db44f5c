"""Upscaled views: the three methods, in Python and on the command line, what they write, and what they refuse."""

import hashlib
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, TINY_MODEL, Backend, make_upscaler, write_tiny_model
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from upscalers import PLAIN, UPSCALER, write_tiny_models

import mvmlx.latents
import mvshared.commands.generate
import mvshared.pipeline
import mvshared.upscaling.views
import mvtorch.latents
import mvtorch.model
from mvshared.backend import load, load_upscaler
from mvshared.camera import load_cameras
from mvshared.checkpoint import WEIGHT_FILE
from mvshared.cli import run
from mvshared.errors import CheckpointError, NumericsError, OptionError, OutputError
from mvshared.files import write_json
from mvshared.images import from_model, load_image
from mvshared.inspection import inspect
from mvshared.memory.plan import PLAIN as PLAIN_PLAN
from mvshared.memory.plan import MemoryPlan
from mvshared.pipeline import Pipeline, Progress
from mvshared.repetition import repeat
from mvshared.runs import read_run
from mvshared.upscaling import standalone
from mvshared.upscaling.folder import write_upscaler
from mvshared.upscaling.views import check_fits, enlarge, enlarge_latents

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
LEAN = MemoryPlan(networks_at_once=False, vae_tile=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and an upscaler of its latents, which uses the model's VAE."""
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=BACKENDS)
def pipeline(request: pytest.FixtureRequest, folders: Path) -> Pipeline[Any]:
    backend: Backend = request.param
    return load(folders / "tiny", backend=backend, device="cpu")


@pytest.fixture
def desk(tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a picture and both models."""
    for name in ("tiny", "x2"):
        (tmp_path / name).symlink_to(folders / name)
    Image.fromarray(PIXELS).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*options: str) -> int:
    return run(["generate", "picture.png", "--model", "tiny", "--device", "cpu", "--backend", "torch", *options])


def views_in(folder: Path) -> NDArray[np.uint8]:
    return np.stack([load_image(path)[..., :3] for path in sorted(folder.glob("view_*.png"))])


# In Python


def test_lanczos_is_pillows(pipeline: Pipeline[Any]) -> None:
    views = pipeline.generate(PIXELS)
    large = pipeline.upscale(views, method="lanczos")
    for image, source in zip(large.images, views.images, strict=True):
        expected = Image.fromarray(source).resize((64, 64), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image, np.asarray(expected))
    np.testing.assert_array_equal(large.latents, views.latents)


@pytest.mark.parametrize("method", ["lanczos", "bilinear"])
def test_views_are_upscaled_once(pipeline: Pipeline[Any], method: Any) -> None:
    large = pipeline.upscale(pipeline.generate(PIXELS), method="lanczos")
    with pytest.raises(OptionError, match="views must be of 32 pixels, not upscaled yet, got '64 x 64 pixels'"):
        pipeline.upscale(large, method=method)


def test_what_was_upscaled_of_another_run_goes_when_it_is_overwritten(pipeline: Pipeline[Any], tmp_path: Path) -> None:
    views = pipeline.generate(PIXELS)
    views.save(tmp_path / "out")
    pipeline.upscale(views, method="lanczos").save(tmp_path / "out" / "upscaled")
    with pytest.raises(OutputError, match="holds a finished run"):
        views.save(tmp_path / "out")
    assert (tmp_path / "out" / "upscaled" / "metadata.json").exists()
    views.save(tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "upscaled").exists()


def test_an_upscaled_run_that_is_in_the_way_is_kept_without_force(pipeline: Pipeline[Any], tmp_path: Path) -> None:
    views = pipeline.generate(PIXELS)
    upscaled = pipeline.upscale(views, method="lanczos").save(tmp_path / "out" / "upscaled")
    with pytest.raises(OutputError, match="upscaled: holds a finished run"):
        views.save(tmp_path / "out")
    assert (upscaled / "metadata.json").exists()
    assert not (tmp_path / "out" / "metadata.json").exists()


def test_the_plan_of_an_upscaling_on_its_own_is_repeated_too(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "picture.png")
    pipe = load(folders / "tiny", backend="torch", device="cpu")
    views = pipe.generate(tmp_path / "picture.png")
    monkeypatch.setattr(pipe, "memory", LEAN)
    upscaled = pipe.upscale(views, method="bilinear")
    assert upscaled.parameters.memory == PLAIN_PLAN
    assert upscaled.parameters.upscale is not None
    assert upscaled.parameters.upscale.memory == LEAN
    other = load(folders / "tiny", backend="torch", device="cpu")
    again = repeat(other, read_run(upscaled.save(tmp_path / "out")))
    assert again.parameters.upscale is not None
    used: list[MemoryPlan] = []
    planned = other.model.planned
    monkeypatch.setattr(other.model, "planned", lambda plan: used.append(plan) or planned(plan))
    again = other.upscale_as(again, again.parameters.upscale)
    assert used == [LEAN]
    assert again.parameters == upscaled.parameters
    np.testing.assert_array_equal(again.images, upscaled.images)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["bilinear", "sd-x2"])
@pytest.mark.parametrize("made", [PLAIN_PLAN, LEAN], ids=["upscaled alone", "all of it"])
def test_the_upscaling_of_a_folder_uses_memory_as_its_run_did(
    folders: Path, desk: Path, monkeypatch: pytest.MonkeyPatch, made: MemoryPlan, method: str, backend: Backend
) -> None:
    upscaler: dict[str, Any] = {"upscaler": folders / "x2", "steps": 2} if method == "sd-x2" else {}
    pipe = load(folders / "tiny", backend=backend, device="cpu")
    pipe.memory = made
    views = pipe.generate(desk / "picture.png")
    pipe.memory = LEAN
    upscaled = pipe.upscale(views, method=method, **upscaler)
    replace(views, parameters=upscaled.parameters).save(desk / "out")  # as `generate` leaves it until the large views are there
    used: list[MemoryPlan] = []
    asked: list[bool] = []
    package: Any = {"torch": mvtorch.latents, "mlx": mvmlx.latents}[backend]
    planned, load_lean = package.LatentModel.planned, mvshared.upscaling.views.load_upscaler
    monkeypatch.setattr(package.LatentModel, "planned", lambda model, plan: used.append(plan) or planned(model, plan))
    monkeypatch.setattr(
        mvshared.upscaling.views,
        "load_upscaler",
        lambda name, **options: asked.append(options["low_memory"]) or load_lean(name, **options),
    )
    networks = 2 if method == "sd-x2" else 1
    assert run(["upscale", "out"]) == 0
    assert (used, asked) == ([LEAN] * networks, [True] * (networks - 1))
    np.testing.assert_array_equal(views_in(desk / "out" / "upscaled"), upscaled.images)
    recorded = json.loads((desk / "out" / "upscaled" / "metadata.json").read_text())["parameters"]["memory"]
    assert (recorded is None) == (made == LEAN)
    used.clear()
    other = ["--upscale", "bilinear"] if method == "sd-x2" else ["--upscaler", "x2", "--upscale-steps", "1"]
    assert run(["upscale", "out", "-o", "other", *other]) == 0  # not what the run was upscaled by
    assert used == [made] * (3 - networks)
    used.clear()
    assert run(["upscale", "out", "-o", "half", "--dtype", "float16"]) == 0  # takes other memory
    assert used == [PLAIN_PLAN] * networks


def test_views_of_a_run_with_low_memory_are_upscaled_one_by_one(folders: Path, desk: Path) -> None:
    pipe = load(folders / "tiny", device="cpu", low_memory=True)
    views = pipe.generate(desk / "picture.png")
    views.save(desk / "out")
    assert run(["upscale", "out", "--upscaler", "x2"]) == 0
    parameters = json.loads((desk / "out" / "upscaled" / "metadata.json").read_text())["parameters"]
    expected = pipe.upscale(views, upscaler=folders / "x2").parameters.upscale
    assert expected is not None and expected.budget_bytes is not None
    assert parameters["budget_bytes"] == expected.budget_bytes < 10**6


def test_latents_that_are_padded_fit_the_budget_that_was_planned_for_one_view(folders: Path, tmp_path: Path) -> None:
    deep = replace(PLAIN, block_out_channels=(32, 32, 32, 32), attention_levels=(False,) * 4)
    network = make_upscaler(deep, "torch")
    weights = {name: weight.numpy() for name, weight in network.state_dict().items()}
    write_upscaler(tmp_path / "x2", replace(UPSCALER, unet=deep), weights, vae_from=str(folders / "tiny"))
    pipe = load(folders / "tiny", backend="torch", device="cpu", low_memory=True)
    views = pipe.generate(PIXELS, size_px=40)  # 10 latents, and the network takes 12
    assert pipe.upscale(views, upscaler=tmp_path / "x2", steps=1).images.shape[1] == 80


def test_bilinear_is_that_of_pytorch_on_the_latents(pipeline: Pipeline[Any]) -> None:
    views = pipeline.generate(PIXELS)
    large = pipeline.upscale(views, method="bilinear")
    latents = torch.from_numpy(views.latents).permute(0, 3, 1, 2)
    expected = F.interpolate(latents, scale_factor=2, mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(large.latents, expected, atol=1e-5)
    decoded = from_model(pipeline.model.decode(pipeline.model.from_numpy(large.latents)))
    np.testing.assert_array_equal(large.images, decoded)
    assert large.images.shape == (2, 64, 64, 3)


def test_the_diffusion_model_gets_the_latents_the_seed_and_its_settings(pipeline: Pipeline[Any], folders: Path) -> None:
    views = pipeline.generate(PIXELS, seed=5)
    large = pipeline.upscale(views, upscaler=folders / "x2", steps=3, noise_level=0.5)
    alone = load_upscaler(folders / "x2", backend=pipeline.model.backend, device="cpu")
    np.testing.assert_array_equal(large.latents, alone.upscale(views.latents, steps=3, noise_level=0.5, seed=5))
    assert large.images.shape == (2, 64, 64, 3)
    assert large.parameters.upscale is not None
    assert (large.parameters.upscale.steps, large.parameters.upscale.noise_level) == (3, 0.5)
    np.testing.assert_array_equal(large.cameras, views.cameras)


def test_the_noise_level_changes_what_the_network_sees(folders: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    found = {backend: load_upscaler(folders / "x2", backend=backend, device="cpu") for backend in BACKENDS}
    results = [found["torch"].upscale(latents, noise_level=level) for level in (0.0, 0.5, 1.0)]
    assert not any(np.allclose(a, b, atol=1e-3) for a, b in pairwise(results))
    np.testing.assert_allclose(found["mlx"].upscale(latents, noise_level=0.5), results[1], atol=1e-3)


def test_enlarging_keeps_plain_pictures_and_latents() -> None:
    assert (enlarge(np.full((1, 5, 7, 3), 9, np.uint8)) == 9).all()
    plain = enlarge_latents(np.full((2, 3, 4, 5), 0.5, np.float32))
    assert plain.shape == (2, 6, 8, 5)
    np.testing.assert_allclose(plain, 0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "nearest"}, "upscale must be one of bilinear, lanczos, sd-x2"),
        ({"method": "lanczos", "steps": 3}, "steps of the upscaler must be left out for lanczos"),
        ({"method": "bilinear", "upscaler": "x2"}, "upscaler must be left out for bilinear"),
        ({"method": "sd-x2"}, "upscaler must be a name or a folder for sd-x2"),
        ({"steps": 0}, "steps of the upscaler must be a whole number"),
        ({"guidance": 3}, "guidance of the upscaler must be 0 or 1: this upscaler takes no text"),
        ({"noise_level": 2}, "noise level of the upscaler must be a number from 0 to 1"),
        ({"budget_bytes": 10}, "memory budget of the upscaler must be at least"),
    ],
)
def test_options_that_are_not_allowed_are_refused(
    pipeline: Pipeline[Any], folders: Path, options: dict[str, Any], match: str
) -> None:
    views = pipeline.generate(PIXELS)
    given: dict[str, Any] = options if "method" in options else {"upscaler": folders / "x2", **options}
    with pytest.raises(OptionError, match=match):
        pipeline.upscale(views, **given)


@pytest.mark.parametrize("method", ["sd-x2", "bilinear"])
def test_latents_with_nan_are_refused(pipeline: Pipeline[Any], folders: Path, method: str) -> None:
    views = pipeline.generate(PIXELS)
    damaged = replace(views, latents=np.where(views.latents > 0, np.nan, views.latents))
    with pytest.raises(NumericsError, match="latents to upscale are not finite"):
        pipeline.upscale(damaged, method=method, upscaler=folders / "x2" if method == "sd-x2" else None)


def test_an_upscaler_of_other_latents_is_refused(pipeline: Pipeline[Any], tmp_path: Path) -> None:
    views = pipeline.generate(PIXELS)
    other = replace(TINY_MODEL, vae=replace(TINY_MODEL.vae, scaling_factor=0.5))
    write_tiny_model(tmp_path / "other", other)
    weights = mvtorch.model.get_weights(make_upscaler(PLAIN, "torch"))
    write_upscaler(tmp_path / "x2", replace(UPSCALER, vae=other.vae), weights, vae_from=str(tmp_path / "other"))
    with pytest.raises(OptionError, match=r"upscaler must be of the same latents \(scaling_factor 0.18215, not 0.5\)"):
        pipeline.upscale(views, upscaler=tmp_path / "x2")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("latent_channels", {"latent_channels": 8}),
        ("downscale", {"block_out_channels": (16, 32)}),
        ("scaling_factor", {"scaling_factor": 0.5}),
        ("latents_mean", {"latents_mean": (0.1, 0.0, 0.0, 0.0)}),
        ("latents_std", {"latents_std": (2.0, 1.0, 1.0, 1.0)}),
    ],
)
def test_latents_are_the_same_only_if_all_that_makes_them_is(field: str, changes: dict[str, Any]) -> None:
    ours = TINY_MODEL.vae
    check_fits(replace(ours, layers_per_block=2), ours, name="upscaler", got="x2")
    with pytest.raises(OptionError, match=rf"upscaler must be of the same latents \({field} "):
        check_fits(replace(ours, **changes), ours, name="upscaler", got="x2")


def test_an_upscaler_whose_files_have_changed_is_read_again(pipeline: Pipeline[Any], folders: Path, tmp_path: Path) -> None:
    file, views = tmp_path / "x2" / "unet" / WEIGHT_FILE, pipeline.generate(PIXELS)
    weights = load_file(folders / "x2" / "unet" / WEIGHT_FILE)
    write_upscaler(tmp_path / "x2", UPSCALER, weights, vae_from=str(folders / "tiny"))
    before = pipeline.upscale(views, upscaler=tmp_path / "x2", steps=1)
    save_file({name: array * np.float32(1.1) for name, array in weights.items()}, file)
    after = pipeline.upscale(views, upscaler=tmp_path / "x2", steps=1)
    fresh = load(folders / "tiny", backend=pipeline.model.backend, device="cpu")
    expected = fresh.upscale(fresh.generate(PIXELS), upscaler=tmp_path / "x2", steps=1)
    np.testing.assert_array_equal(after.latents, expected.latents)
    assert np.abs(after.latents - before.latents).max() > 1e-3
    after.save(tmp_path / "after")
    with pytest.raises(CheckpointError, match="weight files have another size or time than when they were loaded"):
        before.save(tmp_path / "before")
    assert not (tmp_path / "before").exists()


def test_an_upscaler_whose_noise_levels_have_changed_is_read_again(
    pipeline: Pipeline[Any], folders: Path, tmp_path: Path
) -> None:
    x2, views = shutil.copytree(folders / "x2", tmp_path / "x2"), pipeline.generate(PIXELS)
    before = pipeline.upscale(views, upscaler=x2, steps=1)
    write_json(x2 / "scheduler" / "scheduler_config.json", asdict(replace(UPSCALER.sigmas, beta_end=0.02)))
    after = pipeline.upscale(views, upscaler=x2, steps=1)
    fresh = load_upscaler(x2, backend=pipeline.model.backend, device="cpu")
    np.testing.assert_array_equal(after.latents, fresh.upscale(views.latents, steps=1))
    assert np.abs(after.latents - before.latents).max() > 1e-3


def test_views_of_another_model_are_not_decoded(pipeline: Pipeline[Any], folders: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "other")
    (tmp_path / "same").symlink_to(folders / "tiny")
    other, same = (
        load(tmp_path / name, backend=pipeline.model.backend, device="cpu").generate(PIXELS, steps=1)
        for name in ("other", "same")
    )
    with pytest.raises(OptionError, match=r"views must be of .*tiny, whose VAE decodes them, got .*other"):
        pipeline.upscale(other, method="bilinear")
    assert pipeline.upscale(other, method="lanczos").images.shape == (2, 64, 64, 3)
    assert pipeline.upscale(same, method="bilinear").images.shape == (2, 64, 64, 3)


def test_views_of_another_dtype_or_backend_are_refused(pipeline: Pipeline[Any], folders: Path) -> None:
    """Their parameters would not repeat what this pipeline makes of them."""
    backend = pipeline.model.backend
    half = load(folders / "tiny", backend=backend, device="cpu", dtype="float16").generate(PIXELS, steps=1)
    twin = load(folders / "tiny", backend="mlx" if backend == "torch" else "torch", device="cpu").generate(PIXELS, steps=1)
    for views, name in ((half, "dtype"), (twin, "backend")):
        with pytest.raises(OptionError, match=f"views must be made with the {name} of this pipeline"):
            pipeline.upscale(views, method="bilinear")


def test_folders_of_another_kind_are_refused_both_ways(folders: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no latent upscaler.*'MultiViewPipeline' \(is it meant as `model`\?"):
        load_upscaler(folders / "tiny", backend="torch")
    with pytest.raises(CheckpointError, match=r"is a latent upscaler, and no model of views \(is it meant as `upscaler`\?"):
        load(folders / "x2", backend="torch")


def test_a_damaged_network_is_refused_by_name(folders: Path, tmp_path: Path) -> None:
    weights = load_file(folders / "x2" / "unet" / WEIGHT_FILE)
    write_upscaler(tmp_path / "x2", UPSCALER, weights, vae_from=str(folders / "tiny"))
    weights.pop("conv_out.bias")
    save_file(weights, tmp_path / "x2" / "unet" / WEIGHT_FILE)
    with pytest.raises(CheckpointError, match=r"1 missing: conv_out\.bias"):
        load_upscaler(tmp_path / "x2", backend="torch")


def test_upscaling_in_another_thread_waits_for_a_run(pipeline: Pipeline[Any]) -> None:
    views = pipeline.generate(PIXELS)
    with ThreadPoolExecutor(1) as pool:
        waiting: list[Future[Any]] = []

        def on_step(progress: Progress) -> None:
            if not waiting:
                waiting.append(pool.submit(pipeline.upscale, views, method="lanczos"))
                assert not wait(waiting, timeout=0.5).done

        pipeline.generate(PIXELS, on_step=on_step)
        assert waiting[0].result(timeout=60).images.shape == (2, 64, 64, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upscaler_is_read_without_its_vae(folders: Path, backend: Backend) -> None:
    model: Any = load_upscaler(folders / "x2", backend=backend, device="cpu").model
    assert (set(model.networks), model.networks.loaded) == ({"unet", "vae"}, ("unet",))
    assert [path.parent.name for path in model.weight_files] == ["unet"]


# On the command line


def test_generate_writes_both_sizes_and_a_run_that_repeats(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate("-o", "out", "--seed", "3", "--upscale", "sd-x2", "--upscaler", "x2", "--upscale-steps", "3") == 0
    assert "2 views in out" in capfd.readouterr().out
    small, large = views_in(desk / "out"), views_in(desk / "out" / "upscaled")
    assert (small.shape, large.shape) == ((2, 32, 32, 3), (2, 64, 64, 3))
    assert np.load(desk / "out" / "upscaled" / "latents.npy").shape == (2, 16, 16, 4)
    lens = json.loads((desk / "out" / "upscaled" / "transforms.json").read_text())
    assert (lens["w"], lens["h"]) == (64, 64)
    cameras = [load_cameras(desk / "out" / where / "transforms.json") for where in (".", "upscaled")]
    np.testing.assert_array_equal(cameras[0].poses, cameras[1].poses)
    assert cameras[0].fov_deg == pytest.approx(cameras[1].fov_deg)
    for which in ("metadata.json", "upscaled/metadata.json"):
        assert run(["generate", "-o", "again", "--config", f"out/{which}", "--force"]) == 0
        np.testing.assert_array_equal(views_in(desk / "again"), small)
        np.testing.assert_array_equal(views_in(desk / "again" / "upscaled"), large)
        for written in ("metadata.json", "upscaled/metadata.json"):
            assert (desk / "again" / written).read_text() == (desk / "out" / written).read_text()


def test_a_repeated_run_notices_another_upscaler(desk: Path, folders: Path, tmp_path: Path) -> None:
    weights = load_file(folders / "x2" / "unet" / WEIGHT_FILE)
    write_upscaler(tmp_path / "mine", UPSCALER, weights, vae_from=str(folders / "tiny"))
    assert generate("-o", "out", "--upscale", "sd-x2", "--upscaler", "mine") == 0
    finished = read_run(desk / "out")
    pipe = load("tiny", backend="torch", device="cpu")
    assert repeat(pipe, finished).parameters == finished.parameters
    weights["conv_out.bias"] = weights["conv_out.bias"] + 1
    save_file(weights, tmp_path / "mine" / "unet" / WEIGHT_FILE)
    with pytest.raises(CheckpointError, match="the upscaler's weights have changed since the run"):
        repeat(pipe, finished)


def test_without_upscaling_there_is_no_folder_for_it_and_an_old_one_goes(desk: Path) -> None:
    assert generate("-o", "out", "--upscale", "lanczos") == 0
    assert (desk / "out" / "upscaled" / "metadata.json").exists()
    assert generate("-o", "out", "--force") == 0
    assert not (desk / "out" / "upscaled").exists()


def test_a_failure_in_the_upscaler_keeps_the_views(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NumericsError("the upscaled latents are not finite", where="upscaling")

    monkeypatch.setattr(mvshared.pipeline, "upscale_views", fail)
    assert generate("-o", "out", "--upscale", "sd-x2", "--upscaler", "x2") == NumericsError.exit_code
    said = capfd.readouterr().err.strip().splitlines()
    assert said == [
        "mvmlx: error: upscaling: the upscaled latents are not finite (the views of 32 pixels are in out)",
    ]
    assert views_in(desk / "out").shape == (2, 32, 32, 3)
    assert read_run(desk / "out").parameters.upscale is not None
    assert not (desk / "out" / "upscaled" / "metadata.json").exists()


def test_views_to_upscale_are_what_generate_returned(pipeline: Pipeline[Any]) -> None:
    pictures: Any = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(OptionError, match="views must be what generate returned, got 'ndarray'"):
        pipeline.upscale(pictures, method="lanczos")


def test_what_cannot_be_upscaled_is_refused_before_anything_is_generated(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "run", lambda *args, **kwargs: pytest.fail("views were generated"))
    rows = [
        (["--upscale", "sd-x2"], 2, "upscaler must be a name or a folder"),
        (["--upscale", "sd-x2", "--upscaler", "tiny"], 5, "is no latent upscaler"),
        (["--upscale", "sd-x2", "--upscaler", "nowhere"], 5, "no such model"),
        (["--upscale", "nearest"], 2, "upscale must be one of"),
        (["--upscaler", "x2"], 2, "upscaler must be left out without --upscale"),
        (["--upscale-steps", "3"], 2, "--upscale-steps must be left out without --upscale"),
        (["--upscale", "lanczos", "--upscale-budget", "3"], 2, "--upscale-budget must be left out for lanczos"),
        (["--upscale", "lanczos", "--upscale-steps", "3"], 2, "left out for lanczos"),
        (["--upscale", "sd-x2", "--upscaler", "x2", "--upscale-steps", "0"], 2, "--upscale-steps must be"),
        (["--upscale", "sd-x2", "--upscaler", "x2", "--upscale-guidance", "30"], 2, "--upscale-guidance must be"),
        (["--upscale", "sd-x2", "--upscaler", "x2", "--upscale-noise", "3"], 2, "--upscale-noise must be"),
        (["--upscale", "sd-x2", "--upscaler", "x2", "--upscale-budget", "0"], 2, "--upscale-budget must be"),
        (
            ["--size", "64", "--upscale", "sd-x2", "--upscaler", "x2", "--upscale-budget", "0.001"],
            2,
            "--upscale-budget must be at least 0.00174 GB, what one view takes",
        ),
    ]
    for options, code, says in rows:
        assert generate("-o", "out", *options) == code, options
        said = capfd.readouterr().err.strip().splitlines()
        assert len(said) == 1 and says in said[0], said
    assert not (desk / "out").exists()


def test_a_finished_upscaling_is_in_the_way_before_a_model_is_loaded(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (desk / "out" / "upscaled").mkdir(parents=True)
    (desk / "out" / "upscaled" / "metadata.json").write_text("{}")
    monkeypatch.setattr(mvshared.commands.generate, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    assert generate("-o", "out") == OutputError.exit_code
    assert "out/upscaled: holds a finished run" in capfd.readouterr().err


def test_upscale_takes_the_folder_of_a_run(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate("-o", "out", "--seed", "4") == 0
    assert run(["upscale", "out"]) == 0
    assert "out/upscaled" in capfd.readouterr().out
    np.testing.assert_array_equal(views_in(desk / "out" / "upscaled"), enlarge(views_in(desk / "out")))
    lens = json.loads((desk / "out" / "upscaled" / "transforms.json").read_text())
    assert (lens["w"], len(lens["frames"])) == (64, 2)
    assert run(["upscale", "out"]) == 7  # a finished run is there
    assert run(["upscale", "out", "--force", "--upscale", "bilinear"]) == 0
    assert run(["upscale", "out", "-o", "large", "--upscaler", "x2", "--json"]) == 0
    assert generate("-o", "same", "--seed", "4", "--upscale", "sd-x2", "--upscaler", "x2") == 0
    np.testing.assert_array_equal(views_in(desk / "large"), views_in(desk / "same" / "upscaled"))
    document = json.loads((desk / "large" / "metadata.json").read_text())
    assert document["parameters"]["upscaler"].endswith("x2")
    assert document["parameters"]["seed"] == 4
    assert any(name.startswith("upscaler/unet/") for name in document["weights"])


@pytest.mark.parametrize("changed", ["mine/unet", "model/vae"])
def test_upscaled_pictures_are_not_written_with_weights_that_changed_meanwhile(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], changed: str
) -> None:
    for name, copy in (("tiny", "model"), ("x2", "mine")):
        shutil.copytree(desk / name, desk / copy)
    original, file = standalone.upscale_arrays, desk / changed / WEIGHT_FILE

    def meanwhile(*args: Any, **options: Any) -> Any:
        file.write_bytes(file.read_bytes())
        return original(*args, **options)

    monkeypatch.setattr(standalone, "upscale_arrays", meanwhile)
    assert run(["upscale", "picture.png", "-o", "large", "--model", "model", "--upscaler", "mine"]) == CheckpointError.exit_code
    assert "weight files have another size or time than when they were loaded" in capfd.readouterr().err
    assert not (desk / "large").exists()


@pytest.mark.parametrize(
    "asked", [("bilinear",), ("sd-x2", "--upscaler", "x2", "--upscale-steps", "2", "--upscale-noise", "0.1")]
)
def test_a_run_that_was_killed_while_it_upscaled_says_what_goes_on(
    desk: Path, capfd: pytest.CaptureFixture[str], asked: tuple[str, ...]
) -> None:
    options = ("-o", "out", "--seed", "4", "--upscale", *asked)
    assert generate(*options) == 0
    whole = views_in(desk / "out" / "upscaled")
    (desk / "out" / "upscaled" / "metadata.json").rename(desk / "out" / "upscaled" / ".unfinished")
    capfd.readouterr()
    assert generate(*options) == 7
    assert "holds a finished run (mvmlx upscale out upscales its views; name another folder" in capfd.readouterr().err
    other = "mlx" if read_run(desk / "out").parameters.backend == "torch" else "torch"
    assert run(["upscale", "out", "-o", "other", "--backend", other]) == 0  # where a view takes another budget
    assert run(["upscale", "out"]) == 0
    np.testing.assert_array_equal(views_in(desk / "out" / "upscaled"), whole)
    assert generate(*options) == 7
    assert "mvmlx upscale" not in capfd.readouterr().err
    shutil.move(desk / "out" / "upscaled", desk / "large")
    assert generate(*options, "-o", "large") == 7  # a run that is upscaled
    assert "mvmlx upscale" not in capfd.readouterr().err


def test_options_beside_what_a_run_was_to_be_upscaled_by_take_its_place(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate("-o", "out dir", "--upscale", "sd-x2", "--upscaler", "x2", "--upscale-steps", "2") == 0
    shutil.rmtree(desk / "out dir" / "upscaled")
    capfd.readouterr()
    assert generate("-o", "out dir") == 7
    assert "(mvmlx upscale 'out dir' upscales its views; name" in capfd.readouterr().err
    assert run(["upscale", "out dir", "--upscale-steps", "3"]) == 0
    parameters = json.loads((desk / "out dir" / "upscaled" / "metadata.json").read_text())["parameters"]
    assert (parameters["method"], parameters["steps"]) == ("sd-x2", 3)
    assert run(["upscale", "out dir", "--force", "--upscale", "lanczos"]) == 0
    parameters = json.loads((desk / "out dir" / "upscaled" / "metadata.json").read_text())["parameters"]
    assert (parameters["method"], parameters["steps"]) == ("lanczos", None)


def test_latents_alone_are_upscaled_by_what_is_named(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate("-o", "out") == 0
    assert run(["upscale", "out/latents.npy", "--model", "tiny"]) == 2
    assert "--upscale must be given as bilinear or sd-x2 for latents, got None" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        *[("lanczos", option, value) for option, value in (("model", "tiny"), ("device", "cpu"), ("backend", "torch"))],
        *[(method, "prompt", "owl") for method in ("lanczos", "bilinear", "sd-x2")],
        *[
            (method, option, value)
            for method in ("lanczos", "bilinear")
            for option, value in (("seed", "3"), ("quantize", "q8"))
        ],
    ],
)
def test_what_has_no_effect_on_an_upscaling_is_refused(
    desk: Path, capfd: pytest.CaptureFixture[str], method: str, option: str, value: str
) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("a.png")
    upscaler = ["--upscaler", "x2"] if method == "sd-x2" else ["--model", "tiny"] if method == "bilinear" else []
    assert run(["upscale", "a.png", "-o", "large", "--upscale", method, *upscaler, f"--{option}", value]) == 2
    assert f"{option} must be left out" in capfd.readouterr().err
    assert not (desk / "large").exists()
    assert run(["upscale", "a.png", "-o", "large", "--upscale", method, *upscaler]) == 0
    parameters = json.loads((desk / "large" / "metadata.json").read_text())["parameters"]
    assert parameters["prompt"] is None
    assert parameters["seed"] == (0 if method == "sd-x2" else None)


def test_where_numbers_that_are_not_finite_begin_is_found_by_another_command(
    desk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(desk / "x2", desk / "mine")
    tensors = load_file(desk / "mine" / "unet" / WEIGHT_FILE)
    tensors["conv_in.bias"][0] = np.nan
    save_file(tensors, desk / "mine" / "unet" / WEIGHT_FILE)
    assert run(["upscale", "picture.png", "-o", "large", "--upscaler", "mine", "--dtype", "float32"]) == 10
    assert "damaged?; mvmlx generate --check-numerics FOLDER finds the block where" in capfd.readouterr().err


def test_numbers_of_numpy_are_numbers(folders: Path) -> None:
    upscaler, latents = load_upscaler(folders / "x2", backend="torch", device="cpu"), np.zeros((1, 4, 4, 4), np.float32)
    plain = upscaler.upscale(latents, steps=1, guidance=1, noise_level=0)
    given = upscaler.upscale(latents, steps=np.int64(1), guidance=np.float32(1), noise_level=np.float64(0))  # type: ignore[arg-type]
    np.testing.assert_array_equal(plain, given)


def test_lanczos_needs_no_model_and_a_run_of_another_backend_not_its_device(desk: Path) -> None:
    assert generate("-o", "out") == 0
    document = json.loads((desk / "out" / "metadata.json").read_text())
    document["parameters"] |= {"backend": "mlx", "device": "gpu"}
    (desk / "out" / "metadata.json").write_text(json.dumps(document))
    assert run(["upscale", "out", "--backend", "torch", "--upscale", "bilinear"]) == 0
    document["parameters"]["model"] = "gone"
    (desk / "out" / "metadata.json").write_text(json.dumps(document))
    assert run(["upscale", "out", "--upscale", "lanczos", "--force"]) == 0
    assert run(["upscale", "out", "--upscale", "bilinear", "--force"]) == 5


@pytest.mark.parametrize(
    "damaged",
    [
        {"method": "foo"},
        {"method": "sd-x2"},
        {"method": "lanczos", "steps": 3},
        {"steps": 0},
        {"steps": None},
        {"upscaler": "nowhere"},
        {"config_sha256": "0"},
    ],
)
def test_a_damaged_upscaling_in_the_metadata_is_refused_before_anything_is_generated(
    desk: Path, monkeypatch: pytest.MonkeyPatch, damaged: dict[str, Any]
) -> None:
    assert generate("-o", "out", "--upscale", "sd-x2", "--upscaler", "x2") == 0
    path = desk / "out" / "metadata.json"
    document = json.loads(path.read_text())
    whole = document["parameters"]["upscale"]
    document["parameters"]["upscale"] = damaged if "method" in damaged else whole | damaged
    path.write_text(json.dumps(document))
    monkeypatch.setattr(Pipeline, "generate", lambda *args, **kwargs: pytest.fail("views were generated"))
    assert run(["generate", "-o", "again", "--config", "out/metadata.json"]) in (2, 5, 8)
    assert not (desk / "again").exists()


def test_one_upscaler_serves_all_seeds(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    original = mvshared.pipeline.load_planned
    monkeypatch.setattr(mvshared.pipeline, "load_planned", lambda *a, **k: loads.append(a) or original(*a, **k))
    assert generate("-o", "out", "--upscale", "sd-x2", "--upscaler", "x2", "--seed", "1", "--seed", "2") == 0
    assert len(loads) == 1
    assert all((desk / "out" / f"seed_{seed}" / "upscaled" / "metadata.json").exists() for seed in (1, 2))


def test_upscale_takes_pictures_and_latents(desk: Path) -> None:
    assert run(["upscale", "picture.png", "-o", "lanczos"]) == 0
    np.testing.assert_array_equal(views_in(desk / "lanczos"), enlarge(PIXELS[None]))
    assert run(["upscale", "picture.png", "-o", "x2-out", "--upscaler", "x2"]) == 0
    assert views_in(desk / "x2-out").shape == (1, 64, 64, 3)
    assert run(["upscale", "picture.png", "picture.png", "-o", "two", "--upscale", "bilinear", "--model", "tiny"]) == 0
    assert views_in(desk / "two").shape == (2, 64, 64, 3)
    latents = np.zeros((3, 8, 8, 4), np.float32)
    np.save(desk / "latents.npy", latents)
    assert run(["upscale", "latents.npy", "-o", "from-latents", "--upscaler", "x2"]) == 0
    for folder, source in (("x2-out", PIXELS), ("from-latents", latents)):
        parameters = json.loads((desk / folder / "metadata.json").read_text())["parameters"]
        assert parameters["source_sha256"] == hashlib.sha256(source.tobytes()).hexdigest()
    assert views_in(desk / "from-latents").shape == (3, 64, 64, 3)
    assert not (desk / "from-latents" / "transforms.json").exists()


def test_sources_that_cannot_be_upscaled_are_refused(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(PIXELS[:20]).save("other.png")
    Image.fromarray(PIXELS[:30, :30]).save("odd.png")
    np.save("bad.npy", np.full((1, 8, 8, 4), np.nan, np.float32))
    np.save("flat.npy", np.zeros((8, 8), np.float32))
    np.save("good.npy", np.zeros((1, 8, 8, 4), np.float32))
    with open("archive.npy", "wb") as file:
        np.savez(file, latents=np.zeros((1, 8, 8, 4), np.float32))
    (desk / "empty").mkdir()
    assert generate("-o", "out", "--upscale", "lanczos") == 0
    assert generate("-o", "mixed") == 0
    np.save("mixed/latents.npy", np.zeros((2, 5, 4, 4), np.float32))
    capfd.readouterr()
    rows = [
        (["empty"], 2, "an output folder, with a metadata.json"),
        (["out/upscaled"], 2, "views that are not upscaled yet"),
        (["picture.png", "other.png"], 2, "pictures of one size"),
        (["nowhere.png"], 3, "no such file"),
        (["odd.png", "--upscaler", "x2"], 2, "multiples of 4"),
        (["picture.png", "--upscale", "bilinear"], 2, "the one whose VAE"),
        (["picture.png", "--upscale", "none"], 2, "bilinear, lanczos or sd-x2"),
        (["good.npy"], 2, "bilinear or sd-x2 for latents"),
        (["flat.npy", "--upscaler", "x2"], 2, "floats of shape (v, h, w, c)"),
        (["bad.npy", "--upscaler", "x2"], 10, "not finite"),
        (["good.npy", "picture.png"], 2, "one .npy file, or pictures"),
        (["good.npy", "--upscaler", "tiny"], 5, "is no latent upscaler"),
        (["good.npy", "--upscaler", "x2", "--seed", "-1"], 2, "seed must be"),
        (["picture.png", "--upscale-steps", "3"], 2, "the one whose VAE"),
        (["picture.png", "--dtype", "float8"], 2, "dtype must be"),
        (["archive.npy", "--upscaler", "x2"], 2, "it is an .npz archive"),
        (["mixed", "--upscale", "bilinear"], 2, "latents must be those of the pictures beside them"),
    ]
    for arguments, code, says in rows:
        assert run(["upscale", *arguments, "-o", "new"]) == code, arguments
        said = capfd.readouterr().err.strip().splitlines()
        assert len(said) == 1 and says in said[0], said
        assert not (desk / "new").exists()


def test_info_says_what_is_in_an_upscaler(folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = inspect(folders / "x2", backend="torch")
    assert not report.faults
    assert [component.name for component in report.components] == ["unet", "vae"]
    assert run(["info", str(folders / "x2")]) == 0
    assert "tiny-x2: upscales latents to twice their size, 2 steps, guidance 0" in capfd.readouterr().out
