# SPDX-License-Identifier: Apache-2.0
"""The digest of an array is one number however it is cut, and changes with every word."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from vlm_jax.training import digest

KINDS = ["float32", "float64", "uint8", ml_dtypes.bfloat16, "bool"]
SHAPES = [(), (5,), (4, 6), (3, 4, 5), (2, 3, 4, 5), (0, 3)]


def array(shape, kind, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * 50).astype(kind)


def by_formula(x):
    """The sum of the docstring, word by word."""
    words = np.frombuffer(x.tobytes(), f"u{min(x.dtype.itemsize, 4)}")
    return sum(int(w) * (2 * i + 1) for i, w in enumerate(words)) * digest.MIX % 2**64


def whole(x):
    return digest.of_piece(x, [0] * x.ndim, x.shape)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_add_up_to_the_sum_over_all_words(shape, kind):
    x, draw = array(shape, kind), np.random.default_rng(1)
    assert whole(x) == by_formula(x)
    for _ in range(4):
        cuts = [sorted({0, n, *map(int, draw.integers(0, n + 1, 2))}) for n in shape]
        boxes = itertools.product(*[list(itertools.pairwise(cut)) for cut in cuts])
        parts = []
        for box in boxes:
            piece = np.asarray(x[tuple(slice(*side) for side in box)])
            parts.append(digest.of_piece(piece, [start for start, _ in box], shape))
        assert digest.total(parts) == by_formula(x)


def test_blocks_add_up(monkeypatch):
    x = array((7, 33), "float32")
    for block in (1, 4, 10, 64):
        monkeypatch.setattr(digest, "BLOCK", block)
        assert whole(x) == by_formula(x)


def test_every_bit_and_every_exchange_changes_it():
    x = array((4, 5), "float32")
    for bit in range(x.nbytes * 8):
        y = bytearray(x.tobytes())
        y[bit // 8] ^= 1 << bit % 8
        assert whole(np.frombuffer(y, "float32").reshape(x.shape)) != whole(x)
    for i, j in itertools.combinations(range(x.size), 2):
        y = x.copy()
        y.flat[i], y.flat[j] = x.flat[j], x.flat[i]
        assert whole(y) != whole(x)
