# SPDX-License-Identifier: Apache-2.0
"""Rows of one length that are answered together: they join and leave between two tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from vlm_jax.models.cache import KV
from vlm_jax.serving.decoder import Sampling
from vlm_jax.serving.programs import Chunk, Programs, Read, Slots

# Steps in a row for which fewer rows would do, after which there are fewer: each change copies
# what the rows have in their caches.
PATIENCE = 8


class Result(NamedTuple):
    """New tokens on their way from the device: row `k` of `ids` is the next one of `members[k]`."""

    members: dict[int, Any]
    ids: Array
    logits: Array


def ladder(least: int, most: int) -> tuple[int, ...]:
    """From `least` to `most`, each four times the one before but the last."""
    found = [min(least, most)]
    while found[-1] < most:
        found.append(min(4 * found[-1], most))
    return tuple(found)


def rungs_of(slots: int) -> tuple[int, ...]:
    """The numbers of rows for which a step is compiled: 1, 4, 16 ... and `slots`."""
    return ladder(1, slots)


class Pool:
    """At most `slots` rows with room for `length` tokens, read and new ones together, in the layers
    that hold fewest.

    Memory and time of a step are those of the smallest number of `rungs` that holds the members.
    """

    def __init__(self, programs: Programs, *, length: int, slots: int):
        self.programs, self.length, self.rungs = programs, length, rungs_of(slots)
        self.members: dict[int, Any] = {}  # row -> who is answered there
        self.reset()

    def reset(self) -> None:
        """Forgets all members, and what is in the caches."""
        self.members.clear()
        self.rung, self.spare = 0, 0
        self.slots: Slots | None = None

    @property
    def rows(self) -> int:
        """Rows of a step now."""
        return self.rungs[self.rung]

    @property
    def lost(self) -> bool:
        """Whether a program that failed has taken the caches with it."""
        return self.slots is not None and any(
            x.is_deleted() for x in jax.tree.leaves(self.slots.caches)
        )

    def join(self, member: Any, read: Chunk | Read, position: int, sampling: Sampling) -> None:
        """Takes a row that was read to `position`, whose first token is chosen already."""
        if self.slots is None:
            self.slots = self.programs.opened(self.length)
        if len(self.members) == self.rows:
            self.move(self.rung + 1)
        row = next(k for k in range(self.rows) if k not in self.members)
        given = row, read.ids, position, sampling
        self.slots = self.programs.insert(self.slots, read.caches, *given)
        self.members[row] = member

    def leave(self, row: int) -> None:
        """Frees a row for the next, and the memory of all behind the last."""
        del self.members[row]
        if not self.members:
            self.reset()

    def step(self) -> Result:
        """One more token of every row."""
        fewer = self.rungs[max(self.rung - 1, 0)]
        self.spare = self.spare + 1 if len(self.members) <= fewer < self.rows else 0
        if self.spare > PATIENCE:
            self.move(self.rung - 1)
        self.slots, logits = self.programs.step(self.slots)
        return Result(dict(self.members), self.slots.ids, logits)

    def move(self, rung: int) -> None:
        """Brings the members into the rows of another rung, the first ones."""
        members = list(self.members.items())
        index = [row for row, _ in members]
        index += [0] * (self.rungs[rung] - len(index))
        self.slots = self.programs.of_rows(self.slots, index)
        self.members.clear()
        self.members |= enumerate(member for _, member in members)
        self.rung, self.spare = rung, 0

    def row_of(self, member: Any) -> int:
        """The row in which a member is."""
        return next(row for row, found in self.members.items() if found is member)

    def block(self, row: int, start: int, length: int) -> list[KV]:
        """Keys and values of a part of a row."""
        return self.programs.block(self.slots.caches, row, start, length)

    def warm(self, join: Callable[[], None], length: int) -> None:
        """Runs every program once. `join` brings one member in; `length` is that of a block, 0
        where none is kept."""
        for rung in range(len(self.rungs)):
            if rung:
                self.move(rung)
            join()
            result = self.step()
            self.programs.likeliest(result.logits, result.ids)
            if length:
                self.block(0, 0, length)
        self.members.clear()
        for rung in reversed(range(len(self.rungs) - 1)):
            self.move(rung)
        self.reset()
