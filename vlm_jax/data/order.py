# SPDX-License-Identifier: Apache-2.0
"""The endless shuffled order of a source's examples, a pure function of the seed."""

from typing import Any

import grain
import numpy as np

from vlm_jax.data.example import Source

# Repetitions of the data, more than any training needs: grain's endless repeat has a length that
# does not fit batches of 1.
EPOCHS = 1 << 32


class Drawn:
    """The example at a place of the endless order of a source with weights."""

    def __init__(self, source: Any, seed: int):
        self.source, self.seed = source, seed
        self._known: dict[int, np.ndarray] = {}

    def __call__(self, place: int) -> int:
        epoch, index = divmod(int(place), len(self.source))
        order = self._known.get(epoch)
        if order is None:
            order = self.source.order(self.seed, epoch)
            # Several threads may be here at once: each makes the same and replaces.
            before = {k: v for k, v in self._known.items() if k == epoch - 1}
            self._known = before | {epoch: order}
        return int(order[index])


def examples(source: Source, seed: int) -> grain.MapDataset:
    """Indices of examples: epoch after epoch, each in an order of its own."""
    seed %= 1 << 32
    if hasattr(source, "order"):
        return grain.MapDataset.range(EPOCHS * len(source)).map(Drawn(source, seed))
    return grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat(EPOCHS)
