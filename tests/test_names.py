"""Names and shapes of every tensor, at full size, against tables of the public checkpoints; names of other layouts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from mvshared.config import IMAGEDREAM, MVDREAM, SD21, SD_VAE, CLIPTextConfig, CLIPVisionConfig, UNetConfig
from mvshared.names import LDM_UNET_MARK, ldm_unet_names
from mvshared.public_configs import diffusers_unet
from mvtorch.clip import CLIPTextModel, CLIPVisionModel
from mvtorch.model import weight_shapes
from mvtorch.unet import MultiViewUNet
from mvtorch.vae import AutoencoderKL

MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"
)


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    document = json.loads((MANIFESTS / f"{name}.json").read_text(encoding="utf-8"))
    return {tensor: tuple(shape) for tensor, shape in document.items()}


def unet_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return weight_shapes(MultiViewUNet(config))


def test_stable_diffusion_2_1_has_every_tensor() -> None:
    assert unet_shapes(SD21) == manifest("sd21_unet")


def test_the_vae_has_every_tensor() -> None:
    with torch.device("meta"):
        assert weight_shapes(AutoencoderKL(SD_VAE)) == manifest("sd_vae")


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("sd21_text23", CLIPTextModel, CLIPTextConfig()),
        ("clip_l_text", CLIPTextModel, CLIP_L),
        ("clip_vit_h_vision", CLIPVisionModel, CLIPVisionConfig()),
        ("clip_vit_h_vision_proj", CLIPVisionModel, CLIPVisionConfig(projection_dim=1024)),
    ],
)
def test_clip_has_every_tensor(name: str, kind: type[torch.nn.Module], config: CLIPTextConfig | CLIPVisionConfig) -> None:
    with torch.device("meta"):
        shapes = weight_shapes(kind(config))
    expected = {tensor.removeprefix("text_model.").removeprefix("vision_model."): s for tensor, s in manifest(name).items()}
    assert shapes == expected


@pytest.mark.parametrize(("name", "config"), [("mvdream_ldm_unet", MVDREAM), ("imagedream_ldm_unet", IMAGEDREAM)])
def test_mvdream_and_imagedream_have_every_tensor_under_its_ldm_name(name: str, config: UNetConfig) -> None:
    shapes = unet_shapes(config)
    names = ldm_unet_names(shapes, config)
    assert {names[own]: shape for own, shape in shapes.items()} == manifest(name)
    assert LDM_UNET_MARK in names.values()


@pytest.mark.parametrize(
    "config",
    [
        replace(SD21, layers_per_block=(1, 3, 2, 1)),
        replace(SD21, attention_levels=(False, True, False, True)),
        replace(SD21, attention_levels=(False,) * 4, transformer_layers_per_block=(2,) * 4),
        replace(
            MVDREAM,
            block_out_channels=(64, 128),
            layers_per_block=(1, 1),
            transformer_layers_per_block=(2, 1),
            attention_levels=(True, False),
        ),
    ],
)
def test_every_tensor_of_other_sizes_has_an_ldm_name_of_its_own(config: UNetConfig) -> None:
    names = ldm_unet_names(unet_shapes(config), config)
    assert len(set(names.values())) == len(names)
    assert all(name.startswith(("time_embed.", "camera_embed.", "out.")) or "_block" in name for name in names.values())
    assert not any("resnets" in name or "attentions" in name or "samplers" in name for name in names.values())
    blocks = {int(name.split(".")[1]) for name in names.values() if name.startswith("input_blocks.")}
    assert blocks == set(range(sum(config.layers_per_block) + len(config.layers_per_block)))


def test_ldm_puts_the_upsampling_behind_the_transformer_if_there_is_one() -> None:
    config = replace(SD21, attention_levels=(True, True, False, False))
    names = ldm_unet_names(unet_shapes(config), config)
    assert names["up_blocks.1.upsamplers.0.conv.weight"] == "output_blocks.5.1.conv.weight"
    assert names["up_blocks.2.upsamplers.0.conv.weight"] == "output_blocks.8.2.conv.weight"


SD15 = {"attention_head_dim": 8, "cross_attention_dim": 768}
SD21_768 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}


@pytest.mark.parametrize("fields", [SD15, SD21_768], ids=["sd15", "sd21-768"])
def test_full_size_stable_diffusion_has_every_tensor_of_diffusers(fields: dict[str, Any]) -> None:
    with torch.device("meta"):
        oracle: Any = UNet2DConditionModel(**fields)
    expected = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
    config = diffusers_unet(dict(oracle.config), path=Path("config.json"))
    assert unet_shapes(config) == expected
    assert len(set(ldm_unet_names(expected, config).values())) == len(expected) == 686
