"""Names and shapes of the original files at full size, as other projects' code makes them: see fixtures/README.md.

Our own converter wrote the original files of the other tests; these lists do not depend on it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_upscaler_conversion import k_diffusion_names

from mvshared.config import IMAGEDREAM, MVDREAM, SD21, SD_VAE, CLIPTextConfig, CLIPVisionConfig
from mvshared.conversion.networks import Part, convert_network
from mvshared.conversion.raw import RawTensor
from mvshared.conversion.sources import sort_tensors
from mvtorch.model import network_shapes

MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"
SD15 = replace(SD21, cross_attention_dim=768, num_attention_heads=(8, 8, 8, 8), use_linear_projection=False)
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"
)


def manifest(name: str, *, prefix: str = "") -> dict[str, tuple[int, ...]]:
    document = json.loads((MANIFESTS / f"{name}.json").read_text(encoding="utf-8"))
    return {f"{prefix}{tensor}": tuple(shape) for tensor, shape in document.items()}


def converted(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Part], dict[str, str]]:
    """The networks of a file with these tensors, and what is left out of it."""
    path = Path("original.ckpt")
    source = sort_tensors({name: RawTensor(dtype="F32", shape=shape, read=zeros) for name, shape in shapes.items()}, path=path)
    parts, left_out = [], dict(source.left_out)
    for layout, tensors in source.networks.items():
        found, rest = convert_network(layout, tensors, path=path)
        parts += found
        left_out |= rest
    return parts, left_out


def zeros() -> Any:
    return np.zeros(0, np.uint32)


FILES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[Any, str]]]] = {
    "Stable Diffusion 1.5": (
        manifest("sd15_ldm_unet", prefix="model.diffusion_model.")
        | manifest("compvis_vae", prefix="first_stage_model.")
        | manifest("sd15_text", prefix="cond_stage_model.transformer."),
        {"unet": (SD15, ""), "vae": (SD_VAE, "sd_vae"), "text_encoder": (CLIP_L, "clip_l_text")},
    ),
    "MVDream": (
        manifest("mvdream_ldm_unet", prefix="model.diffusion_model.")
        | manifest("compvis_vae", prefix="first_stage_model.")
        | manifest("open_clip_vit_h_text", prefix="cond_stage_model.model."),
        {"unet": (MVDREAM, "mvdream_ldm_unet"), "vae": (SD_VAE, "sd_vae"), "text_encoder": (CLIPTextConfig(), "sd21_text23")},
    ),
    "ImageDream": (
        manifest("imagedream_ldm_unet", prefix="model.diffusion_model.")
        | manifest("compvis_vae", prefix="vae_model.")
        | manifest("open_clip_vit_h_text", prefix="clip_model.model.")
        | manifest("open_clip_vit_h_visual", prefix="clip_model.model."),
        {
            "unet": (IMAGEDREAM, "imagedream_ldm_unet"),
            "vae": (SD_VAE, "sd_vae"),
            "text_encoder": (CLIPTextConfig(), "sd21_text23"),
            "image_encoder": (CLIPVisionConfig(), "clip_vit_h_vision"),
        },
    ),
    "CompVis' autoencoder": (
        manifest("compvis_vae") | {"loss.logvar": (), "loss.discriminator.main.0.weight": (64, 3, 4, 4)},
        {"vae": (SD_VAE, "sd_vae")},
    ),
    "OpenCLIP": (
        manifest("open_clip_vit_h_text") | manifest("open_clip_vit_h_visual") | {"attn_mask": (77, 77)},
        {"text_encoder": (CLIPTextConfig(), "sd21_text23"), "image_encoder": (CLIPVisionConfig(), "clip_vit_h_vision")},
    ),
    "the x2 latent upscaler": (manifest("sd_x2_k_diffusion"), {"unet": (None, "sd_x2_latent_upscaler_unet")}),
}


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_of_an_original_file_has_its_place(file: str) -> None:
    stored, expected = FILES[file]
    parts, left_out = converted(stored)
    assert {part.component: part.config for part in parts} == {name: config for name, (config, _) in expected.items()}
    for part in parts:
        name = expected[part.component][1]
        shapes = manifest(name) if name else network_shapes(SD15)
        assert {tensor: raw.shape for tensor, raw in part.tensors.items()} == shapes
    known = ("of the VAE's training", "of CLIP's training", "position numbers", "the causal mask")
    known += ("behind the text states that the U-Net takes", "behind the image states that the U-Net takes")
    assert set(left_out.values()) <= {*known, "the fixed kernel of the resampling"}


def test_the_upscaler_s_names_are_those_that_diffusers_own_script_expects() -> None:
    document = json.loads((MANIFESTS / "sd_x2_latent_upscaler_unet.json").read_text(encoding="utf-8"))
    stored = {name: shape for name, shape in manifest("sd_x2_k_diffusion").items() if not name.endswith(".kernel")}
    assert dict(k_diffusion_names(document)) == stored
