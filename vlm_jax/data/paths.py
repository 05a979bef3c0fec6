# SPDX-License-Identifier: Apache-2.0
"""Finds files by the names in a data set, in either Unicode form and with other suffixes.

A name with an accent has two spellings in Unicode (NFC, NFD), and disks and archives change the one
to the other.
"""

import os
import unicodedata
from pathlib import Path

# Suffixes to try for images that were renamed or have another format (OCR-VQA: GIF named .jpg).
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


class Folder:
    """Finds files below a folder; each directory is listed only once.

    Attributes:
      renamed: files found under another suffix. respelled: found in the other Unicode form.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        self._listed: dict[str, dict[str, str]] = {}
        self.renamed = self.respelled = 0

    def find(self, name: str, *, suffixes: tuple[str, ...] = ()) -> str | None:
        """The path of a file as the disk spells it, or with another of `suffixes`.

        None if there is no such file.
        """
        folder, base = os.path.split(os.path.join(self.root, name))
        requested, folder = folder, self._spelled(folder)
        names = self._names(folder)
        if base in names or _composed(base) in names:
            spelled = _of(names, base)
            self.respelled += (requested, base) != (folder, spelled)
            return os.path.join(folder, spelled)
        stem = os.path.splitext(base)[0]
        for suffix in suffixes:
            for other in (stem + suffix, stem + suffix.upper()):
                if spelled := _of(names, other):
                    self.renamed += 1
                    return os.path.join(folder, spelled)
        return None

    def _names(self, folder: str) -> dict[str, str]:
        """The names in a folder, by themselves and by their composed form."""
        if folder not in self._listed:
            try:
                listed = os.listdir(folder or ".")
            except (OSError, ValueError):  # ValueError: a name with a NUL in it
                listed = []
            names = {name: name for name in listed}
            for name in sorted(listed):
                if not name.isascii():
                    names.setdefault(_composed(name), name)
            self._listed[folder] = names
        return self._listed[folder]

    def _spelled(self, folder: str) -> str:
        """The folder as the disk spells it; unchanged if it exists as given, or not at all."""
        if folder.isascii() or self._names(folder):
            return folder
        real = os.sep if folder.startswith(os.sep) else ""
        for part in filter(None, folder.split(os.sep)):
            real = os.path.join(real, _of(self._names(real), part) or part)
        return real


def of_split(path: str, split: str, *, example: str) -> str:
    """A path with its "{split}" filled in. Without one its files are all of "train".

    Raises:
      ValueError: for another split without one; `example` is a path that has one.
    """
    if "{split}" not in path and split != "train":
        raise ValueError(
            f"split {split!r} of {path!r}: without {{split}} in their name files are all training "
            f"data; set data.path to something like {example}"
        )
    return path.replace("{split}", split)


def existing_path(path: str | Path) -> Path:
    """The path of an existing file in either Unicode form; else the path as given."""
    requested = Path(path)
    try:
        if str(requested).isascii() or requested.exists():
            return requested
    except (OSError, ValueError):
        return requested
    spelled = Folder("").find(str(requested))
    return Path(spelled) if spelled else requested


def _of(names: dict[str, str], name: str) -> str | None:
    return names.get(name) or names.get(_composed(name))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
