# SPDX-License-Identifier: Apache-2.0
"""Normalized answers and soft scores are those that the published evaluators gave."""

import re

import pytest

from vlm_jax.evals import answers
from vlm_jax.evals.task import Question
from vlm_jax.evals.tasks import TASKS

# input -> EvalAI's form, and VQAEval's where it differs; by running both.
GOLDEN = {
    "Yes.": "yes", "A dog": "dog", "The man's hat": ("man 's hat", "man's hat"),
    "10,000": "10000", "10, 000": "10 000", "2,5": "25", "U.S.A.": "usa", "3.14": "3.14",
    "$5.00": "$5.00", "none": "0", "Two dogs": "2 dogs", "dont know": "don't know",
    "can't": "can't", "Im": "im", "left-handed": "left handed", "a/b": "b", "a / b": "b",
    "rock & roll": "rock & roll", "What?": "what", "o'clock": "o'clock", "1.": "1", "1. ": "1",
    "N/A": "n", "blue and white": "blue and white", "he's": ("he 's", "he's"),
    "7:30 pm": "7:30 pm", "e.g. cat": "eg cat", "": "", ". ": "", " .  .  . ": "",
    "it's a dog": ("it 's dog", "it's dog"), '"stop"': "stop", "100%": "100%",
    "coca-cola": "coca cola", "t shirt": "t shirt", "t-shirt": "t shirt", "shes": "shes",
    "youd": "you'd", "three-piece": "3 piece", "5 o clock": "5 o clock", "." * 40: "." * 8,
    "ten-ten": "10 10", "THE": "", "an apple, a pear": "apple pear",
}  # fmt: skip


@pytest.mark.parametrize("text", GOLDEN)
def test_a_normalized_answer_is_the_published_one(text):
    expected = GOLDEN[text]
    evalai, vqa_eval = (expected, expected) if isinstance(expected, str) else expected
    assert (answers.evalai(text), answers.vqa_eval(text)) == (evalai, vqa_eval)


def test_all_golden_vectors_are_here():
    assert (len(GOLDEN), len(answers.CONTRACTIONS)) == (44, 120)


@pytest.mark.parametrize("same, score", [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_the_soft_score_leaves_each_person_out(same, score):
    golds = ["cat"] * same + [f"dog {i}" for i in range(10 - same)]
    assert 100 * answers.soft_score("cat", golds) == pytest.approx(score)
    # The definition, by index: identical answers of two people are two answers.
    other = [min(1, (golds[:i] + golds[i + 1 :]).count("cat") / 3) for i in range(10)]
    assert answers.soft_score("cat", golds) == pytest.approx(sum(other) / 10)


def test_marks_are_judged_on_the_whole_text():
    # A blank beside one slash removes both; a thousands comma removes every mark.
    assert answers.without_punctuation("a/b /c") == "ab c"
    assert answers.without_punctuation("1,000-year") == "1000year"
    # EvalAI reads several commas between digits as one, VQAEval does not.
    assert answers.evalai_parts("1,,2-x") == "12x" and answers.vqa_eval("1,,2-x") == "1 2 x"


def test_after_32_periods_no_further_one_goes():
    assert answers.vqa_eval("." * 33) == "." and answers.evalai("x" + "." * 32) == "x"
    assert answers.PERIODS == re.UNICODE == 32


def test_vizwiz_writes_contractions_with_another_apostrophe():
    assert answers.vizwiz("dont") == "don\u2019t" and answers.vizwiz("dont", "`") == "don`t"
    assert answers.vizwiz("cant") == "can't" and answers.vizwiz("whove", "`") == "who've"
    assert answers.vizwiz("couldn'tve", "`") == "couldn`t`ve"
    assert len(answers.VIZWIZ["`"]) == 120


def test_number_words_are_digits_but_full_width_digits_stay():
    for form in (answers.evalai, answers.evalai_parts, answers.vqa_eval, answers.vizwiz):
        assert form("Ten") == "10" and form("eleven") == "eleven"
        assert form("２") == "２"
    # A full-width digit is a digit: the period before it stays, the comma between goes.
    assert answers.vqa_eval(".２") == ".２" and answers.vqa_eval("１,０") == "１０"


def grade(task, protocol, text, golds):
    """The grade of an answer, times 100."""
    question = Question(id=0, text="", answers=tuple(golds))
    return round(100 * TASKS[task].protocols[protocol].grade(question, text).value, 9)


@pytest.mark.parametrize(
    "task, protocol, text, golds, score",
    [
        ("vqav2", "official", "two dogs", ["2 dogs"] * 10, 0),
        ("vqav2", "official", "2 dogs.", ["2 dogs"] * 10, 0),
        ("textvqa", "llava", "two dogs", ["2 dogs"] * 10, 100),
        ("textvqa", "llava", "2 dogs.", ["2 dogs"] * 10, 100),
        ("vqav2", "official", "Yes", ["yes"] * 10, 0),
        ("vqav2", "official", "Yes", ["yes"] * 9 + ["no"], 100),
        ("vqav2", "llava", "Yes.", ["yes"] * 10, 100),
        ("vqav2", "llava", "T-shirt", ["T-shirt"] * 10, 0),
        ("vqav2", "lmms-eval", "T-shirt", ["t shirt"] * 10, 100),
        ("vqav2", "lmms-eval", "two", ["2"] * 10, 100),
        ("vqav2", "official", "two", ["2"] * 10, 0),
        ("vqav2", "lmms-eval", "２", ["2"] * 10, 0),
        ("textvqa", "lmms-eval", "２", ["2"] * 10, 0),
        ("textvqa", "lmms-eval", "２", ["２", "2", "2", "２", *["x"] * 6], 60),
        ("vqav2", "lmms-eval", "the man's", ["man's"] * 10, 100),
        ("textvqa", "lmms-eval", "the man's", ["man's"] * 10, 100),
        ("vqav2", "llava", "the man's", ["man's"] * 9 + ["x"], 0),
        ("vizwiz", "official", "Green tea", ["green tea"] * 10, 100),
        ("vizwiz", "official", "Green tea", ["Green tea"] * 10, 0),
        ("vizwiz", "lmms-eval", "Green tea", ["Green tea"] * 10, 100),
        ("vizwiz", "official", "two", ["two"] * 10, 0),
        ("vizwiz", "official", "two", ["2"] * 10, 100),
        ("vizwiz", "official", "dont know", ["don't know"] * 10, 0),
        ("vizwiz", "llava", "dont know", ["don't know"] * 10, 100),
        ("vizwiz", "llava", "Unanswerable", ["unanswerable"] * 4 + ["x"] * 6, 100),
        ("vizwiz", "llava", "", [""] * 2 + ["x"] * 8, 60),
        ("vizwiz", "official", "." * 33, ["."] * 10, 100),
        ("vizwiz", "llava", "." * 65, ["."] * 10, 100),
        ("vqav2", "llava", "." * 40, ["." * 8] * 10, 100),
        ("vqav2", "llava", "." * 40, ["." * 8] * 9 + ["x"], 100),
    ],
)
def test_what_each_protocol_matches(task, protocol, text, golds, score):
    assert grade(task, protocol, text, golds) == score
