# SPDX-License-Identifier: Apache-2.0
"""NLVR: human sentences about three boxes of shapes, true or false (ACL 2017, CC-BY-4.0).

Two of its files are used: the public test split is trained on, the dev split is evaluated on, both
as "val" and as "test". Each sentence comes with all six orders of its boxes, which stay together
because a sentence belongs to one file.
"""

import hashlib
import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlm_jax.data.benchmark.scenes import covering
from vlm_jax.data.example import BadExample, Example, Images
from vlm_jax.data.pictures import one_line
from vlm_jax.data.rows import Fault, check_text, own_ids
from vlm_jax.data.skips import Skips

FILES = {"train": "test", "val": "dev", "test": "dev"}  # our split -> the split of the data set
ORDERS = tuple(itertools.permutations(range(3)))  # image K shows boxes ORDERS[K] of structured_rep
BOX = 100  # pixels
BOX_LEFT = (0, 150, 300)  # in the published image of 400 x 100, between gray bars
CORNERS = (
    (0, 0),
    (BOX, 0),
    (0, BOX),
)  # where the boxes go on a square of 200 x 200, in reading order
EMPTY = (128, 128, 128)  # the fourth quarter: the gray of the bars

KINDS = ("circle", "square", "triangle")
COLORS = ("Black", "Yellow", "#0099ff")
SIZES = (10, 20, 30)  # pixels


class _Files:
    """Reads files of a split from its folder, or from its tar file without unpacking it."""

    def __init__(self, root: Path, split: str):
        self.folder, self.tar = root / split, root / f"{split}.tar"
        self.places: dict[str, tuple[int, int]] = {}
        if self.folder.is_dir():
            return
        if not self.tar.is_file():
            raise FileNotFoundError(
                f"{root} holds neither a folder {split} nor {split}.tar: set data.path to the "
                "folder that holds NLVR's dev and test splits"
            )
        try:
            with tarfile.open(self.tar, "r:") as archive:
                self.places = {
                    m.name.removeprefix("./"): (m.offset_data, m.size)
                    for m in archive
                    if m.isfile()
                }
        except tarfile.TarError as error:
            raise ValueError(
                f"{self.tar} is not an uncompressed tar file, or cut short: {error}"
            ) from error

    def read(self, name: str) -> bytes:
        if not self.places:
            return (self.folder / name).read_bytes()
        key = f"{self.folder.name}/{name}"
        if key not in self.places:
            raise FileNotFoundError(f"{self.tar} holds no {key}")
        start, size = self.places[key]
        with self.tar.open("rb") as file:
            file.seek(start)
            return file.read(size)


class _Reader:
    """Reads image i of the rows and arranges its boxes on a square."""

    def __init__(self, files: _Files, names: list[str]):
        self.files, self.names = files, names

    def __call__(self, index: int) -> np.ndarray:
        name = self.names[index]
        try:
            with Image.open(io.BytesIO(self.files.read(name))) as image:
                return mosaic(image)
        except Exception as error:  # decoders raise many kinds of errors
            raise BadExample(
                f"NLVR image {name} in {self.files.folder} cannot be read: {one_line(error)}; "
                "unpack the data again, or set data.on_bad_example=skip"
            ) from error


def mosaic(image: Image.Image) -> np.ndarray:
    """The three boxes of a published image on a square, uint8 [200, 200, 3], over white."""
    if image.size != (4 * BOX, BOX):
        raise OSError(f"{image.size[0]} x {image.size[1]} pixels, not {4 * BOX} x {BOX}")
    image = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    square = Image.new("RGB", (2 * BOX, 2 * BOX), EMPTY)
    for left, corner in zip(BOX_LEFT, CORNERS, strict=True):
        square.paste(flat.crop((left, 0, left + BOX, BOX)), corner)
    return np.array(square)


class Nlvr:
    """One file of NLVR; an example per sentence and order of boxes, with id "IDENTIFIER-ORDER".

    Example ids tell the groups of consistency: "12-3-0" is order 0 of identifier 12-3, whose
    original sentence is 12.

    Args:
      path: the folder that holds `dev` and `test`, as folders or tar files.
      split: train (the data set's test), val or test (both its dev).
    Raises:
      FileNotFoundError, ValueError: for missing or broken files, naming them.
    """

    name = "nlvr"
    protocol = "nlvr"
    patch_classes = 1 + len(KINDS) * len(COLORS) * len(SIZES)

    def __init__(self, path: str, split: str):
        if split not in FILES:
            raise ValueError(f"split {split!r}: NLVR is used as {', '.join(FILES)}")
        self.split, file = split, FILES[split]
        files = _Files(Path(path), file)
        data = files.read(f"{file}.json")
        names: list[str] = []
        self._boxes: list[list[list[dict]]] = []
        self._examples: list[Example] = []
        rows = []
        for number, line in enumerate(data.splitlines(), 1):
            try:
                rows.append(_checked(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError, Fault) as error:
                raise ValueError(
                    f"{Path(path) / file / file}.json, line {number}: {error!r:.120}: expected an "
                    "object with sentence, label, identifier, directory and structured_rep"
                ) from error
        if not rows:
            raise ValueError(f"{Path(path) / file / file}.json is empty: unpack the data again")
        ids = own_ids([identifier for _, _, identifier, _, _ in rows])
        self.repeated_ids, self.left_out = ids.repeated, Skips()
        for own, (sentence, label, identifier, folder, boxes) in zip(ids.own, rows, strict=True):
            self._boxes.append(boxes)
            for order in range(len(ORDERS)):
                turns, name = ((sentence, label),), f"{own}-{order}"
                # The drawings of one sentence, in all their orders, are not independent samples.
                sentence_id = identifier.split("-")[0]
                given_id = f"{identifier}-{order}" if own != identifier else ""
                self._examples.append(
                    Example(name, len(names), turns, "nlvr", "nlvr", sentence_id, given_id)
                )
                names.append(f"images/{folder}/{file}-{identifier}-{order}.png")
        self.images = Images(_Reader(files, names), len(names), names)
        self.data_hash = hashlib.sha256(data).hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def patch_labels(self, index: int, side: int) -> np.ndarray:
        """Per patch the class (kind, color, size) of what covers it most, int32 [side * side]."""
        # Drawn at a size that the patches tile.
        scale = side * -(-2 * BOX // side) / (2 * BOX)
        boxes = [self._boxes[index // len(ORDERS)][k] for k in ORDERS[index % len(ORDERS)]]
        owners = Image.new("L", (round(2 * BOX * scale),) * 2, 0)
        classes = [0]
        for corner, shapes in zip(CORNERS, boxes, strict=True):
            box = Image.new("L", (round(BOX * scale),) * 2, 0)
            canvas = ImageDraw.Draw(box)
            for s in shapes:
                kind, color, size = (
                    KINDS.index(s["type"]),
                    COLORS.index(s["color"]),
                    SIZES.index(s["size"]),
                )
                _draw(
                    canvas,
                    kind,
                    s["x_loc"] * scale,
                    s["y_loc"] * scale,
                    s["size"] * scale,
                    len(classes),
                )
                classes.append(1 + (kind * len(COLORS) + color) * len(SIZES) + size)
            owners.paste(box, (round(corner[0] * scale), round(corner[1] * scale)))
        return np.array(classes, np.int32)[covering(np.asarray(owners), side)]

    def notes(self) -> list[str]:
        """Sentences for the user about how the file was read."""
        if not self.repeated_ids:
            return []
        return [
            f"NLVR {FILES[self.split]}: {self.repeated_ids} rows have the identifier of an earlier "
            "row; they are read as IDENTIFIER#2, ..., and none is dropped"
        ]

    def describe(self) -> dict[str, Any]:
        """Counts of examples, images and labels, and the file of the data set."""
        labels = Counter(e.turns[0][1] for e in self._examples)
        return {
            "source": self.name,
            "split": self.split,
            "file": FILES[self.split],
            "examples": len(self),
            "images": len(self.images),
            "labels": dict(sorted(labels.items())),
            **({"repeated_ids": self.repeated_ids} if self.repeated_ids else {}),
            "data_hash": self.data_hash,
        }


def _checked(row: Any) -> tuple[str, str, str, str, list[list[dict]]]:
    """Sentence, label, identifier, directory and boxes of a row.

    Raises:
      KeyError, TypeError, ValueError, Fault: if one is missing or has another form than in NLVR.
    """
    texts = [row[name] for name in ("sentence", "label", "identifier", "directory")]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("sentence, label, identifier and directory are texts")
    for text in texts:
        check_text("the row", text)
    if texts[1] not in ("true", "false"):
        raise ValueError(f"the label is {texts[1]!r:.40}, not true or false")
    boxes = row["structured_rep"]
    if not isinstance(boxes, list) or len(boxes) != len(BOX_LEFT):
        raise TypeError("structured_rep is not a list of three boxes")
    for shape in (shape for box in boxes for shape in box):
        KINDS.index(shape["type"]), COLORS.index(shape["color"]), SIZES.index(shape["size"])
        shape["x_loc"] + shape["y_loc"] + 0.0  # numbers
    return *texts, boxes


def _draw(
    canvas: ImageDraw.ImageDraw, kind: int, x: float, y: float, size: float, fill: int
) -> None:
    """One shape by its left top corner and size, in pixels of the canvas."""
    right, bottom = x + size - 1, y + size - 1
    if kind == 0:
        canvas.ellipse((x, y, right, bottom), fill=fill)
    elif kind == 1:
        canvas.rectangle((x, y, right, bottom), fill=fill)
    else:
        canvas.polygon([(x, bottom), (right, bottom), ((x + right) / 2, y)], fill=fill)
