# SPDX-License-Identifier: Apache-2.0
"""Digests of the pieces of an array, which add up to the array's digest however it is divided.

The digest of an array is the sum over its words of w x (2 i + 1) x MIX modulo 2^64: w is a word's
bits, i its index in the whole array. A change of one word and a swap of two always change it; any
other change does so except for one in 2^64. A sum does not depend on order: one mesh writes the
pieces, another reads other pieces, and both get the same number. A crc32 does not allow that.
"""

import math
from collections.abc import Sequence

import numpy as np

MASK = 2**64 - 1
MIX = 0x9E3779B97F4A7C15  # odd, so that nothing is lost; bits of the golden ratio
BLOCK = 1 << 18  # words that are summed at once: they fit into a cache


def of_piece(piece: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """The part of an array's digest that one of its pieces contributes, from 0 to 2^64 - 1.

    Args:
      piece: the box of an array of this `shape` that begins at `start`; a scalar is one piece.
    """
    x, start, shape = words(np.asarray(piece), list(start), list(shape))
    if not x.size:
        return 0
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    # After dimension `cut` the box is whole, so it consists of contiguous runs of the array.
    cut = max((d for d in range(len(shape)) if x.shape[d] != shape[d]), default=0)
    length = math.prod(x.shape[cut:])
    base = np.full((1,) * cut, start[cut] * strides[cut], np.uint64)
    for d in range(cut):
        places = (start[d] + np.arange(x.shape[d], dtype=np.uint64)) * np.uint64(strides[d])
        base = base + places.reshape(-1, *(1,) * (cut - d - 1))
    runs, base = x.reshape(-1, length), base.reshape(-1)
    ramp = np.arange(min(length, BLOCK), dtype=np.uint64)
    rows, total = max(BLOCK // length, 1), 0
    for at in range(0, length, BLOCK):
        width = min(BLOCK, length - at)
        for row in range(0, len(runs), rows):
            part = runs[row : row + rows, at : at + width].astype(np.uint64)
            places = base[row : row + rows] + np.uint64(at)
            plain, risen = part.sum(axis=1), part @ ramp[:width]
            total += int(((places * np.uint64(2) + np.uint64(1)) * plain).sum()) + 2 * int(
                risen.sum()
            )
    return total * MIX & MASK


def words(
    x: np.ndarray, start: list[int], shape: list[int]
) -> tuple[np.ndarray, list[int], list[int]]:
    """A piece as unsigned words of up to 32 bits, with its start and the array's shape in words."""
    if not shape:
        x, start, shape = x.reshape(1), [0], [1]
    size = x.dtype.itemsize
    if size > 4:
        start = [*start[:-1], start[-1] * (size // 4)]
        shape = [*shape[:-1], shape[-1] * (size // 4)]
    return np.ascontiguousarray(x).view(f"u{min(size, 4)}"), start, shape


def total(digests: Sequence[int]) -> int:
    """The digest of an array from those of all its pieces."""
    return sum(digests) & MASK
