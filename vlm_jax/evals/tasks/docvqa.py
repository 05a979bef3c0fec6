# SPDX-License-Identifier: Apache-2.0
"""DocVQA and InfographicVQA: questions about documents, scored by ANLS (Mathew et al. 2021, 2022).

Both have the files of the Robust Reading Competition and its script; they differ in names.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm_jax.evals.groups import average_of_groups
from vlm_jax.evals.metrics import edit_distance
from vlm_jax.evals.readers import row_of, texts_of
from vlm_jax.evals.task import (
    Annotations,
    Grade,
    Protocol,
    Question,
    Task,
    found,
    image_folder,
    read_json,
    short,
    unique,
)

THRESHOLD = 0.5  # a similarity below it counts 0; itself it counts
# Fields of the files "withQT" whose values group the questions; each is one value or a list.
GROUPS = {
    "question_types": "question_type",
    "answer_type": "answer_type",
    "evidence": "evidence",
    "operation/reasoning": "operation",
}


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one answer, from 0 to 1, by the RRC's script.

    Distances are between texts in lower case with single blanks, lengths those of the texts as
    they are given, in upper case.
    """
    return max(_similarity(prediction, answer) for answer in answers)


def _similarity(prediction: str, answer: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    if length == 0:
        return 1.0
    distance = edit_distance(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
    similarity = 1 - distance / length
    return 0.0 if similarity < THRESHOLD else similarity


def grade(question: Question, text: str, *, strip: bool) -> Grade:
    """The ANLS of a text against all accepted answers."""
    text = text.strip() if strip else text
    value = anls(text, question.answers)
    rule = "equal" if value == 1 else "near" if value else "far"
    return Grade(value, " ".join(text.lower().split()), rule)


def read(
    path: Path,
    *,
    task: str,
    names: Sequence[str],
    folders: Sequence[str],
    image: Callable[[Mapping[str, Any]], str],
) -> Annotations:
    """The questions of a file of the competition; a test file has no answers."""
    path = found(path, names, task)
    whole = read_json(path, dict)
    rows = whole.get("data")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: no list `data`; its fields are {', '.join(whole):.80}")
    folder = image_folder(path, folders)
    questions = []
    for number, row in enumerate(rows):
        with row_of(path, number):
            name = image(row)
            questions.append(
                Question(
                    id=row["questionId"],
                    text=row["question"],
                    images=(folder / name,),
                    answers=texts_of(row.get("answers") or ()),
                    cluster=name,
                    facts={"groups": tuple(_groups(row))},
                )
            )
    version = " ".join(
        str(whole[field])
        for field in ("dataset_name", "dataset_version", "dataset_split")
        if field in whole
    )
    return Annotations(unique(questions, path), (path,), version)


def _groups(row: Mapping[str, Any]) -> list[str]:
    found_groups = []
    for field, name in GROUPS.items():
        values = row.get(field) or []
        for value in values if isinstance(values, list) else [values]:
            found_groups.append(f"{name}.{value}")
    return found_groups


PROTOCOLS = {
    "official": Protocol(
        metric="anls",
        source="the script of the Robust Reading Competition, as in QwenLM/Qwen-VL@aa00ed0 "
        "eval_mm/infographicsvqa_eval.py; prompt of lmms-eval",
        prompt=short,
        max_new_tokens=32,
        grade=partial(grade, strip=False),
        aggregate=average_of_groups,
        faults=(
            "lengths are those of the texts as given, distances those of the normalized ones: "
            "blanks around a wrong answer raise its score",
        ),
    ),
    "lmms-eval": Protocol(
        metric="anls",
        source="EvolvingLMMs-Lab/lmms-eval@75571cf api/metrics.py anls, on stripped answers",
        prompt=short,
        max_new_tokens=32,
        grade=partial(grade, strip=True),
        aggregate=average_of_groups,
        faults=("blanks inside an answer count in its length but not in its distance",),
    ),
}

# Without question types, and the test split, last: a folder may hold several.
DOCVQA_FILES = [
    folder + name
    for name in ("val_v1.0_withQT.json", "val_v1.0.json", "test_v1.0.json")
    for folder in ("", "spdocvqa_qas/", "val/", "test/")
]
INFOVQA_FILES = [
    folder + name
    for name in (
        "infographicsVQA_val_v1.0_withQT.json",
        "infographicsVQA_val_v1.0.json",
        "infographicsVQA_test_v1.0.json",
    )
    for folder in ("", "infographicsvqa_qas/", "val/", "test/")
]

DOCVQA = Task(
    name="docvqa",
    title="DocVQA (single page), validation, 5,349 questions",
    where="https://rrc.cvc.uab.es/?ch=17, task 1; registration needed",
    layout="val_v1.0_withQT.json, documents/",
    read=partial(
        read,
        task="docvqa",
        names=DOCVQA_FILES,
        folders=["documents", "spdocvqa_images", "images"],
        image=lambda row: row["image"].removeprefix("documents/"),
    ),
    protocols=PROTOCOLS,
)
INFOVQA = Task(
    name="infovqa",
    title="InfographicVQA, validation, 2,801 questions",
    where="https://rrc.cvc.uab.es/?ch=17, task 3; registration needed",
    layout="infographicsVQA_val_v1.0_withQT.json, infographicsVQA_val_v1.0_images/",
    read=partial(
        read,
        task="infovqa",
        names=INFOVQA_FILES,
        folders=[
            "infographicsVQA_val_v1.0_images",
            "infographicsvqa_images",
            "infographicsVQA_test_v1.0_images",
            "images",
        ],
        image=lambda row: row["image_local_name"],
    ),
    protocols=PROTOCOLS,
)
