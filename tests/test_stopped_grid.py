# SPDX-License-Identifier: Apache-2.0
"""A grid that is stopped or killed, on a disk or in a bucket, ends with an unbroken one's rows.

Every run is a process of its own, with one device.
"""

import json

import fake_bucket
import pytest
import tiny
from test_grid import NAMES, run

from vlm_jax import files, preemption

pytestmark = pytest.mark.slow

# A signal at the given time that a step of a stage ends, ...
AT_A_STEP = """
from vlm_jax.training.log import Log
note, seen = Log.__call__, []
def stop(self, step, *more):
    note(self, step, *more)
    seen.append((self.name, step))
    if seen.count({step}) == {time}:
        os.kill(os.getpid(), signal.{signal})
Log.__call__ = stop
"""
# ... and in the middle of a cell's evaluation.
AT_AN_ANSWER = """
from vlm_jax.grids import run
cell, predict, cells = run.run_cell, run.predict, []
def known(one, *more):
    cells.append(one.name)
    return cell(one, *more)
def stop(*given, **more):
    for number, record in enumerate(predict(*given, **more)):
        if (cells[-1], number) == ({cell!r}, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        yield record
run.run_cell, run.predict = known, stop
"""
STOPS = {
    "encoder": AT_A_STEP.format(step=("encoder", 2), time=1, signal="SIGTERM"),
    "second cell": AT_A_STEP.format(step=("finetune", 2), time=2, signal="SIGTERM"),
    "third evaluation": AT_AN_ANSWER.format(cell=NAMES[2]),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same(folder, unbroken):
    assert tiny.rows(folder) == tiny.rows(unbroken)
    for name in NAMES:
        one, other = (home / "cells" / name / "predictions.jsonl" for home in (folder, unbroken))
        assert one.read_text() == other.read_text()


def test_after_sigterm_the_same_command_ends_with_the_rows_of_an_unbroken_grid(unbroken, tmp_path):
    for where, before in STOPS.items():
        stopped = run(tmp_path, before)
        assert stopped.returncode == preemption.STATUS, f"{where}: {stopped.stderr}"
        last = stopped.stderr.splitlines()[-1]
        assert "vlm-jax grid: SIGTERM: " in last and "the same command continues" in last
    assert [row["cell"] for row in tiny.rows(tmp_path)] == NAMES[:2]
    done = run(tmp_path)
    # The models of all cells were trained: one is left to be evaluated.
    assert done.returncode == 0 and "finetune 3/3" not in done.stderr, done.stderr
    assert_same(tmp_path, unbroken)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_grid_that_is_killed_in_a_bucket_ends_with_the_rows_of_one_on_a_disk(
    unbroken, monkeypatch
):
    with fake_bucket.serving() as (_, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        place = "gs://a-bucket/grid"
        killed = run(place, AT_A_STEP.format(step=("finetune", 2), time=2, signal="SIGKILL"))
        assert killed.returncode == -9, killed.stderr
        folder = files.path_of(place)
        assert [row["cell"] for row in tiny.rows(folder)] == NAMES[:1]
        # It waits until the lease of the killed process has run out.
        done = run(place)
        assert done.returncode == 0 and "encoder 3/3" not in done.stderr, done.stderr
        assert_same(folder, unbroken)
        made, rows = json.loads(done.stdout), (folder / "rows.jsonl").read_text()
        assert made["report"] == f"{place}/report/index.html" and made["cells"] == 3
        assert "<html" in (folder / "report/index.html").read_text()
        again = run(place)
        assert again.returncode == 0 and "finetune 3/3" not in again.stderr, again.stderr
        assert (folder / "rows.jsonl").read_text() == rows
