"""Tiny checkpoint folders as diffusers and transformers save them themselves."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

FIXTURES = Path(__file__).parent / "fixtures"

SD_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def stable_diffusion(folder: Path, *, unet: dict[str, Any] | None = None, **schedule: Any) -> Path:
    """A tiny Stable Diffusion 1 with random weights; `unet` and `schedule` are other fields of diffusers' configs."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    UNet2DConditionModel(**(arguments | (unet or {}))).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 16),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        norm_num_groups=8,
    ).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=525, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, eos_token_id=524
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    DDIMScheduler(**(SD_SCHEDULER | schedule)).save_pretrained(folder / "scheduler")
    shutil.copytree(FIXTURES / "tiny-mvdream" / "tokenizer", folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder
