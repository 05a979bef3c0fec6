# SPDX-License-Identifier: Apache-2.0
"""Where examples come from: one table of sources, opened by a configuration and a split."""

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from typing import Any

from vlm_jax.data.benchmark.synthetic import Synthetic
from vlm_jax.data.benchmark.synthetic import majority as majority_by_wording
from vlm_jax.data.example import BadExample, Example, Source
from vlm_jax.data.llava import Llava
from vlm_jax.data.nlvr import Nlvr
from vlm_jax.data.pictures import check_exif

log = logging.getLogger(__name__)

__all__ = ["SOURCES", "BadExample", "Example", "Origin", "Source", "majority", "open_source"]


@dataclass(frozen=True)
class Origin:
    """Where examples come from: fields of config.data, and the seed of what is made from one.

    ValueError for an unknown source, on_bad_example or image_exif, and for no image in a row.
    """

    source: str
    path: str
    images: str
    text_only: bool
    images_per_row: int
    on_bad_example: str
    image_exif: str
    train_images: int
    val_images: int
    test_images: int
    seed: int

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source!r}: choose one of {', '.join(SOURCES)}")
        if self.on_bad_example not in ("fail", "skip"):
            raise ValueError(f"data.on_bad_example={self.on_bad_example!r}: choose fail or skip")
        if self.images_per_row < 1:
            raise ValueError(f"data.images_per_row={self.images_per_row}: at least 1")
        check_exif("data.image_exif", self.image_exif)

    @classmethod
    def of(cls, config: Any) -> "Origin":
        """As a configuration says."""
        named = [field.name for field in fields(cls) if field.name != "seed"]
        return cls(**{name: config.data[name] for name in named}, seed=config.seed)


def _llava(origin: Origin, split: str) -> Llava:
    return Llava(
        origin.path,
        split,
        images=origin.images,
        text_only=origin.text_only,
        images_per_row=origin.images_per_row,
        skip=origin.on_bad_example == "skip",
        exif=origin.image_exif,
    )


def _synthetic(origin: Origin, split: str) -> Synthetic:
    images = {"train": origin.train_images, "val": origin.val_images, "test": origin.test_images}
    return Synthetic(split, images=images.get(split, 0), seed=origin.seed)


def _nlvr(origin: Origin, split: str) -> Nlvr:
    return Nlvr(origin.path, split)


SOURCES = {"llava": _llava, "synthetic": _synthetic, "nlvr": _nlvr}


def open_source(origin: Origin, split: str) -> Source:
    """The split ("train", "val" or "test") of a source.

    What is not as it was given is a warning: rows left out, ids of our own.

    Raises:
      ValueError: for an unknown split, or one without examples.
      FileNotFoundError, BadExample: for data that is missing or bad, saying which.
    """
    source = SOURCES[origin.source](origin, split)
    if not len(source):
        raise ValueError(
            f"the {split} split of data.source={source.name!r} has no examples"
            + (f": set data.{split}_images above 0" if source.name == "synthetic" else "")
        )
    for note in source.notes():
        log.warning(note)
    return source


def majority(train: Source, test: Source) -> dict[str, float]:
    """Per task the share of `test` that the most frequent training answer gets right.

    The embedded benchmark knows the form of each question and takes the best answer of each form.
    """
    if isinstance(train, Synthetic) and isinstance(test, Synthetic):
        return majority_by_wording(train, test)
    answers: dict[str, Counter] = defaultdict(Counter)
    for i in range(len(train)):
        answers[train[i].task][train[i].turns[-1][1]] += 1
    right, total = Counter(), Counter()
    for i in range(len(test)):
        task, answer = test[i].task, test[i].turns[-1][1]
        total[task] += 1
        right[task] += answers[task].most_common(1)[:1] == [(answer, answers[task][answer])]
    return {task: right[task] / total[task] for task in sorted(total)}
