# SPDX-License-Identifier: Apache-2.0
"""LLaVA rows and their images as a data set of tensorflow-datasets, without tensorflow.

Files are array_record, written by the library's builder and read by index through its data-source
interface. A split is written twice: NAME has everything, NAME_texts the rows without the bytes of
their images, so that opening a split reads texts alone.
"""

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlm_jax import progress
from vlm_jax.data.example import BadExample, Images
from vlm_jax.data.pictures import Place, Unusable, decode, one_line, read_bytes
from vlm_jax.data.row_source import RowSource, shown
from vlm_jax.data.rows import json_value, own_ids
from vlm_jax.data.skips import Skips

TEXTS = "_texts"
NAME = "llava_rows"
VERSION = "1.0.0"


def library() -> Any:
    """tensorflow_datasets. Raises ValueError, with the way to install it."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(
            f"data.source='tfds' needs tensorflow-datasets ({error}): pip install 'vlm_jax[tfds]'"
        ) from None
    return tensorflow_datasets


def build(source: RowSource, folder: Path | str) -> Path:
    """Writes the rows of a source, a split of it, as a data set; the folder to be read.

    Bytes of images are stored as they are in their files, once for each row that shows them.

    Raises:
      ValueError: if the folder has the data set already, or tensorflow-datasets is missing.
      BadExample: for an image that is not there; nothing is left behind.
    """
    tfds = library()
    features = tfds.features

    def records(*, whole: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        with progress.doing("writing the rows", len(source)) as task:
            for index in range(len(source)):
                example = source[index]
                places = [source.place(image) for image in example.images]
                row = {"turns": example.turns, "names": [shown(place) for place in places]}
                yield (
                    index,
                    {
                        "id": example.given or example.id,
                        "row": json.dumps(row),
                        "images": [content(place) for place in places] if whole else [],
                    },
                )
                task.note(index + 1)

    class LlavaRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = NAME
        VERSION = tfds.core.Version(VERSION)
        # Nothing is downloaded; to look for the sums of files the library needs a package that it
        # does not ask for (importlib_resources).
        url_infos: ClassVar[dict] = {}

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Rows of a LLaVA file: id, turns and names as JSON, bytes of images.",
                features=features.FeaturesDict(
                    {
                        "id": features.Text(),
                        "row": features.Text(),
                        "images": features.Sequence(features.Text()),
                    }
                ),
                disable_shuffling=True,  # a row keeps its number
            )

        def _split_generators(self, dl_manager):
            return {
                source.split: records(whole=True),
                source.split + TEXTS: records(whole=False),
            }

        def _generate_examples(self):
            raise TypeError("each split has its own generator")

    tfds.disable_progress_bar()
    builder = LlavaRows(data_dir=str(folder), file_format="array_record")
    if builder.is_prepared():
        raise ValueError(f"{builder.data_path} holds a data set already: choose another folder")
    with contextlib.redirect_stdout(sys.stderr):  # the library talks
        builder.download_and_prepare()
    return Path(builder.data_path)


def content(place: Place) -> bytes:
    """The bytes of an image's file. Raises BadExample if they cannot be read."""
    try:
        return read_bytes(place)
    except Unusable as error:
        raise BadExample(f"image {shown(place)} {error}; replace the file") from None


class Tfds(RowSource):
    """The rows of a data set that `build` wrote.

    Args:
      path: the folder with dataset_info.json; "{split}" in it stands for the split.
      split: train, val or test, as it was written.
      others: as for `Llava`.
    Raises:
      FileNotFoundError, ValueError: if there is no such data set or split, and (unless
        `may_be_empty`) without a usable row.
      BadExample: for the first bad row, unless `skip`.
    """

    name = "tfds"

    def __init__(
        self,
        path: str,
        split: str,
        *,
        text_only: bool = False,
        images_per_row: int = 1,
        skip: bool = False,
        exif: str = "ignore",
        left_out: Skips | None = None,
        may_be_empty: bool = False,
    ):
        super().__init__(
            split,
            path.replace("{split}", split),
            text_only=text_only,
            images_per_row=images_per_row,
            left_out=left_out,
        )
        path = self.path
        texts = opened(path, split + TEXTS)
        of_all, rows = hashlib.sha256(), []
        for number in range(len(texts)):
            record = texts[number]
            of_all.update(record["id"] + b"\n" + record["row"] + b"\n")
            value = json_value(record["row"].decode())
            said = [
                {"from": who, "value": text}
                for turn in value["turns"]
                for who, text in zip(("human", "gpt"), turn, strict=True)
            ]
            count = len(value["names"])
            marks = sum(turn["value"].count("<image>") for turn in said)
            if count == 1 and not marks:  # the reader of the file has removed a single mark
                said[0]["value"] = "<image>\n" + said[0]["value"]
            images = [Place(path, number, k, name) for k, name in enumerate(value["names"])]
            rows.append({"id": record["id"].decode(), "image": images, "conversations": said})
        self.read(
            rows,
            own_ids([row["id"] for row in rows]),
            lambda number: f"{path}, record {number}",
            sha256=of_all.hexdigest(),
            exif=exif,
            skip=skip,
            may_be_empty=may_be_empty,
        )
        names = [self.images.name(i) for i in range(len(self.images))]
        reader = _Records(path, split, list(self._places), exif)
        self.images = Images(reader, len(names), names)

    def named(self, row: dict) -> list[Place]:
        """The images of a record."""
        return row["image"]

    def found(self, name: Place) -> Place:
        """Itself."""
        return name


def opened(path: str, split: str) -> Any:
    """The records of a split by index, images not decoded.

    Raises:
      FileNotFoundError: if the folder holds no data set.
      ValueError: if it has no such split.
    """
    tfds = library()
    if not (Path(path) / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"no dataset_info.json in {path}: set data.path to a folder that `vlm-jax data build` "
            "has written"
        )
    builder = tfds.builder_from_directory(path)
    if split not in builder.info.splits:
        has = sorted(name for name in builder.info.splits if not name.endswith(TEXTS))
        raise ValueError(
            f"{path} has no split {split.removesuffix(TEXTS)!r} (with texts): it has "
            f"{', '.join(has)}"
        )
    return builder.as_data_source(split=split)


class _Records:
    """Reads image i from its record; each process opens the files itself."""

    def __init__(self, path: str, split: str, places: list[Any], exif: str):
        self.path, self.split, self.places, self.exif = path, split, places, exif
        self._records: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}

    def __call__(self, index: int) -> np.ndarray:
        if self._records is None:
            self._records = opened(self.path, self.split)
        place = self.places[index]
        data = bytes(self._records[place.start]["images"][place.size])
        try:
            return decode(io.BytesIO(data), exif=self.exif)
        except Exception as error:  # each decoder has its own
            reason = (
                str(error)
                if isinstance(error, Unusable)
                else (f"cannot be decoded: {one_line(error)}")
            )
        raise BadExample(
            f"{self.path}, record {place.start}: image {place.name} {reason}; write the data set "
            "again, or set data.on_bad_example=skip"
        )
