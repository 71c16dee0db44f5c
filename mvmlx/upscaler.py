"""The latent upscaler: k-diffusion's U-Net (ImageDenoiserModelV1) with the tensor names of diffusers' K blocks.

It denoises latents of twice the size beside those that are upscaled, every view by itself. Source: crowsonkb/k-diffusion,
models/image_v1.py; diffusers' unet_2d_blocks.py (KDownBlock2D, KCrossAttnDownBlock2D, ...).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import mlx.core as mx
import mlx.nn as nn

from mvmlx.attention import Attention, KeyValues
from mvmlx.convolutions import PointConv2d
from mvmlx.layers import AdaGroupNorm, gelu, run_block
from mvshared.attention import FUSED, AttentionOptions
from mvshared.channels import KLevelPlan, upscaler_plan
from mvshared.config import K_GROUP_WIDTH, K_NORM_EPS, KUNetConfig
from mvshared.upscaling.shapes import check_context, check_inputs


class KResnetBlock(nn.Module):
    """Adaptive norm, GELU, convolution, twice, and a shortcut; only the second convolution changes `hidden` channels."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, *, config: KUNetConfig) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.norm2 = _norm(hidden, config)
        self.conv2 = nn.Conv2d(hidden, out_channels, 3, padding=1)
        self.conv_shortcut = PointConv2d(in_channels, out_channels, bias=False) if in_channels != out_channels else None

    def __call__(self, x: mx.array, emb: mx.array) -> mx.array:
        """x (n, h, w, in_channels) and embeddings (n, time_embed_dim) to (n, h, w, out_channels)."""
        h = self.conv1(gelu(self.norm1(x, emb)))
        h = self.conv2(gelu(self.norm2(h, emb)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class KCrossAttention(Attention):
    """Attention with biases to a context that is normalised first."""

    def __init__(self, channels: int, heads: int, *, context_dim: int) -> None:
        super().__init__(channels, heads, context_dim=context_dim, bias=True)
        self.norm_cross = nn.LayerNorm(context_dim)

    def keys_values(self, context: mx.array) -> KeyValues:
        """Keys and values (b, n, m, d) of a context (b, m, context_dim)."""
        return super().keys_values(self.norm_cross(context))


class KAttentionBlock(nn.Module):
    """Self-attention over the pixels of each view if asked for, then cross-attention to a text, each after an adaptive norm."""

    def __init__(self, channels: int, *, config: KUNetConfig, itself: bool) -> None:
        super().__init__()
        heads, context_dim = channels // config.attention_head_dim, config.cross_attention_dim
        assert context_dim is not None
        self.itself = itself
        if itself:
            self.norm1 = _norm(channels, config)
            self.attn1 = Attention(channels, heads, bias=True)
        self.norm2 = _norm(channels, config)
        self.attn2 = KCrossAttention(channels, heads, context_dim=context_dim)

    def __call__(self, x: mx.array, emb: mx.array, text: KeyValues, *, options: AttentionOptions) -> mx.array:
        """Views (b v, h, w, c), embeddings (b v, time_embed_dim) and what a text (b, ...) has of keys and values."""
        if self.itself:
            tokens = self.norm1(x, emb).flatten(1, 2)
            y = self.attn1(tokens, self.attn1.keys_values(tokens), options=options)
            x = x + y.reshape(x.shape)
        tokens = self.norm2(x, emb).reshape(text.keys.shape[0], -1, x.shape[-1])
        y = self.attn2(tokens, text, options=options)
        return x + y.reshape(x.shape)


class KLevel(nn.Module):
    """The blocks of one resolution, as planned: at a level that attends, every resnet has an attention of its own."""

    def __init__(self, config: KUNetConfig, plan: KLevelPlan) -> None:
        super().__init__()
        attends, itself = config.attention_levels[plan.level], plan.level == len(config.attention_levels) - 1
        self.resnets = [KResnetBlock(*channels, config=config) for channels in plan.resnets]
        self.attentions = [KAttentionBlock(channels[2], config=config, itself=itself) for channels in plan.resnets if attends]

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Every resnet with the attention that follows it."""
        return zip_longest(self.resnets, self.attentions)


class KTimeEmbedding(nn.Module):
    """Linear, GELU, Linear, GELU of the noise level's waves and the projected condition."""

    def __init__(self, config: KUNetConfig) -> None:
        super().__init__()
        width = config.time_embed_dim
        self.cond_proj = nn.Linear(config.time_cond_proj_dim, width, bias=False)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def __call__(self, waves: mx.array, condition: mx.array) -> mx.array:
        """Waves (b, time_embed_dim) and condition (b, time_cond_proj_dim) to (b, time_embed_dim)."""
        return gelu(self.linear_2(gelu(self.linear_1(waves + self.cond_proj(condition)))))


class FourierEmbedding(nn.Module):
    """Cosines and sines of a number at random frequencies, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels // 2,))

    def __call__(self, x: mx.array) -> mx.array:
        """Numbers (b,) to float32 (b, channels)."""
        angles = 2 * math.pi * x.astype(mx.float32)[:, None] * self.weight.astype(mx.float32)
        return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


class LatentUpscaler(nn.Module):
    """Predicts minus the velocity in latents of twice the size, and the logarithm of its variance.

    `gradient_checkpointing` trades time for memory in training: blocks are computed again for their gradients.
    """

    def __init__(
        self, config: KUNetConfig, *, attention_options: AttentionOptions = FUSED, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_options = attention_options
        self.gradient_checkpointing = gradient_checkpointing
        channels, plan = config.block_out_channels, upscaler_plan(config)
        self.conv_in = PointConv2d(config.in_channels, channels[0])
        self.time_proj = FourierEmbedding(config.time_embed_dim)
        self.time_embedding = KTimeEmbedding(config)
        self.down_blocks = [KLevel(config, each) for each in plan.down]
        self.up_blocks = [KLevel(config, each) for each in plan.up]
        self.conv_out = PointConv2d(channels[0], config.out_channels)

    def keys_values(self, context: mx.array | None) -> Sequence[KeyValues]:
        """What the views attend to of a text (b, l, cross_attention_dim), for every attention: constant over the steps.

        The context is None, and nothing is attended to, for a network without text. Raises OptionError for other shapes.
        """
        check_context(self.config, context=None if context is None else context.shape)
        if context is None:
            return []
        context = context.astype(self.conv_in.weight.dtype)
        blocks = (block for level in (*self.down_blocks, *self.up_blocks) for block in level.attentions)
        return [block.attn2.keys_values(context) for block in blocks]

    def __call__(self, sample: mx.array, noise: mx.array, *, text: Sequence[KeyValues], condition: mx.array) -> mx.array:
        """Denoise sample (b, v, h, w, in_channels); returns (b, v, h, w, out_channels) in the weights' dtype.

        sample holds x_t of variance 1 and the low-resolution latents at its size, noise (b,) a quarter of ln sigma, text what
        `keys_values` gave, condition (b, time_cond_proj_dim). Raises OptionError for shapes that do not fit.
        """
        check_inputs(
            self.config,
            sample=sample.shape,
            noise=noise.shape,
            condition=condition.shape,
            attended=text[0].keys.shape[0] if text else None,
        )
        dtype = self.conv_in.weight.dtype
        b, v = sample.shape[:2]
        emb = mx.repeat(self.time_embedding(self.time_proj(noise).astype(dtype), condition.astype(dtype)), v, axis=0)
        attended = iter(text)

        def run(level: KLevel, x: mx.array) -> mx.array:
            recompute, options = self.gradient_checkpointing, self.attention_options
            for resnet, attention in level.layers():
                x = run_block(resnet, x, emb, recompute=recompute)
                if attention is not None:
                    x = run_block(attention, x, emb, next(attended), recompute=recompute, options=options)
            return x

        x = self.conv_in(sample.astype(dtype).flatten(0, 1))
        skips = []
        for number, level in enumerate(self.down_blocks):
            x = run(level, blur_downsample(x) if number else x)
            skips.append(x)
        if self.config.attention_levels[-1]:
            skips.pop()
        for number, level in enumerate(self.up_blocks):
            x = blur_upsample(x) if number else x
            if number or not self.config.attention_levels[-1]:
                x = mx.concatenate([x, skips.pop()], axis=-1)
            x = run(level, x)
        return mx.unflatten(self.conv_out(x), 0, (b, v))


def blur_downsample(x: mx.array) -> mx.array:
    """(n, h, w, c) at half the size, weighted 1, 3, 3, 1 in both directions, reflected at the edges."""
    for axis in (1, 2):
        size = x.shape[axis]
        x = mx.concatenate([_entries(x, axis, 1, 2), x, _entries(x, axis, size - 2, size - 1)], axis=axis)
        before, first, second, after = (_entries(x, axis, start, start + size - 1, step=2) for start in range(4))
        x = (before + after) * 0.125 + (first + second) * 0.375
    return x


def blur_upsample(x: mx.array) -> mx.array:
    """(n, h, w, c) at twice the size: between neighbours, 3/4 of the nearer and 1/4 of the other, reflected at the edges."""
    for axis in (1, 2):
        size = x.shape[axis]
        before = mx.concatenate([_entries(x, axis, 1, 2), _entries(x, axis, 0, size - 1)], axis=axis)
        after = mx.concatenate([_entries(x, axis, 1, size), _entries(x, axis, size - 2, size - 1)], axis=axis)
        pair = mx.stack([x * 0.75 + before * 0.25, x * 0.75 + after * 0.25], axis=axis + 1)
        x = pair.flatten(axis, axis + 1)
    return x


def _entries(x: mx.array, axis: int, start: int, stop: int, *, step: int = 1) -> mx.array:
    """The entries start, start + step, ... below stop of an axis."""
    return x[tuple(slice(start, stop, step) if each == axis else slice(None) for each in range(x.ndim))]


def _norm(channels: int, config: KUNetConfig) -> AdaGroupNorm:
    return AdaGroupNorm(channels // K_GROUP_WIDTH, channels, embed_dim=config.time_embed_dim, eps=K_NORM_EPS)
