# SPDX-License-Identifier: Apache-2.0
"""The LLaVA conversation format: a JSON list of rows with `id`, `image` and `conversations`.

Everything the JSON and the folder listings show is checked when the source opens; what only
decoding shows is found when an image is read. A bad row fails or, on request, is left out and
counted.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.data.example import IMAGE_MARK, BadExample, Example, Images

# Images that were renamed or are in truth of another kind (OCR-VQA: GIF named .jpg) are found by
# these.
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")
MOST_ELONGATED = (
    100  # a longer image shows nothing, and would fill memory where the short side is resized
)


class _Fault(Exception):
    """Why a row is bad: a word to count it under, and what came and what was allowed."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_rows(path: Path) -> tuple[list, str]:
    """The rows of a LLaVA JSON file and the sha256 of its bytes.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: where it is no JSON, cut short, or not a list.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}: set data.path to a LLaVA JSON file")
    data = path.read_bytes()
    try:
        rows = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON, or cut short ({len(data)} bytes): {error}; download it again, "
            "or give a JSON list of rows with id, image and conversations"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds a JSON {type(rows).__name__} at the top, not a list of rows with id, "
            "image and conversations"
        )
    return rows, hashlib.sha256(data).hexdigest()


def turns_of(row: dict, has_image: bool) -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs of a row, without its image mark.

    As in LLaVA a leading answer is dropped, and the mark may stand anywhere in the first question.
    """
    said = row.get("conversations")
    if not isinstance(said, list) or not all(
        isinstance(s, dict) and isinstance(s.get("value"), str) for s in said
    ):
        raise _Fault(
            "conversations", "`conversations` is not a list of {from, value} with text values"
        )
    if said and said[0].get("from") == "gpt":
        said = said[1:]
    if (
        not said
        or len(said) % 2
        or any(s.get("from") != ("human", "gpt")[k % 2] for k, s in enumerate(said))
    ):
        raise _Fault(
            "conversations",
            f"the turns are {[s.get('from') for s in said]}, not human and gpt in turn, "
            "ending with gpt",
        )
    for k, turn in enumerate(said):
        marks = turn["value"].count(IMAGE_MARK)
        if marks and k:
            raise _Fault(
                "image_mark",
                f"{IMAGE_MARK} in turn {k + 1} ({turn['from']}): it belongs in the first question",
            )
        if marks > 1:
            raise _Fault(
                "image_mark", f"{marks} times {IMAGE_MARK}: one image per row is supported"
            )
        if k % 2 and not turn["value"].strip():
            raise _Fault("empty_answer", f"turn {k + 1} is an empty answer: nothing to learn from")
    if has_image != (IMAGE_MARK in said[0]["value"]):
        raise _Fault(
            "image_mark",
            f"an image but no {IMAGE_MARK} in the first question"
            if has_image
            else f"{IMAGE_MARK} in the first question but no image",
        )
    texts = [s["value"].replace(IMAGE_MARK, "").strip() for s in said]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


class _Folder:
    """Finds images below a folder; each directory is listed once, however many images it holds."""

    def __init__(self, root: Path):
        self.root, self._listed, self.renamed = root, {}, 0

    def find(self, name: str) -> str:
        """The path of an image, under another suffix where the file is not there as named."""
        folder, base = os.path.split(os.path.join(self.root, name))
        if folder not in self._listed:
            try:
                self._listed[folder] = set(os.listdir(folder))
            except OSError:
                self._listed[folder] = set()
        names = self._listed[folder]
        if base in names:
            return os.path.join(folder, base)
        stem = os.path.splitext(base)[0]
        for suffix in SUFFIXES:
            if (other := stem + suffix) in names or (other := stem + suffix.upper()) in names:
                self.renamed += 1
                return os.path.join(folder, other)
        raise _Fault(
            "missing_image",
            f"no image {os.path.join(folder, base)}, nor with another suffix "
            f"({', '.join(SUFFIXES)}): check data.images={str(self.root)!r}",
        )


def read_image(
    path: str, owner: str, way_out: str = "replace the file, or set data.on_bad_example=skip"
) -> np.ndarray:
    """An image as RGB uint8 [H, W, 3], decoded by its content whatever its name; first frame of
    several.

    Raises:
      BadExample: where it cannot be decoded whole, naming the row that `owner` describes.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if max(width, height) > MOST_ELONGATED * min(width, height):
                raise BadExample(
                    f"{owner}: image {path} is {width} x {height} pixels, more than "
                    f"{MOST_ELONGATED} times as long as wide; {way_out}"
                )
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadExample(f"{owner}: image {path} cannot be decoded: {error}; {way_out}") from error


class Llava:
    """Rows of a LLaVA JSON file.

    Args:
      path: the JSON file; "{split}" in it stands for the split. Without, there is only "train".
      split: train, val or test.
      images: the folder that image paths are relative to.
      text_only: accept rows without an image.
      skip: leave bad rows out and count them, instead of failing.
    Raises:
      FileNotFoundError, ValueError: for a file that cannot be read as such, or without a usable
        row.
      BadExample: for the first bad row, unless `skip`.
    """

    name = "llava"
    protocol = "embedded"

    def __init__(
        self, path: str, split: str, *, images: str, text_only: bool = False, skip: bool = False
    ):
        if "{split}" not in path and split != "train":
            raise ValueError(
                f"split {split!r} of {path!r}: a LLaVA file without {{split}} in its name is all "
                "training data; set data.path to something like data/{split}.json"
            )
        self.split = split
        self.path = Path(path.replace("{split}", split))
        rows, file_hash = read_rows(self.path)
        self.faults: Counter[str] = Counter()
        self._folder = _Folder(Path(images))
        self._examples: list[Example] = []
        self._paths: dict[str, int] = {}
        self._owners: list[str] = []
        taken: set[str] = set()
        first = None
        for number, row in enumerate(rows):
            given = row.get("id") if isinstance(row, dict) else None
            name = "" if given is None else str(given)
            try:
                self._add(row, name, taken, text_only)
            except _Fault as fault:
                self.faults[fault.kind] += 1
                first = first or f"{self.path}, row {number} (id {name!r}): {fault}"
        bad = self.faults.total()
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
        owners = self._owners
        self.images = Images(_Reader(paths, owners), len(paths))
        self.data_hash = hashlib.sha256(
            f"{file_hash} {text_only} {dict(self.faults)}".encode()
        ).hexdigest()

    def _add(self, row: Any, name: str, taken: set[str], text_only: bool) -> None:
        if not isinstance(row, dict):
            raise _Fault(
                "row", f"a {type(row).__name__}, not an object with id, image and conversations"
            )
        if not name:
            raise _Fault("id", "no id")
        if name in taken:
            raise _Fault("duplicate_id", "this id came before: ids must be unique")
        image = row.get("image")
        if image is not None and not isinstance(image, str):
            raise _Fault("image", f"`image` is {image!r}, not one path")
        if not image and not text_only:
            raise _Fault(
                "no_image", "no `image`: set data.text_only=True to accept rows of text alone"
            )
        turns = turns_of(row, bool(image))
        index = None
        if image:
            path = self._folder.find(image)
            index = self._paths.setdefault(path, len(self._paths))
            if index == len(self._owners):
                self._owners.append(f"{self.path}, id {name!r}")
        taken.add(name)
        self._examples.append(Example(name, index, turns, "llava", "llava"))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def describe(self) -> dict[str, Any]:
        """Counts of rows, images, rows left out by reason, and images under another suffix."""
        return {
            "source": self.name,
            "split": self.split,
            "path": str(self.path),
            "examples": len(self),
            "images": len(self.images),
            "left_out": dict(sorted(self.faults.items())),
            "renamed_images": self._folder.renamed,
            "data_hash": self.data_hash,
        }


class _Reader:
    """Reads image i; a class, so that worker processes can take it along."""

    def __init__(self, paths: list[str], owners: list[str]):
        self.paths, self.owners = paths, owners

    def __call__(self, index: int) -> np.ndarray:
        return read_image(self.paths[index], self.owners[index])
