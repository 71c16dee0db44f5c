"""What shapes tell of the public CLIP towers in files without a config: heads and activation stand in no tensor."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from mvshared.config import CLIPTextConfig, CLIPVisionConfig
from mvshared.conversion.configs import clip_text_config, clip_vision_config, open_clip_text_config, open_clip_vision_config
from mvshared.conversion.links import open_clip_links
from mvshared.conversion.raw import RawTensor
from mvtorch.model import network_shapes


def in_open_clip(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a tower under OpenCLIP's names."""
    unread = {name: RawTensor(dtype="F32", shape=shape, read=lambda: np.zeros(0)) for name, shape in shapes.items()}
    return {link.other: link.to_other(unread).shape for link in open_clip_links(shapes, prefix="")}


def test_vit_h_s_text_tower_is_known_by_its_shapes() -> None:
    shapes = network_shapes(CLIPTextConfig())
    assert open_clip_text_config(in_open_clip(shapes)) == CLIPTextConfig()
    assert clip_text_config(shapes) == CLIPTextConfig()


def test_vit_h_s_vision_tower_has_16_heads_of_80_numbers() -> None:
    shapes = network_shapes(CLIPVisionConfig())
    assert open_clip_vision_config(in_open_clip(shapes)) == CLIPVisionConfig()
    assert clip_vision_config(shapes) == CLIPVisionConfig()


def test_openai_s_vit_l_has_its_quick_gelu() -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = replace(CLIPTextConfig(), hidden_act="quick_gelu", **sizes)
    assert clip_text_config(network_shapes(text)) == text
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = replace(CLIPVisionConfig(), hidden_act="quick_gelu", **sizes)
    assert clip_vision_config(network_shapes(vision)) == vision


@pytest.mark.parametrize("name", ["text_projection.weight", "visual_projection.weight"])
def test_projections_are_transposed_in_open_clip(name: str) -> None:
    (link,) = open_clip_links([name], prefix="")
    assert link.own_shape((64, 32)) == (32, 64)
