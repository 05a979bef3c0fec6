# SPDX-License-Identifier: Apache-2.0
"""AI2D: multiple-choice questions about diagrams of school science (Kembhavi et al. 2016).

The rows have no ids: a question is the number of its line, from 0.
"""

import re
import string
from functools import partial
from pathlib import Path

from vlm_jax.evals.choices import LETTERS, choose, lettered
from vlm_jax.evals.readers import hub_image, hub_rows, row_of, texts_of
from vlm_jax.evals.task import (
    LETTER,
    Annotations,
    Grade,
    Protocol,
    Question,
    Task,
    average,
    unique,
)

FIRST = re.compile(r"\s*([A-Z])\.")
NO_MARKS = str.maketrans("", "", string.punctuation)


def read(path: Path) -> Annotations:
    """The questions of test.jsonl."""
    path, rows = hub_rows(path, ["test.jsonl", "data/test.jsonl", "ai2d.jsonl"], "ai2d")
    questions = []
    for number, row in enumerate(rows):
        with row_of(path, number):
            image = hub_image(path, row, "image")
            answer = str(row.get("answer", "")).strip()
            options = texts_of(row["options"])
            if answer.isdecimal() and int(answer) >= len(options):
                raise ValueError(f"its answer is {answer}, and it has {len(options)} options")
            questions.append(
                Question(
                    id=number,
                    text=row["question"],
                    images=(image,) if image else (),
                    answers=(LETTERS[int(answer)],) if answer.isdecimal() else (),
                    cluster=str(image or number),
                    facts={"options": options},
                )
            )
    notes = (
        "the file does not say whether the labels in its pictures are masked; the score differs "
        "by many points between both kinds",
    )
    return Annotations(unique(questions, path), (path,), f"{len(questions)} questions", notes)


def grade(question: Question, text: str) -> Grade:
    """1 if the text names the right option."""
    letter, rule = choose(text, question.facts["options"])
    return Grade(float(letter == question.answers[0]), letter, rule)


def grade_lmms_eval(question: Question, text: str) -> Grade:
    """1 if the letter before a first full stop, or the whole text, is the right letter, without
    case and ASCII punctuation."""
    first = FIRST.match(text)
    kept = first.group(1) if first else text.strip()
    bare = kept.lower().translate(NO_MARKS)
    rule = "letter and full stop at the beginning" if first else "the whole text"
    return Grade(float(bare == question.answers[0].lower()), bare, rule)


def prompt(question: Question) -> str:
    """The question, its options and the request for a letter."""
    return f"{question.text}\n{lettered(question.facts['options'])}{LETTER}"


protocol = partial(Protocol, prompt=prompt, max_new_tokens=16, aggregate=average)
TASK = Task(
    name="ai2d",
    title="AI2D, test, 3,088 questions",
    where="https://huggingface.co/datasets/lmms-lab/ai2d, rows as JSON lines; the originals at "
    "https://allenai.org/data/diagrams",
    layout="test.jsonl (question, options, answer, image), images/",
    read=read,
    protocols={
        "official": protocol(
            metric="accuracy",
            source="arXiv 1603.07396, accuracy over options; letters by "
            "vlm_jax/evals/choices.py; prompt of lmms-eval",
            grade=grade,
        ),
        "lmms-eval": protocol(
            metric="exact_match",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/ai2d/utils.py MultiChoiceRegexFilter, "
            "api/metrics.py exact_match_hf_evaluate",
            grade=grade_lmms_eval,
            faults=("B) left, `The answer is B` and the text of the right option are wrong",),
        ),
    },
)
