# SPDX-License-Identifier: Apache-2.0
"""A folder belongs to one run at a time, whichever hosts the runs are on.

A file in the folder says who holds it, and is written anew every few seconds. Who finds it takes
the folder if the holder is gone: a process of this machine that no longer runs, or one elsewhere
that gave no sign of life for as long as its file promises. Clocks of two machines are not compared;
what counts is whether the file changes while it is watched.

On a disk the kernel's own lock comes first: it is free the moment its holder dies. A bucket has
none; there the file is made on the condition that it is not there. Two that take a stale file at
the same time both write it, wait, and read who was last; a holder that finds another's name in its
file ends at once. So two runs can overlap for one beat at most, and only where one was thought dead
and was not.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm_jax import files, hosts, preemption, progress

NAME = ".lease.json"
BEAT, LIFE = 15.0, 60.0  # seconds between signs of life; without one after which a holder is gone
SETTLE = 2.0  # seconds in which another that takes the same stale file writes its name
POLL = 2.0  # seconds between two looks


class Busy(ValueError):
    """Another run holds the folder."""


def me() -> dict[str, Any]:
    """What tells this process from all others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else ""
    return dict(host=socket.gethostname(), boot=machine, pid=os.getpid(), id=secrets.token_hex(8))


class Lease:
    """The file in one folder, held by this process from `take` to `drop`."""

    def __init__(self, folder: Any, what: str):
        self.path, self.folder = folder / NAME, folder
        self.mine = me() | {"what": what}
        self.beats = 0
        self.stop = threading.Event()

    def text(self) -> str:
        self.beats += 1
        return json.dumps(self.mine | {"beat": self.beats, "life": LIFE}) + "\n"

    def found(self) -> dict[str, Any] | None:
        """What the file says; None where it is not there, and no holder where it is unreadable."""
        try:
            said = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            said = {}
        return said if isinstance(said, dict) else {}

    def take(self, *, dead: bool, wait: bool) -> None:
        """Takes the folder.

        Args:
          dead: no process of this machine holds it, as the kernel knows.
          wait: until a live holder is done, instead of raising Busy.
        """
        seen, since = None, time.monotonic()
        with progress.doing(f"waiting for {self.folder}, which another run holds"):
            while not files.create(self.path, self.text()):
                now = self.found()
                if now is None:
                    continue
                here = (now.get("host"), now.get("boot")) == (self.mine["host"], self.mine["boot"])
                if seen is None or now != seen:
                    if seen is not None and now.get("id") == seen.get("id") and not wait:
                        raise Busy(busy(self.folder, now))
                    seen, since = now, time.monotonic()
                gone = dead and here
                if gone or time.monotonic() - since > now.get("life", LIFE):
                    files.write_text(self.path, self.text())
                    if not gone:
                        time.sleep(SETTLE)
                    if (self.found() or {}).get("id") == self.mine["id"]:
                        return
                else:
                    time.sleep(POLL)

    def beat(self) -> None:
        """Signs of life, until `drop`; ends the process where another has taken the folder."""
        while not self.stop.wait(BEAT):
            try:
                now = self.found()
                if now is not None and now.get("id") != self.mine["id"]:
                    said = f"{self.folder} was taken by {holder(now)}: this run was thought dead"
                    print(f"vlm-jax: {said}, and ends", file=sys.stderr, flush=True)
                    hosts.fail(2, said)
                    os._exit(2)
                files.write_text(self.path, self.text())
            except OSError as error:
                progress.say(f"{self.path} could not be written ({error}): trying again")

    def drop(self) -> None:
        """Gives the folder back."""
        self.stop.set()
        with suppress(OSError):
            if (self.found() or {}).get("id") == self.mine["id"]:
                self.path.unlink()


def holder(said: dict[str, Any]) -> str:
    """Who holds a folder, for a message."""
    if "host" not in said:
        return "another run"
    return f"process {said['pid']} of {said['host']} ({said.get('what', 'a run')})"


def busy(folder: Any, said: dict[str, Any] | None) -> str:
    """Why a folder cannot be had."""
    who = f" ({holder(said)})" if said and "host" in said else ""
    return f"another run is at work in {folder}{who}: wait for it, or choose another --workdir"


@contextmanager
def held(folder: Any, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds a folder, which is made, for the body: one process of a run does it for all.

    Args:
      what: is being done there, for the messages of others.
      wait: for a live holder to be done.
    Raises:
      Busy: while another run holds it. OSError: for a disk that cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            local = isinstance(folder, Path)
            file = stack.enter_context((folder / ".lock").open("w")) if local else None
        except OSError as error:
            raise OSError(
                f"cannot write to --workdir={folder}: {error.strerror or error}; choose a folder "
                "on a disk with space that you may write to"
            ) from None
        lease = Lease(folder, what)
        if file is not None:
            try:
                # The kernel drops the lock when its holder dies, however it dies.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise Busy(busy(folder, lease.found())) from None
                with progress.doing(f"waiting for {folder}, which another run holds"):
                    fcntl.flock(file, fcntl.LOCK_EX)
        lease.take(dead=file is not None, wait=wait)
        threading.Thread(target=lease.beat, daemon=True).start()
        preemption.NOTICE.last.append(lease.drop)
        try:
            yield
        finally:
            preemption.NOTICE.last.remove(lease.drop)
            lease.drop()
