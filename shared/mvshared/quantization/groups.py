"""Matrices of few bits per number, in MLX's affine format: `w = scale * q + bias`, one scale and bias per group of columns.

The whole numbers q of a row lie one after the other, lowest bits first, in little-endian uint32: what mlx.core.quantize makes
and its kernels read. Scale and bias follow its rule too (mlx/backend/cpu/quantized.cpp): the end of the group's range that is
farther from zero becomes the bias, and the scale is rounded so that zero is one of the numbers. They are stored in float16, and
here q is chosen for the stored ones: for the exact ones, a group of small numbers would lose up to a bit.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.errors import CheckpointError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32)
_SMALLEST_SCALE = np.float32(1e-7)
_FEW_DIGITS = np.float32(2.0**-14)  # float16 has its eleven bits from here on
_CHUNK_NUMBERS = 1 << 20


class Packed(NamedTuple):
    """A quantised matrix (o, k): uint32 (o, k * bits / 32), and float16 scales and biases (o, k / group_size)."""

    weight: NDArray[np.uint32]
    scales: NDArray[np.float16]
    biases: NDArray[np.float16]


def quantize_matrix(matrix: NDArray[np.float32], *, bits: int, group_size: int) -> Packed:
    """Quantise a matrix (o, k) row by row, where k is a multiple of `group_size`.

    Raises CheckpointError for numbers that are not finite, or whose range float16 does not have.
    """
    rows, columns = matrix.shape
    packed = Packed(
        np.empty((rows, columns * bits // 32), np.uint32),
        np.empty((rows, columns // group_size), np.float16),
        np.empty((rows, columns // group_size), np.float16),
    )
    step = max(1, _CHUNK_NUMBERS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = matrix[part].reshape(-1, columns // group_size, group_size)
        scales, biases = _scales_biases(groups, bits=bits)
        packed.scales[part], packed.biases[part] = scales, biases
        q = (groups - biases.astype(np.float32)[..., None]) / scales.astype(np.float32)[..., None]
        q = np.clip(np.rint(q, out=q), 0, (1 << bits) - 1, out=q).astype(np.uint8)
        packed.weight[part] = _pack(q.reshape(-1, columns), bits)
    return packed


def dequantize_matrix(packed: Packed, *, bits: int, group_size: int) -> NDArray[np.float32]:
    """The matrix (o, k) that quantised numbers stand for."""
    q = _unpack(packed.weight, bits)
    groups = q.reshape(len(q), -1, group_size).astype(np.float32)
    groups *= packed.scales.astype(np.float32)[..., None]
    groups += packed.biases.astype(np.float32)[..., None]
    return groups.reshape(q.shape)


def _scales_biases(groups: NDArray[np.float32], *, bits: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Of groups (o, k / group_size, group_size)."""
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = np.maximum((high - low) / np.float32((1 << bits) - 1), _SMALLEST_SCALE)
    below = np.abs(low) > np.abs(high)
    scales, edges = np.where(below, scales, -scales), np.where(below, low, high)
    with np.errstate(over="ignore", invalid="ignore"):
        zeros = np.rint(edges / scales)
        exact = edges / np.where(zeros == 0, np.float32(1), zeros)
        exact = np.where(zeros == 0, scales, exact)
        rounded = exact.astype(np.float16)
        biases = np.where(zeros == 0, np.float32(0), edges).astype(np.float16)
        # Where float16 has few digits, a scale that is rounded down would leave the other end out of reach.
        lost = (np.abs(exact) < _FEW_DIGITS) & (np.abs(rounded.astype(np.float32)) < np.abs(exact))
        rounded = np.where(lost, np.nextafter(rounded, np.copysign(np.float16(np.inf), exact.astype(np.float16))), rounded)
    if not (np.isfinite(rounded).all() and np.isfinite(biases).all()):
        raise CheckpointError("numbers that are not finite, or beyond the range of float16, which cannot be quantised")
    return rounded, biases


def pack_sizes(bits: int) -> tuple[int, int]:
    """How many numbers are packed together, and in how many bytes: the fewest that come out even."""
    numbers = next(count for count in (1, 2, 4, 8) if count * bits % 8 == 0)
    return numbers, numbers * bits // 8


def _pack(q: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    numbers, size = pack_sizes(bits)
    kind = np.uint8 if size == 1 else np.uint64
    parts = q.reshape(len(q), -1, numbers)
    word = parts[..., 0].astype(kind)
    for index in range(1, numbers):
        word |= parts[..., index].astype(kind) << kind(index * bits)
    return _bytes_of(word, size).reshape(len(q), -1).view("<u4").astype(np.uint32, copy=False)


def _unpack(weight: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    numbers, size = pack_sizes(bits)
    data = np.ascontiguousarray(weight).astype("<u4", copy=False).view(np.uint8).reshape(len(weight), -1, size)
    word: NDArray[Any] = data[..., 0] if size == 1 else data[..., 0].astype(np.uint64)
    for index in range(1, size):
        word = word | data[..., index].astype(np.uint64) << np.uint64(8 * index)
    mask = word.dtype.type((1 << bits) - 1)
    q = np.stack([(word >> word.dtype.type(index * bits)) & mask for index in range(numbers)], axis=-1)
    return q.astype(np.uint8).reshape(len(weight), -1)


def _bytes_of(word: NDArray[Any], size: int) -> NDArray[np.uint8]:
    """The lowest `size` bytes of each number, lowest first, on a new last axis."""
    if size == 1:
        return word[..., None]
    return np.ascontiguousarray(np.ascontiguousarray(word.astype("<u8")).view(np.uint8).reshape(*word.shape, 8)[..., :size])
