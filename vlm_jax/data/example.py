# SPDX-License-Identifier: Apache-2.0
"""What a source of data is: examples of questions and answers about images, read by index."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm_jax.data.skips import Skips

IMAGE_MARK = "<image>"  # where the LLaVA format puts the image into a question
EXIF = ("apply", "ignore")  # choices for the EXIF orientation of an image


class BadExample(ValueError):
    """One row that cannot be used; the message names the file, the row and the way out."""


@dataclass(frozen=True)
class Example:
    """Questions and answers about one image, several images or frames in order, or none.

    Attributes:
      id: unique within a source and split.
      image: index into the source's images, a tuple of them, or None for a row of text alone.
      turns: (question, answer) pairs. Each IMAGE_MARK in the questions stands for the next image,
        or the next clip; without any, all images belong to the first question.
      family: the group whose tasks are averaged for the scaling law.
      task: the task inside the family, scored on its own.
      cluster: shared by examples with correlated errors, for standard errors; by default the image,
        or the example's id without an image.
      given: the id in the data set, if `id` is another one because the id was repeated.
      frames: how many of the images each mark stands for: those of a clip; 1 for images.
    """

    id: str
    image: int | tuple[int, ...] | None
    turns: tuple[tuple[str, str], ...]
    family: str
    task: str
    cluster: str = field(default="", repr=False)  # hashes of older data sets stay as they are
    given: str = field(default="", repr=False)
    frames: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        if not self.cluster:
            shared = self.id if self.image is None else str(self.image)
            object.__setattr__(self, "cluster", shared)

    @property
    def images(self) -> tuple[int, ...]:
        """The indices of the images in order; () without an image."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    def questions(self) -> tuple[tuple[int, str], ...]:
        """Each turn's question: the number of images at the template's place, and its text.

        A clip is one image here, whatever its frames.

        A single mark in a question moves to the template's place, as in LLaVA. If a question has
        several, each stays in the text, as in LLaVA-NeXT.
        """
        texts = [question for question, _ in self.turns]
        marks = [text.count(IMAGE_MARK) * bool(self.images) for text in texts]
        if not any(marks):
            marks = [len(self.images) // self.frames, *[0] * (len(texts) - 1)]
            return tuple(zip(marks, texts, strict=True))
        return tuple(
            (1, text.replace(IMAGE_MARK, "").strip()) if count == 1 else (0, text)
            for count, text in zip(marks, texts, strict=True)
        )


@runtime_checkable
class Source(Protocol):
    """A split of a data set.

    `images[i]` is uint8 [H, W, 3], RGB, and may raise BadExample when the file cannot be read.
    `data_hash` is a sha256 over what defines the data, `protocol` how its predictions are scored
    (evals/embedded.py). `left_out` counts the bad rows. `describe()` gives counts for the log,
    `notes()` sentences about changes to the given data. Sources with labels of image content also
    have `patch_labels(i, side)`, int32 [side * side] in
    raster order, and `patch_classes`, one more than the largest label. If things have names, they
    have `patch_names(i, side)` alike, 0 or the number from 1 of one of `names`, the words of each.
    Sources with weights have
    `order(seed, epoch)`, int64 [n], the examples of an epoch; the others are permuted.
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
    """Images that are drawn or read on access, one at a time; `names` are their paths if any.

    `picture(i)` is image i for whoever prepares it: a picture of PIL where `read` has a method
    `picture` that gives one, which saves a copy to an array and back; else as `images[i]`.
    """

    def __init__(self, read, count: int, names: Sequence[str] | None = None):
        self.read, self._count, self._names = read, count, names

    def picture(self, index: int) -> Any:
        """Image `index` as a picture of PIL or as uint8 [H, W, 3]."""
        read = getattr(self.read, "picture", None)
        return self[index] if read is None else read(int(index))

    def name(self, index: int) -> str:
        """The name of an image for messages."""
        return f"image {index}" if self._names is None else self._names[index]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        return self.read(int(index))
