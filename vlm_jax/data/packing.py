# SPDX-License-Identifier: Apache-2.0
"""Plans of which examples share a row or a batch, so that little of it is padding.

A plan depends only on the lengths of all examples and on the seed. Every example is planned once in
each epoch, or as often as its source's weights say; the content of a batch follows from its number,
on any number of processes.

n examples  B rows of a batch
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# Rows that are open at once: each example goes into the fullest one that has room for it.
OPEN_ROWS = 64


@dataclass(frozen=True)
class Arrangement:
    """How examples are arranged in rows and batches: fields of config.data.

    Attributes:
      row_length: tokens of a packed row, text and visual together; 0: one example per row.
      row_images: most images of a packed row.
      buckets: text lengths, ascending, to which rows of one example are rounded up;
        data.text_length is the last one. (): all rows have data.text_length.
    Raises:
      ValueError: for both, or for buckets that are not ascending.
    """

    row_length: int = 0
    row_images: int = 1
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.row_length and self.buckets:
            raise ValueError(
                f"data.row_length={self.row_length} packs rows, data.buckets={self.buckets} sorts "
                "rows of one example: choose one of them"
            )
        if any(b <= a for a, b in zip(self.buckets, self.buckets[1:], strict=False)):
            raise ValueError(f"data.buckets={self.buckets}: give lengths in ascending order")

    @classmethod
    def of(cls, config: Any) -> "Arrangement":
        """The arrangement of a configuration."""
        data = config.data
        return cls(data.row_length, data.row_images, tuple(data.buckets))

    @property
    def plain(self) -> bool:
        """Whether each example has its own row of data.text_length, in any batch."""
        return not self.row_length and not self.buckets

    def check(self, *, text: int, question: int, images: int, visual: int, query: str) -> None:
        """Raises ValueError if some example might not fit.

        Args:
          text, question, images, query: data.text_length, data.question_length,
            data.images_per_row and compressor.query.
          visual: V, most visual tokens of an image.
        """
        if self.buckets and not question * (query == "prefix") < self.buckets[0]:
            raise ValueError(
                f"data.buckets={self.buckets}: with compressor.query='prefix' each bucket needs "
                f"more than the data.question_length={question} tokens before the image"
            )
        if self.buckets and self.buckets[-1] >= text:
            raise ValueError(
                f"data.buckets={self.buckets}: give lengths below data.text_length={text}, which "
                "is always the last bucket"
            )
        if not self.row_length:
            return
        if query == "prefix":
            raise ValueError(
                f"data.row_length={self.row_length}: compressor.query='prefix' reads the text "
                "before the image in a separate pass, which cannot be packed: use data.buckets, or "
                "compressor.query='separate' or 'none'"
            )
        most = text + images * visual
        if self.row_length < most:
            raise ValueError(
                f"data.row_length={self.row_length} has no room for the longest example: "
                f"data.text_length={text} and {images} x {visual} visual tokens are {most}; raise "
                f"it, or set data.text_length={self.row_length - images * visual}"
            )
        if self.row_images < images:
            raise ValueError(
                f"data.row_images={self.row_images} is less than data.images_per_row={images}: a "
                "packed row needs room for the images of at least one example"
            )


@dataclass(frozen=True)
class Lengths:
    """What every example needs of a row.

    Attributes:
      text: its tokens, int32 [n]. images: its images, int32 [n].
      slots: positions that it needs in its own row, int32 [n]: more than its tokens if its text is
        split in two (compressor.query "prefix").
      usable: whether its text can be used, bool [n]. Unusable examples are not planned.
    """

    text: np.ndarray
    images: np.ndarray
    slots: np.ndarray
    usable: np.ndarray


class Group(NamedTuple):
    """A planned batch.

    Attributes:
      rows: the examples of each row. text: T. images: image slots of a row, 0 for none.
      packed: whether a row may hold several examples.
    """

    rows: Sequence[np.ndarray]
    text: int
    images: int
    packed: bool


class Epoch(NamedTuple):
    """The first unit of an epoch, the number of units, and the examples left for the next epoch."""

    first: int
    count: int
    waiting: np.ndarray


# The examples of an epoch in order, int64, by seed and epoch.
Order = Callable[[int, int], np.ndarray]


class Plan(ABC):
    """Batches of every epoch, by number. Raises ValueError if there is no example.

    `order` is that of a source with weights; without one, every example is once in an epoch.
    """

    def __init__(self, lengths: Lengths, *, batch: int, seed: int, order: Order | None = None):
        self.lengths, self.size, self.seed = lengths, batch, seed % (1 << 32)
        self.usable = np.flatnonzero(lengths.usable)
        if not len(self.usable):
            raise ValueError("there is no example to plan")
        self._order = order
        self.per_epoch = len(self.order(0))
        self._epochs: dict[int, Epoch] = {}
        self._units: dict[int, list] = {}

    def order(self, epoch: int) -> np.ndarray:
        """The usable examples of an epoch, in order."""
        if self._order is None:
            return np.random.default_rng((self.seed, epoch)).permutation(self.usable)
        drawn = self._order(self.seed, epoch)
        return drawn[self.lengths.usable[drawn]]

    @abstractmethod
    def build(self, order: np.ndarray, waiting: np.ndarray) -> tuple[list, np.ndarray]:
        """The units of an epoch in this order, and the examples left for the next one."""

    @abstractmethod
    def batch(self, k: int) -> Group:
        """Batch `k`."""

    @abstractmethod
    def summary(self, name: str) -> str:
        """What stage `name` says of it before it begins."""

    @property
    def examples(self) -> int | float:
        """Examples of a batch, on average."""
        return self.size

    def units(self, epoch: int) -> list:
        """The units of an epoch: rows, or batches."""
        if (known := self._units.get(epoch)) is not None:
            return known
        waiting, first = np.zeros(0, np.int64), 0
        if epoch:
            before = self.epoch(epoch - 1)
            waiting, first = before.waiting, before.first + before.count
        units, waiting = self.build(self.order(epoch), waiting)
        self._epochs[epoch] = Epoch(first, len(units), waiting)
        # Several threads may be here at once: each builds the same and replaces, never mutates.
        kept = {
            number: units_of_epoch
            for number, units_of_epoch in self._units.items()
            if number == epoch - 1
        }
        self._units = kept | {epoch: units}
        return units

    def epoch(self, number: int) -> Epoch:
        """The units of an epoch, by number and count."""
        for earlier in range(number + 1):
            if earlier not in self._epochs:
                self.units(earlier)
        return self._epochs[number]

    def unit(self, number: int) -> Any:
        """Unit `number`, counted over all epochs."""
        index = 0
        while number >= (epoch := self.epoch(index)).first + epoch.count:
            index += 1
        return self.units(index)[number - epoch.first]


class Packing(Plan):
    """Several examples in a row: an epoch is rows, of which `batch` make a batch.

    Args:
      tokens: of a row, text and visual together. images: image slots of a row. visual: V.
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        batch: int,
        seed: int,
        tokens: int,
        images: int,
        visual: int,
        order: Order | None = None,
    ):
        super().__init__(lengths, batch=batch, seed=seed, order=order)
        self.tokens, self.images, self.visual = tokens, images, visual

    def build(self, order: np.ndarray, waiting: np.ndarray) -> tuple[list, np.ndarray]:
        """Rows, each closed when the next example fits into none of the open ones."""
        need = self.lengths.text + self.lengths.images * self.visual
        return packed(order, need, self.lengths.images, self.tokens, self.images), waiting

    def batch(self, k: int) -> Group:
        """Batch `k`; it may span two epochs."""
        rows = [self.unit(k * self.size + row) for row in range(self.size)]
        return Group(rows, self.tokens, self.images, True)

    @property
    def rows(self) -> int:
        """Rows of the first epoch; the others have about as many."""
        return self.epoch(0).count

    @property
    def examples(self) -> int | float:
        """Examples of a batch, on average."""
        return self.size * self.per_epoch / self.rows

    def summary(self, name: str) -> str:
        """What stage `name` says of it before it begins."""
        return (
            f"{name}: {self.per_epoch:,} examples in {self.rows:,} packed rows of {self.tokens} "
            f"tokens: {name}.batch={self.size} rows hold {self.examples:.1f} examples, and "
            f"{name}.steps={math.ceil(self.rows / self.size)} is one epoch"
        )


class Buckets(Plan):
    """Rows of one example, each batch of one length and with images or without.

    Leftovers of an epoch that do not fill a batch go into the next larger bucket, and at the end
    text-only examples into a batch with images; fewer than a batch wait for the next epoch.

    Args:
      buckets: lengths, ascending; the last one holds every example. images: image slots of a row.
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        batch: int,
        seed: int,
        buckets: Sequence[int],
        images: int,
        order: Order | None = None,
    ):
        super().__init__(lengths, batch=batch, seed=seed, order=order)
        self.buckets, self.images = tuple(buckets), images
        self.bucket = np.searchsorted(self.buckets, lengths.slots)
        self.shown = lengths.images > 0

    def build(self, order: np.ndarray, waiting: np.ndarray) -> tuple[list, np.ndarray]:
        """Batches in the order in which they became full."""
        size, order = self.size, np.concatenate([waiting, order])
        full, left = [], {}
        for bucket in range(len(self.buckets)):
            for shown in (False, True):
                place = np.flatnonzero(
                    (self.bucket[order] == bucket) & (self.shown[order] == shown)
                )
                whole = len(place) // size * size
                for start in range(0, whole, size):
                    of_batch = place[start : start + size]
                    full.append((of_batch[-1], self._group(order[of_batch], bucket, shown)))
                left[bucket, shown] = order[place[whole:]]
        units = [group for _, group in sorted(full, key=lambda pair: pair[0])]
        rest = {shown: np.zeros(0, np.int64) for shown in (False, True)}
        for bucket in range(len(self.buckets)):
            for shown in (False, True):
                rest[shown] = np.concatenate([rest[shown], left[bucket, shown]])
                if len(rest[shown]) >= size:
                    units.append(self._group(rest[shown][:size], bucket, shown))
                    rest[shown] = rest[shown][size:]
        last = np.concatenate([rest[True], rest[False]])
        if len(last) >= size:
            bucket = int(self.bucket[last[:size]].max())
            units.append(self._group(last[:size], bucket, True))
            last = last[size:]
        return units, last

    @property
    def text(self) -> float:
        """Places of text of a row, on average over the first epoch."""
        return float(np.mean([group.text for group in self.units(0)] or [self.buckets[-1]]))

    def _group(self, examples: np.ndarray, bucket: int, shown: bool) -> Group:
        images = self.images if shown else 0
        return Group(examples[:, None], self.buckets[bucket], images, False)

    def batch(self, k: int) -> Group:
        """Batch `k`."""
        return self.unit(k)

    def summary(self, name: str) -> str:
        """What stage `name` says of it before it begins."""
        units = self.units(0)
        kinds = len({(group.text, group.images) for group in units})
        return (
            f"{name}: {self.per_epoch:,} examples in batches of {kinds} shapes (data.buckets), "
            f"each compiled once; {name}.steps={max(len(units), 1)} is one epoch"
        )


def packed(
    order: np.ndarray, need: np.ndarray, images: np.ndarray, tokens: int, most: int
) -> list[np.ndarray]:
    """The examples of `order` in rows of at most `tokens` tokens and `most` images.

    Each example goes into the fullest of OPEN_ROWS rows that has room for it; if none has, the
    fullest of all is closed.
    """
    rows: list[list[int]] = []
    left, slots = np.zeros(0, np.int64), np.zeros(0, np.int64)  # of the open rows
    done = []
    for example in order:
        tokens_of, images_of = need[example], images[example]
        fits = (left >= tokens_of) & (slots >= images_of)
        if fits.any():
            best = int(np.where(fits, left, tokens + 1).argmin())
        elif len(rows) < OPEN_ROWS:
            best = len(rows)
            rows.append([])
            left, slots = np.append(left, tokens), np.append(slots, most)
        else:
            best = int(left.argmin())
            done.append(np.array(rows[best], np.int64))
            rows[best], left[best], slots[best] = [], tokens, most
        rows[best].append(int(example))
        left[best] -= tokens_of
        slots[best] -= images_of
    return done + [np.array(row, np.int64) for row in rows]
