"""The arithmetic of the networks, reckoned from their configs, beside what PyTorch counts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig as TransformersTextConfig
from transformers import CLIPTextModel, CLIPVisionModel
from transformers import CLIPVisionConfig as TransformersVisionConfig

from mvshared.benchmark.flops import (
    Frames,
    condition_flops,
    run_flops,
    tower_flops,
    unet_flops,
    upscaler_flops,
    vae_flops,
)
from mvshared.benchmark.models import RANDOM
from mvshared.config import (
    IMAGEDREAM,
    SD21,
    SD_VAE,
    SD_X2_UNET,
    CLIPTextConfig,
    CLIPVisionConfig,
    KUNetConfig,
    UNetConfig,
    VAEConfig,
)
from mvtorch.diffusers_model import BUILDERS, unet_arguments
from mvtorch.upscaler import LatentUpscaler
from tests.helpers import TINY_MODEL, TINY_UNET, TINY_VAE


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    return counter.get_total_flops()


def sd21_counted(config: UNetConfig, *, branches: int, side: int, tokens: int) -> int:
    """diffusers' U-Net without joint attention, on one view."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**unet_arguments(config))
        context = torch.zeros(branches, tokens, config.cross_attention_dim or 8)
        return counted(lambda: unet(torch.zeros(branches, config.in_channels, side, side), torch.zeros(branches), context))


@pytest.mark.parametrize("config", [SD21, TINY_UNET, replace(TINY_UNET, mid_attention=False, attention_levels=(False, True))])
def test_a_step_is_what_pytorch_counts_in_diffusers(config: UNetConfig) -> None:
    step = unet_flops(config, Frames(branches=2, views=1, references=0, side=32), tokens=77)
    constant = condition_flops(config, branches=2, text_tokens=77)
    assert step.all + constant.all == sd21_counted(config, branches=2, side=32, tokens=77)
    assert 0 < step.attention < step.all


def test_one_step_of_stable_diffusion_is_the_known_amount() -> None:
    frames = Frames(branches=1, views=1, references=0, side=32)
    total = unet_flops(SD21, frames, tokens=77).all + condition_flops(SD21, branches=1, text_tokens=77).all
    assert round(total / 1e9, 1) == 181.1


@pytest.mark.parametrize("views", [1, 4])
def test_views_cameras_pictures_and_a_reference_frame_are_what_pytorch_counts_in_diffusers(views: int) -> None:
    """diffusers projects texts and embeds timesteps once per frame, instead of once per branch of guidance."""
    config = IMAGEDREAM
    assert config.resampler is not None
    model = replace(RANDOM["imagedream"], unet=config)
    frames, width = views + 1, config.time_embed_dim
    with torch.device("meta"):
        unet: Any = BUILDERS["unet"](None, model).to("meta")
        cameras = torch.zeros(2 * frames, 16)
        unet.extras.set(frames=frames, views=views, cameras=cameras, image_scale=1.0, reference_scale=1.0)
        tokens = torch.zeros(2 * frames, config.resampler.num_queries, 1024)
        context = (torch.zeros(2 * frames, 77, 1024), [tokens[:, None]])
        step = counted(lambda: unet(torch.zeros(2 * frames, 4, 32, 32), torch.zeros(2 * frames), context))
        states = torch.zeros(2, 257, config.resampler.embedding_dim)
        resampled = counted(lambda: unet.image_embed(states))
    constant = condition_flops(config, branches=2, text_tokens=77, pictures=1, states=257).all
    ours = unet_flops(config, Frames(2, views, 1, 32), tokens=77 + 16).all
    again = 2 * (2 * frames - 2) * width * (config.block_out_channels[0] + width)
    assert ours + frames * (constant - resampled) + again == step
    assert constant > resampled > 0


@pytest.mark.parametrize("config", [SD_VAE, TINY_VAE, replace(TINY_VAE, mid_block_add_attention=False, layers_per_block=2)])
@pytest.mark.parametrize("decoder", [True, False])
def test_the_vae_is_what_pytorch_counts_in_diffusers(config: VAEConfig, decoder: bool) -> None:
    levels = len(config.block_out_channels)
    with torch.device("meta"):
        kind: Any = AutoencoderKL
        vae = kind(
            latent_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_add_attention,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
        side = 64 // config.downscale
        latents, pixels = torch.zeros(1, config.latent_channels, side, side), torch.zeros(1, 3, 64, 64)
        expected = counted(lambda: vae.decode(latents) if decoder else vae.encode(pixels))
    assert vae_flops(config, size_px=64, decoder=decoder).all == expected


@pytest.mark.parametrize(
    "config", [SD_X2_UNET, KUNetConfig(block_out_channels=(32, 32, 64), layers_per_block=2, attention_levels=(False,) * 3)]
)
def test_the_upscaler_is_what_pytorch_counts(config: KUNetConfig) -> None:
    """In this project's network: diffusers blurs by convolutions over all channels, which is no part of the work."""
    with torch.device("meta"):
        unet = LatentUpscaler(config).requires_grad_(False)
        text = unet.keys_values(torch.zeros(2, 77, config.cross_attention_dim) if config.cross_attention_dim else None)
        sample, condition = torch.zeros(2, 3, 32, 32, config.in_channels), torch.zeros(2, config.time_cond_proj_dim)
        expected = counted(lambda: unet(sample, torch.zeros(2), text=text, condition=condition))
    tokens = 77 if config.cross_attention_dim else 0
    assert upscaler_flops(config, branches=2, views=3, side=32, tokens=tokens).all == expected


def test_the_towers_are_what_pytorch_counts_in_transformers() -> None:
    text, vision = CLIPTextConfig(num_hidden_layers=2), CLIPVisionConfig(num_hidden_layers=2)
    with torch.device("meta"):
        theirs = TransformersTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16)
        tower: Any = CLIPTextModel(theirs)
        picture_tower: Any = CLIPVisionModel(
            TransformersVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=2,
                num_attention_heads=16,
                image_size=224,
                patch_size=14,
            )
        )
        assert tower_flops(text).all == counted(lambda: tower(torch.zeros(1, 77, dtype=torch.long)))
        assert tower_flops(vision).all == counted(lambda: picture_tower(torch.zeros(1, 3, 224, 224)))


def test_a_run_is_its_parts() -> None:
    frames = Frames(branches=2, views=3, references=1, side=8)
    parts = 5 * unet_flops(TINY_MODEL.unet, frames).all
    parts += vae_flops(TINY_VAE, size_px=32, decoder=False).all + 3 * vae_flops(TINY_VAE, size_px=32, decoder=True).all
    assert run_flops(TINY_MODEL, views=3, size_px=32, steps=5, branches=2).all == parts
