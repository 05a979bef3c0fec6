# SPDX-License-Identifier: Apache-2.0
"""Protocols on examples that can be scored by hand."""

import math

import pytest

from vlm_jax.evals import embedded


def record(task, prediction, answer, cluster, family="reasoning"):
    return dict(
        id="", task=task, family=family, prediction=prediction, answer=answer, cluster=cluster
    )


def test_the_embedded_benchmark_scores_exact_answers_task_by_task():
    scores = embedded.score("embedded", [
        record("count", "2", "2", "0"), record("count", "3", "2", "1"),
        record("count", " 4", "4", "2"), record("number", "8151", "8157", "3", family="text"),
    ])  # fmt: skip
    assert scores.keys() == {"count", "number"}
    count = scores["count"]
    assert (count["family"], count["metric"], count["n"]) == ("reasoning", "exact_match", 3)
    assert count["score"] == pytest.approx(2 / 3)
    # Plain standard error of 1, 0, 1.
    assert count["stderr"] == pytest.approx(math.sqrt((2 * (1 / 3) ** 2 + (2 / 3) ** 2) / 2 / 3))
    assert scores["number"]["family"] == "text" and scores["number"]["score"] == 0


def test_nlvr_counts_images_and_whole_sentences():
    # Suhr et al., ACL 2017: precision over images, consistency over sentences. By hand: sentence 12
    # right on all three of its images, 13 on one of two, 14 on its only one.
    scores = embedded.score("nlvr", [
        record("nlvr", "true", "true", "12"), record("nlvr", "False", "false", "12"),
        record("nlvr", "true.", "true", "12"), record("nlvr", "true", "true", "13"),
        record("nlvr", "true", "false", "13"), record("nlvr", "false it is", "false", "14"),
    ])  # fmt: skip
    assert scores["nlvr"]["score"] == pytest.approx(5 / 6) and scores["nlvr"]["n"] == 6
    assert scores["nlvr_consistency"]["score"] == pytest.approx(2 / 3)
    assert scores["nlvr_consistency"]["n"] == 3
    # Residuals summed by sentence: 3/6, 2(1/6) - 1, 1/6.
    by_sentence = [3 / 6, 1 / 6 - 5 / 6, 1 / 6]
    error = math.sqrt(3 / 2 * sum(r**2 for r in by_sentence)) / 6
    assert scores["nlvr"]["stderr"] == pytest.approx(error)


def test_the_order_of_records_does_not_matter():
    records = [
        record(t, p, "1", str(i)) for i, (t, p) in enumerate([("a", "1"), ("b", "0"), ("a", "0")])
    ]
    assert embedded.score("embedded", records) == embedded.score("embedded", records[::-1])


def test_an_unknown_protocol_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"protocol 'vqa': choose one of \['embedded', 'nlvr'\]"):
        embedded.score("vqa", [])
