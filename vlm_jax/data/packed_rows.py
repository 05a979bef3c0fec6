# SPDX-License-Identifier: Apache-2.0
"""Arrays of a planned batch: several examples in a row, or rows as long as their bucket, and the
share of them that is used.

B rows of this process  M images of a row  T text tokens  Tq question tokens  S pixels  P patches
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import hosts
from vlm_jax.data.example import BadExample
from vlm_jax.data.packing import Group, Plan
from vlm_jax.data.texts import BadText, Texts


class Pictures(NamedTuple):
    """The images of an example; nothing with features."""

    squares: np.ndarray  # uint8 [M, S, S, 3]; black where it has fewer
    sizes: np.ndarray  # int32 [M, 2], as `Processor.shown_size` gives them


Parts = tuple[dict[str, Any], Pictures]  # the text of an example, and its images


@dataclass
class Usage:
    """How many of the computed tokens and images belong to an example.

    Tokens are those of the LLM's rows, text and visual: an image counts all its V (for an adaptive
    method, the most that it may have).
    """

    visual: int
    tokens: int = 0
    tokens_computed: int = 0
    images: int = 0
    images_computed: int = 0

    def add(self, batch: dict[str, Any]) -> None:
        """Counts the rows of a batch of numpy arrays."""
        count, length = batch["ids"].shape
        present = int((batch["image_at"] < length).sum())
        shown = next((batch[name] for name in ("pixels", "levels") if name in batch), None)
        slots = 0 if shown is None else batch["image_at"].size
        self.tokens += int(batch["length"].sum()) + present * self.visual
        added = 0 if "segment" in batch else slots * self.visual
        self.tokens_computed += count * length + added
        self.images, self.images_computed = self.images + present, self.images_computed + slots

    def everywhere(self) -> "Usage":
        """The sums over all processes; every process must call it."""
        counts = (self.tokens, self.tokens_computed, self.images, self.images_computed)
        return Usage(self.visual, *map(sum, zip(*hosts.collected(list(counts)), strict=True)))

    def fields(self) -> dict[str, float]:
        """Fields for a log: the shares that are used; {} before the first batch."""
        shares = {}
        if self.tokens_computed:
            shares["tokens_used"] = self.tokens / self.tokens_computed
        if self.images_computed:
            shares["images_used"] = self.images / self.images_computed
        return shares

    def __str__(self) -> str:
        if not self.tokens_computed:
            return "no steps were left"
        parts = [f"{self.tokens:,} of {self.tokens_computed:,} tokens"]
        if self.images_computed:
            parts.append(f"{self.images:,} of {self.images_computed:,} images")
        shares = " and ".join(f"{share:.1%}" for share in self.fields().values())
        return f"{' and '.join(parts)} computed belong to examples ({shares})"


class PackedRows:
    """Makes the rows of a planned batch that one process holds.

    A packed batch has, besides what `Batches` describes, `segment` int32 [B, T]: the number, from
    1, of the example in its row that each token belongs to, 0 for padding; and `image_segment`
    int32 [B, M]. T is then the length of the spliced row, with room for visual tokens. A batch of
    text alone has neither pixels nor levels.

    An example that cannot be used leaves its place in the batch empty, without supervised tokens.

    Args:
      parts: gives the text and images of an example; may raise BadExample.
      mine: the rows of a batch that this process holds.
      features: cached encoder outputs [images, P, C].
    """

    def __init__(
        self,
        texts: Texts,
        plan: Plan,
        parts: Callable[[int], Parts],
        mine: np.ndarray,
        features: np.ndarray | None,
    ):
        self.texts, self.plan, self.parts = texts, plan, parts
        self.mine, self.features = mine, features

    def __call__(self, k: int) -> dict[str, Any]:
        """The rows of batch `k`, with `faults` and `cut` (truncated examples), which `Batches`
        removes."""
        group = self.plan.batch(int(k))
        batch = self._empty(group)
        faults: dict[int, tuple[str, str]] = {}
        cut: list[int] = []
        for row, number in enumerate(self.mine):
            self._fill(batch, row, group, group.rows[number], faults, cut)
        if group.images == 1:
            images = (
                "image_at",
                "question",
                "question_length",
                "image_segment",
                "pixels",
                "image_size",
                "levels",
            )
            batch |= {name: batch[name][:, 0] for name in images if name in batch}
        if group.images == 0:
            batch["image_at"] = np.full(len(self.mine), group.text, np.int32)
            for name in ("question", "question_length", "pixels", "image_size", "levels"):
                batch.pop(name, None)
        return batch | {"faults": faults, "cut": np.array(cut, np.int64)}

    def _empty(self, group: Group) -> dict[str, np.ndarray]:
        """Arrays without an example."""
        processor, count = self.texts.processor, len(self.mine)
        text, images = (count, group.text), (count, group.images)
        batch = {
            "ids": np.full(text, processor.pad_id, np.int32),
            "loss_mask": np.zeros(text, bool),
            "length": np.zeros(count, np.int32),
            "image_at": np.full(images, group.text, np.int32),
            "question": np.full((*images, processor.question_length), processor.pad_id, np.int32),
            "question_length": np.ones(images, np.int32),
        }
        if group.packed:
            batch |= {
                "segment": np.zeros(text, np.int32),
                "image_segment": np.zeros(images, np.int32),
            }
        if self.features is None:
            size = processor.images.size
            batch["pixels"] = np.zeros((*images, size, size, 3), np.float32)
            if processor.reads == "image_size":
                batch["image_size"] = np.ones((*images, 2), np.int32)
        else:
            shape = (*images, *self.features.shape[1:])
            batch["levels"] = np.zeros(shape, self.features.dtype)
        return batch

    def _fill(
        self,
        batch: dict[str, np.ndarray],
        row: int,
        group: Group,
        examples: np.ndarray,
        faults: dict[int, tuple[str, str]],
        cut: list[int],
    ) -> None:
        """Places the examples of a row one after another."""
        processor, at, shown = self.texts.processor, 0, 0
        for number, example in enumerate(map(int, examples), start=1):
            try:
                text, pictures = self.parts(example)
            except BadExample as error:
                if not self.texts.skip:
                    raise
                faults[example] = ("text" if isinstance(error, BadText) else "image", str(error))
                continue
            places = np.atleast_1d(text["image_at"])
            count, length = int((places < processor.text_length).sum()), int(text["length"])
            here, slots = slice(at, at + length), slice(shown, shown + count)
            batch["ids"][row, here] = text["ids"][:length]
            batch["loss_mask"][row, here] = text["loss_mask"][:length]
            batch["image_at"][row, slots] = at + places[:count]
            # A row with one example has a question even without an image: it may be its first text.
            read_slots = slice(shown, shown + (count if group.packed else group.images))
            read = np.atleast_2d(text["question"])[: read_slots.stop - shown]
            batch["question"][row, read_slots] = read
            batch["question_length"][row, read_slots] = np.atleast_1d(text["question_length"])[
                : len(read)
            ]
            if group.packed:
                batch["segment"][row, here] = number
                batch["image_segment"][row, slots] = number
            if count and self.features is None:
                shown_now = processor.images.normalized(pictures.squares[:count])
                batch["pixels"][row, slots] = shown_now
                if "image_size" in batch:
                    batch["image_size"][row, slots] = pictures.sizes[:count]
            elif count:
                batch["levels"][row, slots] = self.features[self.texts.images(example)[:count]]
            if text["cut"]:
                cut.append(example)
            at, shown = at + length, shown + count
        batch["length"][row] = at
