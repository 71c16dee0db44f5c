"""Names of tensors in checkpoints that are not the models' own.

The models of this project carry the names of diffusers and transformers. Tables say what a tensor is called elsewhere: in
U-Nets of the original Stable Diffusion code ("LDM": CompVis latent-diffusion, openaimodel.py; MVDream and ImageDream keep its
names), in VAEs of diffusers before 0.15, in CLIP's towers of transformers before 5.
"""

import re
from collections.abc import Collection, Iterable

from mvshared.config import UNetConfig

LDM_UNET_MARK = "input_blocks.0.0.weight"  # a weight file with this name is one of LDM's U-Nets
CLIP_PREFIXES = ("text_model.", "vision_model.")
PROJECTIONS = ("text_projection.weight", "visual_projection.weight")  # of CLIP's towers, outside of them
BUFFERS = ("embeddings.position_ids",)  # numbers that older files hold and every model knows by itself

# Attention of the VAE's mid block in checkpoints written before diffusers 0.15.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

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


def own_names(stored: Collection[str], *, expected: Collection[str], unet: UNetConfig | None) -> dict[str, str]:
    """`{stored name: the model's name}` of the tensors in a checkpoint; buffers are left out, unknown names stay what they are.

    `expected` are the model's names; `unet` is its config, if it is a U-Net.
    """
    if unet is not None and LDM_UNET_MARK in stored:
        table = {ldm: own for own, ldm in ldm_unet_names(expected, unet).items()}
        return {name: table.get(name, name) for name in stored}
    names = {}
    for name in stored:
        prefix = next((prefix for prefix in CLIP_PREFIXES if name.startswith(prefix)), "")
        own = rename_old_vae_attention(name[len(prefix) :])
        if own not in BUFFERS:
            names[name] = own
    return names


def rename_old_vae_attention(name: str) -> str:
    """The current name of a VAE tensor, for names old and new."""
    match = re.fullmatch(r"(.*\bmid_block\.attentions\.0\.)(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in OLD_VAE_ATTENTION:
        return name
    return f"{match[1]}{OLD_VAE_ATTENTION[match[2]]}.{match[3]}"


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
