# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of an engine: images become tokens, and rows keys and values, chunk by chunk.

I pixels of the encoder's side  T tokens of a row  V visual tokens  D llm width
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax import progress
from vlm_jax.compressors.compressor import Compressor
from vlm_jax.models.cache import KV
from vlm_jax.serving.decoder import Sampling
from vlm_jax.serving.index import BLOCK, Index, Seen, block_keys, image_key
from vlm_jax.serving.programs import Chunk, Programs
from vlm_jax.serving.tickets import Gone

CHUNKS = (64, 128)  # tokens
MOST_BUCKETS = 16  # of a compressor, beyond which only some of its V are compiled
GREEDY = Sampling(*np.zeros((2, 1), np.float32), np.zeros(1, np.uint32))  # of one row


@dataclass
class Image:
    """An image of a row.

    Attributes:
      handle: its name. key: of its tokens. slots: those of the compressor's program.
      limit: most of its tokens that are read.
      question: the ids that it is compressed by, None if by none.
      pixels: float32 [I, I, 3]; None of one that is `seen` already.
      seen: its tokens, once they are there. encoded: whether this request made them.
      start, end: its tokens in the row, once their number is known.
    """

    handle: str
    key: bytes
    slots: int
    limit: int
    question: list[int] | None
    pixels: Float[np.ndarray, "I I 3"] | None
    seen: Seen | None
    encoded: bool = False
    start: int = 0
    end: int = 0

    @classmethod
    def of(
        cls,
        handle: str,
        pixels: Float[np.ndarray, "I I 3"] | None,
        question: list[int],
        *,
        compressor: Compressor,
        visual_tokens: int,
        index: Index,
    ) -> "Image":
        """An image at V = `visual_tokens`; if it has no pixels, with its tokens in the index.

        Raises:
          Gone: if they are not there.
        """
        slots = compressor.slots(visual_tokens) if compressor.buckets else compressor.tokens
        read = question if compressor.reads_question else None
        key = image_key(handle, slots, read)
        seen = index.image(key) if pixels is None else None
        if pixels is None and seen is None:
            raise Gone(
                f"the index has no image {handle} at {visual_tokens} visual tokens"
                f"{' for this question' if read else ''}: send the image"
            )
        limit = visual_tokens if compressor.buckets else slots
        return cls(handle, key, slots, limit, read, pixels, seen)


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


def slots_of(compressor: Compressor, visual_tokens: Sequence[int]) -> tuple[int, ...]:
    """The slots for which a compressor is compiled, ascending: its buckets and those of these V.

    Of a compressor with a bucket for every V they are those that a plan searches.
    """
    if not compressor.buckets:
        return (compressor.tokens,)
    usual = compressor.buckets
    if len(usual) > MOST_BUCKETS:
        usual = (*compressor.method.planned(compressor.side), compressor.tokens)
    return tuple(sorted({compressor.slots(V) for V in (*usual, *visual_tokens)}))


class Reader:
    """Reads one row at a time, in units of work between which others may be done.

    Args:
      index: where images and beginnings of rows are looked up and kept.
      compressor: makes the images' tokens, in one of these `slots`. width: D.
      chunks: tokens that are read at once, ascending: the smallest that holds the rest of a row, or
        the largest.
    """

    def __init__(
        self,
        programs: Programs,
        index: Index,
        compressor: Compressor,
        *,
        slots: Sequence[int],
        width: int,
        chunks: Sequence[int],
    ):
        self.programs, self.index, self.compressor = programs, index, compressor
        self.slots, self.width, self.chunks = slots, width, tuple(chunks)
        self.caches: dict[int, list[KV]] = {}  # of a row that is read, by the length of its pool
        self.read_tokens = 0

    def read(self, row: Row, length: int) -> Iterator[None]:
        """Reads a row into the caches of this length, from which it may be taken at the end.

        Yields between units of work: an image, a chunk. Returns the `Chunk` of the row's last
        token.
        """
        reader = self.compressor
        for image in row.images:
            image.seen = image.seen or self.index.image(image.key)
            if reader.adaptive:
                yield from self.see(row, image, length)
        row.lay(reader.adaptive)
        keys, most = row.keys(), len(row.ids) - 1  # the last token is always read
        prefix = reader.reads_prefix and any(image.seen is None for image in row.images)
        if prefix:
            # Its image is compressed by the hidden state of the token before it.
            most = row.images[0].start - 1
        blocks = self.index.beginning(keys[: most // BLOCK])
        at = row.cached = BLOCK * len(blocks)
        if not prefix:
            for image in row.images:
                if image.end > at:
                    yield from self.see(row, image, length)
        caches = self.opened(length)
        for number, block in enumerate(blocks):
            caches = self.caches[length] = self.programs.load(caches, block, BLOCK * number)
        end = row.images[0].start if prefix else len(row.ids)
        while at < len(row.ids):
            size = self.size(end - at)
            found = self.chunk(row, slice(at, min(at + size, end)), size, length)
            at = min(at + size, end)
            if at < len(row.ids):
                yield
            if prefix and at == end < len(row.ids):
                yield from self.made(row.images[0], found.hidden)
                end = len(row.ids)
        if self.index.limit:
            self.keep(keys, lambda start: self.programs.block(self.caches[length], 0, start, BLOCK))
        return found

    def opened(self, length: int) -> list[KV]:
        """The caches of a row of this length that is read."""
        if length not in self.caches:
            self.caches[length] = self.programs.blank(length + self.chunks[-1])
        return self.caches[length]

    def keep(self, keys: Sequence[bytes], block_at: Any) -> None:
        """Keeps the blocks that the index lacks, each read by `block_at` its first token.

        Where the device has no memory for them, the index becomes no larger than it is.
        """
        index = self.index
        try:
            blocks = {number: block_at(BLOCK * number) for number in index.missing(keys)}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            index.limit = index.used
            progress.say(
                f"the image index stays at {index.used:,} bytes: the device has no more memory"
            )
            return
        index.keep_blocks(keys, blocks)

    def size(self, rest: int) -> int:
        """The chunk in which so many tokens are read, or the first of them."""
        return next((size for size in self.chunks if size >= rest), self.chunks[-1])

    def chunk(self, row: Row, here: slice, size: int, length: int) -> Chunk:
        """Reads these tokens of a row in a chunk of this size."""
        ids, image = row.ids[here], row.image[here]
        visual = np.zeros((1, size, self.width), self.programs.dtype)
        for number in np.unique(image[image >= 0]):
            mine = np.flatnonzero(image == number)
            visual[0, mine] = row.images[number].seen.tokens[ids[mine]]
        self.read_tokens += len(ids)
        return self.run(
            np.where(image < 0, ids, 0), visual, image >= 0, here.start, length, row.sampling
        )

    def run(
        self,
        ids: Int[np.ndarray, "T"],
        visual: Float[np.ndarray, "1 X D"],
        seen: Any,
        start: int,
        length: int,
        sampling: Sampling,
    ) -> Chunk:
        """Runs the program of a chunk, its ids padded to the size of `visual`."""
        size = visual.shape[1]
        padded = [np.zeros((1, size), np.int32), np.zeros((1, size), bool)]
        for whole, part in zip(padded, (ids, seen), strict=True):
            whole[0, : len(ids)] = part
        found = self.programs.chunk(
            self.opened(length),
            padded[0],
            visual,
            padded[1],
            np.array([start], np.int32),
            np.array([len(ids) - 1], np.int32),
            sampling,
        )
        self.caches[length] = found.caches
        return found

    def see(self, row: Row, image: Image, length: int) -> Iterator[None]:
        """Makes the tokens of an image that are not there yet, with a pass over its question."""
        # An image may stand in a row twice.
        image.seen = image.seen or next(x.seen for x in row.images if x.key == image.key)
        if image.seen is not None:
            return
        feature = None
        if image.question is not None:
            ids, at = np.array(image.question, np.int32), 0
            while at < len(ids):
                size = self.size(len(ids) - at)
                visual = np.zeros((1, size, self.width), self.programs.dtype)
                found = self.run(ids[at : at + size], visual, False, at, length, GREEDY)
                feature, at = found.hidden, at + size
                yield
        yield from self.made(image, feature)

    def made(self, image: Image, feature: Float[Array, "1 D"] | None) -> Iterator[None]:
        """Makes the tokens of an image, by the feature of its question if there is one."""
        levels = self.programs.levels(image.pixels)
        visual = self.programs.visual(image.slots, levels, feature)
        yield  # before the tokens are waited for
        image.seen = Seen(np.asarray(visual.tokens)[0], int(np.asarray(visual.count)[0]))
        image.encoded = True
        self.index.keep_image(image.key, image.seen)

    def warm(self, length: int, pixels: Float[np.ndarray, "I I 3"]) -> Chunk:
        """Runs every program for rows of this length once, and those for images."""
        for size in self.chunks:
            visual = np.zeros((1, size, self.width), self.programs.dtype)
            found = self.run(np.zeros(1, np.int32), visual, False, 0, length, GREEDY)
        block = self.programs.block(self.caches[length], 0, 0, BLOCK)
        self.caches[length] = self.programs.load(self.caches[length], block, 0)
        levels = self.programs.levels(pixels)
        feature = found.hidden if self.compressor.reads_question else None
        for slots in self.slots:
            self.programs.visual(slots, levels, feature)
        return found
