# SPDX-License-Identifier: Apache-2.0
"""Whether a benchmark needs the image: the same model without it, and with a smaller one.

The contribution of the image is (with - blind) / blind. A question is hard for compression if the
model with downsampled images, at the same number of visual tokens, gets it wrong, that is, has a
grade below RIGHT. VTC-Bench (arXiv 2510.07143, Chenfei-Liao/VTC-Bench@55936d4
tools/analyze_results.py) also asks that the model without compression gets it right: its group A;
group B are the questions that both get right.
"""

import math
from collections.abc import Callable
from typing import Any

from vlm_jax.evals import compare, jackknife, significance
from vlm_jax.evals.metrics import clustered_stderr, mean
from vlm_jax.evals.scoring import Scored
from vlm_jax.evals.task import Unit

RIGHT = 0.5  # the least grade of a right answer, as in VTC-Bench


def described(
    seen: Scored,
    *,
    blind: Scored | None = None,
    downsampled: Scored | None = None,
    full: Scored | None = None,
) -> dict[str, Any]:
    """The fields of a score about its images; what each means is in docs/benchmarks.md.

    Args:
      blind: the same model without images.
      downsampled: with downsampled images, at the same number of visual tokens as `seen`.
      full: without compression.
    """
    fields: dict[str, Any] = {}
    if blind is not None:
        fields |= dict(blind=_shown(blind), **contribution(seen, blind))
    if downsampled is not None:
        fields["downsampled"] = _shown(downsampled)
        fields["over_downsampled"] = _difference(downsampled, seen)
        wrong = {key for key, unit in units(downsampled).items() if unit.value < RIGHT}
        fields["hard"] = part(seen, wrong.__contains__)
    if downsampled is not None and full is not None:
        right = {key for key, unit in units(full).items() if unit.value >= RIGHT}
        fields["full"] = _shown(full)
        fields["group_a"] = part(seen, lambda key: key in right and key in wrong)
        fields["group_b"] = part(seen, lambda key: key in right and key not in wrong)
    return fields


def contribution(seen: Scored, blind: Scored) -> dict[str, Any]:
    """(seen - blind) / blind with its standard error and interval, and seen - blind.

    None where the blind model scores 0, or its spread is unknown.
    """
    difference = _difference(blind, seen)
    if not blind.aggregate.value > 0:
        words = "the blind model scores nothing, so that the contribution is unlimited"
        return dict(contribution=None, over_blind=difference, words=words)
    ratio = jackknife.estimate((seen, blind), _contribution)
    known = math.isfinite(ratio.stderr) and ratio.df > 0
    half = significance.t_quantile(ratio.df) * ratio.stderr if known else math.nan
    words = f"the image adds {100 * ratio.value:.1f} %"
    if known:
        words += f" (95 %: {100 * (ratio.value - half):.1f} to {100 * (ratio.value + half):.1f})"
    return dict(
        contribution=dict(
            value=ratio.value,
            stderr=ratio.stderr if known else None,
            interval=[ratio.value - half, ratio.value + half] if known else None,
        ),
        over_blind=difference,
        words=f"{words} to what this model scores without it",
    )


def units(scored: Scored) -> dict[str, Unit]:
    """What counts as one question: the units of a mean, else single questions."""
    if jackknife.scale(scored) is not None:
        return {unit.key: unit for unit in scored.aggregate.units}
    return {
        g.question.key: Unit(g.question.key, g.question.cluster, g.grade.value)
        for g in scored.graded
    }


def part(scored: Scored, kept: Callable[[str], bool]) -> dict[str, Any]:
    """The mean grade, in percent, of the questions whose keys are kept."""
    every = units(scored)
    chosen = [unit for key, unit in every.items() if kept(key)]
    values = [unit.value for unit in chosen]
    known = len({unit.cluster for unit in chosen}) > 1
    stderr = clustered_stderr(values, [unit.cluster for unit in chosen]) if known else None
    return dict(
        value=100 * mean(values) if values else None,
        stderr=None if stderr is None else 100 * stderr,
        unit="percent",
        n=len(values),
        of=len(every),
    )


def _contribution(seen: float, blind: float) -> float:
    return (seen - blind) / blind if blind > 0 else math.nan


def _difference(a: Scored, b: Scored) -> dict[str, Any]:
    estimate, _ = compare.paired_difference(a, b)
    known = math.isfinite(estimate.stderr)
    return dict(value=estimate.value, stderr=estimate.stderr if known else None)


def _shown(scored: Scored) -> dict[str, Any]:
    names = ("value", "stderr", "n", "failed", "predictions")
    return {name: scored.described[name] for name in names}
