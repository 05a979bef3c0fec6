# SPDX-License-Identifier: Apache-2.0
"""For every task and protocol samples score again, and comparisons agree with the two scores."""

import json
from pathlib import Path

import made_scores as made
import pytest

from vlm_jax.evals import compare, samples, scoring
from vlm_jax.evals.tasks import TASKS

EXAMPLES = Path(__file__).parent / "published" / "benchmarks"
CASES = [(t, p) for t in TASKS if (EXAMPLES / t).is_dir() for p in TASKS[t].protocols]


def example(task, protocol, folder=None):
    """The score of an example; with a folder that of answers a third of which are spoiled."""
    home = EXAMPLES / task
    expected = json.loads((home / "expected.json").read_text())
    predictions = home / expected["predictions"]
    if folder is not None:
        rows = [json.loads(line) for line in predictions.read_text().splitlines()]
        spoiled = [row | ({"text": "no idea"} if i % 3 == 0 else {}) for i, row in enumerate(rows)]
        predictions = made.lines(folder / "spoiled.jsonl", spoiled)
    return scoring.score(task, protocol, predictions, home / expected["annotations"])


def test_the_examples_are_of_every_benchmark():
    assert {task for task, _ in CASES} == set(TASKS) - {"own"}


@pytest.mark.parametrize("task, protocol", CASES)
def test_samples_score_again_and_compare_as_the_answers_do(task, protocol, tmp_path):
    a, b = example(task, protocol), example(task, protocol, tmp_path)
    again = []
    for number, scored in enumerate((a, b)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(f"{line}\n" for line in samples.lines(scored)), encoding="utf-8")
        again.append(samples.read(file))
    for name in ("value", "stderr", "n", "failed", "subscores", "parser"):
        assert again[0].described[name] == a.described[name], name
    told = compare.paired(a, b)
    assert told["difference"] == pytest.approx(b.aggregate.value - a.aggregate.value, abs=1e-9)
    assert compare.paired(*again) == told
    back = compare.paired(b, a)
    assert back["difference"] == pytest.approx(-told["difference"])
    assert back["stderr"] == pytest.approx(told["stderr"])
    same = compare.paired(a, a)
    assert same["difference"] == 0 and same["p"] in (1, None)
