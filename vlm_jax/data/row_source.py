# SPDX-License-Identifier: Apache-2.0
"""Rows with `id`, images and `conversations` as examples: what a LLaVA file and a tar share.

A bad row is an error or, on request, is left out and counted.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.data import clips
from vlm_jax.data.example import IMAGE_MARK, BadExample, Example, Images
from vlm_jax.data.pictures import Place, read_picture
from vlm_jax.data.rows import Fault, Ids, check_keys, check_text
from vlm_jax.data.skips import Skip, Skips


def listed(image: Any) -> list:
    """The paths in a row's `image` or `video`: one path, a list of them, or nothing."""
    return image if isinstance(image, list) else [] if image in (None, "") else [image]


def turns_of(row: dict, images: int, *, field: str = "image") -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs of a row with this number of images, which `field` names.

    A single mark in the first question is removed. As in LLaVA a leading answer is dropped. Each
    image has one mark, in any of the questions; a clip (field "video") has <image> or <video>.
    """
    conversation = row.get("conversations")
    if not isinstance(conversation, list):
        raise Fault(
            "conversations",
            f"`conversations` is {conversation!r:.80}, not a list of {{from, value}}"
            if "conversations" in row
            else f"no `conversations` among its fields {', '.join(map(ascii, row)):.80}",
        )
    for k, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Fault(
                "conversations",
                f"turn {k + 1} of `conversations` is {turn!r:.80}, not {{from, value}} with a text "
                "as value",
            )
        check_keys(f"turn {k + 1}", turn)
        check_text(f"turn {k + 1}", turn["value"])
    if conversation and conversation[0].get("from") == "gpt":
        conversation = conversation[1:]
    if (
        not conversation
        or len(conversation) % 2
        or any(turn.get("from") != ("human", "gpt")[k % 2] for k, turn in enumerate(conversation))
    ):
        raise Fault(
            "conversations",
            f"the turns are {[turn.get('from') for turn in conversation]!r:.80}, not human and gpt "
            "in turn, ending with gpt",
        )
    if field == "video":
        conversation = [
            turn | {"value": turn["value"].replace(clips.VIDEO_MARK, IMAGE_MARK)}
            if turn["from"] == "human"
            else turn
            for turn in conversation
        ]
    for k, turn in enumerate(conversation):
        if k % 2 and IMAGE_MARK in turn["value"]:
            raise Fault(
                "image_mark",
                f"{IMAGE_MARK} in turn {k + 1} ({turn['from']}): it belongs in a question",
            )
        if k % 2 and not turn["value"].strip():
            raise Fault("empty_answer", f"turn {k + 1} is an empty answer: nothing to learn from")
    marks = [turn["value"].count(IMAGE_MARK) for turn in conversation]
    if sum(marks) != images:
        raise Fault(
            "image_mark",
            f"{IMAGE_MARK} in a question but no image"
            if not images
            else f"{'a clip' if field == 'video' else 'an image'} but no {IMAGE_MARK} in a question"
            if images == 1 and not any(marks)
            else f"{sum(marks)} times {IMAGE_MARK} in its questions, and `{field}` names {images}: "
            "each image has one mark",
        )
    texts = [turn["value"].strip() for turn in conversation]
    if marks[0] == images == 1:
        texts[0] = texts[0].replace(IMAGE_MARK, "").strip()
    return tuple(zip(texts[::2], texts[1::2], strict=True))


class RowSource(ABC):
    """A source whose rows are checked one by one; a subclass reads them and finds their images.

    Args:
      split: train, val or test.
      path: what the rows were read from, for messages.
      text_only: accept rows without an image.
      images_per_row: the most images, or clips, of a row.
      left_out: where bad rows are counted; a check of the data keeps all of them.
      frames: T, taken of each clip, each an image of its own; 0: clips are bad rows.
    """

    name = ""
    protocol = "embedded"

    def __init__(
        self,
        split: str,
        path: Any,
        *,
        text_only: bool,
        images_per_row: int,
        left_out: Skips | None,
        frames: int = 0,
    ):
        self.split, self.path = split, path
        self.left_out = Skips() if left_out is None else left_out
        self._text_only, self._images_per_row, self._frames = text_only, images_per_row, frames
        self.clips = self.short_clips = 0
        self._examples: list[Example] = []
        self._places: dict[Hashable, int] = {}
        self._owners: list[str] = []
        self.leading_answers = 0

    @abstractmethod
    def named(self, row: dict) -> list[Any]:
        """What a row says of its images. Raises Fault if that names no image."""

    @abstractmethod
    def found(self, name: Any) -> str | Place:
        """Where a named image lies. Raises Fault if it is not there."""

    def filmed(self, row: dict) -> list[str]:
        """What a row says of its clips, if it has no images. Raises Fault if that names no clip."""
        if row.get("video"):
            raise Fault("video", "`video` names a clip, which rows of data.source='llava' can have")
        return []

    def framed(self, name: str) -> tuple[Sequence[str | clips.Frame], int | None]:
        """Where the frames of a named clip lie, as `clips.places`. Raises Fault for none."""
        raise Fault("missing_clip", f"{name} is a clip, and this source has none")

    def read(
        self,
        rows: list[Any],
        ids: Ids,
        where: Callable[[int], str],
        *,
        sha256: str,
        exif: str,
        skip: bool,
        may_be_empty: bool,
    ) -> None:
        """Makes an example of every row.

        Args:
          rows: a dict for each row, or a Fault. ids: their ids.
          where: the place of a row, by its number, for messages.
          sha256: of all that was read.
          exif: "apply" or "ignore" the EXIF orientation of images.
          skip: leave bad rows out and count them, instead of failing.
          may_be_empty: whether it is no error that there is no usable row.
        Raises:
          ValueError: without a usable row, unless `may_be_empty`.
          BadExample: for the first bad row, unless `skip`.
        """
        self.sha256 = sha256
        self.repeated_ids, self.missing_ids = ids.repeated, ids.missing
        for number, row in enumerate(rows):
            owner = f"{where(number)} (id {ids.in_file(number)!r:.80})"
            try:
                self._add(row, ids.own[number], ids.given[number], owner)
            except (Fault, RecursionError) as fault:  # RecursionError: deep JSON in an odd place
                kind = fault.kind if isinstance(fault, Fault) else "json"
                image = row.get("image") or row.get("video") if isinstance(row, dict) else None
                names = [shown(name) for name in listed(image) if isinstance(name, (str, Place))]
                skip_of = Skip(ids.own[number], ", ".join(names), f"{owner}: {fault}")
                self.left_out.add(number, kind, skip_of)
        bad = len(self.left_out)
        first = next((str(skip) for skip in self.left_out.first.values()), "")
        if first and not skip:
            more = f" ({bad - 1} more bad rows)" if bad > 1 else ""
            raise BadExample(
                f"{first}{more}; correct the file, or set data.on_bad_example=skip to leave "
                "bad rows out"
            )
        if not self._examples and not may_be_empty:
            raise ValueError(
                f"{self.path} has no usable row among {len(rows)}"
                + (f"; the first bad one: {first}" if first else "")
            )
        places: list[Any] = list(self._places)
        reader = _Reader(places, self._owners, exif, skip=skip)
        self.images = Images(reader, len(places), [shown(place) for place in places])
        # Without turned images the hash is that of earlier versions.
        turned = " upright" if exif == "apply" else ""
        turned += f" {self._frames} frames" if self.clips else ""
        self.data_hash = hashlib.sha256(
            f"{sha256} {self._text_only} {dict(self.left_out.kinds)}{turned}".encode()
        ).hexdigest()

    def _add(self, row: Any, name: str, given_id: str, owner: str) -> None:
        if isinstance(row, Fault):
            raise row
        if not isinstance(row, dict):
            raise Fault(
                "row", f"a {type(row).__name__}, not an object with id, image and conversations"
            )
        check_keys("the row", row)
        check_text("`id`", name)
        images = self.named(row)
        filmed = self.filmed(row)
        if images and filmed:
            raise Fault("video", "`image` and `video`: a row has images or clips, not both")
        if filmed and not self._frames:
            raise Fault("video", "`video` names a clip, and data.frames=0: set it to the number of "
                        "frames to take of each")  # fmt: skip
        field, named = ("video", filmed) if filmed else ("image", images)
        if len(named) > self._images_per_row:
            raise Fault(
                "images",
                f"{len(named)} {'clips' if filmed else 'images'}, and "
                f"data.images_per_row={self._images_per_row}: raise that to {len(named)}",
            )
        if not named and not self._text_only:
            raise Fault(
                "no_image", "no `image`: set data.text_only=True to accept rows of text alone"
            )
        turns = turns_of(row, len(named), field=field)
        leads = row["conversations"][0].get("from") == "gpt"
        for one in named:
            check_text(f"`{field}`", shown(one))
        # All are found before one is kept: images of a bad row do not belong to the source.
        framed = [self.framed(clip) for clip in filmed]
        places = [self.found(image) for image in images]
        places += [place for of_clip, _ in framed for place in of_clip]
        self.clips += len(framed)
        self.short_clips += sum(n is not None and n < self._frames for _, n in framed)
        indices = []
        for place in places:
            indices.append(self._places.setdefault(place, len(self._places)))
            if indices[-1] == len(self._owners):
                self._owners.append(owner)
        self.leading_answers += leads
        image = tuple(indices) if len(indices) > 1 else indices[0] if indices else None
        frames = self._frames if filmed else 1
        example = Example(name, image, turns, self.name, self.name, given=given_id, frames=frames)
        self._examples.append(example)

    def place(self, image: int) -> Place | clips.Frame:
        """Where an image lies."""
        place = self.images.read.places[image]
        return Place(place) if isinstance(place, str) else place

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def changed(self) -> dict[str, int]:
        """Counts of changes to what the data say; those of 0 are not shown."""
        return {
            "repeated_ids": self.repeated_ids,
            "missing_ids": self.missing_ids,
            "leading_answers": self.leading_answers,
            "clips": self.clips,
            "short_clips": self.short_clips,
        }

    def counted(self) -> dict[str, int]:
        """Further counts, shown even if they are 0."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Counts of rows, images, rows left out by reason, and of changes to what the file has."""
        return {
            "source": self.name,
            "split": self.split,
            "path": str(self.path),
            "examples": len(self),
            "images": len(self.images),
            "left_out": dict(sorted(self.left_out.kinds.items())),
            **self.counted(),
            **{name: count for name, count in self.changed().items() if count},
            "data_hash": self.data_hash,
        }

    def notes(self) -> list[str]:
        """Sentences for the user about how the file was read."""
        sentences = []
        if count := self.repeated_ids:
            sentences.append(
                f"{self.path}: {count} rows have the id of an earlier row; they are read as ID#2, "
                "ID#3, ..., and none is dropped"
            )
        if count := self.missing_ids:
            sentences.append(
                f"{self.path}: {count} rows have no id (a text or a number); they are called #ROW, "
                "counted from 0"
            )
        if count := self.leading_answers:
            sentences.append(
                f"{self.path}: {count} rows begin with an answer (gpt); it is left out, as LLaVA "
                "does"
            )
        if count := self.short_clips:
            sentences.append(
                f"{self.path}: {count} clips have fewer than the data.frames={self._frames} frames "
                "that are taken: some are shown more than once, as LLaVA-NeXT does"
            )
        if self.left_out:
            rows = len(self) + len(self.left_out)
            sentences.append(f"{self.path}: {self.left_out.summary(rows, 'rows are left out')}")
        return sentences


def shown(place: str | Place | clips.Frame) -> str:
    """The name of an image for messages."""
    return (place.name or place.path) if isinstance(place, Place) else str(place)


class _Reader:
    """Reads image i; a class, so that it can be sent to worker processes."""

    def __init__(self, places: list[Any], owners: list[str], exif: str, *, skip: bool):
        self.places, self.owners, self.exif = places, owners, exif
        self.films = clips.Reader(exif)
        # With `skip` this way out is already taken.
        self.way_out = "replace the file" + ("" if skip else ", or set data.on_bad_example=skip")

    def __call__(self, index: int) -> np.ndarray:
        return np.array(self.picture(index))

    def picture(self, index: int) -> Image.Image:
        """Image `index`, not copied to an array."""
        if isinstance(place := self.places[index], clips.Frame):
            return self.films.picture(place, self.owners[index], self.way_out)
        return read_picture(self.places[index], self.owners[index], self.way_out, exif=self.exif)
