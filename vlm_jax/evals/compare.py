# SPDX-License-Identifier: Apache-2.0
"""Whether one model is better than another on the same questions, and what it takes to tell."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vlm_jax.evals import jackknife, significance
from vlm_jax.evals.jackknife import Estimate
from vlm_jax.evals.metrics import clustered_stderr, mean
from vlm_jax.evals.scoring import SCHEMA, Scored

# Differences for which a comparison says how many questions they take, in the task's unit.
DIFFERENCES = (0.5, 1.0, 2.0, 5.0)

# What a comparison needs of a printed score, besides its standard error.
PRINTED = ("task", "protocol", "metric", "value", "unit", "n", "failed", "predictions", "files")
LEAST_SPREAD = 1e-9  # of a difference


def paired(
    a: Scored, b: Scored, *, across_protocols: bool = False, difference: float | None = None
) -> dict[str, Any]:
    """The difference b - a on the same questions, its 95 % interval, tests and power.

    Args:
      across_protocols: allow two protocols.
      difference: a further one, in the task's unit, for `power`.
    Raises:
      ValueError: for two tasks or protocols, and for different questions.
    """
    check_same(a, b, across_protocols)
    estimate, how = paired_difference(a, b)
    return (
        _described(a.described, b.described)
        | dict(paired=True, n=a.aggregate.n)
        | told(estimate, how, n=a.aggregate.n, difference=difference)
        | dict(test=_test(a, b))
    )


def unpaired(
    a: dict[str, Any],
    b: dict[str, Any],
    *,
    across_protocols: bool = False,
    difference: float | None = None,
) -> dict[str, Any]:
    """The difference of two scores of which only the printed JSON objects are left.

    Their questions are unknown, so the standard errors are combined as if independent: the interval
    is mostly wider than that of `paired`.
    """
    for described in (a, b):
        if wrong := [name for name in PRINTED if described.get(name) is None]:
            raise ValueError(
                f"a score of {described.get('task')} without {', '.join(wrong)}: give what "
                "`vlm-jax score` printed"
            )
    same_rules(a, b, across_protocols)
    if (a["n"], a["files"]) != (b["n"], b["files"]):
        raise ValueError(
            f"the two scores of {a['task']} are of different files or questions (n = {a['n']} and "
            f"{b['n']}; {_hashes(a)} and {_hashes(b)}): score both on the same files"
        )
    known = a.get("stderr") is not None and b.get("stderr") is not None
    stderr = math.hypot(a["stderr"], b["stderr"]) if known else math.nan
    estimate = Estimate(b["value"] - a["value"], stderr, a["n"])
    how = "two independent scores; the samples of both (--samples) give the paired difference"
    return (
        _described(a, b)
        | dict(paired=False, n=a["n"])
        | told(estimate, how, n=a["n"], difference=difference)
        | dict(test=None)
    )


def same_rules(a: dict[str, Any], b: dict[str, Any], across_protocols: bool) -> None:
    """Raises ValueError for two tasks, and for two protocols unless that is allowed."""
    if a["task"] != b["task"]:
        raise ValueError(f"cannot compare {a['task']} with {b['task']}: give scores of one task")
    if a["unit"] != b["unit"]:
        raise ValueError(f"cannot compare {a['unit']} with {b['unit']}")
    if a["protocol"] != b["protocol"] and not across_protocols:
        raise ValueError(
            f"{a['task']} by the protocol {a['protocol']} and by {b['protocol']} are two numbers: "
            "score both by one, or compare them with --across-protocols"
        )


def check_same(a: Scored, b: Scored, across_protocols: bool) -> None:
    """Raises ValueError unless both are scores of the same questions by the same rules."""
    same_rules(a.described, b.described, across_protocols)
    ours = {g.question.key: (g.question.text, g.question.answers) for g in a.graded}
    theirs = {g.question.key: (g.question.text, g.question.answers) for g in b.graded}
    if apart := [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]:
        raise ValueError(
            f"{a.task.name}: {len(apart)} questions differ between the two, such as {apart[0]!r}: "
            "a paired comparison needs the same questions of the same version"
        )


def paired_difference(a: Scored, b: Scored) -> tuple[Estimate, str]:
    """b - a with its standard error, and how that was found."""
    units = unit_differences(a, b)
    if units is None:
        estimate = jackknife.estimate((a, b), lambda one, other: other - one)
        return estimate, f"jackknife of the difference over {estimate.groups} groups of clusters"
    values, clusters = units
    factor = jackknife.scale(a) or math.nan
    groups = len(set(clusters))
    stderr = factor * clustered_stderr(values, clusters) if groups > 1 else math.nan
    kind = "questions" if groups == len(values) else f"{groups} clusters (such as images)"
    return Estimate(factor * mean(values), stderr, groups), f"paired differences of {kind}"


def unit_differences(a: Scored, b: Scored) -> tuple[list[float], list[str]] | None:
    """b - a of each unit, and its cluster; None if a value is no mean or units differ."""
    if jackknife.scale(a) is None or jackknife.scale(b) is None:
        return None
    ours = {unit.key: unit for unit in a.aggregate.units}
    theirs = {unit.key: unit for unit in b.aggregate.units}
    if ours.keys() != theirs.keys() or len(ours) < len(a.aggregate.units):
        return None
    return (
        [theirs[key].value - unit.value for key, unit in ours.items()],
        [unit.cluster for unit in ours.values()],
    )


def told(estimate: Estimate, how: str, *, n: int, difference: float | None) -> dict[str, Any]:
    """The fields of a difference: its interval, t test, and the power of these questions."""
    value, stderr, df = estimate.value, estimate.stderr, estimate.df
    # A spread of rounding errors is none, and says nothing about other questions.
    if not math.isfinite(stderr) or df < 1 or stderr < LEAST_SPREAD * abs(value):
        return dict(
            difference=value, stderr=None, interval=None, t=None, df=None, p=None, how=how,
            power=None, verdict="the spread of this metric is unknown on these questions",
        )  # fmt: skip
    half = significance.t_quantile(df) * stderr
    t = value / stderr if value else 0.0
    p = significance.t_p_value(t, df)
    if p < significance.ALPHA:
        verdict = f"{'b' if value > 0 else 'a'} is better"
    else:
        verdict = "these questions do not tell which is better"
    return dict(
        difference=value,
        stderr=stderr,
        interval=[value - half, value + half],
        t=t,
        df=df,
        p=p,
        how=how,
        power=power(value, stderr, n, df, difference),
        verdict=verdict,
    )


def power(
    observed: float, stderr: float, n: int, df: int, difference: float | None = None
) -> dict[str, Any]:
    """How small a difference these n questions tell, and how many questions others take.

    From the observed variance of the paired differences; the number of questions in a cluster is
    taken to stay the same. Differences are in the task's unit, and points are those of n questions.
    """
    least = significance.factor(df) * stderr
    asked = [*DIFFERENCES, *([abs(difference)] if difference else [])]
    questions = {f"{d:g}": math.ceil(n * (least / d) ** 2) for d in sorted(set(asked))}
    return dict(
        alpha=significance.ALPHA,
        power=significance.POWER,
        smallest_difference=least,
        questions_for_observed=math.ceil(n * (least / observed) ** 2) if observed else None,
        questions_for=questions,
    )


def _test(a: Scored, b: Scored) -> dict[str, Any] | None:
    """McNemar's test of questions that are right or wrong, or the sign test over clusters."""
    units = unit_differences(a, b)
    if units is None:
        return None
    sums: dict[str, float] = defaultdict(float)
    for value, cluster in zip(*units, strict=True):
        sums[cluster] += value
    b_better = sum(value > 1e-12 for value in sums.values())
    a_better = sum(value < -1e-12 for value in sums.values())
    single = len(sums) == len(units[0])
    binary = all(u.value in (0.0, 1.0) for s in (a, b) for u in s.aggregate.units)
    name = "McNemar" if single and binary else "sign test"
    return dict(
        name=f"{name}, exact, over {'questions' if single else 'clusters'}",
        a_better=a_better,
        b_better=b_better,
        equal=len(sums) - a_better - b_better,
        p=significance.sign_test(a_better, b_better),
    )


def _described(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    shown = ("protocol", "value", "stderr", "n", "failed", "predictions")
    rules = list(dict.fromkeys([a["protocol"], b["protocol"]]))
    return dict(
        schema=SCHEMA,
        comparison="b - a",
        task=a["task"],
        protocol=" and ".join(rules),
        metric=" and ".join(dict.fromkeys([a["metric"], b["metric"]])),
        unit=a["unit"],
        a={name: a.get(name) for name in shown},
        b={name: b.get(name) for name in shown},
        files=a["files"],
    )


def _hashes(described: dict[str, Any]) -> str:
    files: Sequence[dict[str, str]] = described["files"]
    return ", ".join(f"{f['name']} {f['sha256'][:12]}" for f in files) or "no files"
