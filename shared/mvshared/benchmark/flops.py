"""How much arithmetic the networks are, from their configs: two for each multiply-add, as `torch.utils.flop_counter` counts.

What stays constant over the steps, the keys and values of text and image tokens, is apart from the step. The time embedding is
counted once per branch of guidance, and so is everything else of a step, though both backends compute once what branches that
differ only in their text and image tokens have in common.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mvshared.channels import unet_plan, upscaler_plan
from mvshared.config import CLIPTextConfig, CLIPVisionConfig, KUNetConfig, ModelConfig, ResamplerConfig, UNetConfig, VAEConfig


class Flops(NamedTuple):
    """Of a call, and how much of that is attention's products of queries, keys and values."""

    all: int
    attention: int


class Frames(NamedTuple):
    """What a step of the U-Net runs on: branches of guidance, views, reference frames, and the side of the latents."""

    branches: int
    views: int
    references: int
    side: int

    @property
    def frames(self) -> int:
        return self.views + self.references


def unet_flops(config: UNetConfig, frames: Frames, *, tokens: int = 0) -> Flops:
    """One call of the U-Net whose cross-attention sees `tokens` of text and pictures."""
    n, pixels, channels = frames.branches * frames.frames, frames.side**2, config.block_out_channels
    width, last = config.time_embed_dim, len(channels) - 1
    total = n * pixels * 9 * config.in_channels * channels[0]
    total += frames.branches * width * (channels[0] + width)
    if config.camera_dim is not None:
        total += n * width * (config.camera_dim + width)
    attended = 0
    for level, inputs, outputs, attends in _unet_resnets(config):
        here = pixels // 4**level
        total += n * (here * (9 * outputs * (inputs + outputs) + (inputs != outputs) * inputs * outputs) + width * outputs)
        if attends:
            depth, joint = config.transformer_layers_per_block[level], frames.frames * here
            total += n * here * 2 * outputs**2  # projections around the blocks
            total += depth * n * here * outputs**2 * (16 if config.cross_attention_dim is None else 18)
            attended += depth * frames.branches * 2 * joint * (joint + tokens) * outputs
    for level in range(last):
        total += n * pixels // 4 ** (level + 1) * 9 * channels[level] ** 2  # to the coarser level
        total += n * pixels // 4**level * 9 * channels[level + 1] ** 2  # and from it
    total += frames.branches * frames.views * pixels * 9 * channels[0] * config.out_channels
    return Flops(2 * (total + attended), 2 * attended)


def _unet_resnets(config: UNetConfig) -> Iterator[tuple[int, int, int, bool]]:
    """Level, input and output channels of every resnet, and whether a transformer follows it."""
    down, mid, up = unet_plan(config)
    for each in (*down, mid, *up):
        for inputs, attends in each.layers():
            yield each.level, inputs, config.block_out_channels[each.level], attends


def condition_flops(
    config: UNetConfig, *, branches: int, text_tokens: int, pictures: int = 0, states: int = 0, frames: int = 1
) -> Flops:
    """The keys and values of `text_tokens`, and of the image tokens of pictures with as many `states` each, the keys and values
    for each of `frames` apart, the tokens once."""
    if config.cross_attention_dim is None:
        return Flops(0, 0)
    widths = sum(
        outputs * config.transformer_layers_per_block[level] for level, _, outputs, attends in _unet_resnets(config) if attends
    )
    tokens, resampled = text_tokens, Flops(0, 0)
    if config.resampler is not None and pictures:
        tokens += pictures * config.resampler.num_queries
        one = _resampler_flops(config.resampler, states=states)
        resampled = Flops(branches * pictures * one.all, branches * pictures * one.attention)
    return Flops(4 * branches * frames * tokens * config.cross_attention_dim * widths + resampled.all, resampled.attention)


def _resampler_flops(config: ResamplerConfig, *, states: int) -> Flops:
    width, inner, queries = config.hidden_dim, config.heads * config.dim_head, config.num_queries
    attended = config.depth * 2 * queries * (states + queries) * inner
    layer = 2 * queries * width * inner + 2 * (states + queries) * width * inner + 2 * queries * width**2 * config.ff_mult
    total = states * config.embedding_dim * width + queries * width * config.output_dim + config.depth * layer + attended
    return Flops(2 * total, 2 * attended)


def vae_flops(config: VAEConfig, *, size_px: int, decoder: bool) -> Flops:
    """Encoding or decoding one picture."""
    channels, last, pixels = config.block_out_channels, len(config.block_out_channels) - 1, size_px**2
    coarse = pixels // 4**last
    latent = config.latent_channels if decoder else 2 * config.latent_channels
    total = coarse * latent**2 + coarse * 9 * latent * channels[-1]  # quant_conv, and the convolution beside it
    total += pixels * 9 * channels[0] * (config.out_channels if decoder else config.in_channels)
    total += 2 * coarse * 18 * channels[-1] ** 2
    attended = 0
    if config.mid_block_add_attention:
        total += 4 * coarse * channels[-1] ** 2
        attended = 2 * coarse**2 * channels[-1]
    for level, width in enumerate(channels):
        here = pixels // 4**level
        first = channels[min(level + 1, last)] if decoder else channels[max(level - 1, 0)]
        for number in range(config.layers_per_block + decoder):
            inputs = first if number == 0 else width
            total += here * (9 * width * (inputs + width) + (inputs != width) * inputs * width)
        if level < last:  # between this level and the coarser one, whose channels come in on the way up
            total += (here * channels[level + 1] ** 2 if decoder else here // 4 * width**2) * 9
    return Flops(2 * (total + attended), 2 * attended)


def upscaler_flops(config: KUNetConfig, *, branches: int, views: int, side: int, tokens: int = 0) -> Flops:
    """One call of the latent upscaler for results of that side, whose cross-attention sees `tokens` of text."""
    n, pixels, channels = branches * views, side**2, config.block_out_channels
    width, last, plan = config.time_embed_dim, len(channels) - 1, upscaler_plan(config)
    total = n * pixels * channels[0] * (config.in_channels + config.out_channels)
    total += branches * width * (config.time_cond_proj_dim + 2 * width)
    attended = 0
    for level, resnets in (*plan.down, *plan.up):
        here = pixels // 4**level
        for inputs, hidden, outputs in resnets:
            total += n * here * (9 * hidden * (inputs + outputs) + (inputs != outputs) * inputs * outputs)
            total += n * 2 * width * (inputs + hidden)  # adaptive norms
            if config.attention_levels[level]:
                total += n * here * 2 * outputs**2
                total += n * 2 * width * outputs
                attended += 2 * n * here * tokens * outputs
                if level == last:
                    total += n * here * 4 * outputs**2
                    total += n * 2 * width * outputs
                    attended += 2 * n * here**2 * outputs
    return Flops(2 * (total + attended), 2 * attended)


def tower_flops(config: CLIPTextConfig | CLIPVisionConfig) -> Flops:
    """A CLIP tower for one text or picture."""
    width, total = config.hidden_size, 0
    if isinstance(config, CLIPVisionConfig):
        tokens = config.tokens
        total = (tokens - 1) * config.num_channels * config.patch_size**2 * width
    else:
        tokens = config.max_position_embeddings
    attended = config.num_hidden_layers * 2 * tokens**2 * width
    total += config.num_hidden_layers * tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    return Flops(2 * (total + attended), 2 * attended)


def attended_tokens(config: ModelConfig, *, pictures: int) -> int:
    """Tokens of text and of that many pictures, which the views attend to."""
    if config.unet.cross_attention_dim is None or config.text_encoder is None:
        return 0
    resampler = config.unet.resampler
    return config.text_encoder.max_position_embeddings + (0 if resampler is None else pictures * resampler.num_queries)


def run_flops(config: ModelConfig, *, views: int, size_px: int, steps: int, branches: int) -> Flops:
    """A whole run with a picture, if the model takes one, and two texts: encoders, steps, decoding."""
    pictures = 1 if config.unet.takes_pictures else 0
    frames = Frames(branches, views, pictures if config.unet.reference_frame else 0, size_px // config.vae.downscale)
    text, vision, parts = config.text_encoder, config.image_encoder, list[tuple[int, Flops]]()
    if text is not None:
        parts.append((branches, tower_flops(text)))
        states = 0 if vision is None else vision.tokens
        tokens = text.max_position_embeddings
        parts.append((1, condition_flops(config.unet, branches=branches, text_tokens=tokens, pictures=pictures, states=states)))
    if vision is not None:
        parts.append((pictures, tower_flops(vision)))
    if config.unet.reference_frame:
        parts.append((pictures, vae_flops(config.vae, size_px=size_px, decoder=False)))
    parts.append((steps, unet_flops(config.unet, frames, tokens=attended_tokens(config, pictures=pictures))))
    parts.append((views, vae_flops(config.vae, size_px=size_px, decoder=True)))
    return Flops(sum(count * each.all for count, each in parts), sum(count * each.attention for count, each in parts))
