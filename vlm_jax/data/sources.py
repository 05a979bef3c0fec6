# SPDX-License-Identifier: Apache-2.0
"""Where examples come from: one table of sources, opened by a configuration and a split."""

import logging
from collections import Counter, defaultdict
from typing import Any

from vlm_jax.data.benchmark.synthetic import Synthetic
from vlm_jax.data.benchmark.synthetic import majority as majority_by_wording
from vlm_jax.data.example import BadExample, Example, Source
from vlm_jax.data.llava import Llava
from vlm_jax.data.nlvr import Nlvr
from vlm_jax.data.pictures import check_exif

log = logging.getLogger(__name__)

__all__ = ["SOURCES", "BadExample", "Example", "Source", "majority", "open_source"]


def _llava(config: Any, split: str) -> Llava:
    data = config.data
    return Llava(
        data.path,
        split,
        images=data.images,
        text_only=data.text_only,
        images_per_row=data.images_per_row,
        skip=data.on_bad_example == "skip",
        exif=data.image_exif,
    )


def _synthetic(config: Any, split: str) -> Synthetic:
    data = config.data
    images = {"train": data.train_images, "val": data.val_images, "test": data.test_images}
    return Synthetic(split, images=images.get(split, 0), seed=config.seed)


def _nlvr(config: Any, split: str) -> Nlvr:
    return Nlvr(config.data.path, split)


SOURCES = {"llava": _llava, "synthetic": _synthetic, "nlvr": _nlvr}


def check(config: Any) -> None:
    """ValueError for an unknown source, on_bad_example or image_exif, or no image in a row."""
    if config.data.source not in SOURCES:
        raise ValueError(f"data.source={config.data.source!r}: choose one of {', '.join(SOURCES)}")
    if config.data.on_bad_example not in ("fail", "skip"):
        raise ValueError(f"data.on_bad_example={config.data.on_bad_example!r}: choose fail or skip")
    if config.data.images_per_row < 1:
        raise ValueError(f"data.images_per_row={config.data.images_per_row}: at least 1")
    check_exif("data.image_exif", config.data.image_exif)


def open_source(config: Any, split: str) -> Source:
    """The split ("train", "val" or "test") of the source that config.data names.

    What is not as it was given is a warning: rows left out, ids of our own.

    Raises:
      ValueError: for an unknown source, split, data.on_bad_example or data.image_exif, no image
        in a row, or a split without examples.
      FileNotFoundError, BadExample: for data that is missing or bad, saying which.
    """
    check(config)
    source = SOURCES[config.data.source](config, split)
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
