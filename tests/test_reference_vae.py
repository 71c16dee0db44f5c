"""The VAE of both backends against diffusers' AutoencoderKL with the same random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from helpers import BACKENDS, FLOAT32_RMS, TINY_VAE, Backend, assert_close, from_numpy, make_vae, norm_eps, to_numpy

from mvshared.config import VAEConfig
from mvshared.names import rename_old_vae_attention

CONFIGS = {
    "three levels": TINY_VAE,
    "no attention": replace(TINY_VAE, mid_block_add_attention=False),
    "two layers, four levels, eight latent channels": VAEConfig(
        block_out_channels=(16, 16, 32, 48), layers_per_block=2, norm_num_groups=16, latent_channels=8
    ),
    "one level": replace(TINY_VAE, block_out_channels=(16,)),
}


def diffusers_vae(config: VAEConfig) -> AutoencoderKL:
    """diffusers' model of a config, with the weights of `make_vae`; they must fit exactly."""
    levels = len(config.block_out_channels)
    oracle = AutoencoderKL(
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_add_attention,
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
    )
    oracle.load_state_dict(make_vae(config, "torch").state_dict())
    return oracle.eval()


def pictures(config: VAEConfig) -> np.ndarray:
    shape = (2, 4 * config.downscale, 6 * config.downscale, 3)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_moments_are_those_of_diffusers(name: str, backend: Backend) -> None:
    config, pixels = CONFIGS[name], pictures(CONFIGS[name])
    model = make_vae(config, backend)
    with torch.no_grad():
        expected = diffusers_vae(config).encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist  # pyright: ignore
        moments = model.encode(from_numpy(model, pixels))
    assert_close(moments.mean, expected.mean.permute(0, 2, 3, 1), rms=FLOAT32_RMS)
    assert_close(moments.logvar, expected.logvar.permute(0, 2, 3, 1), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_decoded_pictures_are_those_of_diffusers(name: str, backend: Backend) -> None:
    config = CONFIGS[name]
    model = make_vae(config, backend)
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, config.latent_channels), dtype=np.float32)
    with torch.no_grad():
        expected = diffusers_vae(config).decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample  # pyright: ignore
        pixels = model.decode(from_numpy(model, latents))
    assert_close(pixels, expected.permute(0, 2, 3, 1), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_norm_has_the_eps_of_diffusers(backend: Backend) -> None:
    eps = norm_eps(make_vae(TINY_VAE, backend))
    assert eps == norm_eps(diffusers_vae(TINY_VAE))
    assert len(eps) > 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_extreme_log_variance_is_clamped_as_in_diffusers(backend: Backend) -> None:
    model, oracle, pixels = make_vae(TINY_VAE, backend), diffusers_vae(TINY_VAE), pictures(TINY_VAE)
    with torch.no_grad():
        oracle.quant_conv.weight *= 1000  # pyright: ignore
        model.quant_conv.weight = (
            model.quant_conv.weight * 1000 if backend == "mlx" else torch.nn.Parameter(model.quant_conv.weight * 1000)
        )
        expected = oracle.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.logvar  # pyright: ignore
        logvar = to_numpy(model.encode(from_numpy(model, pixels)).logvar)
    assert logvar.min() == -30.0 and logvar.max() == 20.0
    assert_close(logvar, expected.permute(0, 2, 3, 1), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_are_scaled_with_the_statistics_of_the_config(backend: Backend) -> None:
    mean, std = (0.1, -0.2, 0.3, 1.5), (1.0, 2.0, 0.5, 4.0)
    model = make_vae(replace(TINY_VAE, scaling_factor=0.5, latents_mean=mean, latents_std=std), backend)
    latents = np.random.default_rng(0).standard_normal((2, 3, 5, 4), dtype=np.float32)
    scaled = model.scale_latents(from_numpy(model, latents))
    assert_close(scaled, (latents - np.array(mean)) * 0.5 / np.array(std), rms=1e-6)
    assert_close(model.unscale_latents(scaled), latents, rms=1e-6)
    plain = make_vae(TINY_VAE, backend)
    assert_close(plain.scale_latents(from_numpy(plain, latents)), latents * 0.18215, rms=1e-6)


def test_old_attention_names_become_the_names_of_the_model() -> None:
    names = set(make_vae(TINY_VAE, "torch").state_dict())
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part in ("encoder", "decoder"):
        for new, old in new_to_old.items():
            for kind in ("weight", "bias"):
                name = f"{part}.mid_block.attentions.0.{new}.{kind}"
                assert name in names
                assert rename_old_vae_attention(f"{part}.mid_block.attentions.0.{old}.{kind}") == name
