# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of an engine: images become tokens, and rows keys and values, chunk by chunk.

A model that decides over a whole prompt what becomes of its image is read by `whole.py`.

I pixels of the encoder's side  T tokens of a row  U tokens of a question  V visual tokens
D llm width
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax import progress
from vlm_jax.compressors.compressor import Compressor, Question, Visual
from vlm_jax.models.cache import KV
from vlm_jax.models.vlm import parameters
from vlm_jax.serving.decoder import Sampling
from vlm_jax.serving.index import BLOCK, Index, Seen
from vlm_jax.serving.programs import Chunk, Programs, Read
from vlm_jax.serving.row import GREEDY, Image, Row
from vlm_jax.serving.tickets import Shown

CHUNKS = (16, 64, 128)  # tokens
# What a pass over a chunk costs beside its tokens: the weights are read, as long as 32 tokens take,
# and the host starts a program, as long as .1 GFLOP.
PASS_TOKENS, START_FLOPS = 32, 1e8
WORDS = 64  # ids of a question for which there is a program, besides a much longer one
MOST_BUCKETS = 16  # of a compressor, beyond which only some of its V are compiled


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


def fetched(visual: Visual) -> Seen:
    """The tokens of the one image of a row, on the host."""
    return Seen(np.asarray(visual.tokens)[0], int(np.asarray(visual.count)[0]))


class Reader(ABC):
    """Reads one row at a time, in units of work between which others may be done.

    Args:
      index: where images are looked up and kept.
      compressor: makes the images' tokens, in one of these `slots`. width: D.
      questions: the most ids of an image's question.
    """

    block: ClassVar[int] = 0  # tokens of the blocks in which it keeps beginnings of rows; 0: none
    asks_in_rows = False  # whether the question of an image is read in the caches of its row
    one_image = False  # whether a row has at most one

    def __init__(
        self,
        programs: Programs,
        index: Index,
        compressor: Compressor,
        *,
        slots: Sequence[int],
        width: int,
        questions: int,
    ):
        self.programs, self.index, self.compressor = programs, index, compressor
        self.slots, self.width = slots, width
        self.questions = (WORDS, questions) if questions > 2 * WORDS else (questions,)
        self.read_tokens = 0

    @abstractmethod
    def read(self, row: Row, length: int) -> Generator[None, None, Chunk | Read]:
        """Reads a row for a pool of this length.

        Yields between units of work. Returns what the row's last token gave, in caches that may be
        taken until another row is read.
        """

    @abstractmethod
    def warm(self, length: int, shown: Shown) -> Chunk | Read:
        """Runs every program for rows of this length once, and those for images. Returns a row
        without an image."""

    @abstractmethod
    def keep(self, row: Row, answer: Sequence[int], block_at: Any) -> None:
        """Keeps what was computed of a row and these ids behind it; `block_at` reads a block of
        keys and values by its first token."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets the caches of a reading that failed: they may have been donated to nothing."""

    def see(self, row: Row, image: Image, length: int) -> Iterator[None]:
        """Makes the tokens of an image that are not there yet."""
        # An image may stand in a row twice.
        image.seen = image.seen or next(x.seen for x in row.images if x.key == image.key)
        if image.seen is None:
            question = None
            if image.question is not None:
                question = yield from self.asked(image.question, length)
            yield from self.made(image, question)

    def asked(
        self, ids: Sequence[int], length: int
    ) -> Generator[None, None, Question | Float[Array, "1 D"]]:
        """What an image is compressed by: the ids of its question, in few sizes."""
        del length
        yield from ()
        return self.padded(ids)

    def padded(self, ids: Sequence[int]) -> Question:
        """A question in the smallest size that holds it."""
        room = next(size for size in self.questions if size >= len(ids))
        tokens = np.zeros((1, room), np.int32)
        tokens[0, : len(ids)] = ids
        return Question(tokens, np.array([len(ids)], np.int32))

    def blank_questions(self) -> list[Question | None]:
        """A question of every size; None alone if no question is read."""
        if not self.compressor.reads_question:
            return [None]
        return [self.padded([0] * size) for size in self.questions]

    def made(self, image: Image, question: Question | Float[Array, "1 D"] | None) -> Iterator[None]:
        """Makes the tokens of an image."""
        visual = self.tokens_of(image, self.programs.levels(*image.shown), question)
        yield  # before the tokens are waited for
        image.seen = fetched(visual)
        image.encoded = True
        self.index.keep_image(image.key, image.seen)

    def tokens_of(
        self,
        image: Image,
        levels: Float[Array, "1 P Z"],
        question: Question | Float[Array, "1 D"] | None,
    ) -> Visual:
        """What is kept of an image: its tokens."""
        return self.programs.visual(image.slots, levels, question)

    def warm_images(self, shown: Shown, questions: Sequence[Any]) -> None:
        """Runs the programs of images once, for each of these questions."""
        levels = self.programs.levels(*shown)
        for slots in self.slots:
            for question in questions:
                self.programs.visual(slots, levels, question)


def first_chunks(sizes: Sequence[int], cost: int | float) -> list[int]:
    """The size of the first chunk in which 0, 1 ... tokens are read soonest, to the largest size.

    Args:
      sizes: ascending. cost: of a chunk beside its tokens, in tokens.
    """
    costs, first = [0.0], [sizes[0]]
    for tokens in range(1, sizes[-1] + 1):
        whole, size = min((size + cost + costs[max(tokens - size, 0)], -size) for size in sizes)
        costs.append(whole)
        first.append(-size)
    return first


class InParts(Reader):
    """Reads a row chunk by chunk, behind a beginning that is known.

    Args:
      chunks: tokens that are read at once, ascending: the largest, then those in which the rest of
        a row is read soonest.
    """

    block = BLOCK

    def __init__(
        self, programs: Programs, index: Index, compressor: Compressor, *, chunks: Sequence[int],
        **more: Any,
    ):  # fmt: skip
        super().__init__(programs, index, compressor, **more)
        self.chunks = tuple(chunks)
        of_token = 2 * parameters(programs.llm)
        self.first = first_chunks(self.chunks, PASS_TOKENS + START_FLOPS / of_token)
        self.asks_in_rows = compressor.method.query == "separate"
        self.one_image = compressor.reads_prefix
        self.caches: dict[int, list[KV]] = {}  # of a row that is read, by the length of its pool

    def read(self, row: Row, length: int) -> Generator[None, None, Chunk]:
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
        self.keep(row, (), lambda start: self.programs.block(found.caches, 0, start, BLOCK))
        return found

    def asked(
        self, ids: Sequence[int], length: int
    ) -> Generator[None, None, Question | Float[Array, "1 D"]]:
        """The ids of a question, or for a compressor that reads what the LLM makes of them, the
        last hidden state of a pass over them."""
        if not self.asks_in_rows:
            return (yield from super().asked(ids, length))
        asked, at = np.array(ids, np.int32), 0
        while at < len(asked):
            size = self.size(len(asked) - at)
            visual = np.zeros((1, size, self.width), self.programs.dtype)
            found = self.run(asked[at : at + size], visual, False, at, length, GREEDY)
            at += size
            yield
        return found.hidden

    def opened(self, length: int) -> list[KV]:
        """The caches of a row of this length that is read."""
        if length not in self.caches:
            self.caches[length] = self.programs.blank(length + self.chunks[-1])
        return self.caches[length]

    def keep(self, row: Row, answer: Sequence[int], block_at: Any) -> None:
        """Keeps the blocks that the index lacks.

        Where the device has no memory for them, the index becomes no larger than it is.
        """
        index = self.index
        if not index.limit:
            return
        keys = row.keys(answer)
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

    def reset(self) -> None:
        self.caches.clear()

    def size(self, rest: int) -> int:
        """The first chunk of so many tokens."""
        return self.first[min(rest, self.chunks[-1])]

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

    def warm(self, length: int, shown: Shown) -> Chunk:
        for size in self.chunks:
            visual = np.zeros((1, size, self.width), self.programs.dtype)
            found = self.run(np.zeros(1, np.int32), visual, False, 0, length, GREEDY)
        block = self.programs.block(self.caches[length], 0, 0, BLOCK)
        self.caches[length] = self.programs.load(self.caches[length], block, 0)
        found = found._replace(caches=self.caches[length])
        of_pass = self.asks_in_rows or self.compressor.reads_prefix
        self.warm_images(shown, [found.hidden] if of_pass else self.blank_questions())
        return found
