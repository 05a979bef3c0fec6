# SPDX-License-Identifier: Apache-2.0
"""VizWiz-VQA: questions of blind people about their photos, ten answers each (Gurari et al. 2018).

Ids are positions in the file from 0, as in LLaVA's question files; the val and train splits have
answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlm_jax.evals import question_files
from vlm_jax.evals.answers import evalai, soft_score, vizwiz
from vlm_jax.evals.readers import row_of
from vlm_jax.evals.task import (
    SHORT,
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
    unique,
)
from vlm_jax.evals.tasks.vqav2 import PERIODS, soft

SUFFIX = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
SPLITS = ("val", "train", "test")
NAMES = (
    *(f"{split}.json" for split in SPLITS),
    *(f"{folder}/{split}.json" for folder in ("Annotations", "annotations") for split in SPLITS),
    "llava_test.jsonl",
)


def read(path: Path) -> Annotations:
    """The questions of val.json, train.json or (without answers) test.json."""
    path = found(path, NAMES, "vizwiz")
    if path.suffix == ".jsonl":
        return question_files.read(path, ("test", "images/test"), SUFFIX)
    home = image_folder(path, (path.stem, f"images/{path.stem}"))
    questions = []
    for number, row in enumerate(read_json(path, list)):
        with row_of(path, number):
            questions.append(
                Question(
                    id=number,
                    text=row["question"],
                    images=(home / row["image"],),
                    answers=tuple(a["answer"] for a in row.get("answers", ())),
                    cluster=row["image"],
                    labels={"": row["answer_type"]} if "answer_type" in row else {},
                    facts={"image": row["image"], "answerable": row.get("answerable")},
                )
            )
    return Annotations(unique(questions, path), (path,), path.stem)


def one_sided(
    question: Question,
    text: str,
    *,
    before: Callable[[str], str] = str,
    apostrophe: str = "\u2019",
) -> Grade:
    """VizWiz's score of `before(text)`: the answer is normalized, the ten gold ones are not."""
    answer = vizwiz(before(text), apostrophe)
    value = soft_score(answer, question.answers)
    return Grade(value, answer, "normalized" if answer else "normalized, empty")


def aggregate(graded: Sequence[Graded]) -> Aggregate:
    """Accuracy, that of each type of answer, and how well unanswerable questions are found.

    Average precision and F1 of "unanswerable" as the answer, in percent; absent where the file
    does not say which questions are answerable.
    """
    whole = average(graded)
    pairs = [
        (not g.question.facts["answerable"], g.grade.parsed == "unanswerable" and not g.failed)
        for g in graded
        if g.question.facts.get("answerable") is not None
    ]
    if not pairs:
        return whole
    both = sum(is_so and said for is_so, said in pairs)
    are, said = sum(is_so for is_so, _ in pairs), sum(said for _, said in pairs)
    recall, precision = both / are if are else 0.0, both / said if said else 0.0
    # Two thresholds: those who said so, then everyone.
    area = recall * precision + (1 - recall) * are / len(pairs)
    f1 = 2 * both / (are + said) if are + said else 0.0
    found = {"unanswerable.average_precision": 100 * area, "unanswerable.f1": 100 * f1}
    return replace(whole, subscores={**whole.subscores, **found})


def prompt(question: Question) -> str:
    """The question and LLaVA's two lines."""
    return question.text + SUFFIX


def prompt_lmms_eval(question: Question) -> str:
    """The question capitalized, the rest of it in lower case, and the same lines."""
    return question.text.capitalize() + SUFFIX


GOLDS = (
    "gold answers are not normalized: 'Green tea', 'two' or 'a can' among them is never matched",
    "contractions are written with another apostrophe than in the gold answers: 'dont' is wrong "
    'against "don\'t"',
    PERIODS,
)
OFFICIAL = Protocol(
    metric="vqa_accuracy",
    source="VizWiz API vqaEval.py (Qing Li; vizwiz.org, tasks-and-datasets/vqa); it gives no "
    "prompt, which is LLaVA's",
    prompt=prompt,
    max_new_tokens=128,
    grade=one_sided,
    aggregate=aggregate,
    faults=GOLDS,
)
LLAVA = replace(
    OFFICIAL,
    source="VizWiz evaluation (copy in TRI-ML/vlm-evaluation@d9f5896 "
    "vlm_eval/util/evaluation/vizwiz/eval.py) after haotian-liu/LLaVA@c121f04 "
    "scripts/convert_vizwiz_for_submission.py",
    grade=partial(one_sided, before=evalai, apostrophe="`"),
    faults=(*GOLDS, '\'s is split off before: "man\'s" becomes "man \'s"'),
)
TASK = Task(
    name="vizwiz",
    title="VizWiz-VQA, val, 4,319 questions (test has 8,000 and needs a server)",
    where="https://vizwiz.org/tasks-and-datasets/vqa; CC BY 4.0",
    layout="val.json, val/VizWiz_val_NNNNNNNN.jpg",
    read=read,
    protocols={
        "official": OFFICIAL,
        "llava": LLAVA,
        "lmms-eval": Protocol(
            metric="exact_match",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/vizwiz_vqa/utils.py "
            "vizwiz_vqa_process_results; max_new_tokens is the default of its "
            "models/simple/llava.py",
            prompt=prompt_lmms_eval,
            max_new_tokens=1024,
            grade=partial(soft, plain=evalai),
            aggregate=average,
            faults=("normalizes the gold answers too, which VizWiz does not", PERIODS),
        ),
        "paper": replace(
            LLAVA,
            source="VizWiz evaluation after the converter of "
            "locuslab/llava-token-compression@bdedebd, which is LLaVA's",
        ),
    },
)
