# SPDX-License-Identifier: Apache-2.0
"""SIGTERM means that the machine is preempted: work is saved, and the exit status is 42.

A loop with work to save is `held` and asks at every step whether to stop (`reached`); all processes
of a run stop at the same step. Elsewhere a single process stops at once, and says what it is
`keeping`. A run of several processes stops only in its loops: a process that left alone would take
the others down.

A second SIGTERM, a second or more after the first, ends the process at once.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

NOTHING = "there was nothing to save"
STATUS = 42  # of a process that stopped after SIGTERM and continues when it is started again
# Seconds in which a second SIGTERM counts as part of the first: `timeout` signals a process and
# then its group.
ONE_NOTICE = 1.0
# Seconds after which a process is ended if its main thread does not react, as in a compilation.
PATIENCE = 5.0


class Preempted(BaseException):
    """The run stops here and continues from here when its command is repeated.

    Like KeyboardInterrupt it is not an Exception, so that no handler of failures catches it.
    """


class Notice:
    """The state of SIGTERM handling in this process."""

    def __init__(self) -> None:
        self.received = threading.Event()
        self.depth = 0  # of `held`
        self.polls = 0
        self.answered = threading.Event()  # set when the main thread stops by itself
        self.closed = threading.Event()
        self.last: list[Callable[[], None]] = []  # called before a process is ended from outside
        self.kept = NOTHING  # what is said where nothing is held
        self.forward: Callable[[int], None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the body runs, SIGTERM is a notice. Only the main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for event in (self.received, self.answered, self.closed):
            event.clear()
        self.depth = 0
        before = signal.getsignal(signal.SIGTERM)
        # A Python signal handler runs only when the main thread is back in Python, which may take
        # minutes in a compilation. The wake-up pipe is read by a thread at once.
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
            os.close(read)  # not sooner: a second signal would be written to a broken pipe
            self.received.clear()  # it was for this body, not for what the process does later
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def install(self) -> None:
        """Installs the handler; called again after jax.distributed starts, which replaces it.

        JAX's handler, a C function, is kept and called too: its service agrees on a step with the
        other processes.
        """
        if distributed():
            libc = ctypes.CDLL(None)
            libc.signal.restype = ctypes.c_void_p
            libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
            handler = libc.signal(signal.SIGTERM, None)
            if handler and self.forward is None:
                self.forward = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, *_: object) -> None:
        """Runs in the main thread: stops it at once unless there is work to save."""
        self.received.set()
        if not self.depth and not distributed() and not self.answered.is_set():
            raise self.stopped(self.kept)

    def stopped(self, what: str) -> Preempted:
        """The exception that the main thread raises to stop."""
        self.answered.set()
        return Preempted(f"SIGTERM: {what}")

    def wait(self, read: int) -> None:
        """Runs in a thread that sees the signal, even while the main thread is busy."""
        while signal.SIGTERM not in (heard := os.read(read, 64)):
            if not heard:
                return
        self.received.set()
        if self.forward is not None:
            self.forward(signal.SIGTERM)
        print("SIGTERM: stopping; a second one ends at once", file=sys.stderr, flush=True)
        if self.closed.wait(ONE_NOTICE):
            return
        # From now on the kernel ends the process: that needs no thread.
        ctypes.CDLL(None).signal(signal.SIGTERM, None)
        self.closed.wait(PATIENCE - ONE_NOTICE)
        stops = self.closed.is_set() or self.answered.is_set()
        if stops or self.depth or distributed():
            return
        for end in reversed(self.last):
            with suppress(Exception):  # the process ends in any case
                end()
        print(f"SIGTERM: {self.kept}", file=sys.stderr, flush=True)
        os._exit(STATUS)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The body has work to save: it asks `reached`, and is stopped nowhere else."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if not self.depth and not distributed() and self.received.is_set():
            raise self.stopped("the work in progress is saved")

    @contextmanager
    def keeping(self, kept: str, save: Callable[[], None] = lambda: None) -> Iterator[None]:
        """The body may stop anywhere: `kept` is said then, what is there already and what the same
        command does with it. `save` is called if the process has to be ended from outside."""
        before, self.kept = self.kept, kept
        self.last.append(save)
        try:
            yield
        finally:
            self.kept = before
            self.last.remove(save)

    def reached(self) -> bool:
        """Whether to save and stop now. All processes ask equally often and get the same answer."""
        if not distributed():
            return self.received.is_set()
        from jax.experimental import multihost_utils

        self.polls += 1  # over all loops of the process: the service needs increasing numbers
        return multihost_utils.reached_preemption_sync_point(self.polls)

    def point(self, what: str) -> None:
        """Raises Preempted if a loop without work to save should stop here."""
        if self.reached():
            raise self.stopped(what)


def distributed() -> bool:
    """Whether jax.distributed runs in this process; does not import JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


NOTICE = Notice()
listening, held, reached, point = NOTICE.listening, NOTICE.held, NOTICE.reached, NOTICE.point
install, stopped, keeping = NOTICE.install, NOTICE.stopped, NOTICE.keeping
