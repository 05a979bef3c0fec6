# SPDX-License-Identifier: Apache-2.0
"""Where examples come from: one table of sources, opened by a configuration and a split."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vlm_jax.data.benchmark import things
from vlm_jax.data.benchmark.synthetic import Synthetic
from vlm_jax.data.benchmark.synthetic import majority as majority_by_wording
from vlm_jax.data.example import BadExample, Example, Source
from vlm_jax.data.llava import Llava
from vlm_jax.data.mixture import Mixture, Part
from vlm_jax.data.nlvr import Nlvr
from vlm_jax.data.pictures import check_exif
from vlm_jax.data.tars import Tars
from vlm_jax.data.tfds import Tfds
from vlm_jax.errors import suggestion

log = logging.getLogger(__name__)

__all__ = ["SOURCES", "BadExample", "Example", "Origin", "Source", "majority", "open_source"]

# Fields of `data` that a part of a mixture may set; of the others it has those of `data`.
OF_A_PART = ("source", "path", "images", "text_only", "image_exif",
             "train_images", "val_images", "test_images", "questions_per_row",
             "pictures", "picture_share", "video_share", "held_out_style")  # fmt: skip
A_PART = '("NAME", WEIGHT, {"path": "FILE", "images": "DIR"})'


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
    frames: int
    on_bad_example: str
    image_exif: str
    mixture: tuple
    train_images: int
    val_images: int
    test_images: int
    questions_per_row: int
    pictures: str
    picture_share: float
    video_share: float
    held_out_style: str
    seed: int

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source!r}: choose one of {', '.join(SOURCES)}")
        if self.on_bad_example not in ("fail", "skip"):
            raise ValueError(f"data.on_bad_example={self.on_bad_example!r}: choose fail or skip")
        if self.images_per_row < 1:
            raise ValueError(f"data.images_per_row={self.images_per_row}: at least 1")
        if self.frames < 0:
            raise ValueError(f"data.frames={self.frames}: 0 for images, or the frames of a clip")
        check_exif("data.image_exif", self.image_exif)
        if self.source == "mixture":
            self.parts()
        elif self.mixture:
            raise ValueError(
                f"data.mixture has {len(self.mixture)} parts, and data.source={self.source!r} "
                "reads none: set data.source=mixture, or data.mixture=()"
            )

    def parts(self) -> list[tuple[str, float, "Origin"]]:
        """Name, weight and origin of each part of a mixture.

        ValueError for a part that is none, a weight that is no number above 0, a repeated name and
        a field that a part cannot have.
        """
        if not isinstance(self.mixture, (tuple, list)) or not self.mixture:
            raise ValueError(
                f"data.source='mixture' and data.mixture={self.mixture!r}: give {A_PART} for each "
                "part"
            )
        found: list[tuple[str, float, Origin]] = []
        for part in self.mixture:
            if not (
                isinstance(part, (tuple, list)) and len(part) == 3 and hasattr(part[2], "items")
            ):
                raise ValueError(f"data.mixture: a part is {part!r:.120}: give {A_PART}")
            name, weight, changed = part
            if not isinstance(name, str) or not name or name in (known for known, _, _ in found):
                raise ValueError(
                    f"data.mixture: a part is called {name!r:.80}: give each a name of its own"
                )
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise ValueError(
                    f"data.mixture: the weight of {name!r} is {weight!r:.40}: give a number above "
                    "0; shares are the weights divided by their sum"
                )
            for field in changed:
                if field not in OF_A_PART:
                    raise ValueError(
                        f"data.mixture: part {name!r} has the field {field!r:.40}"
                        f"{suggestion(str(field), OF_A_PART)}: a part has fields of "
                        f"{', '.join(OF_A_PART)}"
                    )
            if changed.get("source", "llava") == "mixture":
                raise ValueError(
                    f"data.mixture: part {name!r} is a mixture: write its parts beside the others"
                )
            of_part = replace(self, **({"source": "llava", "mixture": ()} | dict(changed)))
            found.append((name, float(weight), of_part))
        return found

    @classmethod
    def of(cls, config: Any) -> "Origin":
        """As a configuration says."""
        named = [field.name for field in fields(cls) if field.name != "seed"]
        values = {name: config.data[name] for name in named}
        return cls(**values | {"mixture": tuple(config.data.mixture)}, seed=config.seed)


def _of_rows(origin: Origin) -> dict[str, Any]:
    """What sources of rows are opened with."""
    return dict(
        text_only=origin.text_only,
        images_per_row=origin.images_per_row,
        skip=origin.on_bad_example == "skip",
        exif=origin.image_exif,
    )


def _llava(origin: Origin, split: str) -> Llava:
    of_rows = _of_rows(origin)
    return Llava(origin.path, split, images=origin.images, frames=origin.frames, **of_rows)


def _synthetic(origin: Origin, split: str) -> Synthetic:
    images = {"train": origin.train_images, "val": origin.val_images, "test": origin.test_images}
    shown = None
    if origin.picture_share:
        if not origin.pictures:
            raise ValueError(
                f"data.picture_share={origin.picture_share}, but data.pictures names no folder: "
                "`vlm-jax data fetch pictures` fetches the packages and prints it"
            )
        shown = things.read(Path(origin.pictures))
    return Synthetic(
        split,
        images=images.get(split, 0),
        seed=origin.seed,
        questions_per_row=origin.questions_per_row if split == "train" else 1,
        things=shown,
        picture_share=origin.picture_share,
        held_out_style=origin.held_out_style,
        video_share=origin.video_share,
        frames=origin.frames,
    )


def _nlvr(origin: Origin, split: str) -> Nlvr:
    return Nlvr(origin.path, split)


def _tars(origin: Origin, split: str) -> Tars:
    return Tars(origin.path, split, **_of_rows(origin))


def _tfds(origin: Origin, split: str) -> Tfds:
    return Tfds(origin.path, split, **_of_rows(origin))


def _mixture(origin: Origin, split: str) -> Mixture:
    parts = []
    for name, weight, of_part in origin.parts():
        try:
            source = SOURCES[of_part.source](of_part, split)
        except (ValueError, OSError) as error:
            raise type(error)(f"data.mixture, part {name!r}: {error}") from error
        if not len(source):
            raise ValueError(
                f"data.mixture, part {name!r}: its {split} split has no examples: set "
                f"{split}_images above 0 in its fields"
            )
        parts.append(Part(name, weight, source))
    return Mixture(parts, split)


FILMED = ("llava", "synthetic", "mixture")  # sources that may have clips
SOURCES: dict[str, Callable[[Origin, str], Source]] = {
    "llava": _llava,
    "tars": _tars,
    "tfds": _tfds,
    "mixture": _mixture,
    "synthetic": _synthetic,
    "nlvr": _nlvr,
}


def open_source(origin: Origin, split: str) -> Source:
    """The split ("train", "val" or "test") of a source.

    What is not as it was given is a warning: rows left out, ids of our own.

    Raises:
      ValueError: for an unknown split, or one without examples; for data.frames with a source that
        has no clips.
      FileNotFoundError, BadExample: for data that is missing or bad, saying which.
    """
    if origin.frames and origin.source not in FILMED:
        raise ValueError(
            f"data.frames={origin.frames}, and data.source={origin.source!r} has no clips: set "
            f"data.frames=0, or choose one of {', '.join(FILMED)}"
        )
    if origin.frames and origin.source == "synthetic" and not origin.video_share:
        raise ValueError(
            f"data.frames={origin.frames}, and data.video_share=0.0: none of the examples would be "
            "a clip; set data.video_share, or data.frames=0"
        )
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
