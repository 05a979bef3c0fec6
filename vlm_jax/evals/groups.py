# SPDX-License-Identifier: Apache-2.0
"""Subscores of questions that belong to several groups at once: `Question.facts["groups"]`."""

from collections.abc import Sequence
from dataclasses import replace

from vlm_jax.evals.metrics import mean
from vlm_jax.evals.task import Aggregate, Graded, average


def average_of_groups(graded: Sequence[Graded]) -> Aggregate:
    """The mean grade in percent, and that of every group under the group's name."""
    groups: dict[str, list[float]] = {}
    for g in graded:
        for name in g.question.facts["groups"]:
            groups.setdefault(name, []).append(g.grade.value)
    subscores = {name: 100 * mean(values) for name, values in groups.items()}
    return replace(average(graded, labels=()), subscores=subscores)
