"""The VAE between pictures and latents: AutoencoderKL of latent diffusion (arXiv 2112.10752) with diffusers' tensor names."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mvmlx.attention import SpatialAttention
from mvmlx.convolutions import PointConv2d
from mvmlx.device import evaluated
from mvmlx.layers import Downsample, Float32Conv2d, GroupNorm, ResnetBlock, Upsample, run_block
from mvmlx.norms import norm_silu
from mvmlx.tiling import decode_in_tiles, encode_in_tiles
from mvshared.attention import FUSED, AttentionOptions
from mvshared.config import VAEConfig
from mvshared.errors import OptionError
from mvshared.shapes import check_pictures

NORM_EPS = 1e-6


class Moments(NamedTuple):
    """The normal distribution of latents: mean and logarithm of the variance, both (n, h, w, c)."""

    mean: mx.array
    logvar: mx.array


class Level(nn.Module):
    """The resnets of one resolution, then a down- or an upsampler or neither."""

    def __init__(
        self, in_channels: int, out_channels: int, *, config: VAEConfig, resnets: int, downsample: bool, upsample: bool
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (resnets - 1)
        self.resnets = [ResnetBlock(channels, out_channels, groups=config.norm_num_groups, eps=NORM_EPS) for channels in inputs]
        self.downsamplers = [Downsample(out_channels, pad_after=True)] if downsample else []
        self.upsamplers = [Upsample(out_channels)] if upsample else []

    def __call__(self, x: mx.array, *, recompute: bool = False) -> mx.array:
        """(n, h, w, in_channels) to (n, h', w', out_channels)."""
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = run_block(block, x, recompute=recompute)
        return x


class MidBlock(nn.Module):
    """Resnet, attention if the config has it, resnet, at the coarsest resolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.attentions = [SpatialAttention(channels, groups=groups, eps=NORM_EPS)] if config.mid_block_add_attention else []
        self.resnets = [ResnetBlock(channels, channels, groups=groups, eps=NORM_EPS) for _ in range(2)]

    def __call__(self, x: mx.array, *, options: AttentionOptions, recompute: bool = False) -> mx.array:
        """(n, h, w, c) to (n, h, w, c)."""
        x = run_block(self.resnets[0], x, recompute=recompute)
        for attention in self.attentions:
            x = run_block(attention, x, recompute=recompute, options=options)
        return run_block(self.resnets[1], x, recompute=recompute)


class Encoder(nn.Module):
    """Pixels to features: mean and log-variance side by side in the channels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = [
            Level(
                channels[max(level - 1, 0)],
                channels[level],
                config=config,
                resnets=config.layers_per_block,
                downsample=level < len(channels) - 1,
                upsample=False,
            )
            for level in range(len(channels))
        ]
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: mx.array, *, options: AttentionOptions, recompute: bool = False) -> mx.array:
        """Pixels (n, h, w, 3) to (n, h / 8, w / 8, 2 * latent_channels)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, recompute=recompute)
        x = self.mid_block(x, options=options, recompute=recompute)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    """Latents to pixels; the last convolution is in float32."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = [
            Level(
                channels[max(level - 1, 0)],
                channels[level],
                config=config,
                resnets=config.layers_per_block + 1,
                downsample=False,
                upsample=level < len(channels) - 1,
            )
            for level in range(len(channels))
        ]
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=NORM_EPS)
        self.conv_out = Float32Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def __call__(self, x: mx.array, *, options: AttentionOptions, recompute: bool = False) -> mx.array:
        """Latents (n, h, w, latent_channels) to float32 pixels (n, 8 h, 8 w, 3)."""
        x = self.mid_block(self.conv_in(x), options=options, recompute=recompute)
        for block in self.up_blocks:
            x = block(x, recompute=recompute)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class AutoencoderKL(nn.Module):
    """Encoder and decoder. Pixels are in [-1, 1]; latents are unscaled unless a function says otherwise.

    `gradient_checkpointing` trades time for memory in training: blocks are computed again for their gradients.
    """

    def __init__(
        self, config: VAEConfig, *, attention_options: AttentionOptions = FUSED, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_options = attention_options
        self.gradient_checkpointing = gradient_checkpointing
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = PointConv2d(2 * config.latent_channels, 2 * config.latent_channels)
        self.post_quant_conv = PointConv2d(config.latent_channels, config.latent_channels)

    def encode(self, pixels: mx.array, *, batch: int | None = None, tile: int | None = None) -> Moments:
        """Moments (n, h / 8, w / 8, c) of pixels (n, h, w, 3), `batch` pictures at a time, or all at once.

        `tile` is the side of the tiles that a picture is computed in, in pixels; the result is the same up to rounding. A
        deterministic encoding is the mean, a sample is `mean + exp(logvar / 2) * noise`; `logvar` is in [-30, 20].
        Raises OptionError for a size that is no multiple of `config.downscale`.
        """
        check_pictures("pixels", pixels.shape, channels=self.config.in_channels, multiple=self.config.downscale)
        mean, logvar = mx.split(_in_batches(partial(self._encode, tile=tile), pixels, batch), 2, axis=-1)
        return Moments(mean, mx.clip(logvar, -30.0, 20.0))

    def decode(self, latents: mx.array, *, batch: int | None = None, tile: int | None = None) -> mx.array:
        """Float32 pixels (n, 8 h, 8 w, 3) of unscaled latents (n, h, w, c), `batch` pictures at a time, or all at once.

        `tile` as in `encode`. Raises OptionError for a wrong number of channels.
        """
        check_pictures("latents", latents.shape, channels=self.config.latent_channels)
        return _in_batches(partial(self._decode, tile=tile), latents, batch)

    def scale_latents(self, latents: mx.array) -> mx.array:
        """The U-Net's latents of the VAE's: `(z - latents_mean) * scaling_factor / latents_std`, any shape (..., c)."""
        mean, scale = self._statistics(latents)
        return (latents - mean) * scale

    def unscale_latents(self, latents: mx.array) -> mx.array:
        """The VAE's latents of the U-Net's: the inverse of `scale_latents`, any shape (..., c)."""
        mean, scale = self._statistics(latents)
        return latents / scale + mean

    def _encode(self, pixels: mx.array, *, tile: int | None) -> mx.array:
        x = pixels.astype(self.quant_conv.weight.dtype)
        options = self.attention_options
        if tile:
            x = encode_in_tiles(self.encoder, x, options=options, side=tile)
        else:
            x = self.encoder(x, options=options, recompute=self.gradient_checkpointing)
        return self.quant_conv(x)

    def _decode(self, latents: mx.array, *, tile: int | None) -> mx.array:
        x = latents.astype(self.post_quant_conv.weight.dtype)
        x, options = self.post_quant_conv(x), self.attention_options
        if tile:
            x = decode_in_tiles(self.decoder, x, options=options, side=tile)
        else:
            x = self.decoder(x, options=options, recompute=self.gradient_checkpointing)
        return x

    def _statistics(self, latents: mx.array) -> tuple[mx.array, mx.array]:
        mean = self.config.latents_mean or (0.0,) * self.config.latent_channels
        std = self.config.latents_std or (1.0,) * self.config.latent_channels
        scale = [self.config.scaling_factor / value for value in std]
        return mx.array(mean, dtype=latents.dtype), mx.array(scale, dtype=latents.dtype)


def _in_batches(function: Callable[[mx.array], mx.array], x: mx.array, batch: int | None) -> mx.array:
    if batch is not None and batch < 1:
        raise OptionError("batch", expected="at least 1 or None", got=batch)
    if batch is None or batch >= len(x):
        return function(x)
    # Left to one evaluation, MLX would compute them side by side.
    return mx.concatenate([evaluated(function(x[start : start + batch])) for start in range(0, len(x), batch)])
