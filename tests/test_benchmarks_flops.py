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
from mvtorch.diffusers_model import unet_arguments
from mvtorch.unet import MultiViewUNet
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
def test_views_cameras_pictures_and_a_reference_frame_are_what_pytorch_counts(views: int) -> None:
    assert IMAGEDREAM.resampler is not None
    with torch.device("meta"):
        unet = MultiViewUNet(IMAGEDREAM).requires_grad_(False)
        context, states = torch.zeros(2, 77, 1024), torch.zeros(2, 1, 257, IMAGEDREAM.resampler.embedding_dim)
        sample, camera = torch.zeros(2, views, 32, 32, 4), torch.zeros(2, views, 16)
        given: list[Any] = []
        constant = counted(lambda: given.append(unet.cross_keys_values(context, image_states=states)))
        reference = torch.zeros(2, 1, 32, 32, 4)
        step = counted(lambda: unet(sample, torch.zeros(2), cross=given[0], camera=camera, reference=reference))
    assert condition_flops(IMAGEDREAM, branches=2, text_tokens=77, pictures=1, states=257).all == constant
    assert unet_flops(IMAGEDREAM, Frames(2, views, 1, 32), tokens=77 + 16).all == step


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
