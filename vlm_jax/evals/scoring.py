# SPDX-License-Identifier: Apache-2.0
"""Scores a file of predictions against official annotations by a named protocol."""

import gc
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.errors import suggestion
from vlm_jax.evals import predictions as answers
from vlm_jax.evals.task import Aggregate, Annotations, Grade, Graded, Protocol, Task
from vlm_jax.evals.tasks import TASKS

# An answer that could not be made.
FAILED = Grade(0.0, "", "failed")
SCHEMA = 1


@dataclass(frozen=True)
class Scored:
    """A score with all that it says, and the grade of every question."""

    task: Task
    name: str  # of the protocol
    protocol: Protocol
    annotations: Annotations
    graded: tuple[Graded, ...]
    aggregate: Aggregate
    described: dict[str, Any]


def task_of(name: str) -> Task:
    """The task of this name. Raises ValueError for an unknown one, with the nearest."""
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}{suggestion(name, TASKS)}: choose one of "
            f"{', '.join(sorted(TASKS))}"
        )
    return TASKS[name]


def protocol_of(task: Task, name: str) -> Protocol:
    """A protocol of a task. Raises ValueError if the task does not have it."""
    if name not in task.protocols:
        raise ValueError(
            f"{task.name} has no protocol {name!r}: choose one of {', '.join(task.protocols)}"
        )
    return task.protocols[name]


def score(
    task_name: str,
    protocol_name: str,
    predictions: Path,
    annotations: Path,
    *,
    allow: Collection[str] = (),
) -> Scored:
    """The score of a file of predictions.

    Args:
      annotations: the official file, or the folder that holds it.
      allow: of "missing", "surplus", "duplicate"; see `predictions.read`.
    Raises:
      OSError, ValueError: for an unknown task or protocol, files that cannot be read, ids that do
        not agree, and annotations without answers.
    """
    task = task_of(task_name)
    protocol_of(task, protocol_name)
    given = annotations_of(task, annotations)
    return score_given(task, protocol_name, predictions, given, allow=allow)


def score_given(
    task: Task,
    protocol_name: str,
    predictions: Path,
    given: Annotations,
    *,
    allow: Collection[str] = (),
) -> Scored:
    """The score of a file of predictions for questions that were read already, or for some of
    them; arguments and errors as those of `score`."""
    protocol = protocol_of(task, protocol_name)
    check_answers(task, given)
    found = answers.read(predictions, task, given.questions, allow)
    with _uncollected():
        graded = tuple(
            Graded(q, "", FAILED, failed=True)
            if (text := found.texts[q.key]) is None
            else Graded(q, text, protocol.grade(q, text))
            for q in given.questions
        )
    aggregate = protocol.aggregate(graded)
    files = [file_facts(task, path) for path in given.files]
    described = dict(
        schema=SCHEMA,
        task=task.name,
        protocol=protocol_name,
        **numbers(protocol, aggregate, graded),
        unit=task.unit,
        source=protocol.source,
        faults=list(protocol.faults),
        missing=found.missing,
        surplus=found.surplus,
        duplicate=found.duplicate,
        version=given.version,
        files=files,
        predictions=dict(name=predictions.name, sha256=sha256(predictions)),
        notes=[*given.notes, *old_files(files)],
    )
    return Scored(task, protocol_name, protocol, given, graded, aggregate, described)


def numbers(protocol: Protocol, aggregate: Aggregate, graded: Sequence[Graded]) -> dict[str, Any]:
    """The fields of a score that are computed from the grades.

    Raises:
      ValueError: if no question enters the value, such as none with a picture.
    """
    if not aggregate.n:
        raise ValueError(
            f"none of the {len(graded)} questions counts in {protocol.metric} ({protocol.source}): "
            "choose another protocol, or give all questions of the benchmark"
        )
    told = len({unit.cluster for unit in aggregate.units}) > 1 and math.isfinite(aggregate.stderr)
    return dict(
        metric=protocol.metric,
        value=aggregate.value,
        stderr=aggregate.stderr if told else None,
        n=aggregate.n,
        failed=sum(g.failed for g in graded),
        empty=sum(not g.failed and not g.text.strip() for g in graded),
        subscores=dict(aggregate.subscores),
        parser=parser_counts(graded),
    )


def old_files(files: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each file whose hash is known to be that of an old version."""
    old = [f for f in files if f["known"].startswith("old")]
    current = [f for f in files if f["known"] not in ("unknown", *(g["known"] for g in old))]
    words = [f"{f['name']} is not the current file: {f['known']}" for f in old]
    if old and current:
        mixed = ", ".join(f["name"] for f in current)
        words.append(f"the files are of mixed versions: {mixed} is current")
    return words


def warnings(described: Mapping[str, Any]) -> list[str]:
    """What a reader of a printed score must not miss: failures and files of old versions."""
    scores = [described, described.get("a", {}), described.get("b", {})]
    words = [
        f"{score['failed']} of the answers could not be made; they count as wrong "
        f"({score['predictions']['name']})"
        for score in scores
        if score.get("failed") and "predictions" in score
    ]
    return words + old_files(described.get("files", []))


def annotations_of(task: Task, path: Path) -> Annotations:
    """The questions of a task's official files.

    Raises:
      OSError, ValueError: for files that are missing or have another form.
    """
    try:
        with _uncollected():
            return task.read(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not have the form of {task.name}'s files ({task.layout}): {error!r:.80}"
        ) from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which files and grades do not have.

    It looks at the millions of objects of VQAv2 again and again, and doubles the time of reading.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def check_answers(task: Task, given: Annotations) -> None:
    """Refuses annotations without answers (a test split)."""
    without = sum(not q.answers for q in given.questions)
    if without:
        raise ValueError(
            f"{task.name}: {without} of {len(given.questions)} questions in {given.files[0]} have "
            "no answer, as in a test split or a file of questions alone: give the annotations of a "
            "split that has them, or write the file for the benchmark's server with "
            "--submission=FILE"
        )


def parser_counts(graded: Sequence[Graded]) -> dict[str, int]:
    """How many answers each rule of the parser took, the most frequent first."""
    return dict(Counter(g.grade.rule for g in graded).most_common())


def file_facts(task: Task, path: Path) -> dict[str, str]:
    """Name, hash and, where the hash is known, what this file is."""
    digest = sha256(path)
    return dict(name=path.name, sha256=digest, known=task.known.get(digest, "unknown"))


def sha256(path: Path) -> str:
    """The hash of a file's content; of a folder (MME's) the names and hashes of its text files."""
    if path.is_dir():
        whole = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*.txt") if p.is_file()):
            whole.update(f"{file.relative_to(path)} {sha256(file)}\n".encode())
        return whole.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
