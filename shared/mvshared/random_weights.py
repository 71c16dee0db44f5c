"""Weights for measurements without a checkpoint: the same numbers in both backends, of sizes that keep activations finite."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

POOL = 1 << 22  # random numbers that are used again and again: drawing a thousand million takes minutes


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and arrays, one after the other: what a layer sums keeps its size, so that all of a network counts in its result,
    and the scales of norms are about 1."""
    pool = random_pool()
    for name, shape in shapes.items():
        yield name, random_weight(shape, pool, name=name)


def random_pool() -> NDArray[np.float32]:
    """Numbers of deviation 1, POOL of them."""
    return np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, POOL).astype(np.float32)


def random_weight(shape: tuple[int, ...], pool: NDArray[np.float32], *, name: str) -> NDArray[Any]:
    """One of them, from the numbers of a pool."""
    start = crc32(name.encode()) % (POOL // 2)  # layers of one shape differ, or every token would attend to itself
    values = np.resize(pool[start:], shape)
    values *= np.float32(max(1, prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.06)
    if len(shape) == 1 and name.endswith("weight"):
        values += 1  # of a norm
    return values
