# SPDX-License-Identifier: Apache-2.0
"""A run's folder in a bucket is what it is on a disk, and never has half a file.

The bucket is a stand-in (`fake_bucket.py`): nothing here was tried on Google Cloud Storage itself.
"""

import json
import logging

import fake_bucket
import jax
import numpy as np
import pytest
import tiny

from vlm_jax import files, mesh
from vlm_jax.training import lease, verify
from vlm_jax.training.checkpoint import Checkpoints, numbered
from vlm_jax.training.optimizer import State

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def served():
    """The bucket, and the environment of a process that finds it."""
    with fake_bucket.serving() as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield bucket, environment


@pytest.fixture
def bucket(served):
    """It, empty."""
    served[0].objects.clear()
    served[0].failing = lambda name: False
    return served[0]


def at(path):
    return files.path_of(f"gs://a-bucket/{path}")


def test_a_file_is_all_of_the_old_or_all_of_the_new(bucket):
    files.write_text(at("run/a"), "ä\r\n")
    assert at("run/a").read_bytes() == "ä\r\n".encode()
    with pytest.raises(KeyboardInterrupt), files.writing(at("run/a")) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert at("run/a").read_bytes() == "ä\r\n".encode()
    bucket.failing = lambda name: True
    with pytest.raises(OSError):
        files.write_text(at("run/a"), "new")
    assert at("run/a").read_bytes() == "ä\r\n".encode() and list(bucket.objects) == ["run/a"]


def test_a_folder_is_copied_when_it_is_complete(bucket):
    with pytest.raises(KeyboardInterrupt), files.making(at("run/made")) as fresh:
        fresh.mkdir()
        (fresh / "a").write_text("1")
        raise KeyboardInterrupt
    assert not bucket.objects
    with files.making(at("run/made")) as fresh:
        (fresh / "deep").mkdir(parents=True)
        (fresh / "deep/a").write_text("1")
    assert list(bucket.objects) == ["run/made/deep/a"]
    assert (files.on_disk(at("run/made")) / "deep/a").read_text() == "1"


def test_what_another_process_writes_is_seen_although_the_folder_was_listed_before(bucket):
    files.write_text(at("run/a"), "1")
    assert [path.name for path in at("run").iterdir()] == ["a"]
    bucket.objects["run/a"] = b"longer", 10**9
    bucket.objects["run/b"] = b"new", 10**9
    assert at("run/a").read_text() == "longer"
    assert at("run/b").exists() and {path.name for path in at("run").iterdir()} == {"a", "b"}


def test_of_two_that_make_a_file_one_does(bucket):
    assert files.create(at("run/a"), "1") and not files.create(at("run/a"), "2")
    assert at("run/a").read_text() == "1"


def test_lines_are_there_when_they_are_saved(bucket):
    lines = files.Lines(at("run/a"))
    lines.add("1")
    assert not bucket.objects
    lines.save()
    assert at("run/a").read_text() == "1\n"
    lines = files.Lines(at("run/a"))  # of the next process
    lines.add("2")
    lines.close()
    assert at("run/a").read_text() == "1\n2\n"


def test_a_folder_has_one_run(bucket, monkeypatch):
    for name, seconds in (("BEAT", 0.2), ("LIFE", 1.5), ("SETTLE", 0.1), ("POLL", 0.05)):
        monkeypatch.setattr(lease, name, seconds)
    with lease.held(at("run"), "the first"):
        with pytest.raises(lease.Busy, match="the first"), lease.held(at("run"), "the second"):
            pass
    dead = lease.Lease(at("run"), "one that dies")
    dead.take(dead=False, wait=False)
    with lease.held(at("run"), "its successor"):
        assert dead.read()["what"] == "its successor"
    assert not bucket.objects


def state(step, mesh8):
    draw = np.random.default_rng(step)
    x = jax.device_put(
        draw.normal(size=(16, 32)).astype("f4"), mesh.sharding(mesh8, "embed", "mlp")
    )
    return State(jax.device_put(np.int32(step), mesh.sharding(mesh8)), {"w": x}, {}, ({"m": x},))


def test_checkpoints_are_whole_or_passed_over(bucket, mesh8, caplog):
    checkpoints = Checkpoints(at("run/align"), keep=2)
    for step in (1, 2, 3):
        checkpoints.save(state(step, mesh8), {"position": step})
    checkpoints.close()
    assert numbered(at("run/align")) == [2, 3]
    assert [f.result for f in verify.verify(at("run/align"))] == ["whole", "whole"]
    for name, (data, generation) in list(bucket.objects.items()):
        if "/3/state/" in name and "/d/" in name:
            flipped = bytes([*data[:-40], data[-40] ^ 1, *data[-39:]])
            bucket.objects[name] = flipped, generation
    # Another, of which a killed process did not come to write the last file.
    for name in [n for n in bucket.objects if "/2/" in n and not n.endswith("commit_success.txt")]:
        bucket.objects[name.replace("/2/", "/4/")] = bucket.objects[name]
    assert [f.result for f in verify.verify(at("run/align"))] == ["whole", "damaged"]
    checkpoints = Checkpoints(at("run/align"), keep=2)
    with caplog.at_level(logging.WARNING):
        found, notes = checkpoints.restore(state(9, mesh8))
    assert (int(found.step), notes) == (2, {"position": 2})
    assert "align/3 cannot be used" in caplog.text and "align/4" not in caplog.text
    for ours, theirs in zip(*map(jax.tree.leaves, (found, state(2, mesh8))), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    checkpoints.save(state(3, mesh8), {"position": 3})
    checkpoints.close()
    assert [f.result for f in verify.verify(at("run/align"))] == ["whole", "whole"]


@pytest.mark.parametrize("path, words", [
    ("az://x/run", "known buckets are gs://, s3://"),
    ("s3://x/run", "needs s3fs: pip install"),
])  # fmt: skip
def test_another_bucket_is_refused_with_the_way_out(path, words):
    with pytest.raises(ValueError, match=words):
        files.path_of(path)


# --- Whole commands, in processes of their own ----------------------------------------------------

KILL = """
from vlm_jax.training.log import Log
note = Log.__call__
def die(self, step, metrics, newest):
    note(self, step, metrics, newest)
    if self.name == "finetune" and step == 5:
        newest()
        os.kill(os.getpid(), signal.{signal})
Log.__call__ = die
"""


@pytest.mark.slow
def test_a_training_in_a_bucket_ends_as_one_on_a_disk(served, bucket, trained, monkeypatch):
    command = ("train", "--config=tests/tiny.py", "--workdir=gs://a-bucket/run")
    for name, value in served[1].items():
        monkeypatch.setenv(name, value)
    killed = tiny.run(*command, before=KILL.format(signal="SIGKILL"), timeout=900)
    assert killed.returncode == -9, killed.stderr
    assert numbered(at("run/finetune"))[-1] == 4
    # It waits until the lease of the killed process has run out.
    ended = tiny.run(*command, timeout=900)
    assert ended.returncode == 0, ended.stderr
    assert "finetune 5/6" in ended.stderr and "finetune 4/6" not in ended.stderr
    for stage in ("encoder", "align", "finetune"):
        lines = at(f"run/{stage}/metrics.jsonl").read_text().splitlines()
        ours = [(m["step"], m["loss"], m["gradient_norm"]) for m in map(json.loads, lines)]
        assert ours == tiny.losses(trained / stage)
    evaluated = tiny.run("evaluate", "--workdir=gs://a-bucket/run", timeout=900)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(at("run/scores.json").read_text()) == json.loads(evaluated.stdout)
