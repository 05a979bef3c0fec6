# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all: made beside their place, synced, renamed into it.

Whoever reads a path, now or after a crash, finds all of the old content or all of the new. What
is written later (a checkpoint behind its configuration) never reaches the disk without it. New
files have the permissions that `open` gives them. A link is followed.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal


def write_text(path: str | Path, text: str) -> None:
    """Replaces a file by `text` in UTF-8, line ends as they are.

    Raises:
      OSError: where it cannot be written; the old file is still there.
    """
    with writing(path) as file:
        file.write(text)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces a file by these bytes; raises as `write_text` does."""
    with writing(path, "wb") as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Replaces a file by a value as indented JSON, keys in order; raises as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True))


@contextmanager
def writing(path: str | Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A stream of text ("w", UTF-8, line ends as they are) or bytes ("wb") that replaces a file
    when the body ends well; otherwise it is removed and the old file stays.

    Several processes may write one path at once: the last to finish wins, whole.
    """
    path = Path(os.path.realpath(path))
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
    with _put(fresh, path), open(fresh, mode, **text) as file:  # type: ignore[call-overload]
        yield file


@contextmanager
def making(path: str | Path) -> Iterator[Path]:
    """A path at which the body makes a file or a folder that then replaces what lies at `path`.

    It is PATH.tmp, so that what a killed process left there goes first: for a place that no other
    process writes to. Folders above it are made.
    """
    path = Path(os.path.realpath(path))
    fresh = path.with_name(f"{path.name}.tmp")
    with _put(fresh, path):
        _remove(fresh)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        yield fresh


@contextmanager
def _put(fresh: Path, path: Path) -> Iterator[None]:
    """Renames `fresh` to `path` behind a body that ends well, removes it behind one that does not.

    An OSError names `path`: nobody has heard of the other.
    """
    try:
        yield
        for made in (fresh, *fresh.rglob("*")):
            _sync(made)
        if fresh.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(fresh, path)
        _sync(path.parent)
    except OSError as error:
        ours = error.filename and Path(os.fsdecode(error.filename)).is_relative_to(fresh)
        # What a stream raises for a full disk names no file.
        if ours or error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        _remove(fresh)


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
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
        # Some network disks sync no folder.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
