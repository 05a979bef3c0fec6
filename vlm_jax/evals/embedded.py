# SPDX-License-Identifier: Apache-2.0
"""Protocols: how the predictions of a benchmark become task scores; plain Python.

A record is a dict with `task`, `family`, `prediction`, `answer`, and `cluster` (its scene or
sentence, for standard errors). A protocol turns records into {task: {family, metric, score, stderr,
n, of, skipped}}, scores from 0 to 1: n of `of` examples were answered, `skipped` were not. If some
were skipped, `first_skipped` holds the first three with their reasons.

A skipped example is a dict with `id`, `image`, `reason`, and `task` and `cluster` if known.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from vlm_jax.evals.metrics import clustered_stderr, consistency, exact_match, first_word, mean

SHOWN = 3
Record = Mapping[str, Any]
Scores = dict[str, dict[str, Any]]


def embedded(records: Sequence[Record], skipped: Sequence[Record]) -> Scores:
    """Exact match per task of the embedded benchmark."""
    return by_task(records, skipped, exact_match, "exact_match")


def nlvr(records: Sequence[Record], skipped: Sequence[Record]) -> Scores:
    """NLVR's two scores: precision over images, consistency over sentences (all images right).

    A sentence with a skipped image has no known consistency and is left out.
    """
    scores = by_task(records, skipped, first_word, "precision")
    incomplete = {r["cluster"] for r in skipped if "cluster" in r}
    complete = [r for r in records if r["cluster"] not in incomplete]
    correct = [first_word(r["prediction"], r["answer"]) for r in complete]
    consistent = consistency(correct, [r["cluster"] for r in complete])
    if consistent:
        scores["nlvr_consistency"] = dict(
            family="consistency",
            metric="consistency",
            score=mean(consistent),
            stderr=clustered_stderr(consistent, [str(i) for i in range(len(consistent))]),
            n=len(consistent),
        ) | _missing(len(consistent), incomplete, skipped)
    return scores


def by_task(
    records: Sequence[Record],
    skipped: Sequence[Record],
    metric: Callable[[str, str], float],
    name: str,
) -> Scores:
    """The mean of one metric over the records of each task.

    Raises:
      ValueError: if no example of a task was answered.
    """
    tasks: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        tasks[record["task"]].append(record)
    for record in skipped:
        if (task := record.get("task")) is not None and task not in tasks:
            raise ValueError(f"no example of task {task!r} was answered: {record['reason']}")
    scores = {}
    for task, members in sorted(tasks.items()):
        values = [metric(r["prediction"], r["answer"]) for r in members]
        unanswered = [r for r in skipped if r.get("task") in (None, task)]
        scores[task] = dict(
            family=members[0]["family"],
            metric=name,
            score=mean(values),
            stderr=clustered_stderr(values, [r["cluster"] for r in members]),
            n=len(values),
        ) | _missing(len(values), unanswered, unanswered)
    return scores


def _missing(n: int, skipped: Collection, examples: Sequence[Record]) -> dict[str, Any]:
    """The fields `of`, `skipped` and, if some were skipped, `first_skipped`."""
    first = [{key: r[key] for key in ("id", "image", "reason")} for r in examples[:SHOWN]]
    return dict(of=n + len(skipped), skipped=len(skipped)) | (
        {"first_skipped": first} if skipped else {}
    )


# Name -> (scoring, parser in words). The names go into every results row.
PROTOCOLS: dict[str, tuple[Callable[[Sequence[Record], Sequence[Record]], Scores], str]] = {
    "embedded": (embedded, "strip"),
    "nlvr": (nlvr, "first word, lower case, without punctuation"),
}


def score(protocol: str, records: Sequence[Record], skipped: Sequence[Record] = ()) -> Scores:
    """Task scores of `records` by a named protocol, with the counts of `skipped`.

    Raises:
      ValueError: for an unknown protocol, and if no example, or none of a task, was answered.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: choose one of {sorted(PROTOCOLS)}")
    if not records:
        why = f"; the first: {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"nothing to score: no example was answered of {len(skipped)}{why}")
    return PROTOCOLS[protocol][0](records, skipped)


def summary(scores: Scores) -> str:
    """A sentence about the examples that were not answered, with the first ones; "" if none."""
    incomplete = {name: task for name, task in scores.items() if task["skipped"]}
    if not incomplete:
        return ""
    counts = "; ".join(
        f"{name}: {task['skipped']} of {task['of']} were skipped, the score is of {task['n']}"
        for name, task in incomplete.items()
    )
    first = next(iter(incomplete.values()))["first_skipped"]
    return "\n  ".join([f"not everything was evaluated ({counts}); the first:", *map(named, first)])


def named(skip: Record) -> str:
    """One skipped example in words: its image and the reason."""
    inside = skip["image"] in skip["reason"]
    return skip["reason"] if inside else f"{skip['image']}: {skip['reason']}"
