# SPDX-License-Identifier: Apache-2.0
"""Protocols: how a benchmark's predictions become task scores; plain Python.

A record is a dict with `task`, `family`, `prediction`, `answer`, and `cluster` (what its scene or
sentence is, for standard errors). A protocol turns records into {task: {family, metric, score,
stderr, n}}, scores from 0 to 1.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_jax.evals.metrics import clustered_stderr, consistency, exact_match, first_word, mean

Record = Mapping[str, Any]
Scores = dict[str, dict[str, Any]]


def embedded(records: Sequence[Record]) -> Scores:
    """Exact match per task of the embedded benchmark."""
    return by_task(records, exact_match, "exact_match")


def nlvr(records: Sequence[Record]) -> Scores:
    """NLVR's two scores: precision over images, consistency over sentences (all images right)."""
    scores = by_task(records, first_word, "precision")
    correct = [first_word(r["prediction"], r["answer"]) for r in records]
    groups = [r["cluster"] for r in records]
    whole = consistency(correct, groups)
    scores["nlvr_consistency"] = dict(
        family="consistency",
        metric="consistency",
        score=mean(whole),
        stderr=clustered_stderr(whole, [str(i) for i in range(len(whole))]),
        n=len(whole),
    )
    return scores


def by_task(records: Sequence[Record], metric: Callable[[str, str], float], name: str) -> Scores:
    """The mean of one metric over the records of each task."""
    tasks: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        tasks[record["task"]].append(record)
    scores = {}
    for task, members in sorted(tasks.items()):
        values = [metric(r["prediction"], r["answer"]) for r in members]
        scores[task] = dict(
            family=members[0]["family"],
            metric=name,
            score=mean(values),
            stderr=clustered_stderr(values, [r["cluster"] for r in members]),
            n=len(values),
        )
    return scores


# Name -> (scoring, parser in words). The names go into every results row.
PROTOCOLS: dict[str, tuple[Callable[[Sequence[Record]], Scores], str]] = {
    "embedded": (embedded, "strip"),
    "nlvr": (nlvr, "first word, lower case, without punctuation"),
}


def score(protocol: str, records: Sequence[Record]) -> Scores:
    """Task scores of `records` under a named protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: choose one of {sorted(PROTOCOLS)}")
    return PROTOCOLS[protocol][0](records)
