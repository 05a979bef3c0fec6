# SPDX-License-Identifier: Apache-2.0
"""Answers are kept by what they depend on, so that no question is answered twice.

An entry is a file DIR/ab/cdef....json under the hash of the weights, the pixels, the ids, V and the
decoding. A folder ab holds a bounded number of them; a new one then replaces those that were read
longest ago. Several processes may share a DIR: files are replaced whole, and what another process
removes meanwhile is one more miss.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDERS = 256
MOST = 1 << 18  # entries; a file takes 4 KiB on most disks, so this is 1 GiB


class AnswerCache:
    """The answers in a folder.

    Attributes:
      hits: answers that were there. damaged: entries that could not be read or used.

    Args:
      fits: whether the fields of an entry are those of an answer; another one is damaged.
      most: entries that are kept, rounded up to the same number in each of 256 folders.
    Raises:
      OSError: if the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fits: Callable[[dict[str, Any]], bool],
        most: int = MOST,
    ):
        self.folder, self.fits = Path(folder), fits
        self.hits = self.damaged = 0
        self.each = max(-(-most // FOLDERS), 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.counts: dict[Path, int] = {}  # entries of a folder as far as this process knows

    def place(self, key: str) -> Path:
        """The file of a key, a hash of hexadecimal digits."""
        return self.folder / key[:2] / f"{key[2:]}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of a key, or None; a damaged one is none, and is counted."""
        path = self.place(key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            answer = entry["answer"]
            whole = entry["key"] == key and isinstance(answer, dict) and self.fits(answer)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            self.damaged += 1
            return None
        with suppress(OSError):
            os.utime(path)
        self.hits += 1
        return answer

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keeps an answer, which must be JSON.

        Raises:
          OSError: for a disk that cannot be written.
        """
        path = self.place(key)
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        fresh.write_text(json.dumps({"key": key, "answer": answer}), encoding="utf-8")
        os.replace(fresh, path)
        count = self.counts.get(path.parent)
        count = len(list(path.parent.glob("*.json"))) if count is None else count + 1
        self.counts[path.parent] = self.trimmed(path.parent) if count > self.each else count

    def trimmed(self, folder: Path) -> int:
        """Removes the entries of a folder that were read longest ago; how many are left.

        A tenth more than needed goes, so that not every new entry looks at all others.
        """
        aged = []
        for path in folder.glob("*.json"):
            with suppress(OSError):
                aged.append((path.stat().st_mtime_ns, path))
        kept = max(self.each - self.each // 10, 1)
        for _, path in sorted(aged)[: max(len(aged) - kept, 0)]:
            path.unlink(missing_ok=True)
        return min(len(aged), kept)
