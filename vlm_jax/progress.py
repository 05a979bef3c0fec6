# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr: what a command is doing, how far it is and for how long.

Code that may take long opens a task (`doing`) and reports its progress (`Task.note`). While a
command is `speaking`, a thread prints the task after every 15 seconds without other output. This
file imports only the standard library, so that it works while other libraries are imported.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 15.0  # seconds of silence before a line


class Task:
    """One task: `done` of `total` so far, if they can be counted."""

    def __init__(self, what: str, total: int | None, began: float):
        self.what, self.total, self.began = what, total, began
        self.first: int | None = None
        self.done = 0

    def note(self, done: int) -> None:
        """Sets how much of `total` is done; the first note is where this process began."""
        self.first = done if self.first is None else self.first
        self.done = done

    def line(self, now: float) -> str:
        """The progress, the time so far, and the remaining time at the same speed."""
        seconds = now - self.began
        text = self.what
        if self.total and self.first is not None:
            text += f": {self.done:,} of {self.total:,}"
        text += f", {duration(seconds)} so far"
        if self.total and self.first is not None and (fresh := self.done - self.first) > 0:
            text += f", about {duration(seconds / fresh * (self.total - self.done))} to go"
        return text


class Voice:
    """The running tasks, outermost first, and the time of the last output."""

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
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # of a progress bar on this line
        print(f"{clear}{line}", file=sys.stderr, flush=True)
        self.spoke()

    def spoke(self) -> None:
        """Notes that something was printed: the silence starts again."""
        self.spoken = self.clock()

    @contextmanager
    def doing(self, what: str, total: int | None = None) -> Iterator[Task]:
        """A task for the body: it does `what`, in `total` steps if that is known."""
        task = Task(what, total, self.clock())
        self.tasks.append(task)
        try:
            yield task
        finally:
            self.tasks.remove(task)

    def beat(self) -> None:
        """Prints the current task if nothing was printed for `every` seconds."""
        now = self.clock()
        if self.silent or self.waiting or now - self.spoken < self.every:
            return
        running: list[Task | None] = [*self.tasks]
        task = running[-1] if running else self.base
        around = self.tasks[:-1]
        if task is not None:
            self.say(": ".join([*(outer.what for outer in around), task.line(now)]))

    @contextmanager
    def speaking(self, what: str) -> Iterator[None]:
        """Prints progress in a thread while the body runs; `what` is used outside of any task."""
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
        """No output while the body waits for input from the user."""
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
    """Hours, minutes and seconds, such as 0:01:05."""
    total = max(round(seconds), 0)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"
