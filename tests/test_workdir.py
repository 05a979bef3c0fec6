# SPDX-License-Identifier: Apache-2.0
"""A folder serves one run and one configuration, and a file in it is whole or the old one."""

import errno
import json
import os
import subprocess
import sys

import pytest
import tiny

from vlm_jax.learn import workdir
from vlm_jax.learn.workdir import claim


@pytest.fixture
def c():
    return tiny.get_config()


def test_the_same_configuration_enters_again(tmp_path, c):
    for _ in range(2):
        with claim(tmp_path / "run", c):
            pass
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored == json.loads(json.dumps(c.to_dict()))


def test_a_folder_that_is_older_than_a_field_goes_on_where_the_field_changes_nothing(tmp_path, c):
    older = json.loads(json.dumps(c.to_dict()))
    for name in workdir.LATER:
        section, field = name.split(".")
        del older[section][field]
    workdir.write_json(tmp_path / "config.json", older)
    with claim(tmp_path, c):
        pass
    digest = workdir.digest(c)
    for name, other in (("image_exif", "apply"), ("image_resize", (40,)), ("images_per_row", 2)):
        changed = tiny.config(data={name: other})
        assert workdir.digest(changed) != digest
        with pytest.raises(ValueError, match=f"data.{name} was"), claim(tmp_path, changed):
            pass


def test_two_runs_in_one_folder_are_refused(tmp_path, c):
    with claim(tmp_path, c):
        with pytest.raises(
            ValueError, match="another run is at work in .* choose another --workdir"
        ):
            with claim(tmp_path, c):
                pass
    with claim(tmp_path, c):
        pass  # and free again afterwards


def test_the_claim_of_a_killed_process_is_free(tmp_path, c):
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another run is at work"), claim(tmp_path, c):
        pass
    child.kill()
    child.communicate()
    with claim(tmp_path, c):
        pass


def test_another_configuration_is_refused_by_the_names_of_its_fields(tmp_path, c):
    with claim(tmp_path, c):
        pass
    other = tiny.config(llm=dict(depth=3), vit=dict(levels=(2,)))
    words = r"llm.depth was 2, is 3; vit.levels was \[1, 2\], is \[2\]\): repeat the first command"
    with pytest.raises(ValueError, match=words), claim(tmp_path, other):
        pass
    with other.unlocked():
        other.grid.llms.huge = dict(width=512)
    with pytest.raises(ValueError, match=r"grid.llms.huge.width was None, is 512"):
        with claim(tmp_path, other):
            pass


@pytest.mark.parametrize("bad", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_an_error_with_the_way_out(bad, tmp_path, c):
    # A file where a folder should be stops everyone, root too.
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=f"cannot write to --workdir={tmp_path}/{bad}: .*; choose a folder"
    ):
        with claim(tmp_path / bad, c):
            pass


def test_a_read_only_file_system_is_an_error_with_the_way_out(tmp_path, c, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(workdir.Path, "open", refuse)
    with pytest.raises(OSError, match="Read-only file system; choose a folder"), claim(tmp_path, c):
        pass


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    workdir.write_json(path, {"a": 1})

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workdir.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        workdir.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    monkeypatch.undo()
    workdir.write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}


def test_names_of_nested_fields():
    tree = {"a": {"b": (1, 2), "c": {}}, "d": None}
    assert workdir.flat(tree) == {"a.b": [1, 2], "a.c": {}, "d": None}


def test_provenance_names_what_made_a_result():
    facts = workdir.provenance("xla")
    assert facts["machine"].startswith("8 x cpu")
    assert facts["machine"].endswith("xla kernels")
    assert {"python", "jax", "flax"} <= facts["versions"].keys()
    assert facts["commit"] == "unknown" or len(facts["commit"]) >= 12
