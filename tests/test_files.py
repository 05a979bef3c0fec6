# SPDX-License-Identifier: Apache-2.0
"""A file is all of the old or all of the new, whatever happens while it is written."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax import errors, files

OLD, NEW = "old" * 1000, "new" * 2000
HOME = Path(__file__).parent.parent

# Where a file is written in place, and why that leaves no half of one to be taken for a whole.
IN_PLACE = {
    "vlm_jax/fetch.py": "in a folder that appears when it is whole",
    "vlm_jax/weights/": "in a folder that appears when it is whole",
    "vlm_jax/data/skips.py": "a line is added, half of one is dropped by the reader",
    "vlm_jax/training/log.py": "a line is added, half of one is dropped by the reader",
    "vlm_jax/training/arrays.py": "in a folder that orbax renames when it is whole",
    "vlm_jax/training/lease.py": "the lock of the kernel, an empty file",
    "vlm_jax/serving/answer_cache.py": "renamed when whole; a damaged entry is none",
    "vlm_jax/serving/request_files.py": "answers line by line, as they come",
}
WRITES = re.compile(
    r"\.write_(text|bytes)\(|\bopen\((.*, )?\"[wax]|\bos\.(replace|rename|fsync)\(|\.rename\("
)


@pytest.fixture
def path(tmp_path):
    files.write_text(tmp_path / "a.json", OLD)
    return tmp_path / "a.json"


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_written_is_what_is_read(tmp_path):
    text = "ä\r\n\u2028b\n"
    files.write_text(tmp_path / "a", text)
    assert (tmp_path / "a").read_bytes() == text.encode()
    files.write_bytes(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    files.write_json(tmp_path / "a", {"b": 1, "a": [2]})
    assert (tmp_path / "a").read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}'
    assert os.listdir(tmp_path) == ["a"]


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(path):
    program = (
        "import os, signal, sys\nfrom vlm_jax import files\n"
        "with files.writing(sys.argv[1]) as file:\n"
        " file.write('new' * 999); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], timeout=60)
    assert done.returncode == -signal.SIGKILL and path.read_text() == OLD
    files.write_text(path, NEW)  # what the other left is in nobody's way
    assert path.read_text() == NEW


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(call, path, monkeypatch):
    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError) as raised:
        files.write_text(path, NEW)
    assert errors.sentence(raised.value).startswith(f"no space is left for {path}: make room")
    monkeypatch.undo()
    assert path.read_text() == OLD and os.listdir(path.parent) == [path.name]


def test_an_error_in_the_middle_passes_as_it_is_and_leaves_the_old_file(path):
    with pytest.raises(FileNotFoundError) as raised, files.writing(path) as file:
        file.write(NEW)
        open(path.parent / "b")
    assert raised.value.filename == path.parent / "b" or raised.value.filename.endswith("b")
    with pytest.raises(KeyboardInterrupt), files.making(path) as fresh:
        fresh.write_text(NEW)
        raise KeyboardInterrupt
    assert path.read_text() == OLD and os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_missing_is_named_and_not_the_file_beside_it(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        files.write_text(tmp_path / "no/a", NEW)
    assert errors.sentence(raised.value) == f"there is no folder {tmp_path}/no"


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_permissions_of_the_umask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "a", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_content_and_folder_are_on_the_disk_before_and_after_the_file_is_renamed(path, monkeypatch):
    called = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        called.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def replaced(fresh, to):
        called.append("renamed")
        assert fresh.read_text() == NEW
        replace(fresh, to)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    files.write_text(path, NEW)
    assert called[1:] == ["renamed", str(path.parent)] and called[0].endswith(".tmp")


def test_a_link_is_followed(path):
    (path.parent / "link").symlink_to(path)
    files.write_text(path.parent / "link", NEW)
    assert path.read_text() == NEW and (path.parent / "link").is_symlink()


def test_a_folder_replaces_a_folder_and_what_a_killed_process_left(tmp_path):
    for name in ("a", "a.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(OLD)
    with files.making(tmp_path / "a") as fresh:
        (fresh / "deep").mkdir(parents=True)
        (fresh / "deep/file").write_text(NEW)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "a", "a/deep", "a/deep/file",
    ]  # fmt: skip


def test_files_are_replaced_in_one_way():
    wrong = [
        f"{path}:{number}"
        for path in (p.relative_to(HOME).as_posix() for p in sorted(HOME.glob("vlm_jax/**/*.py")))
        if path != "vlm_jax/files.py" and not path.startswith(tuple(IN_PLACE))
        for number, line in enumerate((HOME / path).read_text().splitlines(), 1)
        # A damaged checkpoint is set aside by its name.
        if WRITES.search(line.replace("files.write_", "")) and "rename(aside)" not in line
    ]
    assert not wrong, f"vlm_jax/files.py writes a file whole or not at all: {wrong}"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write_text(tmp_path / "pipe", "all of it")
        assert os.read(reader, 100) == b"all of it"
        assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    finally:
        os.close(reader)
