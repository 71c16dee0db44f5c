"""Weights for measurements without a checkpoint: the same numbers in both backends, of sizes that keep activations finite."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOL = 1 << 22  # random numbers that are used again and again: drawing a thousand million takes minutes


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and arrays, one after the other: what a layer sums keeps its size, the scales of norms are about 1."""
    pool = random_pool()
    for name, shape in shapes.items():
        yield name, random_weight(shape, pool, name=name)


def random_pool() -> NDArray[np.float32]:
    """Numbers of deviation 0.58, POOL of them."""
    return np.random.default_rng(0).uniform(-1, 1, POOL).astype(np.float32)


def random_weight(shape: tuple[int, ...], pool: NDArray[np.float32], *, name: str) -> NDArray[Any]:
    """One of them, from the numbers of a pool."""
    values = np.resize(pool, shape)
    values *= np.float32(max(1, prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.1)
    if len(shape) == 1 and name.endswith("weight"):
        values += 1  # of a norm
    return values
