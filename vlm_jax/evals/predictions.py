# SPDX-License-Identifier: Apache-2.0
"""Files of predictions: LLaVA's answers format, JSON lines with `question_id` and `text`.

A line may have `error` in place of `text`: no answer could be made, and why. The texts that
lmms-eval and VLMEvalKit write where a call failed are no answers either.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.evals.task import Question, Task, json_lines, repeated

ALLOWED = ("missing", "surplus", "duplicate")
SHOWN = 3
# EvolvingLMMs-Lab/lmms-eval, models/chat/openai.py; open-compass/VLMEvalKit, inference.py.
FAILURES = ("[LMMS_EVAL_REQUEST_FAILED", "Failed to obtain answer")


@dataclass(frozen=True)
class Predictions:
    """The text for each question of a benchmark; None where no answer could be made.

    Attributes:
      missing, surplus, duplicate: how many ids were so, where that is allowed.
    """

    texts: Mapping[str, str | None]
    missing: int = 0
    surplus: int = 0
    duplicate: int = 0


def read(
    path: Path, task: Task, questions: Sequence[Question], allow: Collection[str] = ()
) -> Predictions:
    """The predictions of a file for these questions.

    Args:
      allow: of ALLOWED. A missing answer is then a failed one, a surplus one is left out, and of
        duplicates the last counts.
    Raises:
      ValueError: for a broken line, and for missing, surplus or duplicate ids unless allowed.
    """
    texts: dict[str, str | None] = {}
    duplicates: list[str] = []
    keys = {q.key: None for q in questions}
    times: Counter[str] = Counter()
    for number, row in json_lines(path):
        key = _key(path, number, task, row)
        times[key] += 1
        if (again := repeated(key, times[key])) in keys:
            key = again
        if key in texts:
            duplicates.append(f"{key!r} (line {number})")
        if row.get("error"):
            texts[key] = None
        elif isinstance(row.get("text"), str):
            texts[key] = None if row["text"].startswith(FAILURES) else row["text"]
        else:
            raise ValueError(
                f"{path}, line {number}: `text` is {row.get('text')!r:.60}, not a text; "
                f"its fields are {', '.join(row):.80}"
            )
    if not texts:
        raise ValueError(f"{path} is empty: it needs one line for each question of {task.name}")
    missing = [repr(key) for key in keys if key not in texts]
    surplus = [repr(key) for key in texts if key not in keys]
    if not texts.keys() & keys.keys():
        raise ValueError(
            f"{path}: none of its {len(texts)} ids is a question of {task.name}: it has "
            f"{', '.join(surplus[:SHOWN])}, the annotations have {', '.join(missing[:SHOWN])}"
        )
    for kind, ids, advice in (
        ("duplicate", duplicates, "the last counts"),
        ("missing", missing, "they count as failed"),
        ("surplus", surplus, "they are left out"),
    ):
        if ids and kind not in allow:
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            raise ValueError(
                f"{path}: {len(ids)} {kind} ids against {len(keys)} questions of {task.name}: "
                f"{', '.join(ids[:SHOWN])}{more}; correct the file, or allow them with "
                f"--allow={kind} ({advice})"
            )
    return Predictions(
        {key: texts.get(key) for key in keys}, len(missing), len(surplus), len(duplicates)
    )


def _key(path: Path, number: int, task: Task, row: Mapping[str, Any]) -> str:
    try:
        return task.key_of(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}, line {number}: {error!r:.80}: a prediction of {task.name} needs question_id, "
            f"text and, where ids repeat, prompt; this one has {', '.join(row):.80}"
        ) from error
