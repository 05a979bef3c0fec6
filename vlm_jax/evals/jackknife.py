# SPDX-License-Identifier: Apache-2.0
"""Standard errors of any number that is computed from scores of the same questions.

The delete-a-group jackknife over clusters: each group of questions is left out once, and the
spread of the numbers that remain is the standard error (Quenouille; Efron and Tibshirani, An
Introduction to the Bootstrap, chapter 11). A mean leaves out single clusters, another metric, such
as F1 or the points of MME, at most GROUPS groups, for which its own protocol scores the rest.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm_jax.evals.metrics import jackknife_stderr, mean
from vlm_jax.evals.scoring import Scored

GROUPS = 200


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error; both NaN where they cannot be told."""

    value: float
    stderr: float
    groups: int

    @property
    def df(self) -> int:
        """Degrees of freedom of an interval."""
        return self.groups - 1


def scale(scored: Scored) -> float | None:
    """What the mean of the units is multiplied by to give the value; None if it is no mean."""
    units = scored.aggregate.units
    if scored.aggregate.replicates:
        return None
    factor = 100.0 if scored.task.unit == "percent" else float(len(units))
    average = mean([unit.value for unit in units])
    return factor if math.isclose(factor * average, scored.aggregate.value, abs_tol=1e-9) else None


def estimate(scores: Sequence[Scored], function: Callable[..., float]) -> Estimate:
    """`function` of the values of several scores of the same questions, in their order."""
    whole = function(*(s.aggregate.value for s in scores))
    left_out = [function(*values) for values in zip(*replicates(scores), strict=True)]
    stderr = jackknife_stderr(left_out)
    return Estimate(whole, stderr if math.isfinite(stderr) else math.nan, len(left_out))


def replicates(scores: Sequence[Scored]) -> list[list[float]]:
    """For each score its values without one group after the other; the groups are the same.

    A value is NaN where the rest cannot be scored, or lacks a sub-score, such as a category.
    """
    means = all(scale(s) is not None for s in scores)
    known = [s.aggregate.replicates for s in scores]
    if all(known) and all(left_out.keys() == known[0].keys() for left_out in known):
        return [[left_out[cluster] for cluster in known[0]] for left_out in known]
    if means:
        clusters = {unit.cluster: None for s in scores for unit in s.aggregate.units}
        count = len(clusters)
    else:
        clusters = {graded.question.cluster: None for s in scores for graded in s.graded}
        count = min(len(clusters), GROUPS)
    # In the order of the file, so that each group has its share of every category.
    group = {cluster: i % count for i, cluster in enumerate(clusters)}
    return [(_of_mean if means else _of_any)(s, group, count) for s in scores]


def _of_mean(scored: Scored, group: dict[str, int], count: int) -> list[float]:
    sums, sizes = [0.0] * count, [0] * count
    for unit in scored.aggregate.units:
        sums[group[unit.cluster]] += unit.value
        sizes[group[unit.cluster]] += 1
    total, n, factor = sum(sums), sum(sizes), scale(scored) or math.nan
    return [
        factor * (total - part) / (n - size) if n > size else math.nan
        for part, size in zip(sums, sizes, strict=True)
    ]


def _of_any(scored: Scored, group: dict[str, int], count: int) -> list[float]:
    members: dict[int, set[int]] = defaultdict(set)
    for i, graded in enumerate(scored.graded):
        members[group[graded.question.cluster]].add(i)
    values = []
    for number in range(count):
        out = members[number]
        rest = [graded for i, graded in enumerate(scored.graded) if i not in out]
        try:
            left = scored.protocol.aggregate(rest)
        except (ArithmeticError, ValueError, LookupError):
            values.append(math.nan)
            continue
        same = left.subscores.keys() == scored.aggregate.subscores.keys()
        values.append(left.value if same else math.nan)
    return values
