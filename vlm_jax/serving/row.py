# SPDX-License-Identifier: Apache-2.0
"""A request as an engine reads it: its text and images in one row of tokens.

T tokens of a row  V visual tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from vlm_jax.compressors.compressor import Compressor
from vlm_jax.serving.decoder import Sampling
from vlm_jax.serving.index import Index, Seen, block_keys, image_key
from vlm_jax.serving.tickets import Gone, Shown

GREEDY = Sampling(*np.zeros((2, 1), np.float32), np.zeros(1, np.uint32))  # of one row


@dataclass
class Image:
    """An image of a row.

    Attributes:
      handle: its name. key: of its tokens. slots: those of the compressor's program.
      limit: most of its tokens that are read.
      question: the ids that it is compressed by, None if by none.
      shown: its pixels; None of one that is `seen` already.
      seen: its tokens, once they are there. encoded: whether this request made them.
      start, end: its tokens in the row, once their number is known.
    """

    handle: str
    key: bytes
    slots: int
    limit: int
    question: list[int] | None
    shown: Shown | None
    seen: Seen | None
    encoded: bool = False
    start: int = 0
    end: int = 0

    @classmethod
    def of(
        cls,
        handle: str,
        shown: Shown | None,
        question: list[int],
        *,
        compressor: Compressor,
        visual_tokens: int,
        index: Index,
    ) -> "Image":
        """An image at V = `visual_tokens`; if it is not shown, with its tokens in the index.

        Raises:
          Gone: if they are not there.
        """
        slots = compressor.slots(visual_tokens) if compressor.buckets else compressor.tokens
        read = question if compressor.reads_question else None
        key = image_key(handle, slots, read)
        seen = index.image(key) if shown is None else None
        if shown is None and seen is None:
            raise Gone(
                f"the index has no image {handle} at {visual_tokens} visual tokens"
                f"{' for this question' if read else ''}: send the image"
            )
        limit = visual_tokens if compressor.buckets else slots
        return cls(handle, key, slots, limit, read, shown, seen)


@dataclass
class Row:
    """The text of a request as ids, its images before the ids at `places`, and how it is drawn.

    `ids` and `image` become those of `block_keys` when the number of all tokens is known; `cached`
    counts those whose keys and values were known.
    """

    text: list[int]
    places: Sequence[int]
    images: list[Image]
    sampling: Sampling
    ids: Int[np.ndarray, "T"] = field(default_factory=lambda: np.zeros(0, np.int32))
    image: Int[np.ndarray, "T"] = field(default_factory=lambda: np.zeros(0, np.int32))
    cached: int = 0

    @property
    def most(self) -> int:
        """The most tokens that it can have."""
        return len(self.text) + sum(image.limit for image in self.images)

    def lay(self, adaptive: bool) -> None:
        """Puts text and images in their order; images are `seen` if their number is `adaptive`."""
        ids, image, last = [], [], 0
        for number, (place, one) in enumerate(zip(self.places, self.images, strict=True)):
            ids.append(np.array(self.text[last:place], np.int32))
            image.append(np.full(place - last, -1, np.int32))
            count = min(one.seen.count, one.limit) if adaptive else one.limit
            one.start = sum(map(len, ids))
            one.end, last = one.start + count, place
            ids.append(np.arange(count, dtype=np.int32))
            image.append(np.full(count, number, np.int32))
        ids.append(np.array(self.text[last:], np.int32))
        image.append(np.full(len(self.text) - last, -1, np.int32))
        self.ids, self.image = np.concatenate(ids), np.concatenate(image)

    def keys(self, answer: Sequence[int] = ()) -> list[bytes]:
        """The keys of its whole blocks, with these ids behind it."""
        more = np.array(answer, np.int32)
        ids, image = np.concatenate([self.ids, more]), np.concatenate([self.image, more * 0 - 1])
        return list(block_keys(ids, image, [one.key for one in self.images]))
