# SPDX-License-Identifier: Apache-2.0
"""One law for each family of tasks, their comparison, and what law.json says of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_jax.law import compare, law, published
from vlm_jax.law.forms import FORMS
from vlm_jax.law.law import Law
from vlm_jax.law.points import Points


@dataclass(frozen=True)
class Fitted:
    """Family -> law, in the order of the families; the rows of comparison.csv; words for a person.

    `fields` is the content of law.json: the law of the first family, and what else was asked.
    """

    laws: dict[str, Law]
    comparison: list[dict[str, Any]]
    fields: dict[str, Any]
    words: list[str]


def fit_families(
    families: Mapping[str, Points],
    tasks: Mapping[str, Points],
    form: str = "multiplicative",
    *,
    mean: str = "",
    exponents_of: str | None = None,
    bootstrap: int = 1000,
    resample: str = "residuals",
    seed: int = 0,
    huber: float | None = None,
    weighting: str = "stderr",
) -> Fitted:
    """Fits every family, and every task without draws.

    Args:
      families: family -> points; the first is the one that law.json is of.
      mean: the name among them that is no family but their mean.
      exponents_of: the published points whose exponents the first law is compared with.
      bootstrap, resample, seed, huber, weighting: as `law.fit` has them.
    Raises:
      ValueError: for points that are too few for the form.
    """
    if bootstrap < 0:
        raise ValueError(f"--bootstrap must be 0 or more draws, got {bootstrap}")
    top = next(iter(families))
    how: dict[str, Any] = {"seed": seed, "huber": huber, "weighting": weighting}
    laws: dict[str, Law] = {}
    table: list[dict[str, Any]] = []
    words: list[str] = []
    for name, points in families.items():
        laws[name] = law.fit(points, form, bootstrap=bootstrap, resample=resample, **how)
        rows = compare.compare(points, **how)
        table += [{"family": name} | row for row in rows]
        words += in_words(name, points, laws[name], rows)
    fields = laws[top].to_dict() | {"family": top}
    fields["families"] = {name: found.to_dict() for name, found in laws.items() if name != mean}
    fields["tasks"] = {
        name: law.fit(points, form, bootstrap=0, **how).to_dict() for name, points in tasks.items()
    }
    fields["extrapolation"] = compare.extrapolate(
        families[top], laws[top], bootstrap=bootstrap, resample=resample, **how
    )
    if exponents_of is not None:
        fields["published"], more = against_published(exponents_of, families[top], laws[top])
        words += more
    return Fitted(laws, table, fields, words)


def in_words(name: str, points: Points, fitted: Law, comparison: list[dict[str, Any]]) -> list[str]:
    """The fit in words and numbers, line by line."""
    sizes, tokens = np.unique(points.N), np.unique(points.V)
    lines = [
        f"{name}: {len(points)} points, {len(sizes)} LLM sizes ({sizes[0]:g} to {sizes[-1]:g} "
        f"billion), {len(tokens)} token counts ({tokens[0]:g} to {tokens[-1]:g})",
        f"  error = {FORMS[fitted.form].formula}   SSE {fitted.sse:.5g}   rmse {fitted.rmse:.4g}",
    ]
    for parameter, value in fitted.params.items():
        low, high = fitted.intervals[parameter]
        lines.append(f"  {parameter:6} {value:10.5g}   95 % [{low:.5g}, {high:.5g}]")
    lines += [f"  {note}" for note in fitted.notes]
    judged = [row for row in comparison if row["leave_one_size_out_rmse"]]
    return lines + [
        f"  {row['form']:20} left-out size {row['leave_one_size_out_rmse']:.4f}"
        f"   left-out V {row['leave_one_V_out_rmse'] or float('nan'):.4f}   AIC "
        f"{row['aic']:.1f}"
        for row in sorted(judged, key=lambda row: row["leave_one_size_out_rmse"])
    ]


def against_published(name: str, points: Points, fitted: Law) -> tuple[dict[str, Any], list[str]]:
    """Where the published exponents lie, as fields and in words: each in its interval or not, and
    both together."""
    pair = published.EXPONENTS[name]
    found: dict[str, Any] = {"exponents": pair, "notes": list(published.NOTES[name])}
    if not fitted.form.startswith("multiplicative"):
        return found, []
    found["inside"] = _inside(pair, fitted.intervals)
    both = found["together"] = compare.with_exponents(points, fitted, pair)
    where = {"": fitted.intervals}
    if not fitted.identified["D"]:
        where[" (with D held at 0)"] = compare.without_floor(points, fitted)
        found["inside_with_D_0"] = _inside(pair, where[" (with D held at 0)"])
    words = []
    for held, ends in where.items():
        for key, value in pair.items():
            place = "inside" if _inside(pair, ends)[key] else "outside"
            low, high = ends[key]
            words.append(f"  published {key} {value:g} lies {place} [{low:.4g}, {high:.4g}]{held}")
    words.append(
        f"  both together: SSE {both['sse']:.5g}, {'inside' if both['inside'] else 'outside'} the "
        f"joint 95 % region, which ends at {both['limit']:.5g}"
    )
    return found, words


def _inside(values: Mapping[str, float], ends: Mapping[str, Any]) -> dict[str, bool]:
    return {key: ends[key][0] <= value <= ends[key][1] for key, value in values.items()}
