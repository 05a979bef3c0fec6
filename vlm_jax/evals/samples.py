# SPDX-License-Identifier: Apache-2.0
"""Samples: one JSON line a question, with the field names of lmms-eval's sample files and ours.

lmms-eval's (0.7.3, lmms_eval/loggers/evaluation_tracker.py save_results_samples): doc_id, input,
target, resps, filtered_resps, doc_hash and one field named as the metric. Ours say enough to score
again without the annotations: task, protocol, the question with its labels, the file hashes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.evals import scoring
from vlm_jax.evals.scoring import Scored
from vlm_jax.evals.task import Annotations, Grade, Graded, Question, json_lines

# Of the printed score; the same in all lines.
SHARED = ("schema", "task", "protocol", "predictions", "files", "version")


def lines(scored: Scored) -> Iterator[str]:
    """The samples of a score as lines of JSON, in the order of the annotations."""
    shared = {name: scored.described[name] for name in SHARED}
    for number, graded in enumerate(scored.graded):
        question, grade = graded.question, graded.grade
        ours = dict(
            question_id=question.id,
            key=question.key,
            cluster=question.cluster,
            question=question.text,
            images=[x.name if isinstance(x, Path) else "" for x in question.images],
            answers=question.answers,
            labels=question.labels,
            facts=question.facts,
            value=grade.value,
            rule=grade.rule,
            failed=graded.failed,
        )
        theirs = dict(
            doc_id=number,
            input=scored.protocol.prompt(question),
            target=question.answers[0] if question.answers else "",
            resps=[graded.text],
            filtered_resps=grade.parsed,
            doc_hash=digest(question),
        )
        metric = {} if scored.protocol.metric in ours | theirs | shared else {
            scored.protocol.metric: grade.value
        }  # fmt: skip
        yield text_of(theirs | metric | ours | shared)


def text_of(value: Any) -> str:
    """The value as JSON; in ASCII if a text in it, cut inside a character, is no Unicode."""
    text = json.dumps(value, ensure_ascii=False, default=plain)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=plain)
    return text


def digest(question: Question) -> str:
    """The hash of a question's text and answers."""
    return hashlib.sha256(json.dumps([question.text, question.answers]).encode()).hexdigest()


def plain(value: Any) -> Any:
    """What stands in JSON for a value of `Question.facts`."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return list(value)
    return str(value)


def read(path: Path) -> Scored:
    """The score whose samples are in a file, computed from them again.

    Raises:
      ValueError: for a line that lacks a field, lines of several scores, and a protocol that this
        version does not have.
    """
    graded: list[Graded] = []
    first: dict[str, Any] = {}
    for number, row in json_lines(path):
        try:
            shared = {name: row[name] for name in SHARED}
            first = first or shared
            question = Question(
                id=row["question_id"],
                text=row["question"],
                images=tuple(map(Path, row["images"])),
                answers=tuple(row["answers"]),
                key=row["key"],
                cluster=row["cluster"],
                labels=row["labels"],
                facts=_tuples(row["facts"]),
            )
            grade = Grade(float(row["value"]), row["filtered_resps"], row["rule"])
            graded.append(Graded(question, row["resps"][0], grade, bool(row["failed"])))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: {error!r:.80}: no sample of `vlm-jax score --samples`; "
                f"its fields are {', '.join(row):.120}"
            ) from error
        if shared != first:
            raise ValueError(f"{path}, line {number}: samples of another score than line 1")
    if not graded:
        raise ValueError(f"{path} is empty: it holds no samples")
    if len({g.question.key for g in graded}) < len(graded):
        raise ValueError(f"{path}: a question occurs twice")
    task = scoring.task_of(first["task"])
    protocol = scoring.protocol_of(task, first["protocol"])
    aggregate = protocol.aggregate(graded)
    questions = tuple(g.question for g in graded)
    given = Annotations(questions, (), version=first["version"])
    described = first | scoring.numbers(protocol, aggregate, graded) | dict(unit=task.unit)
    return Scored(task, first["protocol"], protocol, given, tuple(graded), aggregate, described)


def kind_of(path: Path) -> tuple[str, dict[str, Any]]:
    """What a file holds, "predictions", "samples" or "score", and its first JSON object.

    Raises:
      OSError, ValueError: if it begins with none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").lstrip()
        first, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not begin with a JSON object: {error}") from error
    if not isinstance(first, dict):
        raise ValueError(f"{path} begins with a {type(first).__name__}, not with a JSON object")
    if "doc_id" in first and "protocol" in first:
        return "samples", first
    if {"task", "protocol", "value", "stderr", "files"} <= first.keys():
        return "score", first
    return "predictions", first


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return value
