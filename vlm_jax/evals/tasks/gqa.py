# SPDX-License-Identifier: Apache-2.0
"""GQA: questions about scene graphs, one right answer each (Hudson and Manning 2019)."""

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_jax.evals import question_files
from vlm_jax.evals.readers import row_of, text_of
from vlm_jax.evals.task import (
    Aggregate,
    Annotations,
    Grade,
    Graded,
    Protocol,
    Question,
    Task,
    average,
    found,
    image_folder,
    read_json,
    short,
    unique,
)

IMAGES = ("images", "data/images")
NAMES = (
    "data/testdev_balanced_questions.json",
    "testdev_balanced_questions.json",
    "data/val_balanced_questions.json",
    "val_balanced_questions.json",
    "data/questions/testdev_balanced_questions.json",
    "questions/testdev_balanced_questions.json",
    "llava_gqa_testdev_balanced.jsonl",
)
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The last step of a program that only names the answer, as GQA's eval.py counts reasoning steps.
NAMING = ("exist", "query: name", "choose name")


def read(path: Path) -> Annotations:
    """The questions of the official dict, as far as they are balanced; others are left out."""
    path = found(path, NAMES, "gqa")
    if path.suffix == ".jsonl":
        return question_files.read(path, IMAGES)
    rows = read_json(path, dict)
    home = image_folder(path, IMAGES)
    questions = []
    for key, row in rows.items():
        with row_of(path, key):
            if row.get("isBalanced", True):
                questions.append(_question(key, row, home))
    notes = []
    if left := len(rows) - len(questions):
        notes.append(f"{left} questions are not balanced: as in eval.py, they are not scored")
    return Annotations(unique(questions, path), (path,), path.stem, tuple(notes))


def _question(key: str, row: Mapping[str, Any], home: Path) -> Question:
    labels, facts = {}, {}
    if types := row.get("types"):
        labels = {
            "": "open" if types["structural"] == "query" else "binary",
            "structural": types["structural"],
            "semantic": types["semantic"],
        }
        group = row["groups"]["global"]
        facts = {"group": None if group is None else text_of(group)}
    if "semantic" in row:
        steps = [f"{step['operation']}: {step['argument']}" for step in row["semantic"]]
        labels["steps"] = str(sum(not any(name in step for name in NAMING) for step in steps))
        labels["words"] = str(len(row["question"].split()))
    return Question(
        id=key,
        text=row["question"],
        images=(home / f"{row['imageId']}.jpg",),
        answers=(row["answer"],) if "answer" in row else (),
        cluster=str(row["imageId"]),
        labels=labels,
        facts=facts,
    )


def as_written(text: str) -> str:
    """The answer, unchanged."""
    return text


def converted(text: str) -> str:
    """As LLaVA's convert_gqa_for_eval.py: no period at the end, lower case."""
    return text.rstrip(".").lower()


def folded(text: str) -> str:
    """As numpy compares in lmms-eval: lower case within the length of the text, then without ASCII
    punctuation and without NUL at the end."""
    return text.lower()[: len(text)].translate(NO_PUNCTUATION).rstrip("\0")


def equal(question: Question, text: str, *, plain: Callable[[str], str]) -> Grade:
    """1 if the answer is the gold one after `plain`."""
    parsed, gold = plain(text), question.answers[0]
    if parsed == gold:
        return Grade(1.0, parsed, "equal")
    near = converted(parsed.strip()) == converted(gold)
    return Grade(0.0, parsed, "equal but for case, blanks or period" if near else "different")


def equal_folded(question: Question, text: str) -> Grade:
    """1 if answer and gold are equal without case and punctuation."""
    parsed = folded(text.strip())
    right = parsed == folded(question.answers[0])
    return Grade(float(right), parsed, "equal" if right else "different")


def distribution(graded: Sequence[Graded]) -> float | None:
    """GQA's chi-square / 100 of the answers of each global group; None without groups."""
    golds: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for g in graded:
        if (group := g.question.facts.get("group")) is not None:
            golds[group][g.question.answers[0]] += 1
            given[group][g.grade.parsed] += 1
    weighted, total = 0.0, 0
    for group, counts in golds.items():
        size = counts.total()
        weighted += size * sum((given[group][a] - n) ** 2 / n for a, n in counts.items())
        total += size
    return weighted / total / 100 if total else None


def aggregate(graded: Sequence[Graded], *, labels: Sequence[str] | None = None) -> Aggregate:
    """Accuracy in percent with GQA's subscores; `distribution` is better if lower."""
    whole = average(graded, labels=labels)
    if (chi := distribution(graded)) is None:
        return whole
    return replace(whole, subscores={**whole.subscores, "distribution": chi})


AS_WRITTEN = (
    "eval.py compares as written: 'Yes' or 'yes.' is wrong where the gold answer is 'yes'; "
    "--protocol=llava lower-cases and drops the period first",
)
LLAVA = Protocol(
    metric="accuracy",
    source="GQA eval.py after haotian-liu/LLaVA@c121f04 scripts/convert_gqa_for_eval.py",
    prompt=short,
    max_new_tokens=128,
    grade=partial(equal, plain=converted),
    aggregate=partial(aggregate, labels=("", "structural", "semantic")),
    faults=("an answer with a blank around it or another mark at its end is wrong",),
)
TASK = Task(
    name="gqa",
    title="GQA, testdev balanced, 12,578 questions",
    where="https://cs.stanford.edu/people/dorarad/gqa (questions1.2.zip, images.zip); CC BY 4.0",
    layout="data/testdev_balanced_questions.json, data/images/IMAGEID.jpg",
    read=read,
    protocols={
        "official": replace(
            LLAVA,
            source="GQA eval.py (gqadataset.org; a copy in SHI-Labs/VCoder@4e85ace); it gives no "
            "prompt, which is LLaVA's",
            grade=partial(equal, plain=as_written),
            aggregate=aggregate,
            faults=AS_WRITTEN,
        ),
        "llava": LLAVA,
        "lmms-eval": Protocol(
            metric="exact_match",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/gqa/gqa.yaml, api/metrics.py "
            "exact_match_hf_evaluate",
            prompt=short,
            max_new_tokens=16,
            grade=equal_folded,
            aggregate=average,
            faults=(
                "punctuation is removed within words too: 't-shirt' is 'tshirt', '1.5' is '15'",
            ),
        ),
        "paper": replace(
            LLAVA,
            source="GQA eval.py after locuslab/llava-token-compression@bdedebd "
            "scripts/convert_gqa_for_eval.py, which is LLaVA's",
        ),
    },
)
