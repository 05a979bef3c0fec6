# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file is written next to its target, synced and renamed.

A reader, also after a crash, sees all of the old content or all of the new. Files reach the disk
in the order in which they are written (a configuration before its checkpoint). New files have the
permissions that `open` gives them. Links are followed.

Paths may be in a bucket (`buckets.py`), where an object is whole or does not exist; a folder of
several files is copied there when it is complete, file by file.
"""

import errno
import io
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, Literal

from vlm_jax import buckets
from vlm_jax.buckets import is_bucket, path_of  # noqa: F401  # callers import them from here


def write_text(path: str | PurePath, text: str) -> None:
    """Replaces a file by `text` in UTF-8, line ends as they are.

    Raises:
      OSError: if it cannot be written; the old file is kept.
    """
    with writing(path) as file:
        file.write(text)


def write_bytes(path: str | PurePath, data: bytes) -> None:
    """Replaces a file by these bytes; raises as `write_text` does."""
    with writing(path, "wb") as file:
        file.write(data)


def write_json(path: str | PurePath, value: Any) -> None:
    """Replaces a file by a value as indented JSON, keys in order; raises as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True))


@contextmanager
def writing(path: str | PurePath, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A stream of text ("w", UTF-8, line ends as they are) or bytes ("wb") that replaces a file.

    The file is replaced when the body ends without an error; otherwise the old file stays. Several
    processes may write one path at once: the last to finish wins.
    A device or a pipe, such as /dev/stdout, is written to, not replaced.
    """
    if buckets.is_bucket(path):
        stream = io.BytesIO() if mode == "wb" else io.StringIO(newline="")
        yield stream
        content = stream.getvalue()
        buckets.put(path, content.encode() if isinstance(content, str) else content)
        return
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
    if _is_stream(path):
        with open(path, mode, **text) as file:  # type: ignore[call-overload]
            yield file
        return
    path = Path(os.path.realpath(path))
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with _put(fresh, path), open(fresh, mode, **text) as file:  # type: ignore[call-overload]
        yield file


@contextmanager
def making(path: str | PurePath) -> Iterator[Path]:
    """A path PATH.tmp for a file or a folder that replaces `path` when the body ends.

    Leftovers of a killed process at PATH.tmp are removed first, so only one process may write
    `path`. Parent folders are created.
    """
    if buckets.is_bucket(path):
        with tempfile.TemporaryDirectory(prefix="vlm-jax-") as home:
            yield Path(home, "made")
            buckets.upload(Path(home, "made"), path)
        return
    path = Path(os.path.realpath(path))
    fresh = path.with_name(f"{path.name}.tmp")
    with _put(fresh, path):
        _remove(fresh)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        yield fresh


def create(path: str | PurePath, text: str) -> bool:
    """Creates a file with this text unless it exists; returns whether this call created it.

    Raises:
      OSError: if it cannot be written.
    """
    if buckets.is_bucket(path):
        return buckets.put(path, text.encode(), new=True)
    path = Path(path)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.write_text(text, encoding="utf-8")
    try:
        os.link(fresh, path)
        return True
    except FileExistsError:
        return False
    finally:
        fresh.unlink()


def on_disk(path: Any) -> Path:
    """A path that any library can open; for a bucket, a copy that lasts as long as the process."""
    return buckets.download(path) if buckets.is_bucket(path) else Path(path)


def size(path: Any) -> int:
    """Bytes of a file."""
    stat = path.stat()
    return stat.length if buckets.is_bucket(path) else stat.st_size


@contextmanager
def copied(folder: Any, names: Iterable[str]) -> Iterator[Path]:
    """A folder on the disk with the named files of `folder`. Files that the body adds to it are in
    `folder` afterwards. For a folder on the disk it is `folder` itself."""
    if not buckets.is_bucket(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="vlm-jax-") as temporary:
        home, names = Path(temporary, folder.name), [n for n in names if (folder / n).exists()]
        home.mkdir()
        for name in names:
            (home / name).write_bytes((folder / name).read_bytes())
        yield home
        for name in names:
            (home / name).unlink()
        buckets.upload(home, folder)


class Lines:
    """A file that lines are appended to; a crash may cut off the last one.

    On a disk each line is written at once. In a bucket, which cannot append, the whole file is
    rewritten: at most once a minute, and by `save`.
    """

    EVERY = 60.0  # seconds

    def __init__(self, path: Any):
        self.path, self.bucket = path, buckets.is_bucket(path)
        if self.bucket:
            self.at = time.monotonic()
            self.text = self.written = path.read_text() if path.exists() else ""
        else:
            self.file = open(path, "a", encoding="utf-8")

    def add(self, line: str) -> None:
        """Appends a line, given without its line end."""
        if not self.bucket:
            self.file.write(line + "\n")
            self.file.flush()
            return
        self.text += line + "\n"
        if time.monotonic() - self.at > self.EVERY:
            self.save()

    def save(self) -> None:
        """Returns when all lines are written."""
        if self.bucket and self.text != self.written:
            write_text(self.path, self.text)
            self.written, self.at = self.text, time.monotonic()

    def close(self) -> None:
        """Saves and closes the file."""
        self.save()
        if not self.bucket:
            self.file.close()


@contextmanager
def adding(path: Any) -> Iterator[Lines]:
    """Lines for the body, closed when it ends."""
    lines = Lines(path)
    try:
        yield lines
    finally:
        lines.close()


@contextmanager
def _put(fresh: Path, path: Path) -> Iterator[None]:
    """Renames `fresh` to `path` after a body without an error, else removes it.

    An OSError names `path`, the name that the caller knows.
    """
    try:
        yield
        for entry in (fresh, *fresh.rglob("*")):
            _sync(entry)
        if fresh.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(fresh, path)
        _sync(path.parent)
    except OSError as error:
        of_fresh = error.filename and Path(os.fsdecode(error.filename)).is_relative_to(fresh)
        # The error of a stream on a full disk names no file.
        if of_fresh or error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        _remove(fresh)


def _is_stream(path: str | PurePath) -> bool:
    """Whether there is a device, a pipe or a socket, of which another file must not take the
    place."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _remove(path: Path) -> None:
    """Removes a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot sync folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
