# SPDX-License-Identifier: Apache-2.0
"""Scores of predictions against references, and their standard errors; plain Python."""

import math
from collections import defaultdict
from collections.abc import Sequence

LARGEST_STDERR = 0.5  # of a fraction: for a single cluster, which shows no spread


def exact_match(prediction: str, answer: str) -> float:
    """1 if the two strings are equal except for surrounding white space, else 0."""
    return float(prediction.strip() == answer.strip())


def first_word(prediction: str, answer: str) -> float:
    """1 if the first word of the prediction, lower-cased and without punctuation, is the answer."""
    words = prediction.lower().split()
    return float(bool(words) and words[0].strip(".,!?") == answer.lower())


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN for no values."""
    return sum(values) / len(values) if values else math.nan


def clustered_stderr(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Standard error of a mean whose values are correlated within clusters (images, sentences).

    The sandwich form: sqrt(G / (G-1) * sum of squared cluster residual sums) / n, with G clusters;
    equal to the plain standard error if every cluster holds one value. For one cluster it is
    LARGEST_STDERR.
    """
    average = mean(values)
    residuals: dict[str, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - average
    groups = len(residuals)
    if groups < 2:
        return LARGEST_STDERR
    total = sum(r * r for r in residuals.values())
    return math.sqrt(groups / (groups - 1) * total) / len(values)


def jackknife_stderr(replicates: Sequence[float]) -> float:
    """Standard error of a value from the values that leave out one cluster each.

    sqrt((G - 1) / G * sum of squared deviations from their mean), with G clusters (Efron and
    Stein 1981), for values that are not means. NaN for fewer than two clusters.
    """
    groups = len(replicates)
    if groups < 2:
        return math.nan
    average = mean(replicates)
    return math.sqrt((groups - 1) / groups * sum((r - average) ** 2 for r in replicates))


def consistency(correct: Sequence[float], groups: Sequence[str]) -> list[float]:
    """For each group 1 if all of its members are right, else 0 (NLVR: Suhr et al., ACL 2017)."""
    worst: dict[str, float] = {}
    for value, group in zip(correct, groups, strict=True):
        worst[group] = min(value, worst.get(group, 1.0))
    return list(worst.values())


def edit_distance(first: str, second: str) -> int:
    """How many characters must be inserted, deleted or replaced to turn one text into the other
    (Levenshtein 1966)."""
    before = list(range(len(second) + 1))
    for i, mine in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (mine != other)))
        before = row
    return before[-1]
