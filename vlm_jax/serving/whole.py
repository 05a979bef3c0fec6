# SPDX-License-Identifier: Apache-2.0
"""Reads rows in one pass each, for models that decide over a whole prompt what an image becomes.

They prune inside the LLM, show text a summary alone (VoCo), or let text read the patches before the
LLM does (LLaVA-Mini). Nothing of a row can be read before the rest of it, nor be kept for another.

P patches  T tokens of text  U tokens of a question  V visual tokens  D llm width
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from vlm_jax.compressors.compressor import Compressor, Question, Visual
from vlm_jax.serving.index import Index
from vlm_jax.serving.programs import Programs, Read
from vlm_jax.serving.reading import Reader, fetched
from vlm_jax.serving.row import GREEDY, Image, Row
from vlm_jax.serving.tickets import Shown


class Whole(Reader):
    """Reads a row at once, its text padded to one of few sizes: one program for each, with an image
    and without.

    A row has at most one image. What is kept of an image are its tokens, or where text reads the
    patches, what the encoder gives of them.

    Args:
      sizes: of text in tokens, ascending; the last one holds every row's.
      length: tokens for which the caches of a row that was read have room, of the longest pool.
    """

    def __init__(
        self, programs: Programs, index: Index, compressor: Compressor, *, sizes: Sequence[int],
        length: int, **more: Any,
    ):  # fmt: skip
        super().__init__(programs, index, compressor, **more)
        self.sizes, self.length = tuple(sizes), length
        self.one_image = True
        self.fuses = compressor.fusion is not None
        self.warmed: Read | None = None

    def read(self, row: Row, length: int) -> Generator[None, None, Read]:
        for image in row.images:
            image.seen = image.seen or self.index.image(image.key)
            yield from self.see(row, image, length)
        row.lay(self.compressor.adaptive)
        self.read_tokens += len(row.ids)
        seen = [(image.seen, image.limit) for image in row.images]
        batch = self.batch(row.text, row.places, seen)
        return self.programs.whole(batch, row.sampling, self.length)

    def batch(
        self, text: Sequence[int], places: Sequence[int], images: Sequence[tuple[Any, int]]
    ) -> dict[str, Any]:
        """A row for `VLM.prefill`; images are `Seen`, and the most of their tokens to read."""
        # An image behind the last token needs a place in the row too.
        room = max([len(text), *(place + 1 for place in places)])
        size = next(size for size in self.sizes if size >= room)
        ids = np.zeros((1, size), np.int32)
        ids[0, : len(text)] = text
        batch: dict[str, Any] = dict(
            ids=ids,
            length=np.array([len(text)], np.int32),
            image_at=np.array([*places, size][:1], np.int32),
        )
        for seen, limit in images:
            batch["limit"] = np.array([limit], np.int32)
            tokens, count = seen.tokens[None], np.array([seen.count], np.int32)
            if self.fuses:
                batch["levels"] = tokens
            else:
                batch["visual"] = Visual(tokens, count) if self.compressor.adaptive else tokens
        return batch

    def tokens_of(
        self,
        image: Image,
        levels: Float[Array, "1 P Z"],
        question: Question | Float[Array, "1 D"] | None,
    ) -> Visual:
        """The tokens of an image, or where text reads its patches, what that starts from."""
        if self.fuses:
            return Visual(levels, np.array([self.compressor.tokens], np.int32))
        return super().tokens_of(image, levels, question)

    def warm(self, length: int, shown: Shown) -> Read:
        """Runs every program, which serve all pools; the first time alone."""
        if self.warmed is not None:
            return self.warmed
        questions = self.blank_questions()
        levels = self.programs.levels(*shown)
        if not self.fuses:
            self.warm_images(shown, questions)
        for size in self.sizes:
            text = [0] * size
            for slots in self.slots:
                image = Image("", b"", slots, slots, None, None, None)
                seen = fetched(self.tokens_of(image, levels, questions[0]))
                self.programs.whole(self.batch(text, (0,), [(seen, slots)]), GREEDY, self.length)
            self.warmed = self.programs.whole(self.batch(text, (), []), GREEDY, self.length)
        return self.warmed

    def keep(self, row: Row, answer: Sequence[int], block_at: Any) -> None:
        """Keeps nothing: what the layers hold of an image depends on all text of its row."""

    def reset(self) -> None:
        self.warmed = None
