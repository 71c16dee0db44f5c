"""The multi-view denoiser: Stable Diffusion's U-Net (diffusers' UNet2DConditionModel) whose self-attention joins the views.

Cameras are embedded and added to the time embedding of their view (MVDream, arXiv 2308.16512); the clean latent of a reference
picture can ride along as one more frame (ImageDream, arXiv 2312.02201).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvshared.attention import FUSED, AttentionOptions, frame_bias
from mvshared.config import UNetConfig
from mvshared.shapes import check_context, check_unet_inputs
from mvtorch.attention import CrossKeyValues, KeyValues, SpatialTransformer
from mvtorch.clip import Resampler
from mvtorch.cpu_norms import norm_silu
from mvtorch.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    run_block,
    timestep_embedding,
)

Cross = Sequence[Sequence[CrossKeyValues]]  # of every block of every transformer, in the order in which they run


def select_objects(cross: Cross | None, objects: slice) -> Cross | None:
    """What some of the objects attend to."""

    def selected(given: KeyValues) -> KeyValues:
        return KeyValues(given.keys[objects], given.values[objects])

    if cross is None:
        return None
    return [
        [CrossKeyValues(selected(each.context), None if each.image is None else selected(each.image)) for each in blocks]
        for blocks in cross
    ]


class Level(nn.Module):
    """The blocks of one resolution: a resnet per entry of `inputs` (its input channels), transformers behind the first ones."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        *,
        inputs: Sequence[int],
        attentions: int,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[level], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(size, channels, groups=groups, eps=config.norm_eps, time_embed_dim=config.time_embed_dim)
            for size in inputs
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                channels,
                config.heads(level),
                depth=config.transformer_layers_per_block[level],
                context_dim=config.cross_attention_dim,
                image_tokens=config.resampler is not None,
                groups=groups,
                linear=config.use_linear_projection,
            )
            for _ in range(attentions)
        )
        self.downsamplers = nn.ModuleList([Downsample(channels)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if upsample else [])

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Every resnet with the transformer that follows it."""
        return zip_longest(self.resnets, self.attentions)


class MultiViewUNet(nn.Module):
    """Predicts the noise (or the velocity) in the latents of all views of an object.

    `gradient_checkpointing` trades time for memory in training: blocks are computed again for their gradients.
    """

    def __init__(
        self, config: UNetConfig, *, attention_options: AttentionOptions = FUSED, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_options = attention_options
        self.gradient_checkpointing = gradient_checkpointing
        channels, levels = config.block_out_channels, range(len(config.block_out_channels))
        if config.resampler is not None:
            self.image_embed: Any = Resampler(config.resampler)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], config.time_embed_dim)
        if config.camera_dim is not None:
            self.camera_embedding = TimestepEmbedding(config.camera_dim, config.time_embed_dim)

        skips, width = [channels[0]], channels[0]  # channels of the skip connections, and of x
        down, up = [], []
        for level in levels:
            layers, last = config.layers_per_block[level], level == levels[-1]
            inputs = [width] + [channels[level]] * (layers - 1)
            attentions = layers if config.attention_levels[level] else 0
            down.append(Level(config, level, inputs=inputs, attentions=attentions, downsample=not last))
            width = channels[level]
            skips += [width] * (layers + (not last))
        mid_resnets = 2 if config.mid_attention else 1  # as diffusers' UNetMidBlock2D without attention
        mid = Level(config, levels[-1], inputs=[width] * mid_resnets, attentions=mid_resnets - 1)
        for level in reversed(levels):
            layers = config.layers_per_block[level] + 1
            inputs = [(width if index == 0 else channels[level]) + skips.pop() for index in range(layers)]
            attentions = layers if config.attention_levels[level] else 0
            up.append(Level(config, level, inputs=inputs, attentions=attentions, upsample=level > 0))
            width = channels[level]
        self.down_blocks: Iterable[Any] = nn.ModuleList(down)
        self.mid_block = mid
        self.up_blocks: Iterable[Any] = nn.ModuleList(up)

        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def cross_keys_values(
        self, context: Tensor | None, *, image_states: Tensor | None = None, image_scale: float = 1.0
    ) -> Cross | None:
        """What the views attend to beside themselves, for every transformer: it is constant over the sampling steps.

        context (b, l, cross_attention_dim), shared by the views, is None for a model without cross-attention. image_states
        (b, r, m, embedding_dim) are the vision tower's of r reference pictures, whose tokens count `image_scale` times. Raises
        OptionError for shapes that do not fit.
        """
        check_context(
            self.config,
            context=None if context is None else tuple(context.shape),
            image_states=None if image_states is None else tuple(image_states.shape),
        )
        if context is None:
            return None
        dtype, tokens = self.conv_in.weight.dtype, None
        if image_states is not None:
            tokens = self.image_embed(image_states.flatten(0, 1), options=self.attention_options)
            tokens = tokens.unflatten(0, image_states.shape[:2]).flatten(1, 2)
        context = context.to(dtype)
        return [
            [
                block.attn2.cross_keys_values(context, tokens, image_scale=image_scale)
                for block in transformer.transformer_blocks
            ]
            for transformer in self._transformers()
        ]

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        *,
        cross: Cross | None = None,
        camera: Tensor | None = None,
        reference: Tensor | None = None,
        reference_scale: float = 1.0,
    ) -> Tensor:
        """Denoise sample (b, v, h, w, in_channels) at timesteps (b,); returns (b, v, h, w, out_channels) in the weights' dtype.

        cross is what `cross_keys_values` gave, None for a model without cross-attention. Without camera (b, v, camera_dim) the
        camera embedding is left out. reference (b, r, h, w, out_channels) are clean latents of r pictures, one more frame each;
        a model with a reference frame runs without as well, but a dropped picture is one of zeros. `reference_scale` weighs
        their tokens in the self-attention, as factors in its softmax; with 0 the views do not look at them.
        Raises OptionError for shapes that do not fit.
        """
        check_unet_inputs(
            self.config,
            sample=tuple(sample.shape),
            timesteps=tuple(timesteps.shape),
            attended=None if cross is None else self._objects(cross, sample.shape[0]),
            camera=None if camera is None else tuple(camera.shape),
            reference=None if reference is None else tuple(reference.shape),
            reference_scale=reference_scale,
        )
        dtype = self.conv_in.weight.dtype
        b, v = sample.shape[:2]
        frames = self._append_reference(sample.to(dtype), reference if reference_scale else None)
        f = frames.shape[1]  # v, and the references
        emb = self._embed(timesteps, camera, frames=f)
        bias = frame_bias(reference_scale, views=v, references=f - v)
        run = partial(self._run, emb=emb, cross=repeat(None) if cross is None else iter(cross), frames=f, frame_bias=bias)

        x = self.conv_in(frames.flatten(0, 1).permute(0, 3, 1, 2))
        skips = [x]
        for level in self.down_blocks:
            for resnet, transformer in level.layers():
                x = run(resnet, transformer, x)
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)
        for resnet, transformer in self.mid_block.layers():
            x = run(resnet, transformer, x)
        for level in self.up_blocks:
            for resnet, transformer in level.layers():
                x = torch.cat([x, skips.pop()], dim=1)
                x = run(resnet, transformer, x)
            for upsample in level.upsamplers:
                x = upsample(x)
        x = x.unflatten(0, (b, f))[:, :v].flatten(0, 1)
        x = self.conv_out(norm_silu(self.conv_norm_out, x))
        return x.permute(0, 2, 3, 1).unflatten(0, (b, v))

    def _transformers(self) -> Iterator[Any]:
        """The transformers in the order in which they run."""
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from level.attentions

    def _objects(self, cross: Cross, default: int) -> int:
        """How many objects the keys are of; a model may have no transformer at all."""
        return cross[0][0].context.keys.shape[0] if cross else default

    def _append_reference(self, sample: Tensor, reference: Tensor | None) -> Tensor:
        """Frames (b, v + r, h, w, in_channels): references come last, the channels of their normal maps are zero."""
        if reference is None:
            return sample
        clean = F.pad(reference.to(sample.dtype), (0, self.config.normal_channels))
        return torch.cat([sample, clean], dim=1)

    def _embed(self, timesteps: Tensor, camera: Tensor | None, *, frames: int) -> Tensor:
        """Embeddings (b f, time_embed_dim) of the time and, if given, the cameras; a reference frame's camera is zeros."""
        dtype = self.conv_in.weight.dtype
        emb = self.time_embedding(timestep_embedding(timesteps, self.config.block_out_channels[0]).to(dtype))[:, None]
        if camera is not None:
            camera = F.pad(camera.to(dtype), (0, 0, 0, frames - camera.shape[1]))
            emb = emb + self.camera_embedding(camera)
        return emb.expand(-1, frames, -1).flatten(0, 1)

    def _run(
        self,
        resnet: nn.Module,
        transformer: nn.Module | None,
        x: Tensor,
        *,
        emb: Tensor,
        cross: Iterator[Sequence[CrossKeyValues] | None],
        frames: int,
        frame_bias: tuple[float, ...] | None,
    ) -> Tensor:
        recompute = self.gradient_checkpointing
        x = run_block(resnet, x, emb, recompute=recompute)
        if transformer is None:
            return x
        options = self.attention_options
        static = {"views": frames, "frame_bias": frame_bias, "options": options}
        return run_block(transformer, x, next(cross), recompute=recompute, **static)
