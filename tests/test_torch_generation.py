# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of answers run, all sides say the same, and their numbers have their places."""

import json
import os
import subprocess
import sys

import pytest
import tiny

pytestmark = pytest.mark.torch


def test_the_benchmark_of_generation_runs_at_tiny_sizes(tmp_path):
    out = tmp_path / "result.json"
    argv = ["--quick", "--rounds=1", "--dtypes=float32", "--batches=1,2", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/generation.py", *argv],
        cwd=tiny.ROOT,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert row["tokens_that_agree"] == 1.0
        assert set(row["sides"]) == {"transformers", *(f"vlm_jax, V={V}" for V in (1, 9, 36))}
        times = {"first_token_ms", "tokens_per_second", "first_token_ratio", "decode_ratio"}
        assert all(of.keys() == times for of in row["sides"].values())
        of_v = [
            f"{part}, V={V}" for V in (1, 9, 36) for part in ("compressor", "prefill", "decode")
        ]
        assert row["parts_ms"].keys() == {"encoder", "question pass", *of_v}


def test_the_benchmark_of_evaluation_runs_at_tiny_sizes(tmp_path):
    out = tmp_path / "result.json"
    argv = ["--quick", "--rounds=1", "--questions=5", "--batch=2", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/evaluate.py", *argv],
        cwd=tiny.ROOT,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert set(result["answers_that_agree"].values()) == {1.0}
    ours = [f"{how}, V={V}" for V in (9, 36) for how in ("loop", "evaluate")]
    sides = {"transformers", "host", "both V in one pass", *ours}
    assert result["questions_per_second"].keys() == sides
    assert all(speed > 0 for speed in result["questions_per_second"].values())
