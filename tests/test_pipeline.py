"""Generation on both backends: seeds, the sampler against diffusers, guidance, cameras, and what is refused before any work."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from helpers import (
    BACKENDS,
    TINY_MODEL,
    Backend,
    Recorded,
    assert_close,
    assert_different,
    normal_maps,
    record,
    with_unet,
    write_tiny_model,
)
from numpy.typing import NDArray

from mvshared.backend import load
from mvshared.camera import camera_vectors, orbit
from mvshared.config import ModelConfig, SchedulerConfig
from mvshared.conversion.configs import scheduler_document
from mvshared.errors import CameraError, OptionError
from mvshared.guidance import ALL, PLAIN, Guidance
from mvshared.images import to_model
from mvshared.pipeline import Pipeline
from mvshared.runs import Views

LATENTS_RMS = 1e-4
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
NORMALS = list(normal_maps(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipelines(folder: Path) -> dict[Backend, Pipeline[Any]]:
    return {backend: load(folder, backend=backend, device="cpu") for backend in BACKENDS}


@pytest.fixture(params=BACKENDS)
def pipeline(request: pytest.FixtureRequest, pipelines: dict[Backend, Pipeline[Any]]) -> Pipeline[Any]:
    return pipelines[request.param]


@pytest.fixture
def recorded(pipeline: Pipeline[Any]) -> Recorded:
    return record(pipeline)


def generate(pipeline: Pipeline[Any], **options: Any) -> Views:
    return pipeline.generate(PICTURE, **options)


def configured(pipeline: Pipeline[Any], **changes: Any) -> Pipeline[Any]:
    """The pipeline with another config around the same weights."""
    model = copy(pipeline.model)
    config: ModelConfig = replace(model.config, **changes)
    model.config = config
    return Pipeline(model, name=pipeline.name)


def first_name(options: dict[str, Any]) -> str:
    return next(iter(options))


def first_sample(pipeline: Pipeline[Any], **options: Any) -> NDArray[np.float32]:
    """What goes into the model at the first step."""
    recorded = record(pipeline)
    generate(recorded.pipeline, **options)
    return pipeline.model.to_numpy(recorded.model.arguments("denoise")[0][0])


def assert_same_views(actual: Views, expected: Views) -> None:
    assert_close(actual.latents, expected.latents, rms=LATENTS_RMS)
    assert np.abs(actual.images.astype(int) - expected.images).max() <= 1


# One seed, one result


@pytest.mark.parametrize(
    "options", [{}, {"guidance": 1.0}, {"eta": 0.7}, {"normals": NORMALS}], ids=lambda options: " ".join(options) or "defaults"
)
def test_one_seed_gives_one_result_bit_for_bit(pipeline: Pipeline[Any], options: dict[str, Any]) -> None:
    first, second = generate(pipeline, seed=5, **options), generate(pipeline, seed=5, **options)
    np.testing.assert_array_equal(first.latents, second.latents, strict=True)
    np.testing.assert_array_equal(first.images, second.images, strict=True)


def test_another_seed_gives_another_result(pipeline: Pipeline[Any]) -> None:
    first, other = generate(pipeline, seed=5), generate(pipeline, seed=6)
    assert_different(other.latents, first.latents, rms=0.1)
    assert (other.images != first.images).mean() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 1.0},
        {"guidance": 5.0},
        {"guidance": 5.0, "normals": NORMALS},
        {"guidance": 1.0, "normals": NORMALS, "eta": 1.0, "steps": 4},
        {"eta": 0.5, "steps": 4},
        {"steps": 1},
        {"scheduler": "dpmpp-2m", "steps": 4, "spacing": "trailing"},
        {"scheduler": "dpmpp-2s", "steps": 5, "spacing": "linspace"},
        {"scheduler": "unipc", "steps": 4, "spacing": "karras"},
        {"scheduler": "euler-ancestral", "steps": 4, "guidance": 2.0},
        {"steps": 4, "views": 3, "elevation_deg": 20.0},
        {"steps": 4, "size_px": 48},
    ],
    ids=lambda options: " ".join(options),
)
def test_one_seed_gives_one_result_on_both_backends(pipelines: dict[Backend, Pipeline[Any]], options: dict[str, Any]) -> None:
    expected, actual = (generate(pipelines[backend], seed=3, **options) for backend in ("torch", "mlx"))
    assert_same_views(actual, expected)


def test_rounding_does_not_add_up_over_a_hundred_steps(pipelines: dict[Backend, Pipeline[Any]]) -> None:
    options: dict[str, Any] = {"steps": 100, "views": 1, "size_px": 16, "guidance": 1.0}
    expected, actual = (generate(pipelines[backend], **options) for backend in ("torch", "mlx"))
    assert_same_views(actual, expected)


def test_the_result_has_the_documented_shapes_and_types(pipeline: Pipeline[Any]) -> None:
    views = generate(pipeline, views=3, size_px=48)
    assert (views.images.shape, views.images.dtype) == ((3, 48, 48, 3), np.uint8)
    assert (views.latents.shape, views.latents.dtype) == ((3, 12, 12, 4), np.float32)
    assert (views.cameras.shape, views.cameras.dtype) == ((3, 4, 4), np.float32)
    assert views.reference is not None and views.reference.shape == (48, 48, 3)


def test_what_is_not_given_comes_from_the_defaults_of_the_model(pipeline: Pipeline[Any]) -> None:
    given = generate(pipeline, views=2, elevation_deg=0.0, steps=2, guidance=2.0, seed=0, size_px=32, eta=0.0)
    views = generate(pipeline)
    np.testing.assert_array_equal(views.latents, given.latents)
    assert views.parameters == given.parameters


# Noise


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_more_views_keep_the_noise_of_the_first_ones(pipeline: Pipeline[Any], seed: int) -> None:
    few, many = (first_sample(pipeline, views=views, seed=seed) for views in (1, 4))
    np.testing.assert_array_equal(few, many[:1])
    assert_different(many[1:2], many[:1], rms=0.5)
    assert abs(many.std() - 1) < 0.1


def test_given_latents_replace_the_noise_exactly(pipeline: Pipeline[Any]) -> None:
    latents = np.random.default_rng(9).standard_normal((2, 8, 8, 4), np.float32)
    np.testing.assert_array_equal(first_sample(pipeline, latents=latents, seed=1), latents)
    frames = np.concatenate([latents, np.full((1, 8, 8, 4), 7, np.float32)])
    np.testing.assert_array_equal(first_sample(pipeline, latents=frames), latents)
    np.testing.assert_array_equal(
        generate(pipeline, latents=frames).latents, generate(pipeline, latents=latents.astype(np.float64)).latents
    )


def test_the_noise_of_a_seed_given_as_latents_gives_its_views(pipeline: Pipeline[Any]) -> None:
    views = generate(pipeline, seed=4)
    given = generate(pipeline, seed=11, latents=first_sample(pipeline, seed=4))
    np.testing.assert_array_equal(given.latents, views.latents)
    assert views.parameters.latents_sha256 is None and given.parameters.latents_sha256 is not None


@pytest.mark.parametrize(
    "latents",
    [
        np.zeros((2, 8, 8, 4), np.int64),
        np.zeros((2, 8, 8, 4), np.complex64),
        np.zeros((2, 4, 8, 8), np.float32),
        np.zeros((4, 8, 8, 4), np.float32),
        np.zeros((1, 8, 8, 4), np.float32),
        np.zeros((8, 8, 4), np.float32),
        np.zeros((), np.float32),
        np.full((2, 8, 8, 4), np.nan, np.float32),
        np.full((2, 8, 8, 4), 1e300),
        [[1.0], [2.0, 3.0]],
    ],
    ids=lambda latents: f"{getattr(latents, 'dtype', 'list')}-{np.shape(latents) if hasattr(latents, 'dtype') else ''}",
)
def test_latents_that_do_not_fit_are_refused(recorded: Recorded, latents: Any) -> None:
    with pytest.raises(OptionError) as caught:
        generate(recorded.pipeline, latents=latents)
    assert caught.value.name == "latents"
    assert not recorded.model.calls


# The sampler


@pytest.mark.parametrize("copied", [copy, deepcopy, pickle.dumps])
def test_a_pipeline_is_not_copied(pipeline: Pipeline[Any], copied: Callable[[Any], Any]) -> None:
    """Two of them could run one model at once, and what PyTorch has packed for a processor cannot be copied."""
    with pytest.raises(TypeError, match="a pipeline cannot be copied or pickled: load another one"):
        copied(pipeline)


def test_runs_in_two_threads_wait_for_each_other(pipeline: Pipeline[Any]) -> None:
    alone = [generate(pipeline, steps=4, kv_pooling=pooling) for pooling in (1, 2)]
    assert not np.array_equal(alone[0].latents, alone[1].latents)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pooling: generate(pipeline, steps=4, kv_pooling=pooling), (1, 2) * 4))
    for index, views in enumerate(found):
        np.testing.assert_array_equal(views.latents, alone[index % 2].latents)
    inside = []
    generate(pipeline, steps=2, on_step=lambda _: inside.append(generate(pipeline, steps=4, kv_pooling=2)))
    np.testing.assert_array_equal(inside[0].latents, alone[1].latents)


def test_views_are_compared_by_what_they_are(pipeline: Pipeline[Any]) -> None:
    one, other = (generate(pipeline, steps=1) for _ in range(2))
    assert one == one and one != other and other in [one, other] and len({one, other}) == 2


def test_views_are_told_in_a_line_and_a_notebook_shows_their_grid(pipeline: Pipeline[Any], tmp_path: Path) -> None:
    """It shows what the last line of a cell gives."""
    views, one = generate(pipeline, views=3, steps=1, seed=5), generate(pipeline, views=1, steps=1)
    assert repr(views) == f"<3 views of 32 x 32 pixels by {pipeline.name}, steps 1, seed 5>"
    assert repr(one) == f"<1 view of 32 x 32 pixels by {pipeline.name}, steps 1, seed 0>"
    assert views._repr_png_() == (views.save(tmp_path / "out") / "grid.png").read_bytes()
    assert repr(pipeline) == f"<Pipeline of {pipeline.name}: {pipeline.model.backend}, cpu, float32>"


def test_what_is_called_after_every_step_is_looked_at_before(pipeline: Pipeline[Any]) -> None:
    with pytest.raises(OptionError, match="on_step must be a function of the progress, got 3"):
        generate(pipeline, on_step=3)


@pytest.mark.parametrize(
    ("scheduler", "steps", "eta"),
    [
        (SchedulerConfig(), 5, 0.0),
        (SchedulerConfig(), 5, 0.6),
        (SchedulerConfig(), 1, 0.0),
        (SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True), 4, 0.0),
        (SchedulerConfig(timestep_spacing="linspace", set_alpha_to_one=True, beta_schedule="linear"), 3, 0.3),
    ],
    ids=lambda value: getattr(value, "timestep_spacing", str(value)),
)
def test_the_sampler_is_a_loop_over_diffusers_ddim_scheduler(
    pipeline: Pipeline[Any], scheduler: SchedulerConfig, steps: int, eta: float
) -> None:
    pipeline = configured(pipeline, scheduler=scheduler)
    model, guidance, seed = pipeline.model, 3.0, 2
    views = generate(pipeline, steps=steps, eta=eta, guidance=guidance, seed=seed, normals=NORMALS)
    oracle: Any = DDIMScheduler.from_config(scheduler_document(scheduler))
    oracle.set_timesteps(steps)
    guided = Guidance(guidance=guidance).mixture(ALL)
    condition = model.condition(
        cameras=camera_vectors(orbit([45, 225], 0)),
        reference=model.encode_latents(to_model(PICTURE[None])),
        normals=model.encode_latents(to_model(np.stack(NORMALS))),
        branches=guided.branches,
    )
    x = np.random.default_rng(seed).standard_normal((2, 8, 8, 4), np.float32)
    for index, t in enumerate(oracle.timesteps.tolist()):
        out = model.to_numpy(model.denoise(model.from_numpy(x), float(t), condition, guided.weights))
        noise = np.random.default_rng([seed, index + 1]).standard_normal(x.shape, np.float32)
        step: Any = oracle.step(
            torch.from_numpy(out), t, torch.from_numpy(x), eta=eta, variance_noise=torch.from_numpy(noise) if eta else None
        )
        x = step.prev_sample.numpy()
    assert_close(views.latents, x, rms=LATENTS_RMS)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' arrays are of before numpy 2
@pytest.mark.parametrize("name", ["unipc", "dpmpp-2s"])
def test_a_sampler_with_memory_is_a_loop_over_diffusers_scheduler(pipeline: Pipeline[Any], name: str) -> None:
    oracles: dict[str, Any] = {"unipc": UniPCMultistepScheduler, "dpmpp-2s": DPMSolverSinglestepScheduler}
    schedule, model, steps, previews = pipeline.model.config.scheduler, pipeline.model, 5, []
    views = generate(
        pipeline, scheduler=name, spacing="linspace", steps=steps, guidance=1.0, seed=2,
        on_step=lambda progress: previews.append(progress.preview()),
    )  # fmt: skip
    common = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    oracle = oracles[name](**{field: getattr(schedule, field) for field in common})
    oracle.set_timesteps(steps)
    condition = model.condition(
        cameras=camera_vectors(orbit([45, 225], 0)),
        reference=model.encode_latents(to_model(PICTURE[None])),
        normals=None,
        branches=PLAIN.branches,
    )
    x = np.random.default_rng(2).standard_normal((2, 8, 8, 4), np.float32)
    for t in oracle.timesteps.tolist():
        out = model.to_numpy(model.denoise(model.from_numpy(x), float(t), condition, PLAIN.weights))
        x = oracle.step(torch.from_numpy(out), t, torch.from_numpy(x)).prev_sample.numpy()
    assert_close(views.latents, x, rms=LATENTS_RMS)
    np.testing.assert_array_equal(previews[-1], views.images)


def test_the_sampler_and_its_spacing_are_those_of_the_model_unless_others_are_given(pipeline: Pipeline[Any]) -> None:
    model = pipeline.model.config
    scheduler, defaults = replace(model.scheduler, timestep_spacing="karras"), replace(model.defaults, scheduler="dpmpp-2m")
    with_others = configured(pipeline, scheduler=scheduler, defaults=defaults)
    found = generate(with_others, steps=3)
    assert (found.parameters.scheduler, found.parameters.spacing) == ("dpmpp-2m", "karras")
    given = generate(pipeline, steps=3, scheduler="dpmpp-2m", spacing="karras")
    np.testing.assert_array_equal(given.latents, found.latents)
    other = generate(with_others, steps=3, scheduler="ddim", spacing="leading")
    np.testing.assert_array_equal(other.latents, generate(pipeline, steps=3).latents)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "euler", "eta": 0.5}, "eta must be 0 with euler: it is DDIM's, got 0.5"),
        ({"spacing": "karras"}, "spacing must be leading, trailing or linspace for ddim, got 'karras'"),
        ({"scheduler": np.zeros(2)}, "scheduler must be one of ddim, "),
        ({"spacing": np.zeros(2)}, "spacing must be one of leading, "),
        ({"scheduler": "unipc", "spacing": "linspace", "steps": 1000}, "steps must be a whole number from 1 to 999, got 1000"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_before_any_work(recorded: Recorded, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate(recorded.pipeline, **options)
    assert not recorded.model.calls


def test_guidance_1_skips_the_unconditional_half(pipeline: Pipeline[Any]) -> None:
    unet, batches = pipeline.model.unet, []  # pyright: ignore[reportAttributeAccessIssue]

    def counting(sample: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(tuple(sample.shape))
        return unet(sample, *args, **kwargs)

    for name in ("constants", "time_embeddings"):
        setattr(counting, name, getattr(unet, name))
    counted = with_unet(pipeline, counting)
    for guidance in (1, 1.5):
        generate(counted, steps=1, views=3, guidance=guidance)
    assert batches == [(1, 3, 8, 8, 8), (2, 3, 8, 8, 8)]


def test_guidance_extrapolates_from_the_output_without_reference(pipeline: Pipeline[Any]) -> None:
    model = pipeline.model
    cameras = camera_vectors(orbit([45, 225], 0))
    x = model.from_numpy(np.random.default_rng(3).standard_normal((2, 8, 8, 4), np.float32))
    reference = model.encode_latents(to_model(PICTURE[None]))
    zeros = model.from_numpy(np.zeros((1, 8, 8, 4), np.float32))
    conditional, unconditional = (
        model.to_numpy(
            model.denoise(x, 500.0, model.condition(cameras=cameras, reference=latent, normals=None, branches=[ALL]), [1.0])
        )
        for latent in (reference, zeros)
    )
    branches = Guidance(guidance=2).mixture(ALL).branches
    guided = model.condition(cameras=cameras, reference=reference, normals=None, branches=branches)
    assert_different(unconditional, conditional, rms=1e-3)
    for guidance in (1.0, 2.0, 7.5):
        expected = unconditional + guidance * (conditional - unconditional)
        assert_close(model.to_numpy(model.denoise(x, 500.0, guided, (1 - guidance, guidance))), expected, rms=LATENTS_RMS)


@pytest.mark.parametrize(
    "change",
    [{"guidance": 4.0}, {"normals": NORMALS}, {"eta": 0.5}, {"azimuths_deg": [45, 200]}, {"elevation_deg": 30}, {"steps": 3}],
    ids=first_name,
)
def test_every_option_changes_the_result(pipeline: Pipeline[Any], change: dict[str, Any]) -> None:
    assert_different(generate(pipeline, **change).latents, generate(pipeline).latents, rms=1e-4)


# Cameras


@pytest.mark.parametrize(
    "options",
    [
        {"views": 2},
        {"azimuths_deg": [45, 225]},
        {"azimuths_deg": np.array([405, -135]), "elevation_deg": 0},
        {"cameras": [(45, 0), (225, 0)]},
        {"cameras": orbit([45, 225], 0)},
        {"cameras": orbit([45, 225], 0).tolist()},
    ],
    ids=lambda options: " ".join(options),
)
def test_the_same_cameras_give_the_same_views_however_they_are_said(pipeline: Pipeline[Any], options: dict[str, Any]) -> None:
    expected, actual = generate(pipeline), generate(pipeline, **options)
    np.testing.assert_allclose(actual.cameras, expected.cameras, atol=1e-6)
    assert_close(actual.latents, expected.latents, rms=LATENTS_RMS)


def test_views_stand_at_the_azimuths_and_the_elevation_that_were_asked_for(pipeline: Pipeline[Any]) -> None:
    radius = TINY_MODEL.camera.radius
    cameras = generate(pipeline, azimuths_deg=[0, 90], elevation_deg=30, steps=1).cameras
    np.testing.assert_allclose(cameras[:, :3, 3], radius * np.array([[0, 0.5, 0.75**0.5], [0.75**0.5, 0.5, 0]]), atol=1e-6)
    cameras = generate(pipeline, cameras=[(0, 10), (0, -20)], steps=1).cameras
    np.testing.assert_allclose(cameras[:, 1, 3], radius * np.sin(np.radians([10, -20])), atol=1e-6)


def test_cameras_at_the_poles_give_views(pipeline: Pipeline[Any]) -> None:
    views = generate(pipeline, cameras=[(0, 90), (90, 90)], steps=1)
    assert np.isfinite(views.latents).all()
    np.testing.assert_allclose(views.cameras[:, :3, 3], np.array([[0, 1, 0]] * 2) * TINY_MODEL.camera.radius, atol=1e-6)


def test_the_distance_of_a_camera_does_not_change_its_view(pipeline: Pipeline[Any]) -> None:
    near, far = (generate(pipeline, cameras=orbit([45, 225], 0, radius=radius)) for radius in (1, 3))
    assert_close(far.latents, near.latents, rms=LATENTS_RMS)
    np.testing.assert_allclose(np.linalg.norm(far.cameras[:, :3, 3], axis=-1), 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"views": 2, "azimuths_deg": [0, 90]}, "azimuths_deg"),
        ({"views": 2, "cameras": [(0, 0)]}, "cameras"),
        ({"azimuths_deg": [0], "cameras": [(0, 0)]}, "cameras"),
        ({"elevation_deg": 0, "cameras": [(0, 0)]}, "elevation_deg"),
        ({"views": 2, "elevation_deg": 0, "cameras": orbit([0, 90], 0)}, "cameras"),
        ({"views": 0}, "views"),
        ({"views": -1}, "views"),
        ({"views": 65}, "views"),
        ({"views": 2.0}, "views"),
        ({"views": True}, "views"),
        ({"views": "2"}, "views"),
        ({"azimuths_deg": [0] * 65}, "azimuths_deg"),
        ({"cameras": [(0, 0)] * 65}, "cameras"),
        ({"elevation_deg": 91}, "elevation_deg"),
        ({"elevation_deg": float("nan")}, "elevation_deg"),
    ],
    ids=str,
)
def test_cameras_that_contradict_or_are_too_many_are_refused_by_name(
    recorded: Recorded, options: dict[str, Any], name: str
) -> None:
    with pytest.raises(OptionError) as caught:
        generate(recorded.pipeline, **options)
    assert caught.value.name == name and caught.value.exit_code == 2
    assert not recorded.model.calls


POSE = orbit([30], 10)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"azimuths_deg": []}, "at least one"),
        ({"azimuths_deg": [0, np.inf]}, "camera 1.*finite"),
        ({"azimuths_deg": ["front"]}, "real numbers"),
        ({"elevation_deg": "up"}, "real numbers"),
        ({"cameras": []}, "shape"),
        ({"cameras": POSE}, "shape"),
        ({"cameras": [POSE[:3]]}, "shape"),
        ({"cameras": [(0, 0, 1)]}, "shape"),
        ({"cameras": [(0, 91)]}, "elevation"),
        ({"cameras": [POSE, POSE * np.nan]}, "camera 1.*finite"),
        ({"cameras": [POSE * [2, 2, 2, 1]]}, "camera 0.*orthonormal"),
        ({"cameras": [POSE * [-1, 1, 1, 1]]}, "camera 0.*reflection"),
        ({"cameras": [POSE * [1, 1, 1, 0] + np.diag([0, 0, 0, 1])]}, "camera 0.*origin"),
        ({"cameras": [POSE.T]}, "camera 0.*last row"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_no_camera_is_refused_by_its_index(recorded: Recorded, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CameraError, match=message) as caught:
        generate(recorded.pipeline, **options)
    assert caught.value.exit_code == 4
    assert not recorded.model.calls


# Options


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("size_px", [0, 8, 15, 17, 36, 2049, 2056, -32, 32.0, "32", True, None.__class__, [32]]),
        ("steps", [0, -1, 1001, 1000, 2.0, "2", True, float("nan")]),
        ("guidance", [0.99, 20.01, 0, -1, float("nan"), float("inf"), "2", True, [2.0], 2j]),
        ("guidance_text", [0.99, 20.01, 0, float("nan"), "2", True, [2.0]]),
        ("guidance_image", [0.99, 20.01, 0, -1, float("nan"), float("inf"), "2", True, [2.0], 2j]),
        ("guidance_normals", [0.99, 20.01, 0, float("nan"), "2", True, [2.0]]),
        ("guidance_interval", [None, 0.5, "01", (0.5,), (0, 0.5, 1), [0.9, 0.1], {0, 1}, np.zeros(3), True]),
        ("guidance_rescale", [-0.1, 1.1, float("nan"), "0", True, None, [0.5]]),
        ("reference_scale", [-0.1, 2.1, float("nan"), "1", True, None, [0.5]]),
        ("eta", [-0.1, 1.1, float("nan"), "0", True, None, [0.5]]),
        ("seed", [-1, 2**63, 1.0, "1", True, None]),
        ("scheduler", ["heun", "DDIM", "", ["ddim"], {}]),
        ("spacing", ["uniform", "Karras", "", ["leading"], {}]),
    ],
)
def test_options_out_of_range_are_refused_by_name_before_any_work(recorded: Recorded, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(OptionError) as caught:
            generate(recorded.pipeline, **{name: value})
        assert caught.value.name == name, value
        assert repr(value) in str(caught.value)
        assert not recorded.model.calls


@pytest.mark.parametrize(
    "options",
    [
        {"size_px": np.int64(16), "seed": np.uint32(1), "guidance": np.float32(1.5), "eta": np.float32(0.5)},
        {"views": np.int64(1), "steps": np.int16(1)},
        {"guidance": 20, "eta": 1},
        {"guidance_image": np.float32(20), "guidance_rescale": 1, "reference_scale": np.float64(2)},
        {"guidance_image": 1, "guidance_interval": (0, 0), "reference_scale": 0},
        {"seed": 2**63 - 1},
    ],
    ids=str,
)
def test_numbers_of_numpy_and_the_ends_of_the_ranges_are_taken(
    pipeline: Pipeline[Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    views = generate(pipeline, **options)
    for name, value in options.items():
        assert len(views.images) == value if name == "views" else getattr(views.parameters, name) == value
    assert (views.save(tmp_path / "out") / "metadata.json").exists()
