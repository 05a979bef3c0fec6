# SPDX-License-Identifier: Apache-2.0
"""A run on packed rows, its state in few bytes: logged, stopped in mid-epoch and continued."""

import json
import shutil

import pytest
import tiny

pytestmark = pytest.mark.slow

FEW_BYTES = ["--config.frozen_dtype=bfloat16", "--config.align.moments=factored",
             "--config.finetune.moments=bfloat16", "--config.loss_chunk=32"]  # fmt: skip
PACKED = ["--config.data.row_length=128", "--config.data.row_images=6"]
BUCKETS = ["--config.data.buckets=(8, 12, 16)"]


@pytest.mark.parametrize("arranged", [PACKED, BUCKETS], ids=["packed", "buckets"])
def test_a_run_goes_on_where_it_was_stopped(arranged, tmp_path):
    argv = ["train", "--config=tests/tiny.py", f"--workdir={tmp_path}/run", *arranged, *FEW_BYTES]
    done = tiny.run(*argv)
    assert done.returncode == 0, done.stderr
    assert "is one epoch" in done.stderr and "computed belong to examples" in done.stderr
    folder = tmp_path / "run/finetune"
    unbroken = tiny.losses(folder)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.4 < last["tokens_used"] <= 1 and 0.3 < last["images_used"] <= 1
    shutil.rmtree(folder / "6")
    again = tiny.run(*argv)
    assert again.returncode == 0, again.stderr
    assert tiny.losses(folder) == unbroken and len(unbroken) == 6
    scored = tiny.run("evaluate", f"--workdir={tmp_path}/run")
    assert scored.returncode == 0, scored.stderr
