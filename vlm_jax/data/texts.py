# SPDX-License-Identifier: Apache-2.0
"""The texts of a source as arrays: all at once if they are small, else row by row.

M images of a row (data.images_per_row)
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax import progress
from vlm_jax.data.example import BadExample, Example, Source
from vlm_jax.data.packing import Lengths
from vlm_jax.data.processor import Processor

TABLE_BYTES = 1 << 28  # a source whose ids fit into this is tokenized once, at the start


class BadText(BadExample):
    """An example whose text cannot be used."""


class Texts:
    """The tokenized texts of all examples of a source.

    Args:
      answer: whether rows hold the last answer; without it they end where it would start.
      skip: record an example whose text cannot be used in `bad`, instead of failing.
    Attributes:
      table: by name, the arrays of all examples, each as `Processor.text` describes it; None if
        they are larger than TABLE_BYTES.
      bad: examples whose text cannot be used; their rows in the table are those of another example.
    Raises:
      ValueError, BadExample: for a text that cannot be used, unless `skip`; with `skip` if no text
        can be used.
    """

    def __init__(self, source: Source, processor: Processor, *, answer: bool, skip: bool):
        self.source, self.processor = source, processor
        self.answer, self.skip = answer, skip
        self.most = processor.images_per_row
        self.table: dict[str, np.ndarray] | None = None
        self.bad: dict[int, BadText] = {}
        self._lengths: Lengths | None = None
        row_bytes = processor.text_length * 5 + processor.question_length * 4 * self.most
        if len(source) * row_bytes <= TABLE_BYTES:
            examples = [source[i] for i in range(len(source))]
            self.table = stack(self._all(examples))
            self._images = np.array([self._padded(e.images) for e in examples], np.int64)

    def of(self, index: int) -> dict[str, Any]:
        """The text of one example, tokenized now.

        Raises:
          BadText: if it cannot be used, with `skip`.
        """
        return self._tokenized(self.source[index])

    def any(self) -> dict[str, Any]:
        """The text of the first example whose text can be used."""
        for i in range(len(self.source)):
            try:
                return self.of(i)
            except BadText as error:
                last = error
        raise none_usable(self.source, last)

    def images(self, index: int) -> np.ndarray:
        """The images of an example, int64 [M]; -1: none."""
        if self.table is not None:
            return self._images[index]
        return np.array(self._padded(self.source[index].images), np.int64)

    def lengths(self) -> Lengths:
        """What every example needs of a row. Without a table this tokenizes all texts.

        Raises:
          BadExample: for a text that cannot be used, unless `skip`; with `skip` if none can.
        """
        if self._lengths is None:
            self._lengths = self._measure()
        return self._lengths

    def shortened(self, buckets: Sequence[int]) -> "Texts":
        """The same texts in rows of the first of these lengths (ascending) that holds them all."""
        lengths, whole = self.lengths(), self.processor.text_length
        longest = lengths.slots[lengths.usable].max()
        length = next((bucket for bucket in buckets if bucket >= longest), whole)
        if length >= whole or self.processor.query == "prefix":
            return self
        processor = copy.copy(self.processor)
        processor.text_length = length
        return Texts(self.source, processor, answer=self.answer, skip=self.skip)

    def _measure(self) -> Lengths:
        table, count = self.table, len(self.source)
        if table is None:
            needed = []
            with progress.doing("measuring the texts", count) as task:
                for i in range(count):
                    try:
                        needed.append(self._needed(self.of(i)))
                    except BadText as error:
                        self.bad[i] = error
                        needed.append((0, 0, 0))
                    task.note(i + 1)
        else:
            rows = ({name: column[i] for name, column in table.items()} for i in range(count))
            needed = [self._needed(row) for row in rows]
        usable = np.array([i not in self.bad for i in range(count)], bool)
        if not usable.any():
            raise none_usable(self.source, self.bad[count - 1])
        return Lengths(*np.array(needed, np.int32).reshape(-1, 3).T, usable)

    def _needed(self, text: dict[str, Any]) -> tuple[int, int, int]:
        """Tokens and images of an example, and the positions that it takes in its own row."""
        places = np.atleast_1d(text["image_at"])
        places, length = places[places < self.processor.text_length], int(text["length"])
        if self.processor.query == "prefix":
            after = length - int(text["question_length"])
            return length, len(places), self.processor.question_length + after
        # An image at the end of a row needs a position after it: `image_at` = the row's length
        # means that there is no image.
        return length, len(places), max(length, int(places.max(initial=-1)) + 1)

    def _all(self, examples: list[Example]) -> list[dict[str, Any]]:
        texts: list[dict[str, Any] | None] = []
        for i, example in enumerate(examples):
            try:
                texts.append(self._tokenized(example))
            except BadText as error:
                self.bad[i] = error
                texts.append(None)
        spare = next((text for text in texts if text is not None), None)
        if spare is None:
            raise none_usable(self.source, self.bad[len(examples) - 1])
        return [spare if text is None else text for text in texts]

    def _tokenized(self, example: Example) -> dict[str, Any]:
        try:
            return self.processor.text(example, answer=self.answer)
        except ValueError as error:
            if not self.skip:
                raise
            raise BadText(f"{self.source.name}, id {example.id!r}: {error}") from error

    def _padded(self, images: tuple[int, ...]) -> list[int]:
        return [*images, *[-1] * (self.most - len(images))]


def stack(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of all rows, stacked by name."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def none_usable(source: Source, last: BadExample) -> BadExample:
    """The exception for a source of which no example can be used."""
    return BadExample(f"not one of {len(source)} examples can be used; the last: {last}")
