# SPDX-License-Identifier: Apache-2.0
"""OCRBench: 1,000 questions of reading text; points are right answers (Liu et al. 2024).

Ids are positions in the file from 0: its own `id` is not unique.
"""

from functools import partial
from pathlib import Path

from vlm_jax.evals.readers import row_of, texts_of
from vlm_jax.evals.task import (
    Annotations,
    Grade,
    Protocol,
    Question,
    Task,
    average,
    found,
    image_folder,
    question_alone,
    read_json,
    unique,
)

CASED = "HME100k"  # formulas: case counts, blanks do not
# Full-width forms of ASCII, U+FF01 to U+FF5E, and the ideographic space.
NARROW = {0x3000: " "} | {0xFF01 + i: chr(0x21 + i) for i in range(94)}


def read(path: Path) -> Annotations:
    """The questions of OCRBench.json."""
    path = found(path, ["OCRBench.json", "OCRBench/OCRBench.json"], "ocrbench")
    folder = image_folder(path, ["OCRBench_Images"])
    questions = []
    for number, row in enumerate(read_json(path, list)):
        with row_of(path, number):
            answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
            questions.append(
                Question(
                    id=number,
                    text=row["question"],
                    images=(folder / row["image_path"],),
                    answers=texts_of(answers),
                    cluster=row["image_path"],
                    labels={"": row["type"]},
                    facts={"dataset": row["dataset_name"]},
                )
            )
    return Annotations(unique(questions, path), (path,), version=f"{len(questions)} questions")


def contained(question: Question, text: str, *, fold: bool) -> Grade:
    """1 if an answer occurs in the text. `fold` makes full-width characters ASCII, except for
    formulas."""

    def plain(value: str) -> str:
        if question.facts["dataset"] == CASED:
            return value.strip().replace("\n", " ").replace(" ", "")
        value = value.translate(NARROW) if fold else value
        return value.lower().strip().replace("\n", " ")

    parsed = plain(text)
    right = any(plain(answer) in parsed for answer in question.answers)
    return Grade(float(right), parsed, "substring")


TASK = Task(
    name="ocrbench",
    title="OCRBench, 1,000 questions",
    where="https://github.com/Yuliang-Liu/MultimodalOCR, folder OCRBench",
    layout="OCRBench/OCRBench.json, OCRBench_Images/",
    read=read,
    unit="points",
    protocols={
        "official": Protocol(
            metric="points",
            source="Yuliang-Liu/MultimodalOCR@794c36d OCRBench/example.py",
            prompt=question_alone,
            max_new_tokens=100,
            grade=partial(contained, fold=False),
            aggregate=partial(average, points=True),
        ),
        "lmms-eval": Protocol(
            metric="ocrbench_accuracy",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/ocrbench/utils.py "
            "ocrbench_process_results, ocrbench_aggregate_accuracy",
            prompt=question_alone,
            max_new_tokens=128,
            grade=partial(contained, fold=True),
            aggregate=partial(average, points=True),
            faults=(
                "its own return value divides by 1000 whatever the number of questions; here the "
                "value is points",
            ),
        ),
    },
)
