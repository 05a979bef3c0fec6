# SPDX-License-Identifier: Apache-2.0
"""Batches for models trained for several numbers of visual tokens, with those of each row or step.

Shapes: B rows of all processes.  V visual tokens
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from vlm_jax.data.loader import Batch, Batches, local_rows, on_mesh
from vlm_jax.data.skips import Skips


class Drawn(ABC):
    """Batches with something beside their rows, which is drawn from `choices` for each of them.

    What batch k draws is a pure function of (k, seed): the same on all processes and after a
    restart.
    """

    def __init__(self, batches: Batches, choices: Sequence[int], *, seed: int):
        self.batches, self.choices = batches, np.array(choices, np.int32)
        self.seed, self.source = seed % (1 << 32), batches.source

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

    def __iter__(self) -> "Drawn":
        return self

    @abstractmethod
    def __next__(self) -> Batch:
        """The next batch with what was drawn for it."""


class RandomPrefixes(Drawn):
    """Batches with `limit` int32 [B], the number of visual tokens of each row.

    One of `choices` for each micro-batch, with equal probability: micro-batch a of `accumulate`
    holds rows a, a + accumulate, ...
    """

    def __init__(self, batches: Batches, choices: Sequence[int], *, seed: int, accumulate: int = 1):
        super().__init__(batches, choices, seed=seed)
        self.accumulate = accumulate

    def limit(self, k: int) -> np.ndarray:
        """The `limit` of the rows of batch k, all processes together."""
        drawn = np.random.default_rng((self.seed, k)).choice(self.choices, self.accumulate)
        return np.resize(drawn, self.batches.batch)

    def __next__(self) -> Batch:
        size, mesh = self.batches.batch, self.batches.mesh
        rows = self.limit(self.position)[local_rows(mesh, size)]
        return next(self.batches) | on_mesh({"limit": rows}, mesh, size)


class DrawnTokens(Drawn):
    """Batches of one V each, which the shape of `slots` bool [B, V] says.

    A step is compiled for each V. Of as many batches as there are `choices` each choice has one, in
    an order of their own. A batch without images has no `slots`.
    """

    def tokens(self, k: int) -> int:
        """The V of batch k."""
        turn, place = divmod(k, len(self.choices))
        order = np.random.default_rng((self.seed, turn)).permutation(self.choices)
        return int(order[place])

    def __next__(self) -> Batch:
        size, mesh = self.batches.batch, self.batches.mesh
        V = self.batches.usage.visual = self.tokens(self.position)
        batch = next(self.batches)
        if not {"pixels", "levels"} & batch.keys():
            return batch
        slots = np.zeros((len(local_rows(mesh, size)), V), bool)
        return batch | on_mesh({"slots": slots}, mesh, size)
