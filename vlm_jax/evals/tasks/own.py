# SPDX-License-Identifier: Apache-2.0
"""A user's own questions: JSON lines with id, image, question and answer(s), and a named metric.

The prompt is the question as it stands. Fields besides `id`, `question`, `image` or `images`,
`answer` or `answers`, `cluster` and `labels` (a table of sub-scores) are refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.evals.answers import evalai, soft_score
from vlm_jax.evals.task import (
    Annotations,
    Grade,
    Protocol,
    Question,
    Task,
    average,
    json_lines,
    question_alone,
    unique,
)
from vlm_jax.evals.tasks.chartqa import relaxed
from vlm_jax.evals.tasks.docvqa import anls

PEOPLE = 10  # whose answers the soft score of VQA is made for
FIELDS = ("id", "question", "image", "images", "answer", "answers", "cluster", "labels")


def read(path: Path) -> Annotations:
    """The questions of a JSONL file, or of the one such file in a folder.

    Raises:
      OSError, ValueError: for a line with a missing, unknown or wrong field, with its number.
    """
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"own: {path} holds {len(files)} .jsonl files, name the file of questions"
            )
        path = files[0]
    questions = []
    for number, row in json_lines(path):
        try:
            questions.append(_question(path.parent, row))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return Annotations(unique(questions, path), (path,), version=f"{len(questions)} questions")


def _question(folder: Path, row: Mapping[str, Any]) -> Question:
    if unknown := [name for name in row if name not in FIELDS]:
        raise ValueError(f"unknown field {unknown[0]!r}: the fields are {', '.join(FIELDS)}")
    for name in ("id", "question"):
        if not isinstance(row.get(name), str | int) or isinstance(row[name], bool):
            raise ValueError(f"{name} is {row.get(name)!r:.60}, not a text or a whole number")
    if "answer" in row and "answers" in row:
        raise ValueError("it has both answer and answers: give one of them")
    labels = row.get("labels", {})
    if not isinstance(labels, dict):
        raise ValueError(f"labels is {labels!r:.60}, not an object of name and value")
    images = _texts(row, "image", "images")
    return Question(
        id=row["id"],
        text=str(row["question"]),
        images=tuple(folder / name for name in images),
        answers=_texts(row, "answer", "answers"),
        cluster=str(row.get("cluster") or (images[0] if images else "")),
        labels={str(name): str(value) for name, value in labels.items()},
    )


def _texts(row: Mapping[str, Any], one: str, several: str) -> tuple[str, ...]:
    """The texts of a field with one value, or of that with a list."""
    values = row.get(several, row.get(one))
    values = [] if values is None else values if isinstance(values, list) else [values]
    if wrong := [v for v in values if not isinstance(v, str | int | float) or isinstance(v, bool)]:
        raise ValueError(f"{one} is {wrong[0]!r:.60}, not a text or a number")
    return tuple(map(str, values))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def exact_match(question: Question, text: str) -> Grade:
    """1 if the text equals an answer, without case and with single blanks."""
    parsed = _folded(text)
    return Grade(float(parsed in map(_folded, question.answers)), parsed, "whole text")


def contains(question: Question, text: str) -> Grade:
    """1 if an answer occurs in the text, without case and with single blanks."""
    parsed = _folded(text)
    answers = filter(None, map(_folded, question.answers))
    return Grade(float(any(answer in parsed for answer in answers)), parsed, "substring")


def vqa(question: Question, text: str) -> Grade:
    """The soft score of VQA where there are ten answers, else 1 if the text equals one of them;
    both sides normalized as EvalAI does."""
    parsed, answers = evalai(text), [evalai(answer) for answer in question.answers]
    soft = len(answers) == PEOPLE
    value = soft_score(parsed, answers) if soft else float(parsed in answers)
    return Grade(value, parsed, "ten answers" if soft else "whole text")


def near(question: Question, text: str) -> Grade:
    """ANLS: one less the share of characters that differ, 0 if that is more than half."""
    text = text.strip()
    return Grade(anls(text, question.answers), _folded(text), "whole text")


def relaxed_match(question: Question, text: str) -> Grade:
    """1 if a number is within 5 % of an answer, or the text equals it without case."""
    text = text.strip()
    right = max(relaxed(text, answer) for answer in question.answers)
    return Grade(right, text, "whole text")


def _protocol(metric: str, source: str, grade: Callable[[Question, str], Grade]) -> Protocol:
    return Protocol(
        metric=metric,
        source=source,
        prompt=question_alone,
        max_new_tokens=128,
        grade=grade,
        aggregate=average,
    )


# Metric -> protocol: the questions are a user's, so that the metric is the whole rule.
TASK = Task(
    name="own",
    title="your own questions, with --metric",
    where="a file of yours",
    layout='JSON lines such as {"id": 1, "image": "a.jpg", "question": "...", "answer": "..."}; '
    "images relative to the file",
    read=read,
    protocols={
        "exact_match": _protocol("exact_match", "case and blanks do not count", exact_match),
        "contains": _protocol("contains", "case and blanks do not count", contains),
        "vqa": _protocol("vqa", "the rule of VQAv2 for ten answers, normalized", vqa),
        "anls": _protocol("anls", "the rule of DocVQA, on stripped answers", near),
        "relaxed": _protocol("relaxed", "the rule of ChartQA, on stripped answers", relaxed_match),
    },
)
