# SPDX-License-Identifier: Apache-2.0
"""Files by the names that a data set gives them, however the disk spells those.

A name with an accent has two spellings in Unicode (NFC, NFD). Disks and archives change the one to
the other; the letters stay the same, and so does the file that is meant.
"""

import os
import unicodedata
from pathlib import Path

# Images that were renamed or are in truth of another kind (OCR-VQA: GIF named .jpg) are found by
# these.
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


class Folder:
    """Finds files below a folder; each directory is listed once, however many files it holds.

    Attributes:
      renamed: files found under another suffix. respelled: found in the other Unicode form.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        self._listed: dict[str, dict[str, str]] = {}
        self.renamed = self.respelled = 0

    def find(self, name: str, *, suffixes: tuple[str, ...] = ()) -> str | None:
        """The path of a file as the disk spells it; with another of `suffixes` where it has none as
        named. None where there is no such file."""
        folder, base = os.path.split(os.path.join(self.root, name))
        asked, folder = folder, self._spelled(folder)
        names = self._names(folder)
        if base in names or _composed(base) in names:
            found = _of(names, base)
            self.respelled += (asked, base) != (folder, found)
            return os.path.join(folder, found)
        stem = os.path.splitext(base)[0]
        for suffix in suffixes:
            for other in (stem + suffix, stem + suffix.upper()):
                if found := _of(names, other):
                    self.renamed += 1
                    return os.path.join(folder, found)
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
        """The folder as the disk spells it; unchanged where it is there as it is, or nowhere."""
        if folder.isascii() or self._names(folder):
            return folder
        real = os.sep if folder.startswith(os.sep) else ""
        for part in filter(None, folder.split(os.sep)):
            real = os.path.join(real, _of(self._names(real), part) or part)
        return real


def existing_path(path: str | Path) -> Path:
    """The path of a file that is there, in whichever Unicode form; else the path as given."""
    given = Path(path)
    try:
        if str(given).isascii() or given.exists():
            return given
    except (OSError, ValueError):
        return given
    found = Folder("").find(str(given))
    return Path(found) if found else given


def _of(names: dict[str, str], name: str) -> str | None:
    return names.get(name) or names.get(_composed(name))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
