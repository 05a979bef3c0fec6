# SPDX-License-Identifier: Apache-2.0
"""What was left out of a data set: counted once each, by reason, and the first of them by name."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_jax import files, hosts

SHOWN = 3


@dataclass(frozen=True)
class Skip:
    """One example or row that is not used.

    Attributes:
      id: its id, or the place in its file. image: the path of its image, "" where that is not why.
      reason: what was wrong, in a sentence.
    """

    id: str
    image: str
    reason: str

    def __str__(self) -> str:
        text = self.reason if self.image in self.reason else f"{self.image}: {self.reason}"
        # Half a character, which a path may hold, cannot be printed everywhere.
        return text.encode(errors="backslashreplace").decode()


class Skips:
    """Counts what is skipped, each number once however often it is met.

    Attributes:
      kinds: how many by kind. first: the three of the lowest number, by number.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.first: dict[int, Skip] = {}
        self._seen: set[int] = set()
        self._fresh: list[tuple[int, str, dict[str, str]]] = []
        self._path: Path | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, number: int, kind: str, skip: Skip) -> None:
        """Notes that what has this number is not used; nothing where that is known."""
        if number in self._seen:
            return
        self._seen.add(number)
        self._fresh.append((number, kind, asdict(skip)))
        self.kinds[kind] += 1
        self.first[number] = skip
        if len(self.first) > SHOWN:
            del self.first[max(self.first)]
        self.first = dict(sorted(self.first.items()))
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"number": number, "kind": kind, **asdict(skip)}) + "\n")

    def share(self) -> None:
        """Notes what the other processes of the run skipped since they last shared; all call it."""
        fresh, self._fresh = self._fresh, []
        for found in hosts.collected(fresh):
            for number, kind, skip in found:
                self.add(number, kind, Skip(**skip))
        self._fresh = []

    def keep(self, path: Path) -> None:
        """Reads what an earlier attempt noted in a file, and notes what follows there too."""
        if path.exists():
            # A killed run may have left half a line.
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            for line in whole.splitlines():
                fields = json.loads(line)
                number, kind = fields.pop("number"), fields.pop("kind")
                self.add(number, kind, Skip(**fields))
            if whole != text:
                files.write_text(path, whole)
        self._path = path

    def fields(self) -> dict[str, Any]:
        """For a file of numbers: how many, why, and the first by name; {} where there are none."""
        if not self:
            return {}
        return dict(
            skipped=len(self),
            skipped_reasons=dict(sorted(self.kinds.items())),
            first_skipped=[asdict(skip) for skip in self.first.values()],
        )

    def summary(self, of: int, what: str) -> str:
        """A sentence and the first by name, such as "3 of 40 examples were skipped ..."."""
        reasons = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items()))
        head = f"{len(self)} of {of} {what} ({reasons}); the first:"
        return "\n  ".join([head, *map(str, self.first.values())])
