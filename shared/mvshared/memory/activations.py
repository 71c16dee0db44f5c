"""What the networks' activations take at most, from their configs: every formula follows the layers in the order they run.

Counted is what is alive at once, in numbers per pixel or token, at the layer where that is most: the skip connections that wait
for the way up, the input, and the working copies of the layer itself. How many copies a layer has at once depends on the
backend, and was fitted to measured peaks: see docs/memory.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod

from mvshared.attention import FUSED_WIDTHS, SCORE_BYTES, AttentionOptions
from mvshared.backend import BackendName, Dtype, is_metal
from mvshared.channels import unet_plan
from mvshared.config import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from mvshared.precision import DTYPE_BYTES

NARROW = 64


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a backend holds of a layer at once.

    `norm`: copies of a norm's input, in float32 and in half precision. `feed_forward`: of its tokens. `unfolded`: float32
    copies of a convolution's input that are made for the matrix product. `fused`: the widest heads for which attention has
    a kernel that never holds its scores, None for all. `pieces`: of sliced attention, in flight at once. `relaid`: whether a
    weight is copied to another layout when it is used. `caches`: whether freed memory is kept for later. `spread`: how much
    more memory activations take than they have, since what is freed leaves gaps. `narrow`: how much more a convolution of
    fewer than NARROW channels takes. `dequantized`: bytes per number of a quantised weight when it is used. `runtime`: of the
    library itself, once it computes. `winograd`: whether wide convolutions of large maps are computed by Winograd's method.
    """

    norm: tuple[float, float]
    feed_forward: float
    unfolded: float
    fused: int | None
    pieces: int
    relaid: bool
    caches: bool = False
    spread: float = 1.0
    narrow: float = 1.0
    dequantized: int = 8
    runtime: int = 45_000_000
    winograd: bool = False

    def convolution(self, inputs: int, outputs: int, *, pictures: int, height: float, width: float, number: int) -> float:
        """Bytes of a 3x3 convolution of maps of that size, with its norm before it."""
        pixels, factor = pictures * height * width, self.narrow if inputs < NARROW else 1
        plain = factor * number * (self.norm[number < SCORE_BYTES] * inputs + outputs) + SCORE_BYTES * self.unfolded * inputs
        transformed = self._transformed(inputs, outputs, pictures=pictures, height=height, width=width)
        # The norm's copies are gone before Winograd's method begins.
        return max(pixels * plain, number * (pixels * (inputs + outputs) + transformed) if transformed else 0)

    def _transformed(self, inputs: int, outputs: int, *, pictures: int, height: float, width: float) -> int:
        """Numbers that Winograd's method holds beside input and output: filter, padded input, and input and output of the
        products, of 8x8 numbers for a tile of 6x6 pixels; 0 where MLX computes otherwise (its backend/metal/conv.cpp)."""
        fits = inputs % 32 == 0 and outputs % 32 == 0 and inputs + outputs >= 256 and pictures * height * width >= 4096
        if not self.winograd or not fits:
            return 0
        down, across = ceil(height / 6), ceil(width / 6)
        padded = pictures * (6 * down + 2) * (6 * across + 2) * inputs
        return 64 * inputs * outputs + padded + 64 * pictures * down * across * (inputs + outputs)

    def weight(self, largest: int, quantized: int, *, number: int) -> int:
        """Bytes of a weight's copies while it is used, for the numbers of the largest one and the largest quantised one."""
        return max(number * largest if self.relaid else 0, self.dequantized * quantized)


TORCH_CPU = Costs(norm=(2.4, 4.7), feed_forward=24, unfolded=0, fused=None, pieces=3, relaid=True, spread=1.3, narrow=1.6)
TORCH_GPU = Costs(norm=(2.4, 4.7), feed_forward=18, unfolded=0, fused=None, pieces=3, relaid=False)
MLX_CPU = Costs(norm=(4, 6), feed_forward=18, unfolded=9, fused=0, pieces=10, relaid=True, caches=True)
MLX_CUDA = Costs(norm=(4, 6), feed_forward=18, unfolded=0, fused=max(FUSED_WIDTHS), pieces=10, relaid=False, caches=True)
# Metal frees nothing before a command buffer is full, of 40 operations on small maps.
MLX_METAL = replace(MLX_CUDA, runtime=MLX_CUDA.runtime + 110_000_000, winograd=True)


def costs_of(backend: BackendName, device: str) -> Costs:
    """The costs of a backend on a device."""
    if backend == "torch":
        return TORCH_CPU if device == "cpu" else TORCH_GPU
    return MLX_CPU if device == "cpu" else MLX_METAL if is_metal(backend, device) else MLX_CUDA


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a network's memory depends on beside its config: pictures that run together, and (h, w) of its finest level."""

    batch: int
    frames: int
    height: int
    width: int
    dtype: Dtype
    attention: AttentionOptions

    @property
    def number(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def pixels(self) -> int:
        return self.batch * self.frames * self.height * self.width


def attention_bytes(
    costs: Costs, options: AttentionOptions, *, batch: int, heads: int, queries: int, keys: int, width: int
) -> int:
    """Bytes of the scores that attention holds at once."""
    scores = SCORE_BYTES * batch * heads * queries * keys
    if options.implementation == "plain":
        return 3 * scores
    if options.implementation == "sliced":
        return min(scores, costs.pieces * max(options.budget_bytes, SCORE_BYTES * keys))
    return 0 if costs.fused is None or width <= costs.fused else scores


def unet_bytes(config: UNetConfig, sizes: Sizes, costs: Costs) -> int:
    """The most that one call of the U-Net takes: skip connections and the widest layer, whichever level has it."""
    most = 0.0
    for level, inputs, outputs, skips, attends in _unet_layers(config):
        pixels = sizes.pixels / 4**level
        waiting = sizes.number * sizes.pixels * skips
        work = sizes.number * pixels * inputs + costs.convolution(
            max(inputs, outputs),
            outputs,
            pictures=sizes.batch * sizes.frames,
            height=sizes.height / 2**level,
            width=sizes.width / 2**level,
            number=sizes.number,
        )
        if attends:
            tokens = sizes.frames * sizes.height * sizes.width // 4**level
            heads = config.heads(level)
            scores = attention_bytes(
                costs, sizes.attention, batch=sizes.batch, heads=heads, queries=tokens, keys=tokens, width=outputs // heads
            )
            work = max(work, pixels * sizes.number * outputs * costs.feed_forward)
            work = max(work, pixels * sizes.number * outputs * 7 + scores)
        most = max(most, waiting + work)
    return round(most)


def _unet_layers(config: UNetConfig) -> Iterator[tuple[int, int, int, float, bool]]:
    """Level, input and output channels, and channels of the waiting skip connections per pixel of the finest level, of every
    resnet, and whether a transformer follows it."""
    channels, (down, mid, up) = config.block_out_channels, unet_plan(config)
    skips = [(0, channels[0])]
    for each in down:
        outputs = channels[each.level]
        for inputs, attends in each.layers():
            yield each.level, inputs, outputs, _waiting(skips), attends
            skips.append((each.level, outputs))
        if each.level < mid.level:
            skips.append((each.level + 1, outputs))
    for inputs, attends in mid.layers():
        yield mid.level, inputs, channels[mid.level], _waiting(skips), attends
    for each in up:
        for inputs, attends in each.layers():
            skips.pop()
            yield each.level, inputs, channels[each.level], _waiting(skips), attends


def _waiting(skips: list[tuple[int, int]]) -> float:
    return sum(width / 4**level for level, width in skips)


def vae_bytes(config: VAEConfig, sizes: Sizes, costs: Costs, *, decoder: bool, tile: int | None) -> int:
    """The most that the VAE's encoder or decoder takes for `sizes.batch` pictures that run together, in tiles for one."""
    channels = config.block_out_channels
    pixels, number = sizes.pixels, sizes.number
    most = 0.0
    for level, width in enumerate(channels):
        here = pixels / 4**level
        wider = channels[min(level + 1, len(channels) - 1)] if decoder else width
        sides = {"height": sizes.height / 2**level, "width": sizes.width / 2**level}
        convolved = partial(costs.convolution, wider, max(width, wider), number=number)
        whole = here * number * wider + convolved(pictures=sizes.batch * sizes.frames, **sides)
        if tile is not None:
            piece = {name: min(side, tile + 2) for name, side in sides.items()}
            held = number * here * (wider + 2 * width if wider != width else 2 * width)
            whole = min(whole, held + 4 * wider * prod(piece.values()) + convolved(pictures=1, **piece))
        most = max(most, whole)
    coarse = pixels // 4 ** (len(channels) - 1)
    middle = channels[-1] * coarse * number * 6.0
    each = coarse // sizes.batch
    middle += attention_bytes(costs, sizes.attention, batch=sizes.batch, heads=1, queries=each, keys=each, width=channels[-1])
    if config.mid_block_add_attention:
        most = max(most, middle)
    return round(most)


def tower_bytes(config: CLIPTextConfig | CLIPVisionConfig, sizes: Sizes, costs: Costs) -> int:
    """The most that a CLIP tower takes for `sizes.batch` texts or pictures: every layer's states are kept."""
    tokens = config.tokens if isinstance(config, CLIPVisionConfig) else config.max_position_embeddings
    width, number = config.hidden_size, sizes.number
    kept = (config.num_hidden_layers + 1) * width * number
    work = number * (4 * width + 2 * config.intermediate_size)
    scores = attention_bytes(
        costs,
        sizes.attention,
        batch=sizes.batch,
        heads=config.num_attention_heads,
        queries=tokens,
        keys=tokens,
        width=width // config.num_attention_heads,
    )
    return sizes.batch * tokens * (kept + work) + scores
