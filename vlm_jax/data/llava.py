# SPDX-License-Identifier: Apache-2.0
"""The LLaVA conversation format: rows with `id`, `image` and `conversations`, JSON or JSON lines.

In the place of `image` a row may have `video`, a folder of frames or a video file (LLaVA-NeXT).

Everything that the JSON and the folder listings show is checked when the source opens; faults that
only decoding shows are found when an image is read. A bad row is an error or, on request, is left
out and counted.
"""

import os
from collections.abc import Sequence
from typing import Any

from vlm_jax.data import clips
from vlm_jax.data.paths import SUFFIXES, Folder, existing_path, of_split
from vlm_jax.data.pictures import Unusable
from vlm_jax.data.row_source import RowSource, listed
from vlm_jax.data.rows import Fault, own_ids, read_rows
from vlm_jax.data.skips import Skips


class Llava(RowSource):
    """Rows of a LLaVA file, a JSON list or JSON lines.

    Args:
      path: the file; "{split}" in it stands for the split. Without, there is only "train".
      split: train, val or test.
      images: the folder that paths of images and clips are relative to.
      text_only: accept rows without an image.
      images_per_row: the most images, or clips, of a row.
      skip: leave bad rows out and count them, instead of failing.
      exif: "apply" or "ignore" the EXIF orientation of images.
      left_out: where bad rows are counted; a check of the data keeps all of them.
      may_be_empty: whether a file without a usable row is accepted, as by a check of the data.
      frames: T, taken of each clip; 0: a row with a clip is bad.
    Raises:
      FileNotFoundError, ValueError: for a file that is not a LLaVA file, or (unless
        `may_be_empty`) without a usable row.
      BadExample: for the first bad row, unless `skip`.
    """

    name = "llava"

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
        left_out: Skips | None = None,
        may_be_empty: bool = False,
        frames: int = 0,
    ):
        super().__init__(
            split,
            existing_path(of_split(path, split, example="data/{split}.json")),
            text_only=text_only,
            images_per_row=images_per_row,
            left_out=left_out,
            frames=frames,
        )
        file_rows = read_rows(self.path)
        self._folder = Folder(images)
        rows = file_rows.rows
        self.read(
            rows,
            own_ids([row.get("id") if isinstance(row, dict) else None for row in rows]),
            lambda number: f"{self.path}, {file_rows.place(number)}",
            sha256=file_rows.sha256,
            exif=exif,
            skip=skip,
            may_be_empty=may_be_empty,
        )

    def named(self, row: dict) -> list[str]:
        """The paths that a row names."""
        images = listed(row.get("image"))
        if not all(isinstance(image, str) and image for image in images):
            raise Fault("image", f"`image` is {row['image']!r:.80}, not a path or a list of paths")
        return images

    def found(self, name: str) -> str:
        """The path of an image, with another suffix if there is no file of this name."""
        path = self._folder.find(name, suffixes=SUFFIXES)
        if path is None:
            raise Fault(
                "missing_image",
                f"no image {os.path.join(self._folder.root, name)}, nor with another suffix "
                f"({', '.join(SUFFIXES)}): check data.images={self._folder.root!r}",
            )
        return path

    def filmed(self, row: dict) -> list[str]:
        """The paths of the clips that a row names."""
        named = listed(row.get("video"))
        if not all(isinstance(clip, str) and clip for clip in named):
            raise Fault("video", f"`video` is {row['video']!r:.80}, not a path or a list of paths")
        return named

    def framed(self, name: str) -> tuple[Sequence[str | clips.Frame], int | None]:
        """Where the frames of a clip lie, and how many it has if that is known.

        ValueError for a clip in a video file if PyAV is not installed.
        """
        path = self._folder.find(name.rstrip("/"))
        if path is None:
            raise Fault(
                "missing_clip",
                f"no clip {os.path.join(self._folder.root, name)}: check "
                f"data.images={self._folder.root!r}",
            )
        if not os.path.isdir(path):
            clips.library()
        try:
            return clips.places(path, self._frames, name)
        except Unusable as error:
            raise Fault("empty_clip", f"clip {path} {error}") from None

    def counted(self) -> dict[str, Any]:
        """Images found with another suffix."""
        return {"renamed_images": self._folder.renamed}

    def changed(self) -> dict[str, int]:
        """Counts of changes, those of names too."""
        return super().changed() | {"respelled_images": self._folder.respelled}
