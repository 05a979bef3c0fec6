# SPDX-License-Identifier: Apache-2.0
"""Every score that a published evaluator gave comes out of our tasks too, to 1e-9.

`--published-dir=DIR` scores DIR/metrics.json; tests/published/README.md has the format.
"""

import json
from pathlib import Path

import pytest

from vlm_jax.evals.task import Graded, Question
from vlm_jax.evals.tasks import TASKS, chartqa, docvqa, mme, scienceqa

GATE = 1e-9


def graded(task, protocol, prediction, answers, **question):
    """An answer with its grade by a protocol."""
    question = Question(answers=tuple(answers), **{"id": 0, "text": "", **question})
    return Graded(question, prediction, TASKS[task].protocols[protocol].grade(question, prediction))


def soft(task, protocol):
    """Scores cases of one prediction and the answers of people."""

    def score(cases):
        for case in cases:
            got = graded(task, protocol, case["prediction"], case["answers"]).grade.value
            yield case, got, case["score"]

    return score


def anls(cases):
    for case in cases:
        yield case, docvqa.anls(case["prediction"], case["answers"]), case["score"]


def relaxed(cases):
    for case in cases:
        yield case, chartqa.relaxed(case["prediction"], case["answer"]), case["score"]


def ocrbench(cases):
    for case in cases:
        facts = {"dataset": case["dataset"]}
        got = graded("ocrbench", "lmms-eval", case["prediction"], case["answers"], facts=facts)
        yield case, got.grade.value, case["score"]


def science(cases):
    for case in cases:
        got = scienceqa.grade(case["prediction"], case["choices"], case["answer"])
        yield case, got, case["score"]


def pope(protocol):
    """Scores all rows together, as one category."""

    def score(case):
        rows = [
            graded(
                "pope", protocol, row["prediction"], [row["answer"]],
                id=row["question_id"], labels={"category": "random"},
            )
            for row in case["rows"]
        ]  # fmt: skip
        subscores = TASKS["pope"].protocols[protocol].aggregate(rows).subscores
        for name in case.keys() - {"rows"}:
            yield name, subscores[f"random.{name}"] / 100, case[name]

    return score


def points(case):
    got = mme.score(case["rows"])
    for name in case.keys() - {"rows"}:
        yield name, got[name], case[name]


METRICS = {
    "vqav2": soft("vqav2", "lmms-eval"),
    "textvqa": soft("textvqa", "lmms-eval"),
    "vizwiz_vqa": soft("vizwiz", "lmms-eval"),
    "textvqa_m4c": soft("textvqa", "llava"),
    "anls": anls,
    "chartqa_relaxed": relaxed,
    "ocrbench": ocrbench,
    "pope_lmms_eval": pope("lmms-eval"),
    "pope_llava": pope("llava"),
    "mme": points,
    "scienceqa_lmms_eval": science,
}


def pytest_generate_tests(metafunc):
    if "metric" in metafunc.fixturenames:
        path = Path(metafunc.config.getoption("--published-dir"), "metrics.json")
        if not path.is_file():
            raise pytest.UsageError(f"--published-dir holds no metrics.json: {path}")
        metrics = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(name for name in metrics if not name.startswith("_"))
        metafunc.parametrize("metric, cases", [(n, metrics[n]) for n in names], ids=names)


def test_a_score_is_that_of_the_published_evaluator(metric, cases):
    assert metric in METRICS, f"add {metric} to the table of this test"
    wrong = [
        (case, got, score)
        for case, got, score in METRICS[metric](cases)
        if got != pytest.approx(score, rel=GATE, abs=GATE)
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)}"
