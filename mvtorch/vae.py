"""The VAE between pictures and latents: AutoencoderKL of latent diffusion (arXiv 2112.10752) with diffusers' tensor names."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvshared.attention import FUSED, AttentionOptions
from mvshared.config import VAEConfig
from mvshared.errors import OptionError
from mvshared.shapes import check_pictures
from mvtorch.attention import SpatialAttention
from mvtorch.cpu_norms import norm_silu
from mvtorch.layers import Downsample, Float32Conv2d, GroupNorm, ResnetBlock, Upsample, run_block
from mvtorch.tiling import decode_in_tiles, encode_in_tiles

NORM_EPS = 1e-6


class Moments(NamedTuple):
    """The normal distribution of latents: mean and logarithm of the variance, both (n, h, w, c)."""

    mean: Tensor
    logvar: Tensor


class Level(nn.Module):
    """The resnets of one resolution, then a down- or an upsampler or neither."""

    def __init__(
        self, in_channels: int, out_channels: int, *, config: VAEConfig, resnets: int, downsample: bool, upsample: bool
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (resnets - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, out_channels, groups=config.norm_num_groups, eps=NORM_EPS) for channels in inputs
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels, pad_after=True)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """(n, in_channels, h, w) to (n, out_channels, h', w')."""
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = run_block(block, x, recompute=recompute)
        return x


class MidBlock(nn.Module):
    """Resnet, attention if the config has it, resnet, at the coarsest resolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        attentions = [SpatialAttention(channels, groups=groups, eps=NORM_EPS)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=NORM_EPS) for _ in range(2))

    def forward(self, x: Tensor, *, options: AttentionOptions, recompute: bool = False) -> Tensor:
        """(n, c, h, w) to (n, c, h, w)."""
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
        self.down_blocks = nn.ModuleList(
            Level(
                channels[max(level - 1, 0)],
                channels[level],
                config=config,
                resnets=config.layers_per_block,
                downsample=level < len(channels) - 1,
                upsample=False,
            )
            for level in range(len(channels))
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, *, options: AttentionOptions, recompute: bool = False) -> Tensor:
        """Pixels (n, 3, h, w) to (n, 2 * latent_channels, h / 8, w / 8)."""
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
        self.up_blocks = nn.ModuleList(
            Level(
                channels[max(level - 1, 0)],
                channels[level],
                config=config,
                resnets=config.layers_per_block + 1,
                downsample=False,
                upsample=level < len(channels) - 1,
            )
            for level in range(len(channels))
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=NORM_EPS)
        self.conv_out = Float32Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, *, options: AttentionOptions, recompute: bool = False) -> Tensor:
        """Latents (n, latent_channels, h, w) to float32 pixels (n, 3, 8 h, 8 w)."""
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
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def encode(self, pixels: Tensor, *, batch: int | None = None, tile: int | None = None) -> Moments:
        """Moments (n, h / 8, w / 8, c) of pixels (n, h, w, 3), `batch` pictures at a time, or all at once.

        `tile` is the side of the tiles that a picture is computed in, in pixels; the result is the same up to rounding. A
        deterministic encoding is the mean, a sample is `mean + exp(logvar / 2) * noise`; `logvar` is in [-30, 20].
        Raises OptionError for a size that is no multiple of `config.downscale`.
        """
        check_pictures("pixels", tuple(pixels.shape), channels=self.config.in_channels, multiple=self.config.downscale)
        mean, logvar = _in_batches(partial(self._encode, tile=tile), pixels, batch).chunk(2, dim=-1)
        return Moments(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor, *, batch: int | None = None, tile: int | None = None) -> Tensor:
        """Float32 pixels (n, 8 h, 8 w, 3) of unscaled latents (n, h, w, c), `batch` pictures at a time, or all at once.

        `tile` as in `encode`. Raises OptionError for a wrong number of channels.
        """
        check_pictures("latents", tuple(latents.shape), channels=self.config.latent_channels)
        return _in_batches(partial(self._decode, tile=tile), latents, batch)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """The U-Net's latents of the VAE's: `(z - latents_mean) * scaling_factor / latents_std`, any shape (..., c)."""
        mean, scale = self._statistics(latents)
        return (latents - mean) * scale

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """The VAE's latents of the U-Net's: the inverse of `scale_latents`, any shape (..., c)."""
        mean, scale = self._statistics(latents)
        return latents / scale + mean

    def _encode(self, pixels: Tensor, *, tile: int | None) -> Tensor:
        x = pixels.to(self.quant_conv.weight.dtype).permute(0, 3, 1, 2)
        options = self.attention_options
        if tile:
            x = encode_in_tiles(self.encoder, x, options=options, side=tile)
        else:
            x = self.encoder(x, options=options, recompute=self.gradient_checkpointing)
        return self.quant_conv(x).permute(0, 2, 3, 1)

    def _decode(self, latents: Tensor, *, tile: int | None) -> Tensor:
        x = latents.to(self.post_quant_conv.weight.dtype).permute(0, 3, 1, 2)
        x, options = self.post_quant_conv(x), self.attention_options
        if tile:
            x = decode_in_tiles(self.decoder, x, options=options, side=tile)
        else:
            x = self.decoder(x, options=options, recompute=self.gradient_checkpointing)
        return x.permute(0, 2, 3, 1)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.config.latents_mean or (0.0,) * self.config.latent_channels
        std = self.config.latents_std or (1.0,) * self.config.latent_channels
        return latents.new_tensor(mean), latents.new_tensor([self.config.scaling_factor / value for value in std])


def _in_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch: int | None) -> Tensor:
    if batch is not None and batch < 1:
        raise OptionError("batch", expected="at least 1 or None", got=batch)
    if batch is None or batch >= len(x):
        return function(x)
    return torch.cat([function(x[start : start + batch]) for start in range(0, len(x), batch)])
