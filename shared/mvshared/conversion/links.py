"""Which tensors of this project are which in other layouts: one table per network, read in both directions.

Other layouts: LDM (CompVis latent-diffusion) for U-Net and VAE, OpenCLIP for CLIP's towers, k-diffusion for the upscaler.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mvshared.config import UNetConfig
from mvshared.conversion.raw import RawTensor, cast
from mvshared.names import ldm_unet_names


@dataclass(frozen=True, kw_only=True)
class Link:
    """One tensor `other` elsewhere is `own` here: several of `own` are its rows one after the other.

    `transposed`: (a, b) there is (b, a) here. `ones`: there it has as many sizes of 1 more at its end.
    """

    own: tuple[str, ...]
    other: str
    transposed: bool = False
    ones: int = 0

    def own_shape(self, other: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of each of `own`; None if a tensor of the other shape cannot be divided so."""
        if self.ones:
            if other[len(other) - self.ones :] != (1,) * self.ones:
                return None
            other = other[: len(other) - self.ones]
        if self.transposed:
            other = other[::-1]
        if not other or other[0] % len(self.own):
            return other if len(self.own) == 1 else None
        return (other[0] // len(self.own), *other[1:])

    def to_own(self, other: RawTensor) -> dict[str, RawTensor]:
        """The tensors here of one elsewhere, whose shape must fit."""
        shape = self.own_shape(other.shape)
        assert shape is not None

        def part(index: int) -> RawTensor:
            def read() -> np.ndarray:
                bits = other.read()
                bits = bits.T if self.transposed else bits
                return bits.reshape(len(self.own), *shape)[index] if len(self.own) > 1 else bits.reshape(shape)

            return RawTensor(dtype=other.dtype, shape=shape, read=read)

        return {name: part(index) for index, name in enumerate(self.own)}

    def to_other(self, own: Mapping[str, RawTensor]) -> RawTensor:
        """The tensor elsewhere of those here."""
        parts = [own[name] for name in self.own]
        if len({part.dtype for part in parts}) > 1:  # in one tensor they have one dtype, which holds all of their values
            parts = [cast(part, "F32", name=name) for part, name in zip(parts, self.own, strict=True)]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) if len(parts) > 1 else parts[0].shape
        if self.transposed:
            shape = shape[::-1]
        shape += (1,) * self.ones

        def read() -> np.ndarray:
            bits = np.concatenate([part.read() for part in parts]) if len(parts) > 1 else parts[0].read()
            return (bits.T if self.transposed else bits).reshape(shape)

        return RawTensor(dtype=parts[0].dtype, shape=shape, read=read)


def unet_links(names: Collection[str], config: UNetConfig) -> list[Link]:
    """LDM's names of a U-Net's tensors."""
    return [Link(own=(name,), other=other) for name, other in ldm_unet_names(names, config).items()]


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_links(names: Collection[str]) -> list[Link]:
    """LDM's names of a VAE's tensors; the attention there has 1x1 convolutions, the decoder counts from the finest level."""
    levels = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.up_blocks."))
    links = []
    for name in names:
        other, ones = name, 0
        if match := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.+)", name):
            level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
            rest = re.sub(r"^resnets\.(\d+)\.", r"block.\1.", match[4]).replace("conv_shortcut", "nin_shortcut")
            rest = re.sub(r"^(down|up)samplers\.0\.", r"\1sample.", rest)
            other = f"{match[1]}.{match[2]}.{level}.{rest}"
        elif match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
            other = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
        elif match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            other = f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
            ones = 2 if match[3] == "weight" and match[2] != "group_norm" else 0
        elif match := re.fullmatch(r"(encoder|decoder)\.conv_norm_out\.(.+)", name):
            other = f"{match[1]}.norm_out.{match[2]}"
        links.append(Link(own=(name,), other=other, ones=ones))
    return links


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "proj"}


def open_clip_links(names: Collection[str], *, prefix: str) -> list[Link]:
    """OpenCLIP's names of a tower's tensors, behind `prefix`: queries, keys and values are one tensor there."""
    links = []
    for name in names:
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in _PROJECTIONS:
            links.append(Link(own=(name,), other=f"{prefix}{_PROJECTIONS[name]}", transposed=True))
        elif layer is None:
            path, _, kind = name.rpartition(".")
            other = _OPEN_CLIP.get(name) or f"{_OPEN_CLIP[path]}.{kind}"
            links.append(Link(own=(name,), other=f"{prefix}{other}"))
        elif layer[2] in _OPEN_CLIP_LAYER:
            other = f"transformer.resblocks.{layer[1]}.{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"
            links.append(Link(own=(name,), other=f"{prefix}{other}"))
        elif layer[2] == "self_attn.q_proj":
            own = tuple(name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
            other = f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"
            links.append(Link(own=own, other=f"{prefix}{other}"))
    return links


def plain_links(names: Iterable[str], *, prefix: str = "", unprefixed: Collection[str] = ()) -> list[Link]:
    """The same names behind a prefix, such as transformers' `text_model.`"""
    return [Link(own=(name,), other=name if name in unprefixed else f"{prefix}{name}") for name in names]


# The upscaler: diffusers' names here, those of k-diffusion's ImageDenoiserModelV1 there.

_UPSCALER_OUTER = {
    "conv_in": "inner_model.proj_in",
    "conv_out": "inner_model.proj_out",
    "time_embedding.linear_1": "inner_model.mapping.0",
    "time_embedding.linear_2": "inner_model.mapping.2",
    "time_embedding.cond_proj": "inner_model.mapping_cond",
}
_UPSCALER_RESNET = {"norm1.linear": "main.0.mapper", "conv1": "main.2", "norm2.linear": "main.4.mapper", "conv2": "main.6"}
_UPSCALER_SELF = {"norm1.linear": "norm_in.mapper", "attn1.to_out.0": "out_proj"}
_UPSCALER_CROSS = {
    "norm2.linear": "norm_dec.mapper",
    "attn2.norm_cross": "norm_enc",
    "attn2.to_q": "q_proj",
    "attn2.to_out.0": "out_proj",
}
_UPSCALER_CONVOLUTIONS = ("q_proj", "out_proj")  # of size 1 there, and so is qkv_proj; kv_proj is a linear layer


def upscaler_links(others: Collection[str]) -> Iterator[Link]:
    """The links of k-diffusion's tensors; those that it does not know have none.

    A block there is a list: resnet, self-attention if it has it, cross-attention if it has it, and again; down blocks begin
    with the downsampling, which has no weights.
    """
    yield Link(own=("time_proj.weight",), other="inner_model.timestep_embed.weight", ones=1)
    for own, other in _UPSCALER_OUTER.items():
        for kind in ("weight",) if own.endswith("cond_proj") else ("weight", "bias"):
            yield Link(own=(f"{own}.{kind}",), other=f"{other}.{kind}")
    blocks: dict[tuple[str, int], set[int]] = {}
    for name in others:
        if match := re.match(r"inner_model\.u_net\.(d|u)_blocks\.(\d+)\.(\d+)\.main\.", name):
            blocks.setdefault((match[1], int(match[2])), set()).add(int(match[3]))
    for (way, block), places in blocks.items():
        first = 1 if way == "d" else 0
        here = f"inner_model.u_net.{way}_blocks.{block}"
        attends_to_itself = f"{here}.{first + 1}.qkv_proj.weight" in others
        attends = attends_to_itself or f"{here}.{first + 1}.kv_proj.weight" in others
        stride = 1 + attends + attends_to_itself
        for layer in range((max(places) - first) // stride + 1):
            place, own = first + layer * stride, f"{'down' if way == 'd' else 'up'}_blocks.{block}"
            yield from _both(_UPSCALER_RESNET, own=f"{own}.resnets.{layer}", other=f"{here}.{place}")
            if f"{here}.{place}.skip.weight" in others:
                yield Link(own=(f"{own}.resnets.{layer}.conv_shortcut.weight",), other=f"{here}.{place}.skip.weight")
            if attends_to_itself:
                here_self = f"{here}.{place + 1}"
                yield from _both(_UPSCALER_SELF, own=f"{own}.attentions.{layer}", other=here_self)
                yield from _joined(f"{own}.attentions.{layer}.attn1", "qkv", other=f"{here_self}.qkv_proj")
            if attends:
                here_cross = f"{here}.{place + 1 + attends_to_itself}"
                yield from _both(_UPSCALER_CROSS, own=f"{own}.attentions.{layer}", other=here_cross)
                yield from _joined(f"{own}.attentions.{layer}.attn2", "kv", other=f"{here_cross}.kv_proj")


def _both(table: Mapping[str, str], *, own: str, other: str) -> Iterator[Link]:
    for mine, theirs in table.items():
        for kind in ("weight", "bias"):
            ones = 2 if kind == "weight" and theirs in _UPSCALER_CONVOLUTIONS else 0
            yield Link(own=(f"{own}.{mine}.{kind}",), other=f"{other}.{theirs}.{kind}", ones=ones)


def _joined(own: str, parts: str, *, other: str) -> Iterator[Link]:
    for kind in ("weight", "bias"):
        ones = 2 if kind == "weight" and parts == "qkv" else 0
        yield Link(own=tuple(f"{own}.to_{part}.{kind}" for part in parts), other=f"{other}.{kind}", ones=ones)
