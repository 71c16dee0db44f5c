"""A layer over many points at once.

numba caches no function that is given other functions, so the compiled choice of a layer is written out.
"""

import numpy as np
from numpy.typing import NDArray

from mvshared.heads import fields
from mvshared.heads.fields import Layer, Measures
from mvshared.heads.jit import COMPILED, compiled, compiled_inline, entry
from mvshared.heads.primitives import Array

LAYERS = tuple(getattr(fields, layer.name.lower()) for layer in Layer)


def distance(layers: NDArray[np.int64], x: Array, y: Array, z: Array, m: Measures) -> Array:
    """What layers leave at points, three float32 arrays of one shape; numbers below 0 are no layers."""
    if not COMPILED:
        d = x
        for layer in layers[layers >= 0]:
            d = LAYERS[layer](d, x, y, z, m)
        return d
    shape, d = x.shape, np.empty(x.size, np.float32)
    x, y, z = (np.ascontiguousarray(axis, np.float32).ravel() for axis in (x, y, z))
    apply_layers(layers, d, x, y, z, m)
    return d.reshape(shape)


@compiled_inline
def over(field, d: Array, x: Array, y: Array, z: Array, m: Measures) -> None:
    for k in range(len(d)):
        d[k] = field(d[k], x[k], y[k], z[k], m)


@compiled
def apply(layer: int, d: Array, x: Array, y: Array, z: Array, m: Measures) -> None:
    """Put one layer over the distances `d` at points."""
    if layer == Layer.SKIN:
        over(fields.skin, d, x, y, z, m)
    elif layer == Layer.HUMAN_EARS:
        over(fields.human_ears, d, x, y, z, m)
    elif layer == Layer.ELF_EARS:
        over(fields.elf_ears, d, x, y, z, m)
    elif layer == Layer.EYES:
        over(fields.eyes, d, x, y, z, m)
    elif layer == Layer.DOME:
        over(fields.dome, d, x, y, z, m)
    elif layer == Layer.RIBS:
        over(fields.ribs, d, x, y, z, m)
    elif layer == Layer.BOWL:
        over(fields.bowl, d, x, y, z, m)
    elif layer == Layer.FRINGE:
        over(fields.fringe, d, x, y, z, m)
    elif layer == Layer.BOB:
        over(fields.bob, d, x, y, z, m)
    elif layer == Layer.BLUNT_BOB:
        over(fields.blunt_bob, d, x, y, z, m)
    elif layer == Layer.LONG:
        over(fields.long, d, x, y, z, m)
    elif layer == Layer.SIDE_PART:
        over(fields.side_part, d, x, y, z, m)
    elif layer == Layer.MOHAWK:
        over(fields.mohawk, d, x, y, z, m)
    elif layer == Layer.AFRO:
        over(fields.afro, d, x, y, z, m)
    elif layer == Layer.SHORT:
        over(fields.short, d, x, y, z, m)
    elif layer == Layer.UNDER_HAT:
        over(fields.under_hat, d, x, y, z, m)
    elif layer == Layer.BUN:
        over(fields.bun, d, x, y, z, m)
    elif layer == Layer.TWO_BUNS:
        over(fields.two_buns, d, x, y, z, m)
    elif layer == Layer.PONYTAIL:
        over(fields.ponytail, d, x, y, z, m)
    elif layer == Layer.PIGTAILS:
        over(fields.pigtails, d, x, y, z, m)
    elif layer == Layer.SPIKES:
        over(fields.spikes, d, x, y, z, m)
    elif layer == Layer.BEANIE:
        over(fields.beanie, d, x, y, z, m)
    elif layer == Layer.BOBBLE:
        over(fields.bobble, d, x, y, z, m)
    elif layer == Layer.BRIM:
        over(fields.brim, d, x, y, z, m)
    elif layer == Layer.CAP:
        over(fields.cap, d, x, y, z, m)
    elif layer == Layer.HAT_BAND:
        over(fields.hat_band, d, x, y, z, m)
    elif layer == Layer.ROUND_GLASSES:
        over(fields.round_glasses, d, x, y, z, m)
    elif layer == Layer.SQUARE_GLASSES:
        over(fields.square_glasses, d, x, y, z, m)
    elif layer == Layer.CLOTHES:
        over(fields.clothes, d, x, y, z, m)
    elif layer == Layer.RING_COLLAR:
        over(fields.ring_collar, d, x, y, z, m)
    elif layer == Layer.TURTLENECK:
        over(fields.turtleneck, d, x, y, z, m)
    elif layer == Layer.SHIRT:
        over(fields.shirt, d, x, y, z, m)
    elif layer == Layer.SCARF:
        over(fields.scarf, d, x, y, z, m)
    elif layer == Layer.BEAR_EARS:
        over(fields.bear_ears, d, x, y, z, m)
    elif layer == Layer.CAT_EARS:
        over(fields.cat_ears, d, x, y, z, m)
    elif layer == Layer.RABBIT_EARS:
        over(fields.rabbit_ears, d, x, y, z, m)
    elif layer == Layer.NOTHING:
        over(fields.nothing, d, x, y, z, m)
    elif layer == Layer.BEARD:
        over(fields.beard, d, x, y, z, m)
    elif layer == Layer.MOUSTACHE:
        over(fields.moustache, d, x, y, z, m)
    elif layer == Layer.NOSE:
        over(fields.nose, d, x, y, z, m)
    elif layer == Layer.HUMAN_EAR:
        over(fields.human_ear, d, x, y, z, m)
    elif layer == Layer.ELF_EAR:
        over(fields.elf_ear, d, x, y, z, m)


@entry
def apply_layers(layers: NDArray[np.int64], d: Array, x: Array, y: Array, z: Array, m: Measures) -> None:
    """Distances `d` that the layers leave at points (n,)."""
    for layer in layers:
        if layer >= 0:
            apply(layer, d, x, y, z, m)
