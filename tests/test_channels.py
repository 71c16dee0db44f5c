"""Both backends build the U-Nets of what `mvshared.channels` says, from which memory and arithmetic are reckoned."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from helpers import BACKENDS, TINY_UNET, Backend
from upscalers import CONFIGS

import mvmlx.model
import mvtorch.model
from mvshared.channels import unet_plan, upscaler_plan
from mvshared.config import SD21, SD_X2_UNET, KUNetConfig, UNetConfig

MODELS: dict[Backend, Any] = {"torch": mvtorch.model, "mlx": mvmlx.model}
UNETS = {
    "the public network": SD21,
    "as many layers everywhere": TINY_UNET,
    "no attention in the middle": replace(TINY_UNET, mid_attention=False, attention_levels=(False, True)),
    "layers of their own for every level": UNetConfig(
        block_out_channels=(32, 96, 64),
        layers_per_block=(3, 1, 2),
        transformer_layers_per_block=(1, 1, 1),
        attention_levels=(True, False, True),
        attention_head_dim=32,
    ),
    "one level": UNetConfig(
        block_out_channels=(32,), layers_per_block=(2,), transformer_layers_per_block=(1,), attention_levels=(True,)
    ),
}
Shapes = Mapping[str, tuple[int, ...]]


def widths(shapes: Shapes, block: str, weight: str, axis: int) -> tuple[int, ...]:
    """The size of that axis of a weight in every resnet of a block."""
    found = {
        int(match[1]): shapes[name][axis]
        for name in shapes
        if (match := re.fullmatch(rf"{block}\.resnets\.(\d+)\.{weight}", name))
    }
    return tuple(found[number] for number in range(len(found)))


def attentions(shapes: Shapes, block: str) -> int:
    return len({match[0] for name in shapes if (match := re.match(rf"{block}\.attentions\.\d+\.", name))})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS.keys())
def test_every_resnet_of_the_denoiser_takes_the_channels_that_are_planned(backend: Backend, config: UNetConfig) -> None:
    shapes, plan = MODELS[backend].network_shapes(config), unet_plan(config)
    blocks = {f"{way}_blocks.{number}": each for way in ("down", "up") for number, each in enumerate(getattr(plan, way))}
    for block, each in (blocks | {"mid_block": plan.mid}).items():
        assert widths(shapes, block, r"conv1\.weight", 1) == each.inputs
        assert widths(shapes, block, r"conv2\.weight", 0) == (config.block_out_channels[each.level],) * len(each.inputs)
        assert attentions(shapes, block) == each.attentions


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [SD_X2_UNET, *CONFIGS.values()], ids=["the public network", *CONFIGS])
def test_every_resnet_of_the_upscaler_has_the_channels_that_are_planned(backend: Backend, config: KUNetConfig) -> None:
    shapes, plan = MODELS[backend].network_shapes(config), upscaler_plan(config)
    blocks = {f"{way}_blocks.{number}": each for way in ("down", "up") for number, each in enumerate(getattr(plan, way))}
    for block, each in blocks.items():
        first, hidden, last = (
            widths(shapes, block, weight, axis)
            for weight, axis in ((r"conv1\.weight", 1), (r"conv1\.weight", 0), (r"conv2\.weight", 0))
        )
        assert tuple(zip(first, hidden, last, strict=True)) == each.resnets
        assert attentions(shapes, block) == (len(each.resnets) if config.attention_levels[each.level] else 0)


def test_the_plan_of_stable_diffusion_is_the_public_network_s() -> None:
    plan = unet_plan(SD21)
    assert [each.inputs for each in plan.down] == [(320, 320), (320, 640), (640, 1280), (1280, 1280)]
    assert plan.mid == (3, (1280, 1280), 1)
    assert [each.inputs for each in plan.up] == [(2560,) * 3, (2560, 2560, 1920), (1920, 1280, 960), (960, 640, 640)]
    assert [each.attentions for each in (*plan.down, *plan.up)] == [2, 2, 2, 0, 0, 3, 3, 3]
