# SPDX-License-Identifier: Apache-2.0
"""A command is never silent for long: what it is doing, how far it is and since when, on stderr.

Whoever does something that may take long says so (`doing`), and how far it has come (`Task.note`).
While a command is `speaking`, a thread prints that after every 15 seconds in which nothing else was
printed. It is the standard library alone, so that it speaks while the others are imported.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 15.0  # seconds of silence before a line


class Task:
    """One thing that is being done: `done` of `total` so far, where they can be counted."""

    def __init__(self, what: str, total: int | None, began: float):
        self.what, self.total, self.began = what, total, began
        self.first: int | None = None
        self.done = 0

    def note(self, done: int) -> None:
        """So much of `total` is done; the first note says where this process began."""
        self.first = done if self.first is None else self.first
        self.done = done

    def line(self, now: float) -> str:
        """How far it is and for how long it has been done, and what is left by the same speed."""
        seconds = now - self.began
        text = self.what
        if self.total and self.first is not None:
            text += f": {self.done:,} of {self.total:,}"
        text += f", {duration(seconds)} so far"
        if self.total and self.first is not None and (fresh := self.done - self.first) > 0:
            text += f", about {duration(seconds / fresh * (self.total - self.done))} to go"
        return text


class Voice:
    """The tasks under way, outermost first, and when something was last said of them."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, every: float = EVERY):
        self.clock, self.every = clock, every
        self.tasks: list[Task] = []
        self.spoken = clock()
        self.base: Task | None = None
        self.waiting, self.stop = False, threading.Event()
        self.silent = False  # of a run of several processes one speaks

    def say(self, line: str) -> None:
        """Prints a line on stderr."""
        if self.silent:
            return
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # of a bar that stands there
        print(f"{clear}{line}", file=sys.stderr, flush=True)
        self.spoke()

    def spoke(self) -> None:
        """Something was printed: the silence begins anew."""
        self.spoken = self.clock()

    @contextmanager
    def doing(self, what: str, total: int | None = None) -> Iterator[Task]:
        """Says of the body that it does `what`, of which there are `total`."""
        task = Task(what, total, self.clock())
        self.tasks.append(task)
        try:
            yield task
        finally:
            self.tasks.remove(task)

    def beat(self) -> None:
        """Prints what is being done if nothing was printed for long."""
        now = self.clock()
        if self.silent or self.waiting or now - self.spoken < self.every:
            return
        under_way: list[Task | None] = [*self.tasks]
        task = under_way[-1] if under_way else self.base
        around = self.tasks[:-1]
        if task is not None:
            self.say(": ".join([*(outer.what for outer in around), task.line(now)]))

    @contextmanager
    def speaking(self, what: str) -> Iterator[None]:
        """A thread beats while the body runs; `what` is said where nothing better is known."""
        before, self.base = self.base, Task(what, None, self.clock())
        if before is None:
            self.stop = threading.Event()
            self.spoke()
            threading.Thread(target=self._beats, args=(self.stop,), daemon=True).start()
        try:
            yield
        finally:
            self.base = before
            if before is None:
                self.stop.set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Nothing is done but to wait for a person: silence."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.spoke()

    def _beats(self, stop: threading.Event) -> None:
        while not stop.wait(1.0):
            self.beat()


VOICE = Voice()
doing, say, spoke = VOICE.doing, VOICE.say, VOICE.spoke
speaking, listening = VOICE.speaking, VOICE.listening


def duration(seconds: int | float) -> str:
    """Hours, minutes and seconds, as 0:01:05."""
    whole = max(round(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
