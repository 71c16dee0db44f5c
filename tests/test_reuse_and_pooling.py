"""What makes a step cheaper and a little different: guidance that is re-used, keys and values that are averaged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    BACKENDS,
    FLOAT32_RMS,
    TINY_UNET,
    Backend,
    assert_close,
    assert_different,
    denoise,
    make_unet,
    normal_maps,
    record,
    to_numpy,
    unet_inputs,
    with_unet,
    write_tiny_model,
)

import mvmlx.attention
import mvtorch.attention
from mvshared.attention import AttentionOptions
from mvshared.backend import load
from mvshared.camera import camera_vectors, orbit
from mvshared.config import UNetConfig
from mvshared.errors import OptionError
from mvshared.guidance import ALL, PLAIN, Call, Guidance
from mvshared.images import to_model
from mvshared.pipeline import Pipeline
from mvshared.runs import Views
from mvshared.samplers import sampler_steps

ATTENTION: dict[Backend, Any] = {"torch": mvtorch.attention, "mlx": mvmlx.attention}
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
POOLED = AttentionOptions(kv_pooling=2)
FULL = replace(TINY_UNET, in_channels=8, camera_dim=16, reference_frame=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=BACKENDS)
def pipeline(request: pytest.FixtureRequest, folder: Path) -> Pipeline[Any]:
    return load(folder, backend=request.param, device="cpu")


def generate(pipeline: Pipeline[Any], **options: Any) -> Views:
    given: dict[str, Any] = {"azimuths_deg": [45, 225], "elevation_deg": 0, "steps": 5, "guidance": 3.0, "seed": 2}
    return pipeline.generate(PICTURE, **(given | options))


# Guidance that is re-used


@pytest.mark.parametrize(
    ("every", "interval", "expected"),
    [
        (1, (0, 1), "gggggg"),
        (2, (0, 1), "kakaka"),
        (3, (0, 1), "kaakaa"),
        (5, (0, 1), "kaaaag"),
        (9, (0, 1), "kaaaaa"),
        (2, (0.3, 1), "--kaka"),
        (2, (0.3, 0.9), "--kaka"),
        (2, (0.3, 0.8), "--kag-"),
        (2, (0.5, 0.5), "------"),
    ],
)
def test_guidance_is_computed_in_every_nth_guided_step(every: int, interval: Any, expected: str) -> None:
    strength = Guidance(guidance=3, guidance_every=every, guidance_interval=interval)
    guided = strength.mixture(ALL)
    kinds = {"-": Call(PLAIN), "g": Call(guided), "k": Call(guided, keeps=True), "a": Call(PLAIN, adds=True)}
    assert strength.calls(ALL, steps=6) == [kinds[kind] for kind in expected]


def test_without_guidance_there_is_none_to_use_again() -> None:
    assert Guidance(guidance=1, guidance_every=2).calls(ALL, steps=3) == [Call(PLAIN)] * 3


def test_a_step_in_between_adds_what_guidance_changed_in_the_last_guided_step(pipeline: Pipeline[Any]) -> None:
    model, every, steps, rescale = pipeline.model, 2, 5, 0.4
    views = generate(pipeline, guidance_every=every, steps=steps, guidance_rescale=rescale)
    mixture = Guidance(guidance=3).mixture(ALL._replace(text=False, normals=False))
    given: dict[str, Any] = {
        "cameras": camera_vectors(orbit([45, 225], 0)),
        "reference": model.encode_latents(to_model(PICTURE[None])),
        "normals": None,
    }
    guided, plain = (model.condition(branches=branches, **given) for branches in (mixture.branches, PLAIN.branches))
    x: Any = np.random.default_rng(2).standard_normal((2, 8, 8, 4), np.float32)
    delta: Any = None
    for index, step in enumerate(sampler_steps("ddim", model.config.scheduler, steps=steps)):
        latents = model.from_numpy(x)
        out = model.to_numpy(model.denoise(latents, step.timestep, plain, PLAIN.weights))
        if index % every == 0:
            delta = model.to_numpy(model.denoise(latents, step.timestep, guided, mixture.weights, rescale)) - out
        x = np.float32(step.x) * x + np.float32(step.out) * (out + delta)
    assert_close(views.latents, x, rms=1e-4)
    assert_different(views.latents, generate(pipeline, steps=steps, guidance_rescale=rescale).latents, rms=1e-4)


def test_a_step_in_between_computes_one_branch(pipeline: Pipeline[Any]) -> None:
    unet, seen = pipeline.model.unet, []  # pyright: ignore[reportAttributeAccessIssue]

    def counting(sample: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(sample.shape[0])
        return unet(sample, *args, **kwargs)

    counting.constants = unet.constants  # pyright: ignore[reportFunctionMemberAccess]
    counting.time_embeddings = unet.time_embeddings  # pyright: ignore[reportFunctionMemberAccess]
    generate(with_unet(pipeline, counting), guidance_every=2, guidance_interval=(0.2, 1))
    assert seen == [1, 2, 1, 2, 1]


# Keys and values that are averaged


def attended(backend: Backend, config: UNetConfig, options: AttentionOptions, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Queries, keys, values and biases of every attention of a U-Net."""
    module, seen = ATTENTION[backend], []
    original = module.attention

    def recorded(q: Any, k: Any, v: Any, *, options: AttentionOptions, key_bias: Any = None, causal: bool = False) -> Any:
        seen.append([None if array is None else to_numpy(array) for array in (q, k, v, key_bias)])
        return original(q, k, v, options=options, key_bias=key_bias, causal=causal)

    with monkeypatch.context() as patch:
        patch.setattr(module, "attention", recorded)
        denoise(make_unet(config, backend, options=options), unet_inputs(config, views=3))
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_and_values_of_2x2_pixels_are_averaged_within_every_frame(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    (q, k, v, _), *_ = attended(backend, FULL, AttentionOptions(), monkeypatch)
    (same_q, few_k, few_v, _), *_ = attended(backend, FULL, POOLED, monkeypatch)
    np.testing.assert_array_equal(same_q, q)
    for few, full in ((few_k, k), (few_v, v)):
        batch, heads, tokens, width = full.shape
        assert tokens == 4 * 8 * 12  # three views and the reference
        squares = full.reshape(batch, heads, 4, 4, 2, 6, 2, width).mean(axis=(4, 6))
        assert_close(few, squares.reshape(batch, heads, tokens // 4, width), rms=FLOAT32_RMS)


@pytest.mark.parametrize("levels", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_finest_level_with_attention_is_pooled(
    backend: Backend, levels: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(FULL, attention_levels=levels, cross_attention_dim=None)
    finest = 4 * 8 * 12 if levels[0] else 4 * 4 * 6
    seen = attended(backend, config, POOLED, monkeypatch)
    assert {(q.shape[2], k.shape[2]) for q, k, *_ in seen} == {(finest, finest // 4)} | (
        {(4 * 4 * 6, 4 * 4 * 6)} if levels[0] else set()
    )


def test_pooled_views_are_the_same_on_both_backends(folder: Path) -> None:
    options: dict[str, Any] = {"kv_pooling": 2, "reference_scale": 0.5, "normals": list(normal_maps(2))}
    expected, actual = (generate(load(folder, backend=each, device="cpu"), **options).latents for each in BACKENDS)
    assert_close(actual, expected, rms=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_attention_pools_alike(backend: Backend) -> None:
    inputs = unet_inputs(FULL, views=2)
    fused = denoise(make_unet(FULL, backend, options=POOLED), inputs)
    for form in ("plain", "sliced"):
        options = replace(POOLED, implementation=form, budget_bytes=4096)
        assert_close(denoise(make_unet(FULL, backend, options=options), inputs), fused, rms=FLOAT32_RMS)
    assert_different(denoise(make_unet(FULL, backend), inputs), fused, rms=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_that_weighs_double_is_one_given_twice_with_pooling_too(backend: Backend) -> None:
    unet, given = make_unet(FULL, backend, options=POOLED), unet_inputs(FULL, views=2)
    assert given.reference is not None
    twice = given._replace(reference=np.repeat(given.reference, 2, axis=1))

    assert_close(denoise(unet, given, reference_scale=2.0), denoise(unet, twice), rms=FLOAT32_RMS)
    assert_different(denoise(unet, given), denoise(unet, twice), rms=1e-4)


def test_a_run_is_pooled_and_the_one_after_it_is_not(pipeline: Pipeline[Any]) -> None:
    plain, pooled = generate(pipeline), generate(pipeline, kv_pooling=2)
    assert_different(pooled.latents, plain.latents, rms=1e-4)
    assert (pooled.parameters.kv_pooling, pooled.parameters.memory) == (2, plain.parameters.memory)
    np.testing.assert_array_equal(generate(pipeline).latents, plain.latents)


def test_low_memory_pools_alike(pipeline: Pipeline[Any], folder: Path) -> None:
    low = load(folder, backend=pipeline.model.backend, device="cpu", low_memory=True)
    assert_close(generate(low, kv_pooling=2).latents, generate(pipeline, kv_pooling=2).latents, rms=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_pooling": 0}, "kv_pooling must be a whole number from 1 to 2, got 0"),
        ({"kv_pooling": 4}, "kv_pooling must be a whole number from 1 to 2, got 4"),
        ({"kv_pooling": True}, "kv_pooling must be a whole number from 1 to 2, got True"),
        ({"guidance_every": 0}, "guidance_every must be a whole number from 1 to 1000, got 0"),
        ({"guidance_every": 1.5}, "guidance_every must be a whole number from 1 to 1000, got 1.5"),
    ],
)
def test_other_values_are_refused_before_any_work(pipeline: Pipeline[Any], options: dict[str, Any], message: str) -> None:
    recorded = record(pipeline)
    with pytest.raises(OptionError, match=message):
        generate(recorded.pipeline, **options)
    assert not recorded.model.calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_that_do_not_make_squares_are_refused(backend: Backend) -> None:
    config = replace(FULL, attention_levels=(False, True))
    with pytest.raises(OptionError, match="kv_pooling must be 1 where the finest attention is over 4x5 pixels, got 2"):
        denoise(make_unet(config, backend, options=POOLED), unet_inputs(config, size=(8, 10)))
