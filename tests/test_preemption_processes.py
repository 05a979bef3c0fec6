# SPDX-License-Identifier: Apache-2.0
"""SIGTERM that one process of several is sent stops all of them at one step."""

import shutil
import signal
import time

import processes
import pytest
import tiny

from vlm_jax import preemption
from vlm_jax.training.checkpoint import numbered

pytestmark = pytest.mark.slow
STEPS = 300
FLAGS = ("--config=tests/tiny.py", "--config.encoder.steps=0", f"--config.align.steps={STEPS}",
         "--config.finetune.steps=0", "--config.checkpoint.every=1000")  # fmt: skip


def command(folder):
    return ["train", *FLAGS, f"--workdir={folder}"]


def lines(folder):
    path = folder / "align/metrics.jsonl"
    return tiny.losses(folder / "align") if path.exists() else []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Losses of an unbroken run of two processes."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    processes.run([command(folder)], processes=2, devices=1)
    return lines(folder)


def test_both_processes_save_one_step_and_go_on_bit_equal(unbroken, tmp_path):
    folder = tmp_path / "run"
    started = processes.start([command(folder)], processes=2, devices=1)
    until = time.monotonic() + 300
    while len(lines(folder)) < 3:
        assert time.monotonic() < until and started[1].poll() is None
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)  # the one that does not speak
    ended = processes.finish(started)
    assert [code for code, _, _ in ended] == [preemption.STATUS] * 2, ended
    (step,) = numbered(folder / "align")
    assert 3 < step < STEPS, "too quick for the test"
    for _, _, err in ended:
        assert f"SIGTERM: align is saved at step {step} of {STEPS}" in err
    shutil.copytree(folder, tmp_path / "other")
    processes.run([command(folder)], processes=2, devices=1)
    assert lines(folder) == unbroken
    # And in one process on as many devices, which adds up the same two halves.
    processes.run([command(tmp_path / "other")], processes=1, devices=2)
    assert lines(tmp_path / "other") == unbroken
