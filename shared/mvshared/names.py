"""Names of tensors in checkpoints that do not follow diffusers: those of the original Stable Diffusion code ("LDM").

The models of this project carry diffusers' names; a table per model says what each tensor is called elsewhere. Sources: CompVis
latent-diffusion, openaimodel.py; bytedance/MVDream and ImageDream, which keep its names.
"""

import re
from collections.abc import Iterable

from mvshared.config import UNetConfig

LDM_UNET_MARK = "input_blocks.0.0.weight"  # a weight file with this name is one of LDM's U-Nets

_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "camera_embedding.linear_1": "camera_embed.0",
    "camera_embedding.linear_2": "camera_embed.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_unet_names(names: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """`{name: LDM's name}` of the tensors of a U-Net with this config.

    LDM numbers the blocks through: after the first convolution, a level has one per resnet and one for the downsampling, and on
    the way up one more resnet, whose last block holds the upsampling too.
    """
    blocks = _blocks(config)
    return {name: _renamed(name, blocks) for name in names}


def _blocks(config: UNetConfig) -> dict[str, str]:
    """LDM's prefix of every block's prefix."""
    table, number = dict(_OUTER), 1
    for level, layers in enumerate(config.layers_per_block):
        for layer in range(layers):
            table[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for block, level in enumerate(reversed(range(len(config.layers_per_block)))):
        for layer in range(config.layers_per_block[level] + 1):
            table[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            table[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        last = 2 if config.attention_levels[level] else 1
        table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{last}.conv"
    return table


def _renamed(name: str, blocks: dict[str, str]) -> str:
    match = re.match(r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions|downsamplers|upsamplers)\.\d+(\.conv(?=\.))?", name)
    prefix = match[0] if match else next((outer for outer in _OUTER if name.startswith(f"{outer}.")), None)
    if prefix is None:
        return name
    rest = name[len(prefix) + 1 :]
    if ".resnets." in f".{prefix}":
        part, _, rest = rest.partition(".")
        rest = f"{_RESNET[part]}.{rest}"
    return f"{blocks[prefix]}.{rest}"
