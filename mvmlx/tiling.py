"""The VAE's networks in tiles: the same result as of the whole picture, up to rounding, with less memory.

Every convolution runs on pieces that overlap by what it looks at, every group norm takes the statistics of the whole picture,
so there are no seams to blend. Two or three feature maps of the finest resolution are all that is held; the middle, at the
coarsest one, is computed as a whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mvmlx.device import evaluated
from mvmlx.layers import GroupNorm, ResnetBlock
from mvmlx.norms import summed
from mvshared.attention import AttentionOptions
from mvshared.tiling import Tile, check_tile, tiles


class Affine(NamedTuple):
    """A group norm whose statistics are known, float32 (n, 1, 1, c): what is subtracted first, factors, summands.

    Every group's first value is subtracted, as in `GroupNorm`: where the mean is large, what is left of it is small.
    """

    first: mx.array
    scale: mx.array
    shift: mx.array

    def silu(self, x: mx.array) -> mx.array:
        """SiLU of the normalised x (n, h, w, c), in its dtype."""
        return nn.silu(((x.astype(mx.float32) - self.first) * self.scale + self.shift).astype(x.dtype))


def norm_of(norm: GroupNorm, x: mx.array, *, side: int) -> Affine:
    """The group norm of x (n, h, w, c), with statistics that are taken tile by tile, in float32."""
    n, height, width, c = x.shape
    groups = norm.groups
    first = x[:, 0, 0, :: c // groups].astype(mx.float32)
    mean = squares = mx.zeros((n, groups))
    for tile in tiles(height, width, side):
        total = summed(_grouped(x[:, *tile.target], groups) - first[:, None, :, None])[:, 0, :, 0]
        mean = evaluated(mean + total / (height * width * c // groups))
    for tile in tiles(height, width, side):
        centred = _grouped(x[:, *tile.target], groups) - first[:, None, :, None] - mean[:, None, :, None]
        squares = evaluated(squares + summed(centred.square())[:, 0, :, 0])
    deviation = mx.rsqrt(squares / (height * width * c // groups) + norm.eps)
    first, mean, deviation = (mx.repeat(value, c // groups, axis=1)[:, None, None] for value in (first, mean, deviation))
    scale = deviation * norm.weight.astype(mx.float32)
    return Affine(first, scale, norm.bias.astype(mx.float32) - mean * scale)


def _grouped(x: mx.array, groups: int) -> mx.array:
    """(n, h, w, c) as float32 (n, h w, groups, c / groups)."""
    return x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups).astype(mx.float32)


def in_tiles(
    layer: Callable[[mx.array, Tile], mx.array],
    x: mx.array,
    *,
    side: int,
    halo: int,
    up: int = 1,
    down: int = 1,
    add: Callable[[Tile], mx.array] | None = None,
    out: mx.array | None = None,
) -> mx.array:
    """A layer of x (n, h, w, c), computed in tiles of its result; `layer` gets the piece of x that a tile needs, and the tile.

    See `mvshared.tiling.tiles`. `add` gives what is added to a tile. `out` is written to; it may be an array that only the tile
    itself is read from.
    """
    size = x.shape[1] * up // down, x.shape[2] * up // down
    for tile in tiles(*size, side, halo=halo, up=up, down=down):
        piece = layer(x[:, *tile.source], tile)
        if out is None:
            out = mx.zeros((piece.shape[0], *size, piece.shape[-1]), dtype=piece.dtype)
        result = piece[:, *tile.crop]
        out[:, *tile.target] = result if add is None else result + add(tile)
        mx.eval(out)
    assert out is not None
    return out


def resnet_in_tiles(block: ResnetBlock, x: mx.array, *, side: int) -> mx.array:
    """A resnet block without time embedding of x (n, h, w, c), which is overwritten where no shortcut changes its width."""
    norm = norm_of(block.norm1, x, side=side)
    h = in_tiles(lambda piece, tile: block.conv1(norm.silu(piece)), x, side=side, halo=1)
    norm = norm_of(block.norm2, h, side=side)

    def rest(tile: Tile) -> mx.array:
        return x[:, *tile.target] if block.conv_shortcut is None else block.conv_shortcut(x[:, *tile.target])

    target = x if block.conv_shortcut is None else None
    return in_tiles(lambda piece, tile: block.conv2(norm.silu(piece)), h, side=side, halo=1, add=rest, out=target)


def encode_in_tiles(encoder: Any, x: mx.array, *, options: AttentionOptions, side: int) -> mx.array:
    """What the VAE's encoder makes of pixels (n, h, w, 3), in tiles of `side` pixels. Raises OptionError for the side."""
    side = check_tile(side)
    x = in_tiles(lambda piece, tile: encoder.conv_in(piece), x, side=side, halo=1)
    for level in encoder.down_blocks:
        for block in level.resnets:
            x = resnet_in_tiles(block, x, side=side)
        for block in level.downsamplers:
            x = in_tiles(lambda piece, tile, block=block: block(piece), x, side=side, halo=2, down=2)
    x = encoder.mid_block(x, options=options)
    norm = norm_of(encoder.conv_norm_out, x, side=side)
    return in_tiles(lambda piece, tile: encoder.conv_out(norm.silu(piece)), x, side=side, halo=1)


def decode_in_tiles(decoder: Any, x: mx.array, *, options: AttentionOptions, side: int) -> mx.array:
    """What the VAE's decoder makes of latents (n, h, w, c), in tiles of `side` pixels. Raises OptionError for the side."""
    side = check_tile(side)
    x = mx.array(decoder.mid_block(decoder.conv_in(x), options=options))  # a copy, for whoever looks at what a block returns
    for level in decoder.up_blocks:
        for block in level.resnets:
            x = resnet_in_tiles(block, x, side=side)
        for block in level.upsamplers:
            x = in_tiles(lambda piece, tile, block=block: block(piece), x, side=side, halo=1, up=2)
    norm = norm_of(decoder.conv_norm_out, x, side=side)
    return in_tiles(lambda piece, tile: decoder.conv_out(norm.silu(piece)), x, side=side, halo=1)
