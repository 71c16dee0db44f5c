"""Tiles of a picture: which part of a layer's input each part of its output needs.

A picture too large for the memory is computed layer by layer in tiles that overlap by what a convolution looks at, with the
group statistics of the whole: the result is that of the whole picture, without seams, up to rounding.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mvshared.errors import OptionError

TILE_MULTIPLE = 8


class Tile(NamedTuple):
    """Rows and columns: `source` of the input, `crop` of what the layer makes of it, `target` of the output."""

    source: tuple[slice, slice]
    crop: tuple[slice, slice]
    target: tuple[slice, slice]


def check_tile(side: int) -> int:
    """The side of a tile. Raises OptionError unless it is a positive multiple of TILE_MULTIPLE."""
    if side < TILE_MULTIPLE or side % TILE_MULTIPLE:
        raise OptionError("tile", expected=f"a positive multiple of {TILE_MULTIPLE}", got=side)
    return side


def tiles(height: int, width: int, side: int, *, halo: int = 0, up: int = 1, down: int = 1) -> Iterator[Tile]:
    """Tiles of at most `side` pixels of an output (height, width), row by row.

    The layer enlarges its input `up` times or shrinks it `down` times, and looks `halo` pixels of the input around a tile; what
    it makes of a piece is right but for `halo * up / down` pixels along the cuts. `halo` is a multiple of `down`.
    """
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows = _along(top, min(top + side, height), height, halo=halo, up=up, down=down)
            columns = _along(left, min(left + side, width), width, halo=halo, up=up, down=down)
            yield Tile(*zip(rows, columns, strict=True))


def _along(start: int, stop: int, size: int, *, halo: int, up: int, down: int) -> tuple[slice, slice, slice]:
    """Source, crop and target along one axis, whose output has `size` pixels."""
    first = max(0, start * down // up - halo)
    last = min(size * down // up, -(-stop * down // up) + halo)
    skipped = start - first * up // down
    return slice(first, last), slice(skipped, skipped + stop - start), slice(start, stop)
