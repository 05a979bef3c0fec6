# SPDX-License-Identifier: Apache-2.0
"""Tar shards in the form of webdataset, read through an index and never unpacked.

Members that differ only after the first dot of their file names are one sample: 000.jpg and
000.json, or 000.0.jpg, 000.1.jpg and 000.json. The .json holds `conversations` as a LLaVA row does;
without one, the .txt is the answer to an image alone (a caption).
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax import progress
from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.data.paths import SUFFIXES, existing_path, of_split
from vlm_jax.data.pictures import Place
from vlm_jax.data.row_source import RowSource
from vlm_jax.data.rows import Fault, json_value, own_ids
from vlm_jax.data.skips import Skips

# The first bytes of compressed files -> what they are, and the command that unpacks them.
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "unzstd"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_SHARDS = 100_000


class Member(NamedTuple):
    """A file in a tar: its bytes lie from `start`, `size` of them."""

    name: str
    start: int
    size: int


class Sample(NamedTuple):
    """The members of one sample by what follows the key, and where it is: shard and key."""

    shard: Path
    key: str
    members: dict[str, Member]
    twice: str  # an ending that two members have


def expanded(path: str) -> list[Path]:
    """The shards that a path names: a tar, a folder of them, a pattern, or a range of numbers.

    {000..012} stands for 13 numbers of three digits, as in webdataset; * for any characters.

    Raises:
      ValueError: for a range that is empty or too large.
      FileNotFoundError: if a shard is not there, or no shard is.
    """
    if match := BRACES.search(path):
        low, high = match.groups()
        if not 0 <= int(high) - int(low) < MOST_SHARDS:
            raise ValueError(
                f"data.path={path!r}: {match.group()} is a range from {int(low)} to {int(high)}; "
                f"give the lower number first, and at most {MOST_SHARDS} shards"
            )
        numbers = range(int(low), int(high) + 1)
        names = [
            f"{path[: match.start()]}{number:0{len(low)}}{path[match.end() :]}"
            for number in numbers
        ]
        return [shard for name in names for shard in expanded(name)]
    place = existing_path(path)
    if place.is_dir():
        shards = sorted(place.glob("*.tar"))
        if not shards:
            raise FileNotFoundError(f"data.path={path!r}: this folder has no file named *.tar")
        return shards
    if not place.exists() and glob.has_magic(path):
        shards = sorted(map(Path, glob.glob(path)))
        if not shards:
            raise FileNotFoundError(f"data.path={path!r}: no file has such a name")
        return shards
    if not place.is_file():
        raise FileNotFoundError(
            f"no such file: {path}: set data.path to a tar, a folder of *.tar, or a name with "
            "{000..012} or * in it"
        )
    return [place]


def members_of(shard: Path) -> Iterator[Member]:
    """The files of a tar, in order; only headers are read.

    Raises:
      ValueError: if it is compressed, cut short, no tar, or has a link among its files.
    """
    with shard.open("rb") as file:
        head = file.read(8)
    for magic, (kind, command) in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{shard} is compressed ({kind}), so that nothing can be read from its middle: run "
                f"`{command}` on it; images inside are compressed already"
            )
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                if not info.isreg():
                    raise ValueError(
                        f"{shard}: {info.name!r:.80} is a link or a device, not a file: make the "
                        "tar with --dereference --hard-dereference"
                    )
                yield Member(info.name, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is no tar, or is cut short ({shard.stat().st_size} bytes): {error}; copy it "
            "again"
        ) from error


def samples_of(shard: Path) -> list[Sample]:
    """The samples of a tar, in the order of their first members.

    Raises:
      ValueError: as `members_of` does.
    """
    samples: dict[str, Sample] = {}
    for member in members_of(shard):
        folder, base = os.path.split(member.name)
        stem, _, ending = base.partition(".")
        key = os.path.join(folder, stem)
        sample = samples.setdefault(key, Sample(shard, key, {}, ""))
        if ending in sample.members:
            samples[key] = sample._replace(twice=ending)
        sample.members[ending] = member
    return list(samples.values())


class Tars(RowSource):
    """The samples of tar shards, in the order of shards and members.

    Args:
      path: what `expanded` takes; "{split}" in it stands for the split. Without, there is only
        "train".
      others: as for `Llava`.
    Attributes:
      unread: members that are neither image nor text, by ending.
    Raises:
      FileNotFoundError, ValueError: for shards that are not there or cannot be read, or (unless
        `may_be_empty`) without a usable sample.
      BadExample: for the first bad sample, unless `skip`.
    """

    name = "tars"

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
            of_split(path, split, example="data/{split}-{000..012}.tar"),
            text_only=text_only,
            images_per_row=images_per_row,
            left_out=left_out,
        )
        self.shards = expanded(self.path)
        self.unread: Counter[str] = Counter()
        of_all = hashlib.sha256()
        rows, places = [], []
        with progress.doing("reading the index of the tars", len(self.shards)) as task:
            for number, shard in enumerate(self.shards):
                task.note(number)
                with shard.open("rb") as file:

                    def content(member: Member, file: Any = file) -> bytes:
                        file.seek(member.start)
                        data = file.read(member.size)
                        of_all.update(data)
                        return data

                    for sample in samples_of(shard):
                        named = [(m.name, m.size) for m in sample.members.values()]
                        of_all.update(json.dumps(named).encode())
                        rows.append(self._row(sample, content))
                        places.append(f"{shard}, {sample.key}")
        ids = [row.get("id") if isinstance(row, dict) else None for row in rows]
        self.read(
            rows,
            own_ids(ids),
            places.__getitem__,
            sha256=of_all.hexdigest(),
            exif=exif,
            skip=skip,
            may_be_empty=may_be_empty,
        )

    def _row(self, sample: Sample, content: Callable[[Member], bytes]) -> dict | Fault:
        """A sample as a row; the paths of its images are places."""
        images, texts = {}, {}
        for ending, member in sample.members.items():
            last = "." + ending.rpartition(".")[2].lower()
            if last in SUFFIXES:
                images[ending] = member
            elif ending.lower() in ("json", "txt"):
                texts[ending.lower()] = member
            else:
                self.unread[ending] += 1
        if sample.twice:
            return Fault("repeated_key", f"two members end with .{sample.twice}: rename one")
        if not texts:
            endings = ", ".join(f".{ending}" for ending in sample.members)
            return Fault(
                "row",
                f"the sample has {endings:.80}: it needs a .json with `conversations`, or a .txt "
                "with a caption",
            )
        found = [
            Place(str(sample.shard), m.start, m.size, f"{sample.shard}:{m.name}")
            for _, m in sorted(images.items(), key=lambda one: _order(one[0]))
        ]
        row: dict[str, Any] = {}
        try:
            if "json" in texts:
                value = json_value(content(texts["json"]).decode())
                if not isinstance(value, dict):
                    return Fault("row", f"its .json holds a {type(value).__name__}, not an object")
                row = value
            if "conversations" not in row and "txt" in texts:
                caption = content(texts["txt"]).decode()
                asked = {"from": "human", "value": "\n".join([IMAGE_MARK] * len(found))}
                row["conversations"] = [asked, {"from": "gpt", "value": caption}]
        except UnicodeDecodeError as error:
            return Fault("text", f"its text is not UTF-8: {error}")
        except (ValueError, RecursionError) as error:
            return Fault("json", f"its .json is not JSON, or cut short: {error}")
        row["image"] = found
        if not isinstance(row.get("id"), (str, int)):
            row["id"] = sample.key
        return row

    def named(self, row: dict) -> list[Place]:
        """The images of a sample."""
        return row["image"]

    def found(self, name: Place) -> Place:
        """The place itself: it was found in the index."""
        return name

    def counted(self) -> dict[str, int]:
        """The number of shards."""
        return {"shards": len(self.shards)}

    def notes(self) -> list[str]:
        """Sentences for the user about how the shards were read."""
        sentences = super().notes()
        if self.unread:
            counts = ", ".join(f".{ending} {n}" for ending, n in self.unread.most_common(5))
            sentences.append(
                f"{self.path}: {self.unread.total()} members are neither image nor text and are "
                f"not read ({counts})"
            )
        return sentences


def _order(ending: str) -> tuple:
    """0.jpg, 1.jpg, ..., 10.jpg in the order of their numbers."""
    return tuple((0, int(x), "") if x.isdigit() else (1, 0, x) for x in ending.split("."))
