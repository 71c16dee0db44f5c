"""Upscaling of latents on both backends against diffusers' StableDiffusionLatentUpscalePipeline with random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_latent_upscale import StableDiffusionLatentUpscalePipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from helpers import BACKENDS, FLOAT32_RMS, Backend, assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from upscalers import TINY, diffusers_pipeline

import mvmlx
import mvtorch
from mvshared.backend import load_upscaler
from mvshared.errors import MvWarning, NumericsError, OptionError
from mvshared.memory.plan import MemoryPlan
from mvshared.stages import Stages
from mvshared.upscaling.config import SigmaConfig
from mvshared.upscaling.latents import Upscaler, view_bytes
from mvshared.upscaling.schedule import euler_plan, sampling_sigmas

RUN_RMS = 1e-4  # float32 rounding over a whole run
# diffusers hands tensors to numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def oracle() -> StableDiffusionLatentUpscalePipeline:
    pipeline = diffusers_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(oracle: StableDiffusionLatentUpscalePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upscaler")
    oracle.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=BACKENDS)
def upscaler(request: pytest.FixtureRequest, folder: Path) -> Upscaler[Any]:
    backend: Backend = request.param
    return load_upscaler(folder, backend=backend, device="cpu", dtype="float32")


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def with_diffusers(
    pipeline: StableDiffusionLatentUpscalePipeline,
    low: NDArray[np.float32],
    noise: NDArray[np.float32],
    *,
    prompt: str = "an owl",
    negative_prompt: str | None = None,
    steps: int,
    guidance: float,
) -> NDArray[np.float32]:
    views = len(low)
    result: Any = pipeline(
        prompt=[prompt] * views,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * views,
        image=torch.from_numpy(low).permute(0, 3, 1, 2),
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2).clone(),
        output_type="latent",
    )
    return result.images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("steps", "guidance", "negative"), [(1, 0.0, None), (10, 0.0, None), (10, 1.0, None), (10, 5.0, "blurry"), (75, 0.0, None)]
)
def test_a_run_is_that_of_diffusers(
    oracle: StableDiffusionLatentUpscalePipeline, upscaler: Upscaler[Any], steps: int, guidance: float, negative: str | None
) -> None:
    low, noise = normal(2, 8, 12, 4), normal(2, 16, 24, 4, seed=1)
    expected = with_diffusers(oracle, low, noise, negative_prompt=negative, steps=steps, guidance=guidance)
    found = upscaler.upscale(low, prompt="an owl", negative_prompt=negative, steps=steps, guidance=guidance, noise=noise)
    assert_close(found, expected, rms=RUN_RMS)
    if guidance == 0:  # the prompt is left out
        assert_close(upscaler.upscale(low, steps=steps, guidance=0, noise=noise), expected, rms=RUN_RMS)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_other_noise_levels_are_those_of_diffusers(upscaler: Upscaler[Any], spacing: Any, tmp_path: Path) -> None:
    pipeline = diffusers_pipeline(interpolation_type="linear", timestep_spacing=spacing)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = load_upscaler(tmp_path, backend=upscaler.model.backend, device="cpu")
    low, noise = normal(1, 8, 8, 4), normal(1, 16, 16, 4, seed=1)
    expected = with_diffusers(pipeline, low, noise, steps=4, guidance=0)
    assert_close(loaded.upscale(low, steps=4, noise=noise), expected, rms=RUN_RMS)


@settings(max_examples=40)
@given(steps=st.integers(1, 1000), kind=st.sampled_from(["log_linear", "linspace", "leading", "trailing"]))
def test_noise_levels_are_those_of_diffusers_scheduler(steps: int, kind: Any) -> None:
    spacing = "linspace" if kind == "log_linear" else kind
    interpolation = "log_linear" if kind == "log_linear" else "linear"
    config = SigmaConfig(interpolation_type=interpolation, timestep_spacing=spacing)
    oracle = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type=interpolation,
        timestep_spacing=spacing,
    )
    oracle.set_timesteps(steps)
    assume(len(oracle.timesteps) == steps)  # for some counts, trailing spacing has one too many there
    sigmas = sampling_sigmas(config, steps)
    np.testing.assert_allclose(sigmas, oracle.sigmas[: steps + 1].numpy(), rtol=2e-4, atol=1e-6)
    plan = euler_plan(config, steps)
    scale = float(oracle.init_noise_sigma) / np.sqrt(sigmas[0] ** 2 + 1)
    assert plan.initial == pytest.approx(1.0 if kind == "leading" and sigmas[0] < 1 else scale, rel=1e-4)
    assert [step.timestep for step in plan.steps] == pytest.approx([0.25 * np.log(sigma) for sigma in sigmas[:-1]])


def test_a_step_ends_in_the_picture_if_the_network_knows_it() -> None:
    """With the true minus-velocity at every step, Euler's steps follow x_0 + sigma eps exactly."""
    x0, eps = normal(3), normal(3, seed=1)
    plan = euler_plan(SigmaConfig(), 5)
    sigmas = sampling_sigmas(SigmaConfig(), 5)
    x = (x0 + sigmas[0] * eps) / np.sqrt(sigmas[0] ** 2 + 1)
    for step, sigma in zip(plan.steps, sigmas, strict=False):
        out = (sigma * x0 - eps) / np.sqrt(sigma**2 + 1)
        np.testing.assert_allclose(step.x0_x * x + step.x0_out * out, x0, atol=1e-5)
        x = step.x * x + step.out * out
    np.testing.assert_allclose(x, x0 + sigmas[-1] * eps, atol=1e-5)


def test_groups_of_views_make_what_all_of_them_together_do(upscaler: Upscaler[Any]) -> None:
    low = normal(5, 8, 8, 4)
    one = view_bytes(TINY, (8, 8), backend=upscaler.model.backend, dtype="float32")
    seen: list[tuple[int, int]] = []
    together = upscaler.upscale(low, steps=2, seed=3)
    for budget in (one, 2 * one + 1):
        grouped = upscaler.upscale(low, steps=2, seed=3, budget_bytes=budget, on_step=lambda p: seen.append((p.step, p.steps)))
        assert_close(grouped, together, rms=FLOAT32_RMS)
    assert seen == [(n, 10) for n in range(1, 11)] + [(n, 6) for n in range(1, 7)]


def test_more_views_do_not_change_the_first_ones(upscaler: Upscaler[Any]) -> None:
    low = normal(3, 8, 8, 4)
    assert_close(upscaler.upscale(low[:1], steps=2, seed=3), upscaler.upscale(low, steps=2, seed=3)[:1], rms=FLOAT32_RMS)
    assert np.abs(upscaler.upscale(low[:1], steps=2, seed=4) - upscaler.upscale(low[:1], steps=2, seed=3)).max() > 0.1


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (10, 8), (7, 5)])
def test_any_size_is_upscaled_and_the_padding_is_cut_away(upscaler: Upscaler[Any], size: tuple[int, int]) -> None:
    large = upscaler.upscale(normal(2, *size, 4), steps=2)
    assert large.shape == (2, 2 * size[0], 2 * size[1], 4)
    assert np.isfinite(large).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_networks_of_a_lean_upscaler_go_with_their_stage(folder: Path, backend: Backend) -> None:
    upscaler = load_upscaler(folder, backend=backend, device="cpu", low_memory=True)
    model: Any = upscaler.model
    loaded: list[tuple[str, ...]] = [model.networks.loaded]
    stages = Stages(lambda stage: loaded.append(model.networks.loaded))
    with model.planned(MemoryPlan(networks_at_once=False)):
        upscaler.upscale(normal(1, 8, 8, 4), prompt="an owl", steps=1, guidance=2, stages=stages)
        loaded.append(model.networks.loaded)
    assert loaded == [(), (), ("unet",), ()]


def test_both_backends_upscale_the_same(folder: Path) -> None:
    low = normal(2, 6, 8, 4)
    torch_result, mlx_result = (
        load_upscaler(folder, backend=backend, device="cpu").upscale(low, prompt="an owl", steps=3, guidance=2, seed=5)
        for backend in BACKENDS
    )
    assert_close(mlx_result, torch_result, rms=RUN_RMS)


def test_both_backends_show_the_same_blocks(folder: Path) -> None:
    seen: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    low = normal(1, 8, 8, 4)
    for backend, observe in (("torch", mvtorch.observe), ("mlx", mvmlx.observe)):
        upscaler = load_upscaler(folder, backend=backend, device="cpu")
        blocks: list[tuple[str, tuple[int, ...]]] = []
        with observe(upscaler, lambda name, array, seconds, blocks=blocks: blocks.append((name, tuple(array.shape)))):
            upscaler.model.decode(upscaler.model.from_numpy(upscaler.upscale(low, steps=1)))
        seen[backend] = blocks
    assert seen["torch"] == seen["mlx"]
    names = {name for name, _ in seen["torch"]}
    assert {"unet.down_blocks.3.attentions.1.attn2", "vae.decoder.conv_out", "text_encoder.final_layer_norm"} <= names


def test_half_precision_stays_close_to_float32(folder: Path, upscaler: Upscaler[Any]) -> None:
    half = load_upscaler(folder, backend=upscaler.model.backend, device="cpu", dtype="float16")
    low = normal(1, 8, 8, 4)
    assert_close(half.upscale(low, steps=3), upscaler.upscale(low, steps=3), rms=2e-2)


def test_pictures_become_the_latents_of_diffusers_and_back(
    oracle: StableDiffusionLatentUpscalePipeline, upscaler: Upscaler[Any]
) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    model = upscaler.model
    with torch.no_grad():
        moments: Any = oracle.vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        expected = moments.latent_dist.mean * oracle.vae.config["scaling_factor"]
        decoded: Any = oracle.vae.decode(expected / oracle.vae.config["scaling_factor"])
    latents = model.encode_latents(pixels)
    assert_close(model.to_numpy(latents), expected.permute(0, 2, 3, 1), rms=FLOAT32_RMS)
    assert_close(model.decode(latents), decoded.sample.permute(0, 2, 3, 1), rms=FLOAT32_RMS)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(upscaler: Upscaler[Any]) -> None:
    for guidance, name in ((1, "prompt"), (3, "negative prompt")):
        texts: dict[str, Any] = {"prompt": "an owl", "negative_prompt": "a cat"} | {name.replace(" ", "_"): "owl " * 100}
        with pytest.warns(MvWarning, match=f"^the upscaler's {name} is longer than 75 tokens"):
            upscaler.upscale(normal(1, 8, 8, 4), **texts, steps=1, guidance=guidance)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps of the upscaler must be a whole number from 1 to 1000"),
        ({"steps": 2.0}, "steps of the upscaler must be a whole number"),
        ({"guidance": 0.5}, "guidance of the upscaler must be 0, or a number from 1 to 20"),
        ({"guidance": 20.5}, "guidance of the upscaler must be 0, or a number from 1 to 20"),
        ({"guidance": float("nan")}, "guidance of the upscaler must be"),
        ({"noise_level": 0.1}, "noise level of the upscaler must be 0 for this upscaler"),
        ({"noise_level": -1}, "noise level of the upscaler must be a number from 0 to 1"),
        ({"seed": -1}, "seed must be"),
        ({"noise": np.zeros((1, 16, 8, 4), np.float32)}, "noise must be finite, of shape"),
        ({"budget_bytes": 2e9}, "budget_bytes must be a whole number"),
        ({"noise": [0.0]}, "noise must be finite, of shape"),
        ({"budget_bytes": 1000}, "memory budget of the upscaler must be at least"),
        ({"prompt": 5}, "prompt must be a text"),
    ],
)
def test_options_that_are_not_allowed_are_refused(upscaler: Upscaler[Any], options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        upscaler.upscale(normal(1, 8, 8, 4), **{"guidance": 2, **options})


@pytest.mark.parametrize("latents", [normal(1, 8, 8, 3), normal(8, 8, 4), np.zeros((1, 8, 8, 4), np.int64), "latents"])
def test_latents_that_do_not_fit_are_refused(upscaler: Upscaler[Any], latents: Any) -> None:
    with pytest.raises(OptionError, match="latents must be"):
        upscaler.upscale(latents)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_refused(upscaler: Upscaler[Any], bad: float) -> None:
    low = normal(2, 8, 8, 4)
    low[1, 3, 3, 0] = bad
    with pytest.raises(NumericsError, match="latents to upscale are not finite"):
        upscaler.upscale(low)
