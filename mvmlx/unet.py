"""The multi-view denoiser: Stable Diffusion's U-Net (diffusers' UNet2DConditionModel) whose self-attention joins the views.

Cameras are embedded and added to the time embedding of their view (MVDream, arXiv 2308.16512); the clean latent of a reference
picture can ride along as one more frame (ImageDream, arXiv 2312.02201).
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat, zip_longest
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mvmlx.attention import CrossKeyValues, KeyValues, SpatialTransformer
from mvmlx.clip import Resampler
from mvmlx.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    repeat_objects,
    run_block,
    timestep_embedding,
)
from mvmlx.norms import norm_silu
from mvshared.attention import FUSED, AttentionOptions
from mvshared.channels import LevelPlan, unet_plan
from mvshared.config import UNetConfig
from mvshared.shapes import check_conditions, check_unet_inputs

Cross = Sequence[Sequence[CrossKeyValues]]  # of every block of every transformer, in the order in which they run


class Constants(NamedTuple):
    """What the U-Net needs beside the latents and the time; it is constant over the sampling steps, of b objects.

    What the views attend to beside themselves, None without cross-attention; embedded cameras (b, v + r, time_embed_dim), zeros
    embedded for a reference frame, None without; latents (b, r, h, w, in_channels) of the reference frames, None without; the
    weight of their tokens in the self-attention.
    """

    cross: Cross | None = None
    camera: mx.array | None = None
    reference: mx.array | None = None
    reference_scale: float = 1.0


def select_objects(constants: Constants, objects: slice) -> Constants:
    """The constants of some of the objects."""

    def selected(given: mx.array | None) -> mx.array | None:
        return None if given is None else given[objects]

    def attended(given: KeyValues) -> KeyValues:
        return KeyValues(given.keys[objects], given.values[objects])

    cross = constants.cross and [
        [CrossKeyValues(attended(each.context), None if each.image is None else attended(each.image)) for each in blocks]
        for blocks in constants.cross
    ]
    return constants._replace(cross=cross, camera=selected(constants.camera), reference=selected(constants.reference))


def frames_in_common(constants: Constants) -> Constants:
    """Cameras and reference frames of the first object alone, for all objects: those of the others must be the same."""
    camera, reference = (None if each is None else each[:1] for each in (constants.camera, constants.reference))
    return constants._replace(camera=camera, reference=reference)


class Level(nn.Module):
    """The blocks of one resolution, as planned, and what changes it behind them."""

    def __init__(self, config: UNetConfig, plan: LevelPlan, *, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        level, inputs, attentions = plan
        channels, groups = config.block_out_channels[level], config.norm_num_groups
        self.resnets = [
            ResnetBlock(size, channels, groups=groups, eps=config.norm_eps, time_embed_dim=config.time_embed_dim)
            for size in inputs
        ]
        self.attentions = [
            SpatialTransformer(
                channels,
                config.heads(level),
                depth=config.transformer_layers_per_block[level],
                context_dim=config.cross_attention_dim,
                image_tokens=config.resampler is not None,
                groups=groups,
                linear=config.use_linear_projection,
                finest=level == config.finest_attention,
            )
            for _ in range(attentions)
        ]
        self.downsamplers = [Downsample(channels)] if downsample else []
        self.upsamplers = [Upsample(channels)] if upsample else []

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
        channels, plan = config.block_out_channels, unet_plan(config)
        if config.resampler is not None:
            self.image_embed = Resampler(config.resampler)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], config.time_embed_dim)
        if config.camera_dim is not None:
            self.camera_embedding = TimestepEmbedding(config.camera_dim, config.time_embed_dim)

        self.down_blocks = [Level(config, each, downsample=each.level < plan.mid.level) for each in plan.down]
        self.mid_block = Level(config, plan.mid)
        self.up_blocks = [Level(config, each, upsample=each.level > 0) for each in plan.up]

        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def constants(
        self,
        context: mx.array | None = None,
        *,
        image_states: mx.array | None = None,
        image_scale: float = 1.0,
        camera: mx.array | None = None,
        reference: mx.array | None = None,
        reference_scale: float = 1.0,
    ) -> Constants:
        """What the U-Net is conditioned on, as far as it is constant over the sampling steps.

        context (b, l, cross_attention_dim), shared by the views, is None for a model without cross-attention. image_states
        (b, r, m, embedding_dim) are the vision tower's of r reference pictures, whose tokens count `image_scale` times. Without
        camera (b, v, camera_dim) the camera embedding is left out. reference (b, r, h, w, out_channels) are clean latents of r
        pictures, one more frame each; a model with a reference frame runs without as well, but a dropped picture is one of
        zeros. `reference_scale` weighs their tokens in the self-attention, as factors in its softmax; with 0 the views do not
        look at them. Raises OptionError for shapes that do not fit.
        """
        check_conditions(
            self.config,
            context=None if context is None else context.shape,
            image_states=None if image_states is None else image_states.shape,
            camera=None if camera is None else camera.shape,
            reference=None if reference is None else reference.shape,
            reference_scale=reference_scale,
        )
        if not reference_scale:
            reference = None
        return Constants(
            cross=self._cross_keys_values(context, image_states, image_scale=image_scale),
            camera=self._embed_cameras(camera, references=0 if reference is None else reference.shape[1]),
            reference=self._reference_frames(reference),
            reference_scale=reference_scale,
        )

    def time_embeddings(self, timesteps: mx.array) -> mx.array:
        """Embeddings (n, time_embed_dim), in the weights' dtype, of timesteps (n,)."""
        waves = timestep_embedding(timesteps, self.config.block_out_channels[0])
        return self.time_embedding(waves.astype(self.conv_in.weight.dtype))

    def __call__(self, sample: mx.array, times: mx.array, constants: Constants) -> mx.array:
        """Denoise sample (b, v, h, w, in_channels) at embedded times (b, time_embed_dim), see `time_embeddings`.

        Returns (b, v, h, w, out_channels) in the weights' dtype. Where objects differ only in what they attend to, sample,
        times, cameras and reference frames may be those of one for all b, see `frames_in_common`: what comes before the first
        cross-attention is then computed once. Raises OptionError for shapes that do not fit.
        """
        cross, camera, reference, _ = constants
        references = 0 if reference is None else reference.shape[1]
        b = self._objects(cross, sample.shape[0])
        check_unet_inputs(
            self.config,
            sample=sample.shape,
            times=times.shape,
            attended=None if cross is None else b,
            camera=None if camera is None else (camera.shape[0], camera.shape[1] - references, self.config.camera_dim or 0),
            reference=None if reference is None else (*reference.shape[:4], self.config.out_channels),
        )
        dtype = self.conv_in.weight.dtype
        v = sample.shape[1]
        f = v + references
        frames = sample.astype(dtype)
        if reference is not None:
            frames = mx.concatenate([frames, reference], axis=1)
        run = partial(
            self._run,
            emb=self._embed(times, camera, objects=b, frames=f),
            cross=repeat(None) if cross is None else iter(cross),
            frames=f,
            frame_bias=self._frame_bias(constants, views=v),
        )

        x = self.conv_in(frames.flatten(0, 1))
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
                x = mx.concatenate([x, repeat_objects(skips.pop(), len(x))], axis=-1)
                x = run(resnet, transformer, x)
            for upsample in level.upsamplers:
                x = upsample(x)
        if f > v:
            x = mx.unflatten(x, 0, (b, f))[:, :v].flatten(0, 1)
        x = self.conv_out(norm_silu(self.conv_norm_out, x))
        return mx.unflatten(x, 0, (b, v))

    def _transformers(self) -> Iterator[SpatialTransformer]:
        """The transformers in the order in which they run."""
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from level.attentions

    def _objects(self, cross: Cross | None, default: int) -> int:
        """How many objects the keys are of; a model may have no cross-attention, or no transformer at all."""
        return cross[0][0].context.keys.shape[0] if cross else default

    def _cross_keys_values(
        self, context: mx.array | None, image_states: mx.array | None, *, image_scale: float
    ) -> Cross | None:
        """Of every transformer; None without cross-attention."""
        if context is None:
            return None
        dtype, tokens = self.conv_in.weight.dtype, None
        if image_states is not None:
            tokens = self.image_embed(image_states.flatten(0, 1), options=self.attention_options)
            tokens = mx.unflatten(tokens, 0, image_states.shape[:2]).flatten(1, 2)
        context = context.astype(dtype)
        return [
            [
                block.attn2.cross_keys_values(context, tokens, image_scale=image_scale)
                for block in transformer.transformer_blocks
            ]
            for transformer in self._transformers()
        ]

    def _embed_cameras(self, camera: mx.array | None, *, references: int) -> mx.array | None:
        """Embeddings (b, v + references, time_embed_dim) of cameras (b, v, camera_dim); a reference frame's is zeros."""
        if camera is None:
            return None
        return self.camera_embedding(mx.pad(camera.astype(self.conv_in.weight.dtype), [(0, 0), (0, references), (0, 0)]))

    def _reference_frames(self, reference: mx.array | None) -> mx.array | None:
        """Latents (b, r, h, w, in_channels): the channels of the normal maps are zero."""
        if reference is None:
            return None
        return mx.pad(reference.astype(self.conv_in.weight.dtype), [(0, 0)] * 4 + [(0, self.config.normal_channels)])

    def _frame_bias(self, constants: Constants, *, views: int) -> mx.array | None:
        """What is added to the scores of every frame's keys (f,) for the references' weight; None where that is nothing."""
        reference, scale = constants.reference, constants.reference_scale
        if reference is None or scale == 1:
            return None
        return mx.array([0.0] * views + [math.log(scale)] * reference.shape[1])

    def _embed(self, times: mx.array, camera: mx.array | None, *, objects: int, frames: int) -> mx.array:
        """What is projected in every block (b f, time_embed_dim): of the time and, if given, the cameras, after SiLU."""
        emb = times[:, None]
        if camera is not None:
            emb = emb + camera
        return mx.broadcast_to(nn.silu(emb), (objects, frames, emb.shape[2])).flatten(0, 1)

    def _run(
        self,
        resnet: nn.Module,
        transformer: nn.Module | None,
        x: mx.array,
        *,
        emb: mx.array,
        cross: Iterator[Sequence[CrossKeyValues] | None],
        frames: int,
        frame_bias: mx.array | None,
    ) -> mx.array:
        recompute = self.gradient_checkpointing
        x = run_block(resnet, x, emb[: len(x)], recompute=recompute)
        if transformer is None:
            return x
        static = {"views": frames, "options": self.attention_options}
        return run_block(transformer, x, next(cross), frame_bias, recompute=recompute, **static)
