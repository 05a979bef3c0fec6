# SPDX-License-Identifier: Apache-2.0
"""Two models on the same questions: intervals, tests and power have the properties they claim."""

import dataclasses
import math

import made_scores as made
import pytest
from scipy import stats

from vlm_jax.evals import compare, jackknife, samples, scoring, significance
from vlm_jax.evals.task import Aggregate


def scored(folder, right, name="a"):
    return scoring.score(
        "own", "exact_match", made.answers(folder / f"{name}.jsonl", right),
        folder / "questions.jsonl",
    )  # fmt: skip


def f1(graded):
    """The F1 of "yes", which is no mean of grades."""
    right = sum(g.grade.value for g in graded)
    return Aggregate(100 * 2 * right / (right + len(graded)), math.nan, ())


def as_f1(score):
    protocol = dataclasses.replace(score.protocol, aggregate=f1)
    return dataclasses.replace(score, protocol=protocol, aggregate=f1(score.graded))


@pytest.mark.parametrize("t, df", [(0.1, 1), (2.0, 3), (-3.0, 12), (2.5, 499), (0.0, 7)])
def test_students_t_is_that_of_scipy(t, df):
    assert significance.t_p_value(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-9)
    assert significance.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)


@pytest.mark.parametrize("pair", [(0, 0), (3, 9), (0, 40), (512, 700), (20_000, 20_500)])
def test_the_sign_test_is_the_exact_binomial(pair):
    expected = stats.binomtest(min(pair), sum(pair)).pvalue if sum(pair) else 1.0
    assert significance.sign_test(*pair) == pytest.approx(expected, rel=1e-9)


def test_a_paired_difference_of_single_questions_is_the_paired_t_test_and_mcnemars(tmp_path):
    made.questions(tmp_path, 200)
    first, second = made.drawn(1, 200, 0.5), made.drawn(2, 200, 0.6)
    told = compare.paired(scored(tmp_path, first), scored(tmp_path, second, "b"))
    reference = stats.ttest_rel([float(x) for x in second], [float(x) for x in first])
    interval = reference.confidence_interval()
    assert (told["t"], told["p"]) == pytest.approx((reference.statistic, reference.pvalue))
    assert told["interval"] == pytest.approx([100 * interval.low, 100 * interval.high])
    better = sum(b > a for a, b in zip(first, second, strict=True))
    worse = sum(b < a for a, b in zip(first, second, strict=True))
    assert told["test"]["name"].startswith("McNemar")
    assert told["test"]["p"] == pytest.approx(stats.binomtest(better, better + worse).pvalue)
    back = compare.paired(scored(tmp_path, second, "b"), scored(tmp_path, first))
    assert back["difference"] == -told["difference"] and back["p"] == pytest.approx(told["p"])


def test_questions_of_one_image_count_as_one_where_they_agree(tmp_path):
    made.questions(tmp_path, 200, of_image=4)
    copied = [value for value in made.drawn(3, 50, 0.6) for _ in range(4)]
    told = compare.paired(scored(tmp_path, [False] * 200), scored(tmp_path, copied, "b"))
    made.questions(tmp_path, 50)
    single = compare.paired(scored(tmp_path, [False] * 50), scored(tmp_path, copied[::4], "b"))
    assert (told["stderr"], told["df"]) == pytest.approx((single["stderr"], 49))
    assert told["test"]["name"] == "sign test, exact, over clusters"
    assert told["test"]["p"] == single["test"]["p"]


def test_the_jackknife_of_a_mean_is_its_standard_error(tmp_path):
    made.questions(tmp_path, 120, of_image=3)
    a, b = (scored(tmp_path, made.drawn(k, 120, 0.5), f"{k}") for k in (4, 5))
    estimate = jackknife.estimate((a, b), lambda one, other: other - one)
    told, _ = compare.paired_difference(a, b)
    assert (estimate.value, estimate.stderr) == pytest.approx((told.value, told.stderr))
    alone = jackknife.estimate((a,), lambda value: value)
    assert alone.stderr == pytest.approx(a.aggregate.stderr)


def test_a_metric_that_is_no_mean_has_an_interval_by_the_delta_method(tmp_path):
    made.questions(tmp_path, 150)
    a, b = (as_f1(scored(tmp_path, made.drawn(k, 150, s), f"{k}")) for k, s in ((6, 0.4), (7, 0.6)))
    told = compare.paired(a, b)
    assert told["test"] is None and "jackknife" in told["how"]
    # F1 = 2m / (m + 1) of the mean grade m, whose slope is 2 / (m + 1)^2.
    grades = [[g.grade.value for g in s.graded] for s in (a, b)]
    slopes = [2 / (sum(x) / 150 + 1) ** 2 for x in grades]
    linear = [slopes[1] * y - slopes[0] * x for x, y in zip(*grades, strict=True)]
    assert told["stderr"] == pytest.approx(100 * stats.sem(linear), rel=0.02)


def test_an_interval_of_the_difference_holds_the_truth_as_often_as_it_says(tmp_path):
    made.questions(tmp_path, 60)
    inside = 0
    for seed in range(200):
        one, other = made.drawn(2 * seed, 60, 0.5), made.drawn(2 * seed + 1, 60, 0.7)
        differences = [float(b) - float(a) for a, b in zip(one, other, strict=True)]
        estimate = jackknife.Estimate(
            100 * sum(differences) / 60, 100 * float(stats.sem(differences)), 60
        )
        low, high = compare.told(estimate, "", n=60, difference=None)["interval"]
        inside += low <= 20 <= high
    assert 180 <= inside <= 198


@pytest.mark.parametrize("df", [9, 100_000])
def test_power_is_that_of_the_t_test(df):
    told = compare.power(1.0, 0.5, 1000, df)
    least = told["smallest_difference"]
    noncentral = stats.nct(df, least / 0.5)
    assert noncentral.sf(stats.t.ppf(0.975, df)) == pytest.approx(told["power"], abs=0.02)
    again = compare.power(1.0, 0.5, 1000, df, difference=least)
    assert abs(again["questions_for"][f"{least:g}"] - 1000) <= 1
    assert told["questions_for"]["1"] == told["questions_for_observed"]
    assert told["questions_for"]["1"] == math.ceil(1000 * least**2)


def test_equal_answers_do_not_differ_and_a_difference_without_spread_is_not_certain(tmp_path):
    made.questions(tmp_path, 10)
    a, b = scored(tmp_path, [True] * 10), scored(tmp_path, [False] * 10, "b")
    same = compare.paired(a, a)
    assert (same["difference"], same["p"], same["test"]["p"]) == (0, 1, 1)
    assert same["verdict"] == "these questions do not tell which is better"
    other = compare.paired(a, b)
    assert other["stderr"] is None and other["test"]["p"] == pytest.approx(2**-9)


def test_the_three_kinds_of_files_give_one_difference(tmp_path, capsys):
    made.questions(tmp_path, 40, of_image=2)
    files = [made.answers(tmp_path / f"{k}.jsonl", made.drawn(k, 40, 0.5)) for k in (1, 2)]
    asked = made.own(tmp_path, files[0])[:3]
    by_answers = made.score(capsys, *asked, "--compare", *files)
    kept, printed = [], []
    for k, file in enumerate(files):
        kept.append(tmp_path / f"samples{k}.jsonl")
        printed.append(tmp_path / f"score{k}.json")
        shown = made.score(capsys, *made.own(tmp_path, file), f"--samples={kept[-1]}")
        made.lines(printed[-1], [shown])
    assert made.score(capsys, "--compare", *kept) == by_answers
    unpaired = made.score(capsys, "--compare", *printed)
    assert unpaired["difference"] == pytest.approx(by_answers["difference"])
    assert not unpaired["paired"] and by_answers["paired"]
    message = made.score(capsys, "--compare", files[0], kept[1], code=2)
    assert "holds predictions" in message and "samples" in message


def test_two_protocols_are_compared_only_when_asked(tmp_path, capsys):
    made.questions(tmp_path, 20)
    file = made.answers(tmp_path / "a.jsonl", made.drawn(1, 20, 0.5))
    kept = []
    for metric in ("exact_match", "contains"):
        kept.append(tmp_path / f"{metric}.jsonl")
        flags = [f for f in made.own(tmp_path, file) if "metric" not in f]
        made.score(capsys, *flags, f"--metric={metric}", f"--samples={kept[-1]}")
    message = made.score(capsys, "--compare", *kept, code=2)
    assert "exact_match" in message and "contains" in message and "--across-protocols" in message
    told = made.score(capsys, "--compare", *kept, "--across-protocols")
    assert (told["difference"], told["protocol"]) == (0, "exact_match and contains")


def test_scores_of_other_questions_are_not_compared(tmp_path, capsys):
    kept = []
    for k, n in enumerate((10, 11)):
        made.questions(tmp_path, n)
        file = made.answers(tmp_path / f"{k}.jsonl", [True] * n)
        kept.append(tmp_path / f"samples{k}.jsonl")
        made.score(capsys, *made.own(tmp_path, file), f"--samples={kept[-1]}")
    assert "1 questions differ" in made.score(capsys, "--compare", *kept, code=2)


def test_a_sample_has_the_fields_of_lmms_eval_and_scores_again(tmp_path, capsys):
    made.questions(tmp_path, 6)
    file = made.answers(tmp_path / "a.jsonl", [True, False, None, True, True, False])
    kept = tmp_path / "samples.jsonl"
    shown = made.score(capsys, *made.own(tmp_path, file), f"--samples={kept}")
    rows = [row for _, row in samples.json_lines(kept)]
    assert [row["doc_id"] for row in rows] == list(range(6))
    for name in ("input", "target", "resps", "filtered_resps", "doc_hash", "exact_match"):
        assert all(name in row for row in rows)
    assert [row["exact_match"] for row in rows] == [1, 0, 0, 1, 1, 0]
    again = samples.read(kept).described
    for name in ("value", "stderr", "n", "failed", "subscores", "parser", "metric", "unit"):
        assert again[name] == shown[name], name


def test_what_a_comparison_does_not_use_is_refused(tmp_path, capsys):
    made.questions(tmp_path, 4)
    file = made.answers(tmp_path / "a.jsonl", [True, True, False, True])
    kept = tmp_path / "samples.jsonl"
    shown = made.score(capsys, *made.own(tmp_path, file), f"--samples={kept}")
    printed = made.lines(tmp_path / "score.json", [shown])
    for both in (kept, printed):
        message = made.score(capsys, "--compare", both, both, "--task=own", code=2)
        assert "--task is not for --compare of" in message
    del shown["n"]
    broken = made.lines(tmp_path / "broken.json", [shown])
    assert "own without n" in made.score(capsys, "--compare", printed, broken, code=2)
    wrong = made.lines(tmp_path / "wrong.jsonl", [{"doc_id": 0, "protocol": "llava"}])
    assert "no sample of" in made.score(capsys, "--compare", wrong, wrong, code=2)
