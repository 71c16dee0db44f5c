"""MLX against PyTorch, and what must hold on both: the meaning of views, precision, attention forms, gradients, errors."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    BFLOAT16_RMS,
    FLOAT16_RMS,
    FLOAT32_RMS,
    TINY_UNET,
    TINY_VAE,
    Backend,
    assert_close,
    assert_different,
    denoise,
    from_numpy,
    gradients,
    make_unet,
    make_vae,
    parameter_names,
    set_dtype,
    to_numpy,
    unet_gradients,
    unet_inputs,
)
from hypothesis import given
from hypothesis import strategies as st

import mvmlx.attention
import mvmlx.layers
import mvtorch.attention
import mvtorch.layers
from mvshared.attention import FUSED, SCORE_BYTES, AttentionOptions, score_slices
from mvshared.errors import OptionError

FULL = replace(
    TINY_UNET,
    in_channels=8,
    camera_dim=16,
    reference_frame=True,
    transformer_layers_per_block=(2, 1),
    use_linear_projection=False,
)
PLAIN = AttentionOptions(implementation="plain")
SLICED = AttentionOptions(implementation="sliced", budget_bytes=4096)
LAYERS: dict[Backend, Any] = {"torch": mvtorch.layers, "mlx": mvmlx.layers}
ATTENTION: dict[Backend, Any] = {"torch": mvtorch.attention, "mlx": mvmlx.attention}


def array(backend: Backend, x: np.ndarray) -> Any:
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


def pixels(n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, 16, 24, 3)).astype(np.float32)


def latents(n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 4, 6, 4), dtype=np.float32)


# Both backends, every dtype


@pytest.mark.parametrize("views", [1, 3])
def test_the_unet_gives_the_same_on_both_backends(views: int) -> None:
    inputs = unet_inputs(FULL, views=views)
    assert_close(denoise(make_unet(FULL, "mlx"), inputs), denoise(make_unet(FULL, "torch"), inputs), rms=FLOAT32_RMS)


def test_the_vae_gives_the_same_on_both_backends() -> None:
    ours, twin = make_vae(TINY_VAE, "mlx"), make_vae(TINY_VAE, "torch")
    with torch.no_grad():
        assert_close(ours.decode(mx.array(latents())), twin.decode(torch.from_numpy(latents())), rms=FLOAT32_RMS)
        moments, expected = ours.encode(mx.array(pixels())), twin.encode(torch.from_numpy(pixels()))
    assert_close(moments.mean, expected.mean, rms=FLOAT32_RMS)
    assert_close(moments.logvar, expected.logvar, rms=FLOAT32_RMS)


@pytest.mark.parametrize(("dtype", "rms"), [("float16", FLOAT16_RMS), ("bfloat16", BFLOAT16_RMS)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unet_in_half_precision_stays_near_float32(backend: Backend, dtype: str, rms: float) -> None:
    inputs = unet_inputs(FULL, views=2)
    out = denoise(set_dtype(make_unet(FULL, backend), dtype), inputs)
    assert out.dtype == (np.float16 if dtype == "float16" else np.float32)  # numpy has no bfloat16
    assert_close(out, denoise(make_unet(FULL, "torch"), inputs), rms=rms)


@pytest.mark.parametrize(("dtype", "rms"), [("float16", FLOAT16_RMS), ("bfloat16", BFLOAT16_RMS)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vae_in_half_precision_stays_near_float32(backend: Backend, dtype: str, rms: float) -> None:
    half, full = set_dtype(make_vae(TINY_VAE, backend), dtype), make_vae(TINY_VAE, "torch")
    with torch.no_grad():
        decoded = half.decode(from_numpy(half, latents()))
        assert_close(decoded, full.decode(torch.from_numpy(latents())), rms=rms)
        assert_close(half.encode(from_numpy(half, pixels())).mean, full.encode(torch.from_numpy(pixels())).mean, rms=rms)
    assert "float32" in str(decoded.dtype)


# What the views mean


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_order_of_the_views_gives_the_same_views_in_that_order(backend: Backend) -> None:
    model, inputs, order = make_unet(FULL, backend), unet_inputs(FULL, views=4), [2, 0, 3, 1]
    assert inputs.camera is not None
    reordered = inputs._replace(sample=inputs.sample[:, order], camera=inputs.camera[:, order])
    assert_close(denoise(model, reordered), denoise(model, inputs)[:, order], rms=FLOAT32_RMS)
    cameras_stay = inputs._replace(sample=inputs.sample[:, order])
    assert_different(denoise(model, cameras_stay), denoise(model, inputs)[:, order], rms=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_in_one_view_reaches_the_others_of_its_object_only(backend: Backend) -> None:
    model, inputs = make_unet(FULL, backend), unet_inputs(FULL, batch=2, views=3)
    sample = inputs.sample.copy()
    sample[0, 1] += 1
    before, after = denoise(model, inputs), denoise(model, inputs._replace(sample=sample))
    assert_different(after[0, 0], before[0, 0], rms=1e-3)
    assert_different(after[0, 2], before[0, 2], rms=1e-3)
    assert_close(after[1], before[1], rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_attention_the_views_do_not_see_each_other(backend: Backend) -> None:
    config = replace(TINY_UNET, attention_levels=(False, False), mid_attention=False, cross_attention_dim=None)
    model, inputs = make_unet(config, backend), unet_inputs(config, views=2)
    alone = denoise(model, inputs._replace(sample=inputs.sample[:, 1:]))
    assert_close(alone, denoise(model, inputs)[:, 1:], rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_reference_is_a_frame_of_zeros_and_a_missing_one_no_frame(backend: Backend) -> None:
    config = replace(TINY_UNET, camera_dim=16, reference_frame=True)
    model, inputs = make_unet(config, backend), unet_inputs(config, views=2)
    assert inputs.reference is not None
    dropped = denoise(model, inputs._replace(reference=np.zeros_like(inputs.reference)))
    missing = denoise(model, inputs._replace(reference=None))
    assert_different(dropped, missing, rms=1e-3)
    plain = make_unet(replace(config, reference_frame=False), backend)
    assert_close(missing, denoise(plain, inputs._replace(reference=None)), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_camera_differs_from_a_camera_of_zeros(backend: Backend) -> None:
    model, inputs = make_unet(FULL, backend), unet_inputs(FULL, views=2)
    assert inputs.camera is not None
    zeros = inputs._replace(camera=np.zeros_like(inputs.camera))
    assert_different(denoise(model, inputs._replace(camera=None)), denoise(model, zeros), rms=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbouring_timesteps_differ_in_half_precision_too(backend: Backend) -> None:
    model = set_dtype(make_unet(TINY_UNET, backend), "float16")
    inputs = unet_inputs(TINY_UNET, batch=1)
    late = [denoise(model, inputs._replace(timesteps=np.array([t], dtype=np.float32))) for t in (998.0, 998.2)]
    assert_different(late[0], late[1], rms=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_in_batches_are_the_pictures_at_once(backend: Backend) -> None:
    model = make_vae(TINY_VAE, backend)
    z, x = from_numpy(model, latents(5)), from_numpy(model, pixels(5))
    with torch.no_grad():
        assert_close(model.decode(z, batch=2), model.decode(z), rms=FLOAT32_RMS)
        assert_close(model.encode(x, batch=2).mean, model.encode(x).mean, rms=FLOAT32_RMS)


# Attention


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def queries_keys_values(dtype: type = np.float32, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((2, 3, 20, 8), (2, 3, 33, 8), (2, 3, 33, 8))
    return [(rng.standard_normal(shape) * scale).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("options", [FUSED, PLAIN, SLICED], ids=lambda options: options.implementation)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_attention_computes_the_definition(backend: Backend, options: AttentionOptions) -> None:
    attention = ATTENTION[backend].attention
    for dtype, rms in ((np.float32, 1e-6), (np.float16, 2e-3)):
        arrays = queries_keys_values(dtype)
        out = attention(*(array(backend, x) for x in arrays), options=options)
        assert_close(out, exact_attention(*arrays), rms=rms)


@pytest.mark.parametrize("budget_bytes", [1, 33 * 4, 33 * 4 * 7, 33 * 4 * 20, 33 * 4 * 45, 10**6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sliced_attention_keeps_its_scores_within_the_budget(
    backend: Backend, budget_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, sizes = ATTENTION[backend], []
    plain = module._plain_attention

    def measured(q: Any, k: Any, v: Any, **options: Any) -> Any:
        sizes.append(q.shape[0] * q.shape[1] * k.shape[1] * SCORE_BYTES)
        return plain(q, k, v, **options)

    monkeypatch.setattr(module, "_plain_attention", measured)
    arrays = queries_keys_values()
    options = AttentionOptions(implementation="sliced", budget_bytes=budget_bytes)
    out = module.attention(*(array(backend, x) for x in arrays), options=options)
    assert_close(out, exact_attention(*arrays), rms=1e-6)
    assert sum(sizes) == 2 * 3 * 20 * 33 * SCORE_BYTES
    assert max(sizes) <= max(budget_bytes, 33 * SCORE_BYTES)


@given(
    heads=st.integers(1, 12), queries=st.integers(1, 40), keys=st.integers(1, 40), budget_bytes=st.integers(1, 40 * 40 * 12 * 8)
)
def test_slices_cover_every_score_once(heads: int, queries: int, keys: int, budget_bytes: int) -> None:
    seen = np.zeros((heads, queries), dtype=int)
    for head, query in score_slices(heads=heads, queries=queries, keys=keys, budget_bytes=budget_bytes):
        assert seen[head, query].size * keys * SCORE_BYTES <= max(budget_bytes, keys * SCORE_BYTES)
        seen[head, query] += 1
    assert (seen == 1).all()


def test_lazy_slices_are_alive_a_few_at_a_time() -> None:
    q, k, v = (mx.random.normal((1, 8, 2048, 16)) for _ in range(3))
    mx.eval(q, k, v)

    def peak_bytes(options: AttentionOptions) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        mx.eval(mvmlx.attention.attention(q, k, v, options=options))
        return mx.get_peak_memory() - start

    assert peak_bytes(PLAIN) > 8 * 2048 * 2048 * SCORE_BYTES  # 128 pieces
    budget_bytes = 2**20
    assert peak_bytes(AttentionOptions(implementation="sliced", budget_bytes=budget_bytes)) < 16 * budget_bytes


@pytest.mark.parametrize("options", [PLAIN, SLICED], ids=lambda options: options.implementation)
@pytest.mark.parametrize("backend", BACKENDS)
def test_networks_give_the_same_with_every_form_of_attention(backend: Backend, options: AttentionOptions) -> None:
    inputs = unet_inputs(FULL, views=2)
    model = make_unet(FULL, backend, options=options)
    assert_close(denoise(model, inputs), denoise(make_unet(FULL, backend), inputs), rms=FLOAT32_RMS)
    vae, expected = make_vae(TINY_VAE, backend, options=options), make_vae(TINY_VAE, backend)
    x = from_numpy(vae, latents())
    with torch.no_grad():
        assert_close(vae.decode(x), expected.decode(x), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_networks_hand_their_options_to_every_attention(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = ATTENTION[backend], []
    original = module.attention

    def recorded(q: Any, k: Any, v: Any, *, options: AttentionOptions, **bias: Any) -> Any:
        seen.append(options)
        return original(q, k, v, options=options, **bias)

    monkeypatch.setattr(module, "attention", recorded)
    denoise(make_unet(TINY_UNET, backend, options=SLICED), unet_inputs(TINY_UNET))
    transformers = 1 + 2 + 1 + 2 + 1  # down, up, middle
    assert seen == [SLICED] * 2 * transformers
    vae = make_vae(TINY_VAE, backend, options=PLAIN)
    vae.decode(from_numpy(vae, latents()))
    assert seen[2 * transformers :] == [PLAIN]


def test_attention_options_are_checked() -> None:
    with pytest.raises(OptionError, match="implementation must be one of fused, plain, sliced, got 'flash'"):
        AttentionOptions(implementation="flash")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="budget_bytes must be at least 1, got 0"):
        AttentionOptions(budget_bytes=0)
    with pytest.raises(OptionError, match="kv_pooling must be 1 or 2, got 4"):
        AttentionOptions(kv_pooling=4)


# Float32 islands


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_group_statistics_are_exact_where_the_mean_is_large(backend: Backend, mean: float, dtype: type) -> None:
    x = (np.random.default_rng(0).standard_normal((2, 6, 8, 16)) + mean).astype(dtype)
    groups = x.astype(np.float64).reshape(2, 48, 4, 4)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    norm = set_dtype(LAYERS[backend].GroupNorm(4, 16, eps=1e-5), np.dtype(dtype).name)
    # channels_last memory, as inside of the networks
    out = norm(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if backend == "torch" else norm(mx.array(x))
    # The mean itself, in float32, is off by up to its last digit.
    rms = (1e-3 if dtype is np.float16 else 2e-6) + mean * 2e-7
    assert_close(out, expected.reshape(x.shape), rms=rms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_large_float16_activations_are_finite_and_right(backend: Backend) -> None:
    x = (np.random.default_rng(0).standard_normal((2, 4, 4, 16)) * 8000).astype(np.float16)
    assert np.square(x.astype(np.float64)).max() > np.finfo(np.float16).max
    norm = set_dtype(LAYERS[backend].GroupNorm(4, 16, eps=1e-5), "float16")
    groups = x.astype(np.float64).reshape(2, 16, 4, 4)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / groups.std((1, 3), keepdims=True)
    out = norm(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if backend == "torch" else norm(mx.array(x))
    assert_close(out, expected.reshape(x.shape), rms=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_constant_groups_are_zero(backend: Backend) -> None:
    """What rounding leaves of the mean would be some 300 times larger behind the norm."""
    x = np.broadcast_to(np.linspace(0.1, 7, 32, dtype=np.float32), (2, 16, 16, 32)).copy()
    norm = LAYERS[backend].GroupNorm(32, 32, eps=1e-5)
    out = norm(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if backend == "torch" else norm(mx.array(x))
    assert np.abs(to_numpy(out)).max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_written_out_attention_survives_scores_beyond_float16(backend: Backend) -> None:
    arrays = queries_keys_values(np.float16, scale=200.0)
    assert np.abs(arrays[0].astype(np.float64) @ arrays[1].astype(np.float64).swapaxes(-1, -2)).max() > 65504
    for options in (PLAIN, SLICED):
        out = ATTENTION[backend].attention(*(array(backend, x) for x in arrays), options=options)
        assert_close(out, exact_attention(*arrays), rms=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_layer_of_the_decoder_works_in_float32(backend: Backend) -> None:
    model = set_dtype(make_vae(TINY_VAE, backend), "bfloat16")
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 16), dtype=np.float32)
    weight, bias = (
        torch.from_numpy(to_numpy(p)).double() for p in (model.decoder.conv_out.weight, model.decoder.conv_out.bias)
    )
    weight = weight if backend == "torch" else weight.permute(0, 3, 1, 2)
    half = torch.from_numpy(x).bfloat16().permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(half.double(), weight, bias, padding=1).permute(0, 2, 3, 1)
    with torch.no_grad():
        out = model.decoder.conv_out(half if backend == "torch" else mx.array(x).astype(mx.bfloat16))
    assert_close(out.permute(0, 2, 3, 1) if backend == "torch" else out, expected, rms=1e-6)


# Gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_every_parameter_of_the_unet(backend: Backend) -> None:
    model = make_unet(FULL, backend)
    found = unet_gradients(model, unet_inputs(FULL, views=2))
    assert set(found) == parameter_names(model)
    assert [name for name, x in found.items() if not (np.isfinite(x).all() and np.abs(x).max() > 1e-6)] == []


def test_gradients_of_the_unet_are_the_same_on_both_backends() -> None:
    inputs = unet_inputs(FULL, views=2)
    ours, expected = (unet_gradients(make_unet(FULL, backend), inputs) for backend in ("mlx", "torch"))
    assert set(ours) == set(expected)
    for name, x in expected.items():
        assert_close(ours[name], x, rms=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_every_parameter_of_the_vae(backend: Backend) -> None:
    model = make_vae(TINY_VAE, backend)
    x = from_numpy(model, pixels())

    def loss(vae: Any) -> Any:
        mean, logvar = vae.encode(x)
        return ((vae.decode(mean) - x) ** 2).mean() + (logvar**2).mean()

    found = gradients(model, loss)
    # A bias of the keys shifts all scores of a query alike, which the softmax does not see.
    visible = {name for name in parameter_names(model) if not name.endswith("to_k.bias")}
    assert [name for name in visible if not (np.isfinite(found[name]).all() and np.abs(found[name]).max() > 1e-7)] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_gives_the_same_gradients(backend: Backend) -> None:
    inputs = unet_inputs(FULL, views=2)
    checkpointed = unet_gradients(make_unet(FULL, backend, gradient_checkpointing=True), inputs)
    expected = unet_gradients(make_unet(FULL, backend), inputs)
    assert set(checkpointed) == set(expected)
    for name, x in expected.items():
        assert_close(checkpointed[name], x, rms=1e-5)


@pytest.mark.parametrize("network", ["unet", "vae"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_computes_blocks_twice(backend: Backend, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(*, gradient_checkpointing: bool) -> int:
        count = 0
        original = ATTENTION[backend].attention

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(ATTENTION[backend], "attention", counted)
            if network == "unet":
                unet_gradients(
                    make_unet(TINY_UNET, backend, gradient_checkpointing=gradient_checkpointing), unet_inputs(TINY_UNET)
                )
            else:
                vae = make_vae(TINY_VAE, backend, gradient_checkpointing=gradient_checkpointing)
                x = from_numpy(vae, pixels())
                gradients(vae, lambda vae: (vae.decode(vae.encode(x).mean) ** 2).mean())
        return count

    assert calls(gradient_checkpointing=True) == 2 * calls(gradient_checkpointing=False) > 0


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": np.zeros((2, 1, 8, 12, 4), np.float32)}, r"sample must be of shape \(b, v, h, w, 8\)"),
        ({"sample": np.zeros((2, 0, 8, 12, 8), np.float32)}, r"sample must be of shape \(b, v, h, w, 8\)"),
        ({"sample": np.zeros((2, 1, 7, 12, 8), np.float32)}, "multiples of 2"),
        ({"timesteps": np.zeros(3, np.float32)}, r"times must be of shape \(2, 128\)"),
        ({"context": None}, r"context must be of shape \(b, l, 24\), got None"),
        ({"context": np.zeros((2, 7, 25), np.float32)}, r"context must be of shape \(b, l, 24\)"),
        ({"context": np.zeros((1, 7, 24), np.float32)}, "cross must be of 2 objects, or the sample of one, got 1"),
        ({"camera": np.zeros((2, 2, 16), np.float32)}, r"camera must be of shape \(2, 1, 16\)"),
        ({"reference": np.zeros((2, 1, 8, 12, 8), np.float32)}, r"reference must be of shape \(b, r, h, w, 4\)"),
        ({"reference": np.zeros((2, 0, 8, 12, 4), np.float32)}, r"reference must be of shape \(b, r, h, w, 4\)"),
        ({"reference": np.zeros((2, 1, 8, 8, 4), np.float32)}, r"reference must be of shape \(2, r, 8, 12, 4\)"),
        ({"reference": np.zeros((2, 8, 12, 4), np.float32)}, r"reference must be of shape \(b, r, h, w, 4\)"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unet_refuses_shapes_that_do_not_fit(backend: Backend, change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        denoise(make_unet(FULL, backend), unet_inputs(FULL)._replace(**change))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unet_refuses_conditions_that_it_has_no_weights_for(backend: Backend) -> None:
    config = replace(TINY_UNET, cross_attention_dim=None)
    model, inputs, extra = make_unet(config, backend), unet_inputs(config), unet_inputs(FULL)
    for name in ("context", "camera", "reference"):
        with pytest.raises(OptionError, match=f"{name} must be None for a model without"):
            denoise(model, inputs._replace(**{name: getattr(extra, name)}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vae_refuses_shapes_that_do_not_fit(backend: Backend) -> None:
    model = make_vae(TINY_VAE, backend)
    with pytest.raises(OptionError, match=r"pixels must be of shape .* with h and w multiples of 4"):
        model.encode(from_numpy(model, np.zeros((1, 16, 18, 3), np.float32)))
    with pytest.raises(OptionError, match=r"latents must be of shape \(n, h, w, 4\)"):
        model.decode(from_numpy(model, np.zeros((1, 4, 4, 8), np.float32)))
    with pytest.raises(OptionError, match="batch must be at least 1 or None, got 0"):
        model.decode(from_numpy(model, latents()), batch=0)
