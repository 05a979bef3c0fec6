# SPDX-License-Identifier: Apache-2.0
"""Several sources as one, mixed by weight.

n examples of all parts  q examples of a part in an epoch
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from vlm_jax.data.example import Example, Images, Source
from vlm_jax.data.skips import Skips


@dataclass(frozen=True)
class Part:
    """A source of a mixture, its name, and its weight relative to those of the others."""

    name: str
    weight: float
    source: Source


class Mixture:
    """Examples of several sources, each drawn with its share of the weights.

    An epoch has as many examples as all parts together, and of each part its share, rounded. A part
    is shuffled and used from its first to its last example before one is used again, across
    epochs: a small part with a large weight repeats within an epoch, a large one with a small
    weight takes several epochs. Ids are PART/ID; scores are by part.

    Raises:
      ValueError: if a part would not be drawn once in an epoch, or is scored by another protocol
        than answers that are compared with the true ones.
    """

    name = "mixture"
    protocol = "embedded"

    def __init__(self, parts: Sequence[Part], split: str):
        self.parts, self.split = tuple(parts), split
        for part in self.parts:
            if part.source.protocol != self.protocol:
                raise ValueError(
                    f"data.mixture: part {part.name!r} is scored by the protocol "
                    f"{part.source.protocol!r}, and a mixture by {self.protocol!r}: train and "
                    "evaluate it as a source of its own"
                )
        sizes = [len(part.source) for part in self.parts]
        self._starts = [0, *accumulate(sizes)]
        self.quotas = shares([part.weight for part in self.parts], sum(sizes))
        for part, quota in zip(self.parts, self.quotas, strict=True):
            if not quota:
                raise ValueError(
                    f"data.mixture: of {sum(sizes)} examples of an epoch none would be of "
                    f"{part.name!r} (weight {part.weight:g} of "
                    f"{sum(p.weight for p in self.parts):g}): raise its weight, or leave it out"
                )
        self.images = MixedImages([part.source.images for part in self.parts])
        self.left_out = Skips()
        first = 0
        for part in self.parts:
            self.left_out.include(part.source.left_out, first)
            first += len(part.source) + len(part.source.left_out)
        described = [(p.name, p.weight, p.source.data_hash) for p in self.parts]
        self.data_hash = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        part = self.parts[number]
        own = part.source[index - self._starts[number]]
        moved = tuple(self.images.starts[number] + image for image in own.images)
        return replace(
            own,
            id=f"{part.name}/{own.id}",
            image=moved if len(moved) > 1 else moved[0] if moved else None,
            task=part.name,
            cluster=f"{part.name}/{own.cluster}",
            given=own.given or own.id,
        )

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The examples of an epoch, int64 [n]: a pure function of the seed and the epoch."""
        drawn = []
        for number, (part, quota) in enumerate(zip(self.parts, self.quotas, strict=True)):
            count, first = len(part.source), epoch * quota
            places = np.arange(first, first + quota)
            indices = np.empty(quota, np.int64)
            for turn in range(first // count, (first + quota - 1) // count + 1):
                permutation = np.random.default_rng((seed, number, turn)).permutation(count)
                mine = places // count == turn
                indices[mine] = permutation[places[mine] % count]
            drawn.append(indices + self._starts[number])
        return np.random.default_rng((seed, epoch)).permutation(np.concatenate(drawn))

    def describe(self) -> dict[str, Any]:
        """Counts of the whole, and the description of each part with its weight and share."""
        total = sum(part.weight for part in self.parts)
        return {
            "source": self.name,
            "split": self.split,
            "examples": len(self),
            "images": len(self.images),
            "left_out": dict(sorted(self.left_out.kinds.items())),
            "parts": {
                part.name: {
                    "weight": part.weight,
                    "share": part.weight / total,
                    "examples_per_epoch": quota,
                    **part.source.describe(),
                }
                for part, quota in zip(self.parts, self.quotas, strict=True)
            },
            "data_hash": self.data_hash,
        }

    def notes(self) -> list[str]:
        """The sentences of the parts, and one on how often each part is seen in an epoch."""
        sentences = [note for part in self.parts for note in part.source.notes()]
        seen = ", ".join(
            f"{part.name} {quota:,} of its {len(part.source):,}"
            for part, quota in zip(self.parts, self.quotas, strict=True)
        )
        return [*sentences, f"an epoch of the mixture has {len(self):,} examples: {seen}"]


class MixedImages(Sequence):
    """The images of several sources, one after another; `starts` are the first ones of each."""

    def __init__(self, parts: Sequence[Any]):
        self._parts = parts
        self.starts = [0, *accumulate(len(part) for part in parts)]

    def _at(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self.starts, index) - 1
        return self._parts[number], index - self.starts[number]

    def name(self, index: int) -> str:
        """The name of an image for messages."""
        images, own = self._at(index)
        return images.name(own)

    def picture(self, index: int) -> Any:
        """Image `index` for whoever prepares it, as `Images.picture`."""
        images, own = self._at(index)
        return images.picture(own) if isinstance(images, Images) else images[own]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        images, own = self._at(index)
        return images[own]


def shares(weights: Sequence[int | float], total: int) -> list[int]:
    """`total` divided by weights into whole numbers, those with the largest rests rounded up."""
    exact = [weight / sum(weights) * total for weight in weights]
    whole = [math.floor(x) for x in exact]
    rests = sorted(range(len(exact)), key=lambda k: (whole[k] - exact[k], k))
    for k in rests[: total - sum(whole)]:
        whole[k] += 1
    return whole
