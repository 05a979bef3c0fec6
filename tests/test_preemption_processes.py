# SPDX-License-Identifier: Apache-2.0
"""SIGTERM sent to one process stops all of them at one step, where any number of them continues."""

import json
import shutil
import signal
import time

import numpy as np
import processes
import pytest
import tiny

from vlm_jax import preemption
from vlm_jax.training.checkpoint import numbered

pytestmark = pytest.mark.slow
STEPS = 300
FLAGS = ("--config=tests/tiny.py", "--config.encoder.steps=0", f"--config.align.steps={STEPS}",
         "--config.finetune.steps=0", "--config.checkpoint.every=1000")  # fmt: skip


def command(folder, *flags):
    return ["train", *FLAGS, *flags, f"--workdir={folder}"]


def lines(folder):
    path = folder / "align/metrics.jsonl"
    return tiny.losses(folder / "align") if path.exists() else []


def tokens(folder):
    """Supervised tokens of every batch: they differ from batch to batch."""
    return [json.loads(line)["tokens"] for line in (folder / "align/metrics.jsonl").open()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of an unbroken run of two processes."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    processes.run([command(folder)], processes=2, devices=1)
    return folder


@pytest.fixture(scope="module")
def stopped(unbroken, tmp_path_factory):
    """The folder of a run of two processes, one of which was sent SIGTERM, and how they ended."""
    del unbroken  # first: it fills the cache of programs
    folder = tmp_path_factory.mktemp("stopped") / "run"
    started = processes.start([command(folder)], processes=2, devices=1)
    until = time.monotonic() + 300
    while len(lines(folder)) < 3:
        if time.monotonic() > until or any(process.poll() is not None for process in started):
            raise AssertionError(processes.finish(started, timeout=10))
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)  # the one that does not speak
    return folder, processes.finish(started)


def test_both_processes_save_one_step(stopped):
    folder, ended = stopped
    assert [code for code, _, _ in ended] == [preemption.STATUS] * 2, ended
    (step,) = numbered(folder / "align")
    assert 3 < step < STEPS, "too quick for the test"
    for _, _, err in ended:
        assert f"SIGTERM: align is saved at step {step} of {STEPS}" in err


# One process of as many devices adds up the same two halves.
@pytest.mark.parametrize("count, devices", [(2, 1), (1, 2)])
def test_as_many_devices_go_on_bit_equal(count, devices, stopped, unbroken, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    processes.run([command(folder)], processes=count, devices=devices)
    assert lines(folder) == lines(unbroken)


@pytest.mark.parametrize("count, devices, mesh", [
    (1, 1, ()), (4, 1, ()), (2, 1, ("--config.mesh.fsdp=2",)),
])  # fmt: skip
def test_any_processes_and_any_mesh_go_on_with_the_same_batches(
    count, devices, mesh, stopped, unbroken, tmp_path
):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    (step,) = numbered(folder / "align")
    processes.run([command(folder, *mesh)], processes=count, devices=devices)
    assert tokens(folder) == tokens(unbroken) and len(set(tokens(folder))) > 10
    ours, theirs = (np.array(lines(x))[:, 1] for x in (folder, unbroken))
    np.testing.assert_array_equal(ours[:step], theirs[:step])
    far = np.abs(ours / theirs - 1)
    print(f"after step {step}: {far[step : step + 20].max():.1e}, to the end {far.max():.1e}")
    assert far[step : step + 20].max() < 1e-6 and far.max() < 1e-5


# --- A grid ---------------------------------------------------------------------------------------

GRID = ("--config=tests/one_size.py", "--config.encoder.steps=2", "--config.align.steps=0",
        "--config.finetune.steps=100", "--config.checkpoint.every=1000",
        "--config.grid.baselines=()")  # fmt: skip
CELLS = ("only-v1-token_packer-s0", "only-v4-token_packer-s0")


def test_a_grid_of_two_processes_that_is_stopped_in_a_cell_ends_with_the_same_rows(tmp_path):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "stopped"
    processes.run([["grid", *GRID, f"--workdir={unbroken}"]], processes=2, devices=1)
    command = ["grid", *GRID, f"--workdir={folder}"]
    started = processes.start([command], processes=2, devices=1)
    metrics, until = folder / "cells" / CELLS[1] / "finetune/metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        if time.monotonic() > until or any(process.poll() is not None for process in started):
            raise AssertionError(processes.finish(started, timeout=10))
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    ended = processes.finish(started)
    assert [code for code, _, _ in ended] == [preemption.STATUS] * 2, ended
    assert [row["cell"] for row in tiny.rows(folder)] == [CELLS[0]]
    (step,) = numbered(metrics.parent)
    assert 2 < step < 100, "too quick for the test"
    ((_, _, said), _) = processes.run([command], processes=2, devices=1)
    assert "finetune 100/100" in said and "finetune 1/100" not in said
    assert tiny.rows(folder) == tiny.rows(unbroken)
    for cell in CELLS:
        one, other = (home / "cells" / cell / "predictions.jsonl" for home in (folder, unbroken))
        assert one.read_text() == other.read_text()
