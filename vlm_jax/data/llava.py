# SPDX-License-Identifier: Apache-2.0
"""The LLaVA conversation format: rows with `id`, `image` and `conversations`, JSON or JSON lines.

Everything that the JSON and the folder listings show is checked when the source opens; faults that
only decoding shows are found when an image is read. A bad row is an error or, on request, is left
out and counted.
"""

import hashlib
import os
from typing import Any

import numpy as np

from vlm_jax.data.example import IMAGE_MARK, BadExample, Example, Images
from vlm_jax.data.paths import SUFFIXES, Folder, existing_path
from vlm_jax.data.pictures import read_image
from vlm_jax.data.rows import Fault, check_keys, check_text, own_ids, read_rows
from vlm_jax.data.skips import Skip, Skips


def listed(image: Any) -> list:
    """The paths in a row's `image`: one path, a list of them, or nothing."""
    return image if isinstance(image, list) else [] if image in (None, "") else [image]


def turns_of(row: dict, images: int) -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs of a row with this number of images.

    A single mark in the first question is removed. As in LLaVA a leading answer is dropped. Each
    image has one mark, in any of the questions.
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
            else f"an image but no {IMAGE_MARK} in a question"
            if images == 1 and not any(marks)
            else f"{sum(marks)} times {IMAGE_MARK} in its questions, and `image` names {images}: "
            "each image has one mark",
        )
    texts = [turn["value"].strip() for turn in conversation]
    if marks[0] == images == 1:
        texts[0] = texts[0].replace(IMAGE_MARK, "").strip()
    return tuple(zip(texts[::2], texts[1::2], strict=True))


class Llava:
    """Rows of a LLaVA file, a JSON list or JSON lines.

    Args:
      path: the file; "{split}" in it stands for the split. Without, there is only "train".
      split: train, val or test.
      images: the folder that image paths are relative to.
      text_only: accept rows without an image.
      images_per_row: the most images of a row.
      skip: leave bad rows out and count them, instead of failing.
      exif: "apply" or "ignore" the EXIF orientation of images.
    Raises:
      FileNotFoundError, ValueError: for a file that is not a LLaVA file, or without a usable
        row.
      BadExample: for the first bad row, unless `skip`.
    """

    name = "llava"
    protocol = "embedded"

    def __init__(
        self,
        path: str,
        split: str,
        *,
        images: str,
        text_only: bool = False,
        images_per_row: int = 1,
        skip: bool = False,
        exif: str = "ignore",
    ):
        if "{split}" not in path and split != "train":
            raise ValueError(
                f"split {split!r} of {path!r}: a LLaVA file without {{split}} in its name is all "
                "training data; set data.path to something like data/{split}.json"
            )
        self.split = split
        self.path = existing_path(path.replace("{split}", split))
        file_rows = read_rows(self.path)
        self.left_out = Skips()
        self._text_only, self._images_per_row = text_only, images_per_row
        self._folder = Folder(images)
        self._examples: list[Example] = []
        self._paths: dict[str, int] = {}
        self._owners: list[str] = []
        rows = file_rows.rows
        ids = own_ids([row.get("id") if isinstance(row, dict) else None for row in rows])
        self.repeated_ids, self.missing_ids = ids.repeated, ids.missing
        self.leading_answers = 0
        for number, row in enumerate(rows):
            owner = f"{self.path}, {file_rows.place(number)} (id {ids.in_file(number)!r:.80})"
            try:
                self._add(row, ids.own[number], ids.given[number], owner)
            except (Fault, RecursionError) as fault:  # RecursionError: deep JSON in an odd place
                kind = fault.kind if isinstance(fault, Fault) else "json"
                image = row.get("image") if isinstance(row, dict) else None
                named = [name for name in listed(image) if isinstance(name, str)]
                skip_of = Skip(ids.own[number], ", ".join(named), f"{owner}: {fault}")
                self.left_out.add(number, kind, skip_of)
        bad = len(self.left_out)
        first = next((str(skip) for skip in self.left_out.first.values()), "")
        if first and not skip:
            more = f" ({bad - 1} more bad rows)" if bad > 1 else ""
            raise BadExample(
                f"{first}{more}; correct the file, or set data.on_bad_example=skip to leave "
                "bad rows out"
            )
        if not self._examples:
            raise ValueError(
                f"{self.path} has no usable row among {len(rows)}"
                + (f"; the first bad one: {first}" if first else "")
            )
        paths = list(self._paths)
        reader = _Reader(paths, self._owners, exif, skip=skip)
        self.images = Images(reader, len(paths), paths)
        # Without turned images the hash is that of earlier versions.
        turned = " upright" if exif == "apply" else ""
        self.data_hash = hashlib.sha256(
            f"{file_rows.sha256} {text_only} {dict(self.left_out.kinds)}{turned}".encode()
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
        images = listed(row.get("image"))
        if not all(isinstance(image, str) and image for image in images):
            raise Fault("image", f"`image` is {row['image']!r:.80}, not a path or a list of paths")
        if len(images) > self._images_per_row:
            raise Fault(
                "images",
                f"{len(images)} images, and data.images_per_row={self._images_per_row}: raise that "
                f"to {len(images)}",
            )
        if not images and not self._text_only:
            raise Fault(
                "no_image", "no `image`: set data.text_only=True to accept rows of text alone"
            )
        turns = turns_of(row, len(images))
        leads = row["conversations"][0].get("from") == "gpt"
        for image in images:
            check_text("`image`", image)
        indices = []
        # All are found before one is kept: images of a bad row do not belong to the source.
        for path in [self._found(image) for image in images]:
            indices.append(self._paths.setdefault(path, len(self._paths)))
            if indices[-1] == len(self._owners):
                self._owners.append(owner)
        self.leading_answers += leads
        image = tuple(indices) if len(indices) > 1 else indices[0] if indices else None
        self._examples.append(Example(name, image, turns, "llava", "llava", given=given_id))

    def _found(self, name: str) -> str:
        """The path of an image, with another suffix if there is no file of this name."""
        path = self._folder.find(name, suffixes=SUFFIXES)
        if path is None:
            raise Fault(
                "missing_image",
                f"no image {os.path.join(self._folder.root, name)}, nor with another suffix "
                f"({', '.join(SUFFIXES)}): check data.images={self._folder.root!r}",
            )
        return path

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def describe(self) -> dict[str, Any]:
        """Counts of rows, images, rows left out by reason, and of changes to what the file has."""
        changed = {
            "repeated_ids": self.repeated_ids,
            "missing_ids": self.missing_ids,
            "leading_answers": self.leading_answers,
            "respelled_images": self._folder.respelled,
        }
        return {
            "source": self.name,
            "split": self.split,
            "path": str(self.path),
            "examples": len(self),
            "images": len(self.images),
            "left_out": dict(sorted(self.left_out.kinds.items())),
            "renamed_images": self._folder.renamed,
            **{name: count for name, count in changed.items() if count},
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
        if self.left_out:
            rows = len(self) + len(self.left_out)
            sentences.append(f"{self.path}: {self.left_out.summary(rows, 'rows are left out')}")
        return sentences


class _Reader:
    """Reads image i; a class, so that it can be sent to worker processes."""

    def __init__(self, paths: list[str], owners: list[str], exif: str, *, skip: bool):
        self.paths, self.owners, self.exif = paths, owners, exif
        # With `skip` this way out is already taken.
        self.way_out = "replace the file" + ("" if skip else ", or set data.on_bad_example=skip")

    def __call__(self, index: int) -> np.ndarray:
        return read_image(self.paths[index], self.owners[index], self.way_out, exif=self.exif)
