"""The VAE's networks in tiles: the same result as of the whole picture, up to rounding, with less memory.

Every convolution runs on pieces that overlap by what it looks at, every group norm takes the statistics of the whole picture,
so there are no seams to blend. Two or three feature maps of the finest resolution are all that is held; the middle, at the
coarsest one, is computed as a whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvshared.attention import AttentionOptions
from mvshared.tiling import Tile, check_tile, tiles
from mvtorch.layers import GroupNorm, ResnetBlock


class Affine(NamedTuple):
    """A group norm whose statistics are known, float32 (n, c, 1, 1): what is subtracted first, factors, summands.

    Every group's first value is subtracted: where the mean is large, what is left of it is small.
    """

    first: Tensor
    scale: Tensor
    shift: Tensor

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the normalised x (n, c, h, w), in its dtype."""
        return F.silu(torch.addcmul(self.shift, x.float() - self.first, self.scale).to(x.dtype))


def norm_of(norm: GroupNorm, x: Tensor, *, side: int) -> Affine:
    """The group norm of x (n, c, h, w), with statistics that are taken tile by tile, in float32."""
    n, c, height, width = x.shape
    groups = norm.num_groups
    pieces = [x[(..., *tile.target)] for tile in tiles(height, width, side)]
    first = x[:, :: c // groups, :1, :1].float().repeat_interleave(c // groups, dim=1)
    total = torch.stack([(piece.float() - first).sum(dim=(2, 3)) for piece in pieces]).sum(0)
    mean = (total.view(n, groups, -1).mean(dim=2) / (height * width)).repeat_interleave(c // groups, dim=1)[..., None, None]
    squares = torch.stack([(piece.float() - first).sub_(mean).square_().sum(dim=(2, 3)) for piece in pieces]).sum(0)
    variance = squares.view(n, groups, -1).mean(dim=2) / (height * width)
    deviation = torch.rsqrt(variance + norm.eps).repeat_interleave(c // groups, dim=1)
    scale = (deviation * norm.weight.float())[..., None, None]
    return Affine(first, scale, norm.bias.float()[None, :, None, None] - mean * scale)


def in_tiles(
    layer: Callable[[Tensor, Tile], Tensor],
    x: Tensor,
    *,
    side: int,
    halo: int,
    up: int = 1,
    down: int = 1,
    add: Callable[[Tile], Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A layer of x (n, c, h, w), computed in tiles of its result; `layer` gets the piece of x that a tile needs, and the tile.

    See `mvshared.tiling.tiles`. `add` gives what is added to a tile. `out` is written to; it may be an array that only the tile
    itself is read from.
    """
    size = x.shape[2] * up // down, x.shape[3] * up // down
    for tile in tiles(*size, side, halo=halo, up=up, down=down):
        piece = layer(x[(..., *tile.source)], tile)
        if out is None:
            shape = (*piece.shape[:2], *size)
            out = torch.empty(shape, dtype=piece.dtype, device=x.device, memory_format=torch.channels_last)
        result = piece[(..., *tile.crop)]
        out[(..., *tile.target)] = result if add is None else result + add(tile)
    assert out is not None
    return out


def resnet_in_tiles(block: ResnetBlock, x: Tensor, *, side: int) -> Tensor:
    """A resnet block without time embedding of x (n, c, h, w), which is overwritten where no shortcut changes its width."""
    norm = norm_of(block.norm1, x, side=side)
    h = in_tiles(lambda piece, tile: block.conv1(norm.silu(piece)), x, side=side, halo=1)
    norm = norm_of(block.norm2, h, side=side)

    def rest(tile: Tile) -> Tensor:
        here = x[(..., *tile.target)]
        return here if block.conv_shortcut is None else block.conv_shortcut(here)

    target = x if block.conv_shortcut is None else None
    return in_tiles(lambda piece, tile: block.conv2(norm.silu(piece)), h, side=side, halo=1, add=rest, out=target)


def encode_in_tiles(encoder: Any, x: Tensor, *, options: AttentionOptions, side: int) -> Tensor:
    """What the VAE's encoder makes of pixels (n, 3, h, w), in tiles of `side` pixels. Raises OptionError for the side."""
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


def decode_in_tiles(decoder: Any, x: Tensor, *, options: AttentionOptions, side: int) -> Tensor:
    """What the VAE's decoder makes of latents (n, c, h, w), in tiles of `side` pixels. Raises OptionError for the side."""
    side = check_tile(side)
    x = decoder.mid_block(decoder.conv_in(x), options=options).clone()  # for whoever looks at what a block returns
    for level in decoder.up_blocks:
        for block in level.resnets:
            x = resnet_in_tiles(block, x, side=side)
        for block in level.upsamplers:
            x = in_tiles(lambda piece, tile, block=block: block(piece), x, side=side, halo=1, up=2)
    norm = norm_of(decoder.conv_norm_out, x, side=side)
    return in_tiles(lambda piece, tile: decoder.conv_out(norm.silu(piece)), x, side=side, halo=1)
