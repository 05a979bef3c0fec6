# SPDX-License-Identifier: Apache-2.0
"""Paths in a bucket (gs://BUCKET/..., s3://BUCKET/...), where the folder of a run may be.

An object appears whole when its upload ends, or not at all. A bucket has no renaming, no appending
and no locks, and a folder is only a common prefix of names. `files.py` builds on that what runs
need. Paths are those of etils, which have the methods of pathlib.

Orbax and tensorstore, which write the checkpoints, support only gs:// and s3://.
"""

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# The package that reads and writes each kind, and what to install for it.
PACKAGES = {"gs": ("gcsfs", "vlm_jax[gcs]"), "s3": ("s3fs", "s3fs")}

PROTOCOLS = {"gs": "gcs"}  # fsspec's other name of a scheme


def is_bucket(path: Any) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def path_of(path: Any) -> Any:
    """An absolute pathlib path, or an etils path in a bucket.

    Raises:
      ValueError: for an unknown kind of bucket, or without the package that reads it.
    """
    text = os.fspath(path)
    if not is_bucket(text):
        return Path(text).absolute()
    scheme = text.partition("://")[0]
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ValueError(f"{text}: known buckets are {known}; or give a folder on a disk")
    package, extra = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{text} needs {package}: pip install '{extra}'")
    from etils import epath
    from fsspec.config import conf

    # A listing that is kept has the sizes and names of then: another process's lines would be cut
    # off where the file ended, and its files would not exist.
    for name in {scheme, PROTOCOLS.get(scheme, scheme)}:
        conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return epath.Path(text)


def put(path: Any, data: bytes, *, new: bool = False) -> bool:
    """Writes an object; with `new` only if it does not exist. Returns whether it was written."""
    filesystem, name = filesystem_of(path)
    try:
        filesystem.pipe_file(name, data, mode="create" if new else "overwrite")
    except FileExistsError:
        return False
    finally:
        filesystem.invalidate_cache()
    return True


def upload(source: Path, path: Any) -> None:
    """Copies a file, or the files of a folder one after another, to a path in a bucket."""
    filesystem, name = filesystem_of(path)
    for file in sorted(p for p in (source, *source.rglob("*")) if p.is_file()):
        target = name if file == source else f"{name}/{file.relative_to(source).as_posix()}"
        filesystem.put_file(str(file), target)
    filesystem.invalidate_cache()


def download(path: Any) -> Path:
    """A copy of a file or folder on this machine's disk, removed when the process ends.

    Raises:
      FileNotFoundError: if it does not exist.
    """
    filesystem, name = filesystem_of(path)
    home = Path(tempfile.mkdtemp(prefix="vlm-jax-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    copy = home / Path(name).name
    filesystem.get(name, str(copy), recursive=filesystem.isdir(name))
    return copy


def filesystem_of(path: Any) -> tuple[Any, str]:
    """The fsspec filesystem of a path, and the path's name in it."""
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))
