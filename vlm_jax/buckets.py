# SPDX-License-Identifier: Apache-2.0
"""Paths in a bucket (gs://BUCKET/..., s3://BUCKET/...), where a folder of a run may lie.

An object appears whole when its upload ends, or not at all. There is nothing else of a disk: no
renaming, no adding to the end, no lock, and a folder is what names begin with. `files.py` makes
of that what runs need; paths are those of etils, which have the methods of pathlib's.

Orbax and tensorstore, which write the checkpoints, know gs:// and s3:// alone.
"""

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# What reads and writes each of them, and the extra that installs it.
PACKAGES = {"gs": ("gcsfs", "vlm_jax[gcs]"), "s3": ("s3fs", "s3fs")}


def is_bucket(path: Any) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def path_of(path: Any) -> Any:
    """A path of pathlib, absolute, or one of etils in a bucket.

    Raises:
      ValueError: for a bucket that is not known, or without the package that reads it.
    """
    text = os.fspath(path)
    if not is_bucket(text):
        return Path(text).absolute()
    scheme = text.partition("://")[0]
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ValueError(f"{text}: of buckets {known} are known; or give a folder of a disk")
    package, extra = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{text} needs {package}: pip install '{extra}'")
    from etils import epath

    return epath.Path(text)


def put(path: Any, data: bytes, *, new: bool = False) -> bool:
    """Makes or replaces an object; with `new` only where there is none. Whether it was written."""
    filesystem, name = opened(path)
    try:
        filesystem.pipe_file(name, data, mode="create" if new else "overwrite")
    except FileExistsError:
        return False
    finally:
        filesystem.invalidate_cache()
    return True


def upload(made: Path, path: Any) -> None:
    """Copies a file, or the files of a folder one after another, to a path in a bucket."""
    filesystem, name = opened(path)
    for file in sorted(p for p in (made, *made.rglob("*")) if p.is_file()):
        target = name if file == made else f"{name}/{file.relative_to(made).as_posix()}"
        filesystem.put_file(str(file), target)
    filesystem.invalidate_cache()


def download(path: Any) -> Path:
    """A copy of a file or folder on this machine's disk, which goes when the process ends.

    Raises:
      FileNotFoundError: where there is none.
    """
    filesystem, name = opened(path)
    home = Path(tempfile.mkdtemp(prefix="vlm-jax-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    copy = home / Path(name).name
    filesystem.get(name, str(copy), recursive=filesystem.isdir(name))
    return copy


def opened(path: Any) -> tuple[Any, str]:
    """The filesystem of fsspec that a path is in, and its name there."""
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))
