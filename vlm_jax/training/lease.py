# SPDX-License-Identifier: Apache-2.0
"""A folder belongs to one run at a time, whichever hosts the runs are on.

A lease file in the folder names the holder and is rewritten every few seconds. Another run takes
the folder if the holder is dead: a process of this machine that no longer runs, or one on another
machine whose file did not change for the time that it states. The clocks of two machines are not
compared; what counts is whether the file changes while it is watched.

On a disk the kernel's lock comes first: it is released when its holder dies. A bucket has no lock;
there the file is created only if it does not exist. Two runs that take a stale file at the same
time both write it, wait, and read which was last. A holder that reads another name in its file ends
at once. So two runs can overlap for one beat at most, and only if a live run was taken for dead.
"""

import fcntl
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm_jax import files, hosts, preemption, progress

NAME = ".lease.json"
BEAT, LIFE = 15.0, 60.0  # seconds between heartbeats; without one after which a holder is dead
SETTLE = 2.0  # seconds in which another run that takes the same stale file writes its name
POLL = 2.0  # seconds between two reads


class Busy(ValueError):
    """Another run holds the folder."""


def me() -> dict[str, Any]:
    """What identifies this process."""
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

    def read(self) -> dict[str, Any] | None:
        """The content of the file; None if it does not exist, empty if it cannot be parsed.

        Raises OSError if something else has its name, which no run wrote and none removes.
        """
        if isinstance(self.path, Path) and is_no_file(self.path):
            raise OSError(
                f"{self.path} is a folder, a pipe or a link to nothing, where a run keeps a file "
                "that names it: remove it, or choose another --workdir"
            )
        try:
            holding = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            holding = {}
        return holding if isinstance(holding, dict) else {}

    def take(self, *, dead: bool, wait: bool) -> None:
        """Takes the folder.

        Args:
          dead: whether the kernel's lock shows that no process of this machine holds it.
          wait: for a live holder to finish, instead of raising Busy.
        """
        seen, since = None, time.monotonic()
        with progress.doing(f"waiting for {self.folder}, which another run holds"):
            while not files.create(self.path, self.text()):
                current = self.read()
                if current is None:
                    continue
                here = (current.get("host"), current.get("boot")) == (
                    self.mine["host"],
                    self.mine["boot"],
                )
                if seen is None or current != seen:
                    if seen is not None and current.get("id") == seen.get("id") and not wait:
                        raise Busy(busy(self.folder, current))
                    seen, since = current, time.monotonic()
                gone = dead and here
                if gone or time.monotonic() - since > current.get("life", LIFE):
                    files.write_text(self.path, self.text())
                    if not gone:
                        time.sleep(SETTLE)
                    if (self.read() or {}).get("id") == self.mine["id"]:
                        return
                else:
                    time.sleep(POLL)

    def beat(self) -> None:
        """Writes heartbeats until `drop`; ends the process if another run took the folder."""
        while not self.stop.wait(BEAT):
            try:
                current = self.read()
                if current is not None and current.get("id") != self.mine["id"]:
                    reason = f"{self.folder} was taken by {holder(current)}: this run looked dead"
                    print(f"vlm-jax: {reason}, and ends", file=sys.stderr, flush=True)
                    hosts.fail(2, reason)
                    os._exit(2)
                files.write_text(self.path, self.text())
            except OSError as error:
                progress.say(f"{self.path} could not be written ({error}): trying again")

    def drop(self) -> None:
        """Releases the folder."""
        self.stop.set()
        with suppress(OSError):
            if (self.read() or {}).get("id") == self.mine["id"]:
                self.path.unlink()


def is_no_file(path: Path) -> bool:
    """Whether there is something of this name that is neither a file nor a link to one."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(mode) and not path.is_file()


def holder(lease: dict[str, Any]) -> str:
    """Who holds a folder, for a message."""
    if "host" not in lease:
        return "another run"
    return f"process {lease['pid']} of {lease['host']} ({lease.get('what', 'a run')})"


def busy(folder: Any, lease: dict[str, Any] | None) -> str:
    """Why a folder cannot be taken."""
    who = f" ({holder(lease)})" if lease and "host" in lease else ""
    return f"another run is using {folder}{who}: wait for it, or choose another --workdir"


@contextmanager
def held(folder: Any, what: str, *, wait: bool = False) -> Iterator[None]:
    """Creates and holds a folder for the body; one process of a run does it for all.

    Args:
      what: the work in the folder, for the messages of other runs.
      wait: for a live holder to finish.
    Raises:
      Busy: while another run holds it. OSError: for a disk that cannot be written, and where
        something else than a file has the lease's name.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            local = isinstance(folder, Path)
            file = stack.enter_context((folder / ".lock").open("w")) if local else None
        except OSError as error:
            raise OSError(
                f"cannot write to the folder {folder}: {error.strerror or error}; choose a folder "
                "on a disk with space that you may write to"
            ) from None
        lease = Lease(folder, what)
        if file is not None:
            try:
                # The kernel drops the lock when its holder dies, however it dies.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise Busy(busy(folder, lease.read())) from None
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
