# SPDX-License-Identifier: Apache-2.0
"""Results of lmms-eval: whose standard error, which maximum, which family, or the way out."""

import json
import math

import pytest

from vlm_jax.law.points import Cell
from vlm_jax.rows import lmms_eval, measured, scores

TASKS = lmms_eval.table()


def read(metrics, name="gqa", tasks=TASKS):
    ((_, score, stderr),) = lmms_eval.scores("f", {name: metrics}, tasks)
    return score, stderr


def test_a_score_takes_its_own_filters_standard_error():
    both = {
        "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.01,
        "exact_match,flexible": 0.6, "exact_match_stderr,flexible": 0.02,
    }  # fmt: skip
    with pytest.raises(ValueError, match="by several filters, exact_match,strict, exact_match,fle"):
        read(both)
    for name, expected in (("strict", (0.5, 0.01)), ("flexible", (0.6, 0.02))):
        assert read(both, tasks={"gqa": lmms_eval.Task("r", (f"exact_match,{name}",))}) == expected
    other = {"exact_match,none": 0.5, "exact_match_stderr,flexible": 0.02}
    assert math.isnan(read(other)[1])


def test_every_metric_has_a_named_divisor_or_is_refused_with_the_way_out():
    assert read({"gpt_eval_score,none": 64.0, "gpt_eval_score_stderr,none": 1.0}, "mmvet") == (
        0.64, 0.01,
    )  # fmt: skip
    assert read({"acc,none": 0.25}, "of_my_own")[0] == 0.25
    with pytest.raises(ValueError, match=r"largest value of CIDEr is not known.*\[coco\] metrics"):
        read({"CIDEr,none": 0.9}, "coco")
    with pytest.raises(ValueError, match="gqa's exact_match = 61 is not in 0..1: if it is counted"):
        read({"exact_match,none": 61.0})


def test_the_papers_nine_and_two_are_in_the_table():
    families = {}
    for name, task in TASKS.items():
        families.setdefault(task.family, []).append(name)
    for average, members in scores.AVERAGES.items():
        assert all(any(n.startswith(m) for n in families[average]) for m in members), average


def test_a_table_of_ones_own_adds_and_replaces(tmp_path):
    own = tmp_path / "tasks.toml"
    own.write_text(
        '[coco]\nfamily="captions"\nmetrics=["CIDEr"]\ndivisor=2\n[gqa]\nmetrics=["acc"]\n'
    )
    tasks = lmms_eval.table(own)
    assert read({"CIDEr,none": 0.9}, "coco", tasks)[0] == 0.45
    assert tasks["gqa"].family == "gqa" and tasks["mme"] == TASKS["mme"]
    for text, message in (
        ("[coco]\nmetric='a'\n", "metric = 'a': a task has family"),
        ("[coco]\nmetrics=['a']\ndivisor=0\n", "divisor above 0"),
        ("coco = 3\n", "a task is a section"),
        ("[coco", "not TOML"),
    ):
        own.write_text(text)
        with pytest.raises(ValueError, match=message):
            lmms_eval.table(own)


def test_families_are_means_over_the_same_tasks(tmp_path):
    cell = Cell(
        7.0, 36.0, 0.0, "", 0, {"gqa": (0.4, 0.03), "ai2d": (0.2, 0.04), "x": (0.1, math.nan)}
    )
    (made,), words = lmms_eval.families([cell], TASKS)
    assert made.errors["reasoning"] == pytest.approx((0.3, 0.025))
    assert made.errors["x"][0] == 0.1 and "reasoning is the mean of gqa, ai2d" in words
    with pytest.raises(ValueError, match="N=1, V=4 has no result of ai2d, x"):
        lmms_eval.families([cell, Cell(1.0, 4.0, 0.0, "", 0, {"gqa": (0.5, 0.1)})], TASKS)
    results = {"gqa": {"exact_match,none": 0.6}, "textvqa_val": {"exact_match,none": 0.5}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"N": 7, "V": 36, "results": results}))
    found = measured.read([path])
    assert list(found.families) == [measured.MEAN, "ocr", "reasoning"]
    assert sorted(found.tasks) == ["gqa", "textvqa_val"] and "ocr is the mean" in found.note
