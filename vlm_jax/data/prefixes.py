# SPDX-License-Identifier: Apache-2.0
"""Batches for models trained for any number of visual tokens, with the number for each row.

Shapes: B rows of all processes.
"""

from collections.abc import Sequence

import numpy as np

from vlm_jax.data.loader import Batch, Batches, local_rows, on_mesh
from vlm_jax.data.skips import Skips


class RandomPrefixes:
    """Batches with `limit` int32 [B], the number of visual tokens of each row.

    One of `choices` for each micro-batch, with equal probability: micro-batch a of `accumulate`
    holds rows a, a + accumulate, ... What batch k draws is a pure function of (k, seed).
    """

    def __init__(self, batches: Batches, choices: Sequence[int], *, seed: int, accumulate: int = 1):
        self.batches, self.choices = batches, np.array(choices, np.int32)
        self.seed, self.accumulate = seed % (1 << 32), accumulate
        self.source = batches.source

    @property
    def position(self) -> int:
        """As for the batches themselves."""
        return self.batches.position

    @position.setter
    def position(self, value: int) -> None:
        self.batches.position = value

    @property
    def examples(self) -> int | float:
        """As for the batches themselves."""
        return self.batches.examples

    @property
    def skips(self) -> Skips:
        """As for the batches themselves."""
        return self.batches.skips

    def fields(self) -> dict:
        """As for the batches themselves."""
        return self.batches.fields()

    def close(self) -> None:
        """As for the batches themselves."""
        self.batches.close()

    def limit(self, k: int) -> np.ndarray:
        """The `limit` of the rows of batch k, all processes together."""
        drawn = np.random.default_rng((self.seed, k)).choice(self.choices, self.accumulate)
        return np.resize(drawn, self.batches.batch)

    def __iter__(self) -> "RandomPrefixes":
        return self

    def __next__(self) -> Batch:
        size, mesh = self.batches.batch, self.batches.mesh
        rows = self.limit(self.position)[local_rows(mesh, size)]
        return next(self.batches) | on_mesh({"limit": rows}, mesh, size)
