# SPDX-License-Identifier: Apache-2.0
"""Parsers and scores of benchmarks with options, yes or no, and short answers: what the published
scorers gave, and what they get wrong."""

import json
import math
from pathlib import Path

import pytest

from vlm_jax.evals import choices, groups, metrics, scoring
from vlm_jax.evals.task import Grade, Graded, Question
from vlm_jax.evals.tasks import TASKS, chartqa, docvqa, mme, scienceqa

EXAMPLES = Path(__file__).parent / "published" / "benchmarks"
PUBLISHED = json.loads((Path(__file__).parent / "published" / "metrics.json").read_text())


def graded(task, protocol, text, **question):
    """The grade of one answer."""
    question = Question(id=0, text="", **question)
    return TASKS[task].protocols[protocol].grade(question, text)


def example(task, protocol):
    """The score of the small example of a task."""
    home = EXAMPLES / task
    expected = json.loads((home / "expected.json").read_text())
    return scoring.score(
        task, protocol, home / expected["predictions"], home / expected["annotations"]
    ).described


@pytest.mark.parametrize("prediction, answers, score", [
    ("abcd", ["abxy"], 0.5), ("a", ["ab"], 0.5), ("ABC  corp", ["abc corp"], 1),
    ("abc corp ", ["abc corp"], 1), ("  yes", ["yes"], 1), ("", [""], 1), ("", ["x"], 0),
    ("$1,000", ["1000"], 2 / 3), ("3.5%", ["3.5"], 0.75),
    ("15 June 1999", ["15 June, 1999", "June 15 1999"], 12 / 13), ("itt", ["ITC"], 2 / 3),
    ("n/a", ["n/a"], 1), ("." * 40, ["x"], 0), ("ß", ["ss"], 0), ("straße", ["strasse"], 5 / 7),
])  # fmt: skip
def test_anls_is_that_of_the_competition(prediction, answers, score):
    assert docvqa.anls(prediction, answers) == pytest.approx(score)


def test_blanks_raise_a_wrong_answers_anls_by_the_competitions_script_alone():
    question = dict(answers=("abxyz",), facts={"groups": ()})
    assert graded("docvqa", "official", "abqqq" + 8 * " ", **question).value > 0.5
    assert graded("docvqa", "lmms-eval", "abqqq" + 8 * " ", **question).value == 0


def test_a_question_of_several_types_counts_in_each():
    kinds = [("form",), ("form", "layout")]
    rows = [
        Graded(Question(id=i, text="", facts={"groups": k}), "", Grade(float(i), "", ""))
        for i, k in enumerate(kinds)
    ]
    assert groups.average_of_groups(rows).subscores == {"form": 50, "layout": 100}


@pytest.mark.parametrize("prediction, target, published, ours", [
    ("10.5", "10", 1, 1), ("9.5", "10", 1, 1), ("9.524", "10", 1, 1), ("9.4", "10", 0, 0),
    ("0", "0", 1, 1), ("0.0", "0", 0, 1), ("0.01", "0", 0, 0),
    ("5%", "0.05", 1, 1), ("5%", "5", 0, 1), ("5", "5%", 0, 1), ("2%", "2", 0, 1),
    ("500%", "5", 1, 1), ("50%", "5%", 0, 0), ("2019", "2018", 1, 1), ("1e3", "1000", 1, 1),
    ("10 ", "10", 1, 1), ("Yes", "yes", 1, 1), ("Yes.", "Yes", 0, 0), ("1,000", "1000", 0, 1),
    ("10,00", "1000", 0, 0), ("$5", "5", 0, 1), ("-$5", "-5", 0, 1), ("nan", "nan", 0, 1),
    ("inf", "inf", 0, 1), ("-5", "5", 0, 0), ("", "5", 0, 0), ("[1, 2]", "[1,2]", 0, 0),
    ("１２", "12", 1, 1), ("two", "2", 0, 0), ("%", "5", 0, 0), ("5%%", "0.05", 1, 0),
])  # fmt: skip
def test_relaxed_accuracy(prediction, target, published, ours):
    assert chartqa.relaxed(prediction, target) == published
    assert graded("chartqa", "official", prediction, answers=(target,)).value == ours


def test_both_protocols_score_the_charts_example():
    assert example("chartqa", "lmms-eval")["value"] == 50
    assert example("chartqa", "official")["value"] == 75  # 2 for 2 % and 1,000 for 1000


@pytest.mark.parametrize("text, official, lmms_eval", [
    ("Not sure", "no", "no"), ("none", "no", "no"), (" Yes", "yes", "yes"),
    ("I know", "other", "other"), ("The answer is yes", "other", "other"), ("y", "other", "yes"),
    ("no.", "no", "no"), ("unknown yes", "other", "other"), ("", "other", "other"),
    ("N", "other", "no"), (" n. ", "other", "no"), ("..no", "no", "no"), ("." * 40, *2 * ["other"]),
    ("    yes", "other", "yes"), ("Yesterday", "yes", "yes"), ("ｙｅｓ", "other", "other"),
])  # fmt: skip
def test_the_first_four_characters_answer_yes_or_no(text, official, lmms_eval):
    assert mme.prefix(text)[0] == official
    assert mme.prefix_lmms_eval(text)[0] == lmms_eval


def test_the_error_of_mme_is_a_jackknife_over_pictures():
    def rows(values):
        return [
            Graded(
                Question(id=f"{name}/{i}", text=str(j), cluster=f"{name}/{i}", labels={"": name}),
                "",
                Grade(float(v), "", ""),
            )
            for (name, i), pair in values.items()
            for j, v in enumerate(pair)
        ]

    values = {("count", i): (i % 2, i % 3 > 0) for i in range(9)}
    values |= {("OCR", i): (1, i % 2) for i in range(6)} | {("code_reasoning", 0): (1, 1)}
    whole = mme.aggregate(rows(values))
    assert (whole.n, whole.subscores["cognition"]) == (30, 200)
    left = [
        mme.aggregate(rows({k: v for k, v in values.items() if k != key})).value
        for key in values
        if key[0] != "code_reasoning"
    ]
    assert whole.stderr == pytest.approx(metrics.jackknife_stderr(left))
    assert sorted(whole.replicates.values()) == pytest.approx(sorted(left))
    assert math.isnan(mme.aggregate(rows({("count", 0): (1, 1)})).stderr)


def test_a_prediction_finds_its_picture_with_any_prompt():
    image, question = "artwork/images/1.jpg", "Is this a boat?"
    prompts = [
        f"{question}\nAnswer the question using a single word or phrase.",
        f"{question} Please answer yes or no.",
        f"{question}  Please answer yes or no.",
        question,
    ]
    keys = {mme.key_of({"question_id": image, "prompt": p}) for p in prompts}
    assert keys == {mme.key_of({"question_id": "artwork/1.png", "prompt": question})}


@pytest.mark.parametrize("text, llava, lmms_eval, official", [
    ("B", "B", "B", "B"), ("B.", "", "B", "B"), ("b", "", "B", "B"), ("b.", "", "", "B"),
    (" B ", "", "B", "B"), ("B. hammock", "B", "B", "B"), ("B) hammock", "", "", "B"),
    ("(B)", "", "", "B"), ("(B) hammock", "", "", "B"), ("Ｂ", "", "", "B"),
    ("The answer is B", "", "", "B"), ("The answer is B.", "B", "", "B"),
    ("The answer is A. No: The answer is B.", "", "", "B"), ("the answer is **B**", "", "", "B"),
    ("A cat sits there, so the answer is B.", "", "", "B"),
    ("A. is wrong. The answer is B.", "A", "A", "B"), ("A cat", "", "", ""),
    ("I am sure", "", "", ""),
    ("hammock", "", "", "B"), ("The hammock.", "", "", "B"), ("scarf or hammock", "", "", ""),
    ("E", "", "E", ""), ("D. x", "", "D", ""), ("", "", "", ""), ("." * 40, "", "", ""),
    ("B.2", "", "B", "B"), ("hammocks", "", "", ""), ("answer: b", "", "", "B"),
])  # fmt: skip
def test_letters(text, llava, lmms_eval, official):
    question = dict(answers=("B",), facts={"options": ("scarf", "hammock", "tripod")})
    for protocol, letter in dict(llava=llava, official=official).items():
        grade = graded("scienceqa", protocol, text, **question)
        assert (grade.parsed, grade.value) == (letter, letter == "B")
    assert graded("scienceqa", "paper", text, **question).parsed == llava
    grade = graded("scienceqa", "lmms-eval", text, **question)
    assert (grade.parsed, grade.value) == (lmms_eval, lmms_eval == "B")


def test_the_published_functions_give_the_published_scores():
    for row in PUBLISHED["anls"]:
        got = docvqa.anls(row["prediction"], row["answers"])
        assert got == pytest.approx(row["score"], abs=1e-9)
    for row in PUBLISHED["chartqa_relaxed"]:
        assert chartqa.relaxed(row["prediction"], row["answer"]) == row["score"]
    for row in PUBLISHED["scienceqa_lmms_eval"]:
        got = scienceqa.grade(row["prediction"], row["choices"], row["answer"])
        assert got == row["score"]
    for row in PUBLISHED["ocrbench"]:
        facts = {"dataset": row["dataset"]}
        got = graded(
            "ocrbench", "lmms-eval", row["prediction"], answers=tuple(row["answers"]), facts=facts
        )
        assert got.value == row["score"]
    sums = mme.score(PUBLISHED["mme"]["rows"])
    assert sums["perception"] == pytest.approx(PUBLISHED["mme"]["perception"], abs=1e-9)
    assert sums["cognition"] == pytest.approx(PUBLISHED["mme"]["cognition"], abs=1e-9)


@pytest.mark.parametrize(
    "task", "ai2d chartqa docvqa infovqa mathvista mmbench mme mmmu scienceqa".split()
)
def test_every_rule_says_what_it_saw(task):
    for protocol in TASKS[task].protocols:
        described = example(task, protocol)
        assert all(rule and not rule.isdigit() for rule in described["parser"])
        assert described["failed"] == 0


@pytest.mark.parametrize("text, letter", [
    ("", ""), ("perhaps", ""), ("B or C", ""), ("A cat", ""), ("A cat on B", "B"), ("not B", ""),
    ("B is wrong", ""), ("I think so", ""), ("the answer is b", "B"), ("the answer is a dog", ""),
    ("Step 1: A. Step 2: B. Final: B", "B"), ("I choose C", "C"), ("C\n\nbecause A", "C"),
    ("\\boxed{C}", "C"), ("(b) hammock", "B"), ("选 B", "B"), ("Ｃ．", "C"), ("red A", "A"),
])  # fmt: skip
def test_no_option_is_guessed(text, letter):
    assert choices.choose(text, ["scarf", "hammock", "tripod"])[0] == letter


@pytest.mark.parametrize("dataset, answer, text, official, lmms_eval", [
    ("IIIT5K", "CENTRE", "the centre", 1, 1), ("IIIT5K", "centre", "CENTRE!", 1, 1),
    ("IIIT5K", "４０", "40", 0, 1), ("IIIT5K", "a\nb", "A B", 1, 1), ("IIIT5K", "", "", 1, 1),
    ("HME100k", "x ^ 2", "x^2", 1, 1), ("HME100k", "X", "x", 0, 0), ("HME100k", "２", "2", 0, 0),
])  # fmt: skip
def test_ocrbench_folds_case_and_for_lmms_eval_width(dataset, answer, text, official, lmms_eval):
    for protocol, value in {"official": official, "lmms-eval": lmms_eval}.items():
        facts = {"dataset": dataset}
        assert graded("ocrbench", protocol, text, answers=(answer,), facts=facts).value == value


def test_points_of_ocrbench_are_right_answers_whatever_their_number():
    rows = [
        Graded(Question(id=i, text="", labels={"": "a"}), "", Grade(float(i > 0), "", ""))
        for i in range(3)
    ]
    for protocol in TASKS["ocrbench"].protocols.values():
        assert protocol.aggregate(rows).value == protocol.aggregate(rows).subscores["a"] == 2
        assert protocol.aggregate(rows * 10).value == 20
