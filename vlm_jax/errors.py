# SPDX-License-Identifier: Apache-2.0
"""Error messages as one line for the user."""

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path


def sentence(error: BaseException) -> str:
    """Error messages as one line for the user."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return of_file(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).strip().partition("\n")[0]
        return (
            f"out of memory{f' ({first})' if first else ''}: make the batch smaller, or the model, "
            "or spread it over more devices (mesh.fsdp, mesh.tensor)"
        )
    # str(KeyError) is the repr of its message, and paths come as PosixPath('...').
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    text = re.sub(r"\b(?:Posix|Windows|Pure\w*)?Path\('([^']*)'\)", r"\1", text)
    lines = [line.strip() for line in text.splitlines()]
    # The compiler's messages go on for pages.
    lines = lines[:1] if type(error).__name__ == "JaxRuntimeError" else lines
    return " ".join(lines) or type(error).__name__


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one; "" if none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean {near[0]}?" if near else ""


def of_file(error: OSError) -> str:
    """What went wrong with a file, without the number of the error."""
    path = Path(os.fsdecode(error.filename))
    match error.errno:
        case errno.ENOENT:
            parent = path.absolute().parent
            return f"there is no file {path}" if parent.is_dir() else f"there is no folder {parent}"
        case errno.EACCES | errno.EPERM:
            return f"{path} cannot be opened: give this user permission, or choose another"
        case errno.EISDIR:
            return f"{path} is a folder, not a file"
        case errno.ENOTDIR:
            return f"{path} is inside something that is not a folder"
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space is left for {path}: make room, or choose another disk"
        case errno.EROFS:
            return f"{path} is on a read-only disk: choose another"
    return f"{path}: {error.strerror}"
