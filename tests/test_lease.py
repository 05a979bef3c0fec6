# SPDX-License-Identifier: Apache-2.0
"""A folder belongs to one run, whichever host holds it, and to the next when that one is gone."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import tiny

from vlm_jax.training import lease

# Another process that holds a folder until it is killed or its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from vlm_jax.training import lease
lease.BEAT = 0.2
{change}
with lease.held(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    sys.stdin.read()
"""
# A process of another host: its machine has another name, and the kernel's lock is not shared.
ELSEWHERE = """
import fcntl
lease.socket.gethostname = lambda: "elsewhere"
lease.fcntl.flock = lambda *a: None
"""


@pytest.fixture
def quick(monkeypatch):
    """Seconds of a test."""
    for name, seconds in (("BEAT", 0.2), ("LIFE", 1.0), ("SETTLE", 0.1), ("POLL", 0.05)):
        monkeypatch.setattr(lease, name, seconds)


def holder(folder, change=""):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(change=change), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tiny.ROOT,
    )  # fmt: skip
    assert process.stdout.readline() == b"held\n"
    return process


def take(folder, **how):
    with lease.held(folder, "mine", **how):
        return json.loads((folder / lease.NAME).read_text())


def test_a_holder_on_this_machine_is_named_and_what_it_leaves_is_free_at_once(tmp_path, quick):
    other = holder(tmp_path)
    with pytest.raises(lease.Busy, match=f"process {other.pid} of .*a test.*: wait for it, or"):
        take(tmp_path)
    other.kill()
    other.communicate()
    assert (tmp_path / lease.NAME).exists()  # killed: nobody removed it
    then = time.monotonic()
    assert take(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - then < lease.LIFE
    assert not (tmp_path / lease.NAME).exists()


def test_a_holder_elsewhere_is_refused_while_it_lives_and_followed_when_it_is_dead(tmp_path, quick):
    other = holder(tmp_path, ELSEWHERE)
    with pytest.raises(lease.Busy, match="of elsewhere"):
        take(tmp_path)
    other.kill()
    other.communicate()
    found = json.loads((tmp_path / lease.NAME).read_text()) | {"life": lease.LIFE}
    (tmp_path / lease.NAME).write_text(json.dumps(found))
    then = time.monotonic()
    assert take(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - then > lease.LIFE


@pytest.mark.slow
def test_one_who_waits_is_next(tmp_path, quick):
    other = holder(tmp_path, ELSEWHERE)
    threading.Timer(1.0, other.stdin.close).start()
    assert take(tmp_path, wait=True)["what"] == "mine"
    other.wait()


def test_of_two_that_find_nothing_one_holds(tmp_path, quick):
    # On a disk and in a bucket alike it is the making of the file that decides.
    first, second = (lease.Lease(tmp_path, "x") for _ in range(2))
    first.take(dead=False, wait=False)
    threading.Thread(target=first.beat, daemon=True).start()
    with pytest.raises(lease.Busy):
        second.take(dead=False, wait=False)
    first.drop()
    second.take(dead=False, wait=False)
    second.drop()


def test_a_run_that_was_thought_dead_ends_when_it_sees_its_successor(tmp_path):
    other = holder(tmp_path, ELSEWHERE)
    (tmp_path / lease.NAME).write_text(json.dumps(lease.me() | {"beat": 1}))
    assert other.wait(timeout=30) == 2
    assert (tmp_path / lease.NAME).exists()  # and leaves it what is no longer its own


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere"), os.mkfifo,
], ids=["folder", "link to nothing", "pipe"])  # fmt: skip
def test_what_no_run_wrote_is_named_and_not_waited_for(make, tmp_path, quick):
    make(tmp_path / lease.NAME)
    words = f"{tmp_path / lease.NAME} is a folder, .*: remove it, or choose another --workdir"
    with pytest.raises(OSError, match=words):
        take(tmp_path, wait=True)
    assert os.path.lexists(tmp_path / lease.NAME)  # it is not ours to remove


def test_a_link_to_a_lease_is_a_lease(tmp_path, quick):
    (tmp_path / "elsewhere").write_text(json.dumps(lease.me() | {"beat": 1}))
    (tmp_path / lease.NAME).symlink_to("elsewhere")
    assert take(tmp_path)["pid"] == os.getpid()
