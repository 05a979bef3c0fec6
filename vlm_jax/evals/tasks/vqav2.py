# SPDX-License-Identifier: Apache-2.0
"""VQA v2: ten people's answers to each question about a COCO image (Goyal et al. 2017).

The val and train splits have answers; test-dev and test are scored by a server.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlm_jax.evals import question_files
from vlm_jax.evals.answers import evalai, evalai_parts, one_line, soft_score, vqa_eval
from vlm_jax.evals.readers import row_of
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

ASKED = "v2_OpenEnded_mscoco_{}_questions.json"
ANSWERED = "v2_mscoco_{}_annotations.json"
NAMES = (
    *(ANSWERED.format(split) for split in ("val2014", "train2014")),
    *(ASKED.format(split) for split in ("test-dev2015", "test2015", "val2014")),
    "llava_vqav2_mscoco_test-dev2015.jsonl",
    "llava_vqav2_mscoco_test2015.jsonl",
)


def read(path: Path) -> Annotations:
    """The questions, with answers where the file of annotations is given or beside it."""
    path = found(path, NAMES, "vqav2")
    if path.suffix == ".jsonl":
        return question_files.read(path, _folders(path.stem))
    first = read_json(path, dict)
    split = first.get("data_subtype") or _split(path)
    asked, answered, files = {}, {}, [path]
    for kind, name in (("questions", ASKED), ("annotations", ANSWERED)):
        beside = path.parent / name.format(split)
        if kind in first:
            source, rows = path, first[kind]
        elif beside.is_file():
            source, rows = beside, read_json(beside, dict)[kind]
            files.append(beside)
        else:
            continue
        (asked if kind == "questions" else answered).update(_by_id(source, rows))
    if not asked and not answered:
        raise ValueError(f"{path} has neither `questions` nor `annotations`")
    home, prefix = image_folder(path, _folders(split)), f"COCO_{split.replace('-dev', '')}_"
    questions = []
    for number, key in enumerate(answered or asked):
        row, answers = asked.get(key, {}), answered.get(key, {})
        with row_of(path, number):
            image = (answers or row)["image_id"]
            questions.append(
                Question(
                    id=key,
                    text=row.get("question", ""),
                    images=(home / f"{prefix}{image:012d}.jpg",),
                    answers=tuple(a["answer"] for a in answers.get("answers", ())),
                    cluster=str(image),
                    labels={"": answers["answer_type"], "question_type": answers["question_type"]}
                    if answers
                    else {},
                )
            )
    notes = []
    if not asked:
        notes.append(f"the texts of the questions are in {ASKED.format(split)}, which is missing")
    elif left := len(asked) - len(asked.keys() & answered.keys()) if answered else 0:
        notes.append(
            f"{left} questions of {ASKED.format(split)} have no answers: they are left out"
        )
    return Annotations(unique(questions, path), tuple(files), split, tuple(notes))


def _by_id(path: Path, rows: list[dict]) -> dict[int, dict]:
    by_id: dict[int, dict] = {}
    for number, row in enumerate(rows):
        with row_of(path, number):
            if row["question_id"] in by_id:
                raise ValueError(f"the question_id {row['question_id']!r} is in it twice")
            by_id[row["question_id"]] = row
    return by_id


def _split(path: Path) -> str:
    names = ("val2014", "train2014", "test-dev2015", "test2015")
    return next((name for name in names if name in path.name), names[0])


def _folders(split: str) -> tuple[str, ...]:
    folder = next((f for f in ("train2014", "val2014") if f in split), "test2015")
    return (folder, f"images/{folder}", f"Images/mscoco/{folder}")


def guarded(question: Question, text: str, *, before: Callable[[str], str] = one_line) -> Grade:
    """VQAEval's score of `before(text)`: only where people differ is anything normalized."""
    answer, people = one_line(before(text)), {one_line(a) for a in set(question.answers)}
    if len(people) == 1:
        golds, rule = [*people] * len(question.answers), "as written: all ten people agree"
    else:
        answer, rule = vqa_eval(answer), "normalized"
        golds = [vqa_eval(a) for a in question.answers]
    return Grade(soft_score(answer, golds), answer, rule if answer else f"{rule}, empty")


def soft(question: Question, text: str, *, plain: Callable[[str], str]) -> Grade:
    """The soft score with `plain` on both sides."""
    answer = plain(text)
    value = soft_score(answer, [plain(a) for a in question.answers])
    return Grade(value, answer, "normalized" if answer else "normalized, empty")


def prompt(question: Question) -> str:
    """The question and the suffix for short answers."""
    if not question.text:
        raise ValueError(
            "vqav2: the texts of the questions are in v2_OpenEnded_mscoco_SPLIT_questions.json: "
            "put it beside the annotations"
        )
    return question.text + SHORT


PERIODS = "after 32 periods no further ones are removed"
LLAVA = Protocol(
    metric="vqa_accuracy",
    source="GT-Vision-Lab/VQA@a013f00 PythonEvaluationTools/vqaEvaluation/vqaEval.py after "
    "haotian-liu/LLaVA@c121f04 scripts/convert_vqav2_for_submission.py",
    prompt=prompt,
    max_new_tokens=128,
    grade=partial(guarded, before=evalai),
    aggregate=average,
    faults=(
        "where all ten people agree the gold answers are not normalized, but the answer was "
        "before: a gold answer such as 'T-shirt' or 'it's' can never be matched",
        PERIODS,
    ),
)
TASK = Task(
    name="vqav2",
    title="VQA v2, val2014, 214,354 questions (test-dev has 107,394 and needs a server)",
    where="https://visualqa.org/download.html; annotations CC BY 4.0",
    layout="v2_mscoco_val2014_annotations.json, v2_OpenEnded_mscoco_val2014_questions.json, "
    "val2014/",
    read=read,
    protocols={
        "official": replace(
            LLAVA,
            source="GT-Vision-Lab/VQA@a013f00 PythonEvaluationTools/vqaEvaluation/vqaEval.py; it "
            "gives no prompt, which is LLaVA's",
            grade=guarded,
            faults=(
                "where all ten people agree nothing is normalized: 'Yes' or 'yes.' is wrong "
                "against ten times 'yes'; --protocol=llava normalizes the answer first",
                PERIODS,
            ),
        ),
        "llava": LLAVA,
        "lmms-eval": Protocol(
            metric="exact_match",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/vqav2/utils.py "
            "vqav2_process_results_val",
            prompt=prompt,
            max_new_tokens=16,
            grade=partial(soft, plain=evalai_parts),
            aggregate=partial(average, labels=("",)),
            faults=(
                "normalizes where all ten people agree too, which VQAEval does not",
                PERIODS,
            ),
        ),
        "paper": replace(
            LLAVA,
            source="GT-Vision-Lab/VQA@a013f00 vqaEval.py after the converter of "
            "locuslab/llava-token-compression@bdedebd, which is LLaVA's",
        ),
    },
)
