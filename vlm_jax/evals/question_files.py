# SPDX-License-Identifier: Apache-2.0
"""LLaVA's files of questions: JSON lines with `question_id`, `image` and `text`, no answers.

For splits whose official annotations are not needed to ask, such as VQAv2's test-dev.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax.evals.task import SHORT, Annotations, Question, image_folder, json_lines, unique


def rows(path: Path, *names: str) -> list[dict[str, Any]]:
    """The lines of the file. Raises ValueError for one without a field of `names`."""
    found = []
    for number, row in json_lines(path):
        if missing := [name for name in ("question_id", "text", *names) if name not in row]:
            raise ValueError(f"{path}, line {number}: no {', '.join(missing)}")
        found.append(row)
    return found


def bare(text: str, suffix: str = SHORT) -> str:
    """The question of a `text` that ends in the suffix of a prompt."""
    return text.removesuffix(suffix)


def read(path: Path, folders: Sequence[str], suffix: str = SHORT) -> Annotations:
    """The questions of such a file; their images are in the first of `folders` that exists."""
    home = image_folder(path, folders)
    questions = [
        Question(
            id=row["question_id"],
            text=bare(row["text"], suffix),
            images=(home / row["image"],),
            cluster=str(row["image"]),
        )
        for row in rows(path, "image")
    ]
    note = "a file of questions alone: it can be asked, and a submission written, but not scored"
    return Annotations(unique(questions, path), (path,), "questions alone", (note,))
