# SPDX-License-Identifier: Apache-2.0
"""SIGTERM says that a machine is taken back: what is worth keeping is saved, the status is 42.

Where there is work to save, a loop is `held` and asks at every step whether to stop (`reached`);
the answer is the same step in all processes of a run. Elsewhere one process stops at once. A run
of several processes stops in its loops alone: one that left by itself would take the others down.

A second SIGTERM, a second or more after the first, ends the process at once.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = 42  # of a process that stopped because of SIGTERM and goes on when it is started again
# Seconds in which a second SIGTERM is part of the first: `timeout` sends it to a process and again
# to its group.
ONE_NOTICE = 1.0
# Seconds until a process is ended whose main thread does not answer, as in a compilation.
PATIENCE = 5.0


class Preempted(BaseException):
    """The run stops here and goes on from here when its command is repeated.

    Like KeyboardInterrupt it is no Exception: nothing that handles a failure handles it.
    """


class Notice:
    """What this process knows of SIGTERM."""

    def __init__(self) -> None:
        self.received = threading.Event()
        self.depth = 0  # of `held`
        self.asked = 0
        self.answered = threading.Event()  # the main thread stops by itself
        self.closed = threading.Event()
        self.last: list[Callable[[], None]] = []  # called before a process is ended from outside
        self.forward: Callable[[int], None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the body runs, SIGTERM is a notice. It must be the main thread's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for event in (self.received, self.answered, self.closed):
            event.clear()
        self.depth = 0
        before = signal.getsignal(signal.SIGTERM)
        # A signal handler of Python waits until the main thread is back in Python, which a
        # compilation may put off for minutes; what is written here is read by a thread at once.
        read, write = os.pipe()
        os.set_blocking(write, False)
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self.install()
        thread = threading.Thread(target=self.wait, args=(read,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.closed.set()
            signal.set_wakeup_fd(woken)
            os.close(write)
            thread.join()
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def install(self) -> None:
        """Takes SIGTERM; called again when jax.distributed has begun, which takes it for itself.

        JAX's handler, a function of C, is remembered: its service, which agrees on a step with the
        other processes, must hear of the signal too.
        """
        if distributed():
            libc = ctypes.CDLL(None)
            libc.signal.restype = ctypes.c_void_p
            libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
            theirs = libc.signal(signal.SIGTERM, None)
            if theirs and self.forward is None:
                self.forward = ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, *_: object) -> None:
        """Runs in the main thread: stops it where it stands, unless there is work to save."""
        self.received.set()
        if not self.depth and not distributed() and not self.answered.is_set():
            raise self.stopped("nothing was to be saved")

    def stopped(self, what: str) -> Preempted:
        """What the main thread raises to stop."""
        self.answered.set()
        return Preempted(f"SIGTERM: {what}")

    def wait(self, read: int) -> None:
        """The thread that hears of the signal, whatever the main thread does."""
        try:
            while signal.SIGTERM not in (heard := os.read(read, 64)):
                if not heard:
                    return
        finally:
            os.close(read)
        self.received.set()
        if self.forward is not None:
            self.forward(signal.SIGTERM)
        print("SIGTERM: stopping; a second one ends at once", file=sys.stderr, flush=True)
        if self.closed.wait(ONE_NOTICE):
            return
        # By the kernel from now on: it needs no thread of ours.
        ctypes.CDLL(None).signal(signal.SIGTERM, None)
        self.closed.wait(PATIENCE - ONE_NOTICE)
        stops = self.closed.is_set() or self.answered.is_set()
        if stops or self.depth or distributed():
            return
        for end in self.last:
            end()
        print("SIGTERM: nothing was to be saved", file=sys.stderr, flush=True)
        os._exit(STATUS)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The body has work to save: it asks `reached`, and is not stopped elsewhere."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if not self.depth and not distributed() and self.received.is_set():
            raise self.stopped("what was under way is saved")

    def reached(self) -> bool:
        """Whether to save and stop now. All processes ask equally often, and are told the same."""
        if not distributed():
            return self.received.is_set()
        from jax.experimental import multihost_utils

        self.asked += 1  # over all loops of the process: the service wants rising numbers
        return multihost_utils.reached_preemption_sync_point(self.asked)

    def point(self, what: str) -> None:
        """A place in a loop without work to save: Preempted if it is to stop here."""
        if self.reached():
            raise self.stopped(what)


def distributed() -> bool:
    """Whether this process is one of a run's several, as far as JAX was told; never imports it."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


NOTICE = Notice()
listening, held, reached, point = NOTICE.listening, NOTICE.held, NOTICE.reached, NOTICE.point
install, stopped = NOTICE.install, NOTICE.stopped
