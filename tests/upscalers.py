"""Tiny latent upscalers for the tests: networks, inputs, diffusers' network of the same weights, and whole folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_latent_upscale import StableDiffusionLatentUpscalePipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from helpers import TINY_MODEL, from_numpy, make_upscaler, randomise, to_numpy, write_tiny_model
from numpy.typing import NDArray
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import mvtorch.model
from mvshared.config import KUNetConfig
from mvshared.upscaling.config import UpscaleDefaults, UpscalerConfig
from mvshared.upscaling.folder import write_upscaler
from mvtorch.diffusers_upscaler import k_unet_arguments

FIXTURES = Path(__file__).parent / "fixtures"

TINY = KUNetConfig(
    block_out_channels=(32, 32, 64, 64),
    layers_per_block=2,
    attention_levels=(False, True, True, True),
    attention_head_dim=16,
    cross_attention_dim=24,
    time_cond_proj_dim=128 + 24,  # diffusers embeds the noise level in 128 numbers
)
CONFIGS = {
    "the public network's structure": TINY,
    "one layer, wider heads": replace(TINY, layers_per_block=1, attention_head_dim=32),
    "no attention": KUNetConfig(
        in_channels=6, out_channels=4, block_out_channels=(64, 64), layers_per_block=1, attention_levels=(False, False)
    ),
    "attention in the middle": KUNetConfig(
        block_out_channels=(32, 64, 64),
        layers_per_block=3,
        attention_levels=(False, True, False),
        attention_head_dim=32,
        cross_attention_dim=24,
    ),
}


PLAIN = KUNetConfig(block_out_channels=(32, 32), layers_per_block=1, attention_levels=(False, False), time_cond_proj_dim=8)
UPSCALER = UpscalerConfig(
    family="tiny-x2",
    unet=PLAIN,
    vae=TINY_MODEL.vae,
    text_encoder=None,
    noise_frequencies=(0.5, 1.0, -2.0, 3.0),
    defaults=UpscaleDefaults(steps=2),
)


class UpscalerInputs(NamedTuple):
    """Inputs of the network for b objects with v views: see LatentUpscaler; context (b, l, c) is the text."""

    sample: NDArray[np.float32]
    noise: NDArray[np.float32]
    context: NDArray[np.float32] | None
    condition: NDArray[np.float32]


def upscaler_inputs(config: KUNetConfig, *, batch: int = 2, views: int = 3, size: tuple[int, int] = (16, 24)) -> UpscalerInputs:
    """Seeded noise of the right shapes."""
    generator = np.random.default_rng(1)

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape, dtype=np.float32)

    return UpscalerInputs(
        sample=normal(batch, views, *size, config.in_channels),
        noise=normal(batch),
        context=None if config.cross_attention_dim is None else normal(batch, 7, config.cross_attention_dim),
        condition=normal(batch, config.time_cond_proj_dim),
    )


def run_upscaler(model: Any, inputs: UpscalerInputs) -> NDArray[Any]:
    """The network's output as numpy, without gradients."""
    sample, noise, context, condition = (from_numpy(model, x) for x in inputs)
    with torch.no_grad():
        return to_numpy(model(sample, noise, text=model.keys_values(context), condition=condition))


def diffusers_upscaler(config: KUNetConfig) -> UNet2DConditionModel:
    """diffusers' network of a config, with the weights of `make_upscaler`; they must fit exactly."""
    oracle = UNet2DConditionModel(**k_unet_arguments(config))
    oracle.load_state_dict(make_upscaler(config, "torch").state_dict())
    return oracle.eval()


def diffusers_pipeline(config: KUNetConfig = TINY, **scheduler: Any) -> StableDiffusionLatentUpscalePipeline:
    """A complete small pipeline with random weights, in the public one's structure."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": config.latent_channels,
    }
    vae = AutoencoderKL(**sizes)
    randomise(vae)
    assert config.cross_attention_dim is not None
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=config.cross_attention_dim,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="quick_gelu",
            bos_token_id=49406,
            eos_token_id=49407,
            projection_dim=config.cross_attention_dim,
        )
    )
    levels: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    levels |= {"prediction_type": "sample", "interpolation_type": "log_linear", **scheduler}
    return StableDiffusionLatentUpscalePipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(FIXTURES / "tiny-mvdream" / "tokenizer"),
        unet=diffusers_upscaler(config),
        scheduler=EulerDiscreteScheduler(**levels),
    )


def write_tiny_models(folder: Path) -> Path:
    """A tiny model in `folder`/tiny, and in `folder`/x2 an upscaler without text that uses its VAE; returns the folder."""
    write_tiny_model(folder / "tiny")
    weights = mvtorch.model.get_weights(make_upscaler(PLAIN, "torch"))
    write_upscaler(folder / "x2", UPSCALER, weights, vae_from=str(folder / "tiny"))
    return folder
