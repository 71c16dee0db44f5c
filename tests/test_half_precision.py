"""Half precision at its limits: activations of 1e4, scores beyond float16, strong guidance and many steps, on both backends."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    TINY_MODEL,
    TINY_UNET,
    TINY_VAE,
    Backend,
    assert_close,
    copy_weights,
    denoise,
    from_numpy,
    make_unet,
    make_upscaler,
    make_vae,
    randomise,
    set_dtype,
    to_numpy,
    unet_inputs,
    write_tiny_model,
)
from numpy.typing import NDArray
from upscalers import TINY as TINY_UPSCALER

import mvmlx.attention
import mvmlx.clip
import mvmlx.layers
import mvmlx.model
import mvmlx.upscaler
import mvtorch.attention
import mvtorch.clip
import mvtorch.layers
import mvtorch.model
import mvtorch.upscaler
from mvshared.attention import FUSED
from mvshared.backend import load
from mvshared.config import CLIPTextConfig, CLIPVisionConfig, KUNetConfig, ResamplerConfig

ATTENTION: dict[Backend, Any] = {"torch": mvtorch.attention, "mlx": mvmlx.attention}
CLIP: dict[Backend, Any] = {"torch": mvtorch.clip, "mlx": mvmlx.clip}
LAYERS: dict[Backend, Any] = {"torch": mvtorch.layers, "mlx": mvmlx.layers}
UPSCALER: dict[Backend, Any] = {"torch": mvtorch.upscaler, "mlx": mvmlx.upscaler}

LARGE = 1e4
HALVES = ("float16", "bfloat16")
HALF_RMS = {"float16": 5e-3, "bfloat16": 4e-2}
TEXT = CLIPTextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16
)
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
RESAMPLER = ResamplerConfig(embedding_dim=32, hidden_dim=32, output_dim=24, depth=2, dim_head=16, heads=2, num_queries=4)
KINDS = ("spread", "large mean", "constant", "outlier")


def activations(kind: str, *shape: int) -> NDArray[np.float32]:
    """Numbers up to LARGE: all over the range, close to its end, all alike in every channel, or a single one."""
    rng = np.random.default_rng(0)
    if kind == "spread":
        return rng.uniform(-LARGE, LARGE, shape).astype(np.float32)
    if kind == "large mean":
        return (LARGE - rng.uniform(0, 64, shape)).astype(np.float32)
    if kind == "constant":
        return np.broadcast_to(np.where(np.arange(shape[-1]) % 2, LARGE, -LARGE).astype(np.float32), shape).copy()
    x = rng.standard_normal(shape).astype(np.float32)
    x.reshape(-1)[0] = LARGE
    return x


def make(modules: dict[Backend, Any], backend: Backend, name: str, *args: Any, **kwargs: Any) -> Any:
    """A block with random weights, the same on both backends."""
    model = getattr(modules["torch"], name)(*args, **kwargs)
    randomise(model)
    return model if backend == "torch" else copy_weights(model, getattr(modules["mlx"], name)(*args, **kwargs))


def on_pictures(backend: Backend, block: Any, x: NDArray[np.float32], *args: Any, dtype: str, **kwargs: Any) -> NDArray[Any]:
    """A block's output (n, h, w, c) for pictures x (n, h, w, c) in a dtype."""
    if backend == "mlx":
        return to_numpy(block(half(backend, x, dtype), *args, **kwargs))
    with torch.no_grad():
        return to_numpy(block(half(backend, x, dtype).permute(0, 3, 1, 2), *args, **kwargs).permute(0, 2, 3, 1))


def half(backend: Backend, x: NDArray[np.float32], dtype: str) -> Any:
    return torch.from_numpy(x).to(getattr(torch, dtype)) if backend == "torch" else mx.array(x).astype(getattr(mx, dtype))


def assert_finite(x: Any) -> None:
    values = to_numpy(x).astype(np.float64)
    assert np.isfinite(values).all(), f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite"
    assert values.any()


# Blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_resnet_blocks_take_large_activations(backend: Backend, dtype: str, kind: str) -> None:
    block = set_dtype(make(LAYERS, backend, "ResnetBlock", 16, 32, groups=4, eps=1e-5, time_embed_dim=8), dtype)
    emb = half(backend, activations("spread", 2, 8), dtype)
    assert_finite(on_pictures(backend, block, activations(kind, 2, 8, 8, 16), emb, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_samplers_of_both_directions_take_large_activations(backend: Backend, dtype: str, kind: str) -> None:
    for name in ("Downsample", "Upsample"):
        block = set_dtype(make(LAYERS, backend, name, 16), dtype)
        assert_finite(on_pictures(backend, block, activations(kind, 2, 8, 8, 16), dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_take_large_activations_and_a_large_context(backend: Backend, dtype: str, kind: str) -> None:
    options: dict[str, Any] = {"depth": 1, "context_dim": 24, "image_tokens": True, "groups": 4, "linear": True}
    block = set_dtype(make(ATTENTION, backend, "SpatialTransformer", 32, 2, **options), dtype)
    context, image = (half(backend, activations(kind, 1, tokens, 24), dtype) for tokens in (7, 4))
    with torch.no_grad():
        cross = [block.transformer_blocks[0].attn2.cross_keys_values(context, image, image_scale=1.0)]
        x = activations(kind, 2, 4, 4, 32)
        assert_finite(on_pictures(backend, block, x, cross, views=2, options=FUSED, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_middle_of_the_vae_takes_large_activations(backend: Backend, dtype: str, kind: str) -> None:
    block = set_dtype(make_vae(TINY_VAE, backend).decoder.mid_block, dtype)
    assert_finite(on_pictures(backend, block, activations(kind, 1, 6, 6, 32), options=FUSED, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_layers_take_large_activations(backend: Backend, dtype: str, activation: Any, kind: str) -> None:
    for causal in (True, False):
        config = replace(TEXT, hidden_act=activation)
        layer = set_dtype(make(CLIP, backend, "CLIPEncoderLayer", config, causal=causal), dtype)
        with torch.no_grad():
            assert_finite(layer(half(backend, activations(kind, 2, 9, 32), dtype), options=FUSED))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_resampler_takes_large_states(backend: Backend, dtype: str, kind: str) -> None:
    block = set_dtype(make(CLIP, backend, "Resampler", RESAMPLER), dtype)
    with torch.no_grad():
        assert_finite(block(from_numpy(block, activations(kind, 2, 9, 32))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_the_upscaler_take_large_activations(backend: Backend, dtype: str, kind: str) -> None:
    config: KUNetConfig = TINY_UPSCALER
    channels = config.block_out_channels[-1]
    x, emb = activations(kind, 2, 4, 4, channels), half(backend, activations("spread", 2, config.time_embed_dim) / LARGE, dtype)
    resnet = set_dtype(make(UPSCALER, backend, "KResnetBlock", channels, channels, channels, config=config), dtype)
    assert_finite(on_pictures(backend, resnet, x, emb, dtype=dtype))
    block = set_dtype(make(UPSCALER, backend, "KAttentionBlock", channels, config=config, itself=True), dtype)
    context = half(backend, activations(kind, 1, 7, config.cross_attention_dim or 0), dtype)
    with torch.no_grad():
        text = block.attn2.keys_values(context)
        assert_finite(on_pictures(backend, block, x, emb, text, options=FUSED, dtype=dtype))
    for name in ("blur_downsample", "blur_upsample"):
        assert_finite(on_pictures(backend, getattr(UPSCALER[backend], name), x, dtype=dtype))


# Attention


@pytest.mark.parametrize("width", [16, 40, 512])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_beyond_float16_give_the_definitions_attention(backend: Backend, dtype: str, width: int) -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.choice([-1.0, 1.0], (1, 2, 9, width)).astype(np.float32) * 400 for _ in range(2))
    v = rng.standard_normal((1, 2, 9, width), np.float32)
    assert np.abs(q @ k.swapaxes(-1, -2)).max() > 65504
    for causal in (False, True):
        scores = (q @ k.swapaxes(-1, -2)).astype(np.float64) * width**-0.5
        scores = np.where(np.triu(np.ones((9, 9), bool), 1), -np.inf, scores) if causal else scores
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ v
        arrays = [half(backend, x, dtype) for x in (q, k, v)]
        out = ATTENTION[backend].attention(*arrays, options=FUSED, causal=causal)
        assert_close(out, expected, rms=HALF_RMS[dtype])


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_of_mlx_in_half_precision_is_as_exact_as_its_dtype_without_a_kernel(dtype: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [half("mlx", rng.standard_normal((1, 2, 33, 64), np.float32) * 3, dtype) for _ in range(3)]
    exact = mvmlx.attention.attention(*(x.astype(mx.float32) for x in arrays), options=FUSED)
    out = mvmlx.attention.attention(*arrays, options=FUSED)
    assert_close(out, exact, rms={"float16": 6e-4, "bfloat16": 4e-3}[dtype])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_is_exact_up_to_the_last_number_of_the_dtype(backend: Backend, dtype: str) -> None:
    x = np.concatenate([np.linspace(-6, 6, 101), [-6e4, 4e4, 6e4]]).astype(np.float32)
    halved = half(backend, x, dtype)
    exact = torch.nn.functional.gelu(torch.from_numpy(to_numpy(halved).astype(np.float64))).numpy()
    epsilon = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(to_numpy(LAYERS[backend].gelu(halved)), exact, rtol=1.01 * epsilon, atol=1e-6)


# Networks


@pytest.mark.parametrize("kind", ["spread", "constant", "outlier"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unet_takes_a_large_sample_context_camera_and_reference(backend: Backend, dtype: str, kind: str) -> None:
    config = replace(TINY_UNET, camera_dim=16, reference_frame=True)
    model = set_dtype(make_unet(config, backend), dtype)
    inputs = unet_inputs(config, views=2, batch=1)
    # A context of 1e4 in every token adds 1e4 to every activation in every block: the sum itself is beyond float16.
    names = ("sample", "reference") if kind == "constant" else ("sample", "context", "camera", "reference")
    large = {name: activations(kind, *getattr(inputs, name).shape) for name in names}
    assert_finite(denoise(model, inputs._replace(**large)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vae_takes_large_pixels_and_latents(backend: Backend, dtype: str) -> None:
    model = set_dtype(make_vae(TINY_VAE, backend), dtype)
    with torch.no_grad():
        moments = model.encode(from_numpy(model, activations("spread", 1, 16, 16, 3)))
        assert_finite(moments.mean)
        assert_finite(model.decode(from_numpy(model, activations("spread", 1, 4, 4, 4))))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_takes_large_embeddings_and_pixels(backend: Backend, dtype: str) -> None:
    text, vision = (make(CLIP, backend, *each) for each in (("CLIPTextModel", TEXT), ("CLIPVisionModel", VISION)))
    with torch.no_grad():
        weight = text.embeddings.token_embedding.weight
        large = from_numpy(text, activations("spread", *weight.shape))
        if backend == "torch":
            weight.copy_(large)
        else:
            text.embeddings.token_embedding.weight = large
        ids = np.arange(18).reshape(2, 9)
        out = set_dtype(text, dtype)(from_numpy(text, ids))
        assert_finite(out.last_hidden_state)
        assert_finite(out.pooler_output)
        pixels = activations("spread", 1, 28, 28, 3)
        assert_finite(set_dtype(vision, dtype)(from_numpy(vision, pixels)).hidden_states[-2])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_upscalers_network_takes_a_large_sample_and_context(backend: Backend, dtype: str) -> None:
    config = TINY_UPSCALER
    model = set_dtype(make_upscaler(config, backend), dtype)
    context = None if config.cross_attention_dim is None else activations("spread", 1, 7, config.cross_attention_dim)
    arguments = (activations("spread", 1, 2, 16, 16, config.in_channels), np.array([0.5], np.float32))
    with torch.no_grad():
        text = model.keys_values(from_numpy(model, context))
        condition = np.random.default_rng(0).standard_normal((1, config.time_cond_proj_dim), np.float32)
        sample, noise = (from_numpy(model, x) for x in arguments)
        assert_finite(model(sample, noise, text=text, condition=from_numpy(model, condition)))


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    unet = replace(
        TINY_MODEL.unet,
        block_out_channels=(8,),
        layers_per_block=(1,),
        transformer_layers_per_block=(1,),
        attention_levels=(False,),  # the middle has one
        num_attention_heads=(1,),
        norm_num_groups=4,
    )
    vae = replace(TINY_VAE, block_out_channels=(8, 8), mid_block_add_attention=False, norm_num_groups=4)
    defaults = replace(TINY_MODEL.defaults, views=1, size_px=16)
    scheduler = replace(TINY_MODEL.scheduler, steps_offset=0)  # with 1, 1000 steps do not fit
    config = replace(TINY_MODEL, unet=unet, vae=vae, defaults=defaults, scheduler=scheduler)
    return write_tiny_model(tmp_path_factory.mktemp("smallest"), config)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_steps_with_guidance_20_end_in_finite_views(folder: Path, backend: Backend, dtype: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    pipeline = load(folder, backend=backend, device="cpu", dtype=dtype)
    views = pipeline.generate(image, steps=1000, guidance=20.0, seed=0)
    assert views.parameters.steps == 1000
    assert_finite(views.latents)
    assert len(np.unique(views.images)) > 1
