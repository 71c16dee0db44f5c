"""Runs in memory: pictures and normal maps in every form, progress, and numbers that are not finite."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, TINY_MODEL, Backend, Recorded, normal_maps, record, write_tiny_model
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from mvshared.backend import load
from mvshared.checkpoint import WEIGHT_FILE
from mvshared.errors import ImageError, NumericsError, OptionError
from mvshared.images import save_png
from mvshared.pipeline import Pipeline, Progress
from mvshared.request import prepare

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
MAPS = normal_maps(2)


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


# Pictures and normal maps


def test_a_picture_is_the_same_in_every_form(pipeline: Pipeline[Any], picture: Path) -> None:
    expected = pipeline.generate(PIXELS).latents
    opaque = np.concatenate([PIXELS, np.full((32, 32, 1), 255, np.uint8)], axis=-1)
    for form in (picture, str(picture), Image.open(picture), Image.fromarray(opaque), opaque, PIXELS.astype(np.uint16) * 257):
        np.testing.assert_array_equal(pipeline.generate(form).latents, expected)


def test_a_grey_picture_is_the_coloured_one_of_that_grey(pipeline: Pipeline[Any]) -> None:
    grey = PIXELS[..., 0]
    expected = pipeline.generate(np.stack([grey] * 3, axis=-1)).latents
    for form in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(pipeline.generate(form).latents, expected)


def test_the_clear_parts_of_a_picture_are_white(pipeline: Pipeline[Any]) -> None:
    alpha = np.zeros((32, 32, 1), np.uint8)
    alpha[8:] = 255
    views = pipeline.generate(np.concatenate([PIXELS, alpha], axis=-1))
    expected = PIXELS.copy()
    expected[:8] = 255
    np.testing.assert_array_equal(views.reference, expected)
    np.testing.assert_array_equal(views.latents, pipeline.generate(expected).latents)


def test_another_picture_gives_other_views(pipeline: Pipeline[Any]) -> None:
    assert not np.array_equal(pipeline.generate(PIXELS).latents, pipeline.generate(255 - PIXELS).latents)


@pytest.mark.parametrize("image", ["gone.png", Path("gone.png"), ".", 5, [None], np.zeros((4, 4, 5), np.uint8)], ids=str)
def test_what_is_no_picture_is_refused_before_any_work(recorded: Recorded, image: Any) -> None:
    with pytest.raises(ImageError) as caught:
        recorded.pipeline.generate(image)
    assert caught.value.exit_code == 3
    assert not recorded.model.calls


def test_normal_maps_are_the_same_as_a_folder_as_files_and_as_arrays(pipeline: Pipeline[Any], maps: Path) -> None:
    files = sorted(maps.iterdir())
    expected = pipeline.generate(PIXELS, normals=maps).latents
    forms: list[Any] = [str(maps), files, tuple(map(str, files)), list(MAPS), [files[0], MAPS[1]]]
    for form in forms:
        np.testing.assert_array_equal(pipeline.generate(PIXELS, normals=form).latents, expected)
    assert not np.array_equal(pipeline.generate(PIXELS, normals=files[::-1]).latents, expected)


@pytest.mark.parametrize("normals", [[], list(MAPS)[:1], [*MAPS, MAPS[0]], 5], ids=lambda x: str(np.shape(x)))
def test_another_number_of_normal_maps_than_views_is_refused(recorded: Recorded, normals: Any) -> None:
    with pytest.raises(OptionError, match="normals") as caught:
        recorded.pipeline.generate(PIXELS, normals=normals)
    assert caught.value.name == "normals"
    assert not recorded.model.calls


def test_normal_maps_that_are_not_there_are_refused(recorded: Recorded, tmp_path: Path) -> None:
    for normals in (tmp_path / "gone", [tmp_path / "a.png", tmp_path / "b.png"]):
        with pytest.raises(ImageError):
            recorded.pipeline.generate(PIXELS, normals=normals)
    assert not recorded.model.calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_without_normal_channels_refuses_normal_maps(tmp_path: Path, maps: Path, backend: Backend) -> None:
    config = replace(TINY_MODEL, unet=replace(TINY_MODEL.unet, in_channels=4))
    recorded = record(load(write_tiny_model(tmp_path / "model", config), backend=backend, device="cpu"))
    for normals in (maps, list(MAPS)):
        with pytest.raises(OptionError, match="takes no normal maps") as caught:
            recorded.pipeline.generate(PIXELS, normals=normals)
        assert caught.value.name == "normals"
    assert not recorded.model.calls
    assert np.isfinite(recorded.pipeline.generate(PIXELS).latents).all()


# Progress


def test_on_step_gets_every_step_and_sees_the_state(pipeline: Pipeline[Any]) -> None:
    seen: list[tuple[Progress, NDArray[np.float32]]] = []
    views = pipeline.generate(PIXELS, steps=4, eta=0.5, on_step=lambda progress: seen.append((progress, progress.latents())))
    assert [(progress.step, progress.steps) for progress, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [progress.timestep for progress, _ in seen] == [751.0, 501.0, 251.0, 1.0]
    for progress, latents in seen:
        assert (latents.shape, latents.dtype) == ((2, 8, 8, 4), np.float32)
        np.testing.assert_array_equal(progress.latents(), latents)  # still that of its step
    assert not np.array_equal(seen[0][1], seen[1][1])
    np.testing.assert_array_equal(seen[-1][1], views.latents)
    np.testing.assert_array_equal(pipeline.generate(PIXELS, steps=4, eta=0.5).latents, views.latents)


def test_views_that_are_changed_leave_the_next_run_of_their_request_as_it_was(pipeline: Pipeline[Any]) -> None:
    request = prepare(pipeline.model.config, lambda: pipeline.tokenizer, image=PIXELS, views=2, steps=1)
    first = pipeline.run(request)
    names = ("images", "latents", "cameras", "reference")
    before = {name: getattr(first, name).copy() for name in names}
    for name in names:
        getattr(first, name)[...] = 0
    again = pipeline.run(request)
    for name in names:
        np.testing.assert_array_equal(getattr(again, name), before[name])


def test_the_preview_of_the_last_step_is_the_result(pipeline: Pipeline[Any]) -> None:
    previews: list[NDArray[np.uint8]] = []
    scheduler = replace(TINY_MODEL.scheduler, set_alpha_to_one=True)  # so that the last step ends without noise
    model = record(pipeline).model
    vars(model)["config"] = replace(TINY_MODEL, scheduler=scheduler)
    whole: Any = model
    views = Pipeline(whole, name=pipeline.name).generate(
        PIXELS, steps=3, on_step=lambda progress: previews.append(progress.preview())
    )
    assert all((preview.shape, preview.dtype) == ((2, 32, 32, 3), np.uint8) for preview in previews)
    assert np.abs(previews[-1].astype(int) - views.images).max() <= 1
    assert np.abs(previews[0].astype(int) - views.images).max() > 1


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_exception_of_on_step_passes_and_leaves_the_pipeline_usable(pipeline: Pipeline[Any], error: BaseException) -> None:
    expected = pipeline.generate(PIXELS).latents

    def stop(progress: Progress) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        pipeline.generate(PIXELS, on_step=stop)
    assert caught.value is error
    np.testing.assert_array_equal(pipeline.generate(PIXELS).latents, expected)


# Numbers that are not finite


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("component", "tensor", "where"),
    [
        ("unet", "conv_out.bias", "sampling"),
        ("vae", "encoder.conv_in.bias", "sampling"),
        ("vae", "decoder.conv_out.bias", "decoding"),
    ],
)
def test_nan_in_the_weights_is_a_numerics_error(
    model_folder: Path, tmp_path: Path, backend: Backend, component: str, tensor: str, where: str
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / component / WEIGHT_FILE
    weights = load_file(path)
    weights[tensor][0] = np.nan
    save_file(weights, path)
    with pytest.raises(NumericsError) as caught:
        load(tmp_path / "model", backend=backend, device="cpu").generate(PIXELS)
    assert (caught.value.where, caught.value.exit_code) == (where, 10)
