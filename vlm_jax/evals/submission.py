# SPDX-License-Identifier: Apache-2.0
"""Files for the servers that score the test splits: VQAv2, VizWiz, MMBench, DocVQA, InfoVQA.

Formats and the treatment of answers: haotian-liu/LLaVA@c121f04, scripts/convert_*_for_submission.py
and the task pages of rrc.cvc.uab.es (one object with questionId and answer for each question). An
answer that could not be made is the empty text.
"""

import csv
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from vlm_jax.evals import predictions, samples, spreadsheet
from vlm_jax.evals.answers import evalai
from vlm_jax.evals.task import Annotations, Question, Task

# Columns of MMBench's file that its server does not get, and the place of the new one.
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_AT = 6


def made(
    task: Task, given: Annotations, file: Path, *, allow: tuple[str, ...] = ()
) -> tuple[bytes, predictions.Predictions]:
    """The content of the file for the task's server, and the predictions that are in it.

    Raises:
      ValueError: for a task without a server, and for predictions as `predictions.read` does.
    """
    if task.name not in FORMATS:
        raise ValueError(
            f"{task.name} has no server that takes a file: --submission is for {', '.join(FORMATS)}"
        )
    found = predictions.read(file, task, given.questions, allow)
    return FORMATS[task.name](given, found.texts), found


def _vqav2(given: Annotations, texts: Mapping[str, str | None]) -> bytes:
    return _json([dict(question_id=q.id, answer=_processed(q, texts)) for q in given.questions])


def _vizwiz(given: Annotations, texts: Mapping[str, str | None]) -> bytes:
    return _json([dict(image=_image(q).name, answer=_processed(q, texts)) for q in given.questions])


def _docvqa(given: Annotations, texts: Mapping[str, str | None]) -> bytes:
    answers = [dict(questionId=q.id, answer=(texts[q.key] or "").strip()) for q in given.questions]
    return _json(answers)


def _mmbench(given: Annotations, texts: Mapping[str, str | None]) -> bytes:
    csv.field_size_limit(sys.maxsize)
    with given.files[0].open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    kept = [name for name in rows[0] if name not in DROPPED]
    names = [*kept[:PREDICTION_AT], "prediction", *kept[PREDICTION_AT:]]
    table: list[list[str | int | None]] = [list(names)]
    for row in rows:
        cells = {**row, "prediction": texts.get(str(int(row["index"])))}
        table.append([_value(name, cells[name]) for name in names])
    return spreadsheet.table(table)


def _value(name: str, text: str | None) -> str | int | None:
    return int(text) if name == "index" and text else text or None


def _processed(question: Question, texts: Mapping[str, str | None]) -> str:
    text = texts[question.key]
    return "" if text is None else evalai(text)


def _image(question: Question) -> Path:
    image = question.images[0]
    if not isinstance(image, Path):
        raise ValueError(f"question {question.key}: its image has no name")
    return image


def _json(answers: list[dict[str, object]]) -> bytes:
    return (samples.text_of(answers) + "\n").encode()


FORMATS: Mapping[str, Callable[[Annotations, Mapping[str, str | None]], bytes]] = {
    "vqav2": _vqav2,
    "vizwiz": _vizwiz,
    "mmbench": _mmbench,
    "docvqa": _docvqa,
    "infovqa": _docvqa,
}
