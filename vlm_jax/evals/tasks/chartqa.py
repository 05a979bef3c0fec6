# SPDX-License-Identifier: Apache-2.0
"""ChartQA: questions about charts, scored by relaxed accuracy (Masry et al. 2022, section 5.1).

A number may be off by 5 %. The files have no ids: a question is `FILE/POSITION` from 0, such as
`test_human/3`.
"""

import math
import re
from pathlib import Path

from vlm_jax.evals.readers import row_of, text_of
from vlm_jax.evals.task import (
    SHORT,
    Annotations,
    Grade,
    Protocol,
    Question,
    Task,
    average,
    found,
    image_folder,
    read_json,
    unique,
)

TOLERANCE = 0.05  # of the target
FILES = ("test_human.json", "test_augmented.json")
SUFFIX = "\nAnswer the question with a single word."  # lmms-eval tasks/chartqa/chartqa.yaml
THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+(\.\d*)?")


def relaxed(prediction: str, target: str) -> float:
    """Relaxed correctness as published: pix2struct's metrics.py and lmms-eval's chartqa/utils.py.

    Numbers are what Python's `float` reads; a percent sign divides by 100; a target of 0 and
    everything else is compared as text, without case.
    """
    return _published(prediction, target)[0]


def _published(prediction: str, target: str) -> tuple[float, str]:
    value, goal = _published_number(prediction), _published_number(target)
    if value is not None and goal:
        return float(abs(value - goal) / abs(goal) <= TOLERANCE), "number"
    return float(prediction.lower() == target.lower()), "text"


def _published_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _lenient(prediction: str, target: str) -> tuple[float, str]:
    prediction, target = prediction.strip(), target.strip()
    values, goals = _readings(prediction), _readings(target)
    if not values or not goals:
        return float(prediction.lower() == target.lower()), "text"
    one_sided = len(values) != len(goals)
    pairs = [(v, g) for v in values for g in goals] if one_sided else [(values[0], goals[0])]
    right = any(abs(v - g) <= TOLERANCE * abs(g) for v, g in pairs)
    return float(right), "number, percent sign on one side" if one_sided else "number"


def _readings(text: str) -> list[float]:
    """What number a text is: none, one, or with a percent sign the written one and its 1/100."""
    percent = text.endswith("%")
    digits = text.removesuffix("%").strip()
    for sign in "$€£¥":
        digits = digits.replace(sign, "", 1) if digits.lstrip("+-").startswith(sign) else digits
    if THOUSANDS.fullmatch(digits.lstrip("+-")):
        digits = digits.replace(",", "")
    try:
        value = float(digits)
    except ValueError:
        return []
    if not math.isfinite(value):
        return []
    return [value, value / 100] if percent else [value]


def grade(question: Question, text: str) -> Grade:
    """By the paper's rule: numbers are equal within 5 %, however they are written."""
    value, rule = _lenient(text, question.answers[0])
    return Grade(value, text.strip(), rule)


def grade_published(question: Question, text: str) -> Grade:
    """By the published function, on the stripped text."""
    value, rule = _published(text.strip(), question.answers[0])
    return Grade(value, text.strip(), rule)


def read(path: Path) -> Annotations:
    """The questions of test_human.json and test_augmented.json, or of one such file."""
    if path.is_file():
        files = [path]
    else:
        homes = ("", "test", "ChartQA Dataset/test", "ChartQA_Dataset/test")
        first = found(
            path, [f"{home}/{name}".lstrip("/") for home in homes for name in FILES], TASK.name
        )
        files = [first.parent / name for name in FILES if (first.parent / name).is_file()]
    questions = []
    for file in files:
        split, folder = file.stem.split("_")[-1], image_folder(file, ["png"])
        for number, row in enumerate(read_json(file, list)):
            with row_of(file, number):
                questions.append(
                    Question(
                        id=f"{file.stem}/{number}",
                        text=row["query"],
                        images=(folder / row["imgname"],),
                        answers=(text_of(row["label"]),) if row.get("label") is not None else (),
                        cluster=row["imgname"],
                        labels={"": split},
                    )
                )
    version = f"{' and '.join(f.stem for f in files)}, {len(questions)} questions"
    missing = [name for name in FILES if name not in {f.name for f in files}]
    notes = [f"without {name}: the reported number is over both" for name in missing]
    return Annotations(unique(questions, files[0]), tuple(files), version, tuple(notes))


TASK = Task(
    name="chartqa",
    title="ChartQA, test, 1,250 human and 1,250 augmented questions",
    where="https://github.com/vis-nlp/ChartQA, folder ChartQA Dataset; GPL-3.0",
    layout="ChartQA Dataset/test/test_human.json, test_augmented.json, png/",
    read=read,
    protocols={
        "official": Protocol(
            metric="relaxed_accuracy",
            source="arXiv 2203.10244, section 5.1; prompt of LLaVA's short answers. A percent "
            "sign on one side alone may mean 1/100 or nothing, thousands separators and currency "
            "signs are read, and numbers equal to a target of 0 are right",
            prompt=lambda question: question.text + SHORT,
            max_new_tokens=16,
            grade=grade,
            aggregate=average,
            faults=("years are numbers too: 2019 is right for 2018",),
        ),
        "lmms-eval": Protocol(
            metric="relaxed_overall",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/chartqa/utils.py "
            "chartqa_process_results, on stripped answers",
            prompt=lambda question: question.text + SUFFIX,
            max_new_tokens=16,
            grade=grade_published,
            aggregate=average,
            faults=(
                "2% is wrong for 2, and 2 for 2%",
                "with a target of 0 only the same text is right: 0.0 is wrong",
                "1,000 is wrong for 1000, and $5 for 5",
                "years are numbers too: 2019 is right for 2018",
            ),
        ),
    },
)
