# SPDX-License-Identifier: Apache-2.0
"""Examples and rows that are left out: counted once each, by reason, with the first ones named."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from vlm_jax import files

SHOWN = 3


@dataclass(frozen=True)
class Skip:
    """One example or row that is not used.

    Attributes:
      id: its id, or the place in its file. image: the path of the image, "" if not the reason.
      reason: what was wrong, in a sentence.
    """

    id: str
    image: str
    reason: str

    def __str__(self) -> str:
        text = self.reason if self.image in self.reason else f"{self.image}: {self.reason}"
        # A lone surrogate, which a path may hold, cannot be printed everywhere.
        return text.encode(errors="backslashreplace").decode()


class Skips:
    """Counts skipped examples, each number once.

    Attributes:
      kinds: kind -> count. first: number -> skip, the three of the lowest numbers.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.first: dict[int, Skip] = {}
        self._seen: set[int] = set()
        self._fresh: list[tuple[int, str, dict[str, str]]] = []
        self._path: PurePath | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, number: int, kind: str, skip: Skip) -> None:
        """Notes that the example of this number is skipped; without effect if that is known."""
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
            line = json.dumps({"number": number, "kind": kind, **asdict(skip)})
            with files.adding(self._path) as lines:
                lines.add(line)

    def include(self, others: "Skips", first: int) -> None:
        """Counts what another source left out, its numbers counted from `first`.

        Only its first ones are known by name; the others are numbered after them.
        """
        named = dict(others.first)
        self.kinds.update(others.kinds)
        self._seen.update(range(first, first + len(others)))
        self.first |= {first + place: skip for place, skip in enumerate(named.values())}
        self.first = dict(sorted(self.first.items())[:SHOWN])

    def share(self) -> None:
        """Notes what the other processes of the run skipped since they last shared; all call it."""
        fresh, self._fresh = self._fresh, []
        from vlm_jax import hosts  # the description of an example needs no JAX

        for found in hosts.collected(fresh):
            for number, kind, skip in found:
                self.add(number, kind, Skip(**skip))
        self._fresh = []

    def keep(self, path: PurePath) -> None:
        """Reads the notes of an earlier attempt from a file, and appends further ones to it."""
        if path.exists():
            # A killed run may have left half a line.
            text = path.read_text(encoding="utf-8")
            complete = text[: text.rfind("\n") + 1]
            for line in complete.splitlines():
                fields = json.loads(line)
                number, kind = fields.pop("number"), fields.pop("kind")
                self.add(number, kind, Skip(**fields))
            if complete != text:
                files.write_text(path, complete)
        self._path = path

    def fields(self) -> dict[str, Any]:
        """Fields for a JSON file: count, reasons and the first skips; {} if there are none."""
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
