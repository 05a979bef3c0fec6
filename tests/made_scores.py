# SPDX-License-Identifier: Apache-2.0
"""Made benchmarks for the tests of scores: files of questions of our own and of answers to them."""

import json
import random
from pathlib import Path

from vlm_jax.__main__ import main


def lines(path, rows):
    """Writes rows as JSON lines and gives the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(folder, n=40, of_image=1):
    """A file of n questions for the task own, `of_image` for each image; the answers are "yes"."""
    return lines(folder / "questions.jsonl", [
        {"id": i, "image": f"{i // of_image}.png", "question": f"{i}?", "answer": "yes",
         "labels": {"half": "first" if i < n // 2 else "second"}} for i in range(n)
    ])  # fmt: skip


def answers(path, right):
    """A file of answers; `right` says which are right, None that one could not be made."""
    return lines(path, [
        {"question_id": i, "error": "out of memory"} if value is None
        else {"question_id": i, "text": "Yes" if value else "no"}
        for i, value in enumerate(right)
    ])  # fmt: skip


def drawn(seed, n, share):
    """n draws that are right with a probability of `share`."""
    chance = random.Random(seed)
    return [chance.random() < share for _ in range(n)]


def score(capsys, *argv, code=0):
    """The JSON object that `vlm-jax score ARGV` prints, or its message where it fails."""
    assert main(["score", *map(str, argv)]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return err if code else json.loads(out)


def own(folder: Path, predictions: Path):
    """The flags of a score of `questions` in a folder."""
    return ["--task=own", "--metric=exact_match", f"--annotations={folder / 'questions.jsonl'}",
            f"--predictions={predictions}"]  # fmt: skip
