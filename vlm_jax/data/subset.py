# SPDX-License-Identifier: Apache-2.0
"""Some of the examples of a source: an even sample, or a part that is held out of training."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.example import Example, Source
from vlm_jax.data.skips import Skips


class Subset:
    """The examples of `source` at these indices, in this order; its images keep their numbers.

    `what` says in words which they are. What the whole source left out is not counted again.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray, what: str):
        self.source, self.indices, self.what = source, np.asarray(indices, np.int64), what
        self.name, self.split = source.name, source.split
        self.images, self.protocol = source.images, source.protocol
        self.left_out = Skips()
        described = f"{source.data_hash} {self.indices.tolist()}"
        self.data_hash = hashlib.sha256(described.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]

    def describe(self) -> dict[str, Any]:
        """As the source, with its own number of examples."""
        own = {"examples": len(self), "subset": self.what, "data_hash": self.data_hash}
        return self.source.describe() | own

    def notes(self) -> list[str]:
        """Nothing: the source has said it."""
        return []


def sample(source: Source, most: int) -> Source:
    """At most `most` examples, evenly spaced over the source; itself if it has no more."""
    if len(source) <= most:
        return source
    places = np.arange(most) * len(source) // most
    return Subset(source, places, f"{most} of {len(source)}, evenly spaced")


def hold_out(source: Source, count: int) -> tuple[Subset, Subset]:
    """A source without some examples, and these: at least `count`, with all others of their images.

    Which ones depends on the source alone, not on a seed. No image is in both, so examples that
    share images, also through other examples, stay together.

    Raises:
      ValueError: if less than half of the examples would be left.
    """
    if hasattr(source, "order"):
        raise ValueError(
            f"validation.hold_out={count}: a mixture has no examples held out, because its weights "
            "would change; give its parts files with {split} in their name, and set "
            "validation.hold_out=0"
        )
    of_image: dict[int, list[int]] = defaultdict(list)
    for index in range(len(source)):
        for image in source[index].images:
            of_image[image].append(index)
    held: set[int] = set()
    for start in np.random.default_rng(0).permutation(len(source)):
        if len(held) >= count:
            break
        waiting = [int(start)]
        while waiting:
            index = waiting.pop()
            if index not in held:
                held.add(index)
                waiting += [other for image in source[index].images for other in of_image[image]]
    kept = [index for index in range(len(source)) if index not in held]
    if len(kept) < max(len(held), 1):
        raise ValueError(
            f"validation.hold_out={count}: with all examples that share their images, "
            f"{len(held)} of {len(source)} examples would be held out: set it lower, or validate "
            "on a split of its own (validation.split, {split} in data.path)"
        )
    return (
        Subset(source, kept, f"{len(held)} are held out"),
        Subset(source, sorted(held), "held out"),
    )
