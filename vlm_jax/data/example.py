# SPDX-License-Identifier: Apache-2.0
"""What a source of data is: examples of questions and answers about images, read by index."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm_jax.data.skips import Skips

IMAGE_MARK = "<image>"  # where the LLaVA format puts the image into a question
EXIF = ("apply", "ignore")  # what becomes of the EXIF orientation of an image


class BadExample(ValueError):
    """One row that cannot be used; the message names the file, the row and the way out."""


@dataclass(frozen=True)
class Example:
    """Questions and answers about an image, about several in their order, or about none.

    Attributes:
      id: unique within a source and split.
      image: index into the source's images, a tuple of them, or None for a row of text alone.
      turns: (question, answer) pairs. Each IMAGE_MARK in the questions stands for the next image;
        without any, all images belong to the first question.
      family: the group whose tasks are averaged for the scaling law.
      task: the task inside the family, scored on its own.
      cluster: what examples that err together share, for standard errors; the image
        unless given, a row's own id where there is none.
      given: the id in the data set, where `id` is one of our own because that came before.
    """

    id: str
    image: int | tuple[int, ...] | None
    turns: tuple[tuple[str, str], ...]
    family: str
    task: str
    cluster: str = field(default="", repr=False)  # hashes of older data sets stay as they are
    given: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not self.cluster:
            shared = self.id if self.image is None else str(self.image)
            object.__setattr__(self, "cluster", shared)

    @property
    def images(self) -> tuple[int, ...]:
        """The images in their order, however many there are."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    def questions(self) -> tuple[tuple[int, str], ...]:
        """Each turn's question: how many images stand where a template puts them, and its text.

        A mark alone in its question goes there, wherever it was written, as LLaVA moves it. Of
        several in one question each stays in the text where it is, as in LLaVA-NeXT.
        """
        texts = [question for question, _ in self.turns]
        marks = [text.count(IMAGE_MARK) * bool(self.images) for text in texts]
        if not any(marks):
            marks = [0] * len(texts)
            return ((len(self.images), texts[0]), *zip(marks[1:], texts[1:], strict=True))
        return tuple(
            (1, text.replace(IMAGE_MARK, "").strip()) if count == 1 else (0, text)
            for count, text in zip(marks, texts, strict=True)
        )


@runtime_checkable
class Source(Protocol):
    """A split of a data set.

    `images[i]` is uint8 [H, W, 3], RGB, and may raise BadExample when the file cannot be read.
    `data_hash` is a sha256 over what defines the data, `protocol` how its predictions are scored
    (evals/tasks.py). `left_out` counts the rows that are no examples because they are bad.
    `describe()` gives counts for the log, `notes()` sentences about what is not as it was given.
    Sources that know what an image shows also have `patch_labels(i, side)`, int32 [side * side] in
    raster order, and `patch_classes`, one more than the largest label.
    """

    name: str
    split: str
    images: Any
    data_hash: str
    protocol: str
    left_out: Skips

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def describe(self) -> dict[str, Any]: ...

    def notes(self) -> list[str]: ...


class Images(Sequence):
    """Images made or read one at a time, when asked for; `names` are their paths if any."""

    def __init__(self, read, count: int, names: Sequence[str] | None = None):
        self._read, self._count, self._names = read, count, names

    def name(self, index: int) -> str:
        """What to call an image."""
        return f"image {index}" if self._names is None else self._names[index]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        return self._read(int(index))
