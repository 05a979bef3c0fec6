# SPDX-License-Identifier: Apache-2.0
"""Fits one law per family of tasks, compares the forms and builds the fields of law.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_jax.law import answer, compare, components, law, methods, published
from vlm_jax.law.answer import Answer
from vlm_jax.law.forms import FORMS
from vlm_jax.law.law import SCHEMA, Law
from vlm_jax.law.points import Points


@dataclass(frozen=True)
class Fitted:
    """What `vlm-jax fit` writes and prints.

    Attributes:
      laws: family -> law, in the order of the families.
      comparison: the rows of comparison.csv.
      fields: the content of law.json: the law of the first family, then the rest.
      words: lines for the terminal.
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
    method: str | None = None,
    source: str = "",
    exponents_of: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    huber: float | None = None,
    weighting: str = "stderr",
) -> Fitted:
    """Fits every family, and every task without draws.

    Args:
      families: family -> points; the first one gives the law at the top of law.json.
      mean: the key of `families` that is the mean of the others and not a family.
      method: the compressor whose law it is; None if the rows do not say.
      source: what the rows are, for law.json.
      exponents_of: a key of `published.EXPONENTS`, to compare with the first law.
      bootstrap, seed, huber, weighting: see `law.fit`.
    Raises:
      ValueError: if the points cannot determine the form.
    """
    if bootstrap < 0:
        raise ValueError(f"--bootstrap must be 0 or more draws, got {bootstrap}")
    first = next(iter(families))
    options: dict[str, Any] = {"seed": seed, "huber": huber, "weighting": weighting}
    laws: dict[str, Law] = {}
    answers: dict[str, Answer] = {}
    table: list[dict[str, Any]] = []
    words: list[str] = []
    for name, points in families.items():
        laws[name] = law.fit(points, form, bootstrap=bootstrap, **options)
        answers[name], rows = answer.answer(points, laws[name], bootstrap=bootstrap, **options)
        table += [{"family": name} | row for row in rows]
        words += in_words(name, points, laws[name], rows) + answer_in_words(answers[name])
    fields = document(laws, answers, mean=mean)
    fields |= {"method": method, "fitted_on": fitted_on(families[first], source)}
    fields["tasks"] = {
        name: law.fit(points, form, bootstrap=0, **options).to_dict()
        for name, points in tasks.items()
    }
    fields["extrapolation"] = compare.extrapolate(
        families[first], laws[first], bootstrap=bootstrap, **options
    )
    if exponents_of is not None:
        fields["published"], lines = against_published(exponents_of, families[first], laws[first])
        words += lines
    return Fitted(laws, table, fields, words)


def fit_methods(
    families: Mapping[str, Points],
    *,
    method: str | None = None,
    source: str = "",
    bootstrap: int = 1000,
    seed: int = 0,
) -> Fitted:
    """The laws of the published methods, and of `families` pooled with them if there are any.

    The top of law.json is the first of `families`, else the published method `method`; "methods"
    has every published method with its best number of tokens. Raises ValueError for an unknown
    method.
    """
    if bootstrap < 1:
        raise ValueError(f"laws of methods need --bootstrap of 1 or more draws, got {bootstrap}")
    known = methods.fit_published(bootstrap=bootstrap, seed=seed)
    sections = {
        name: fitted.to_dict()
        | {
            "answer": known.answer(name).to_dict(), "family": methods.FAMILY, "method": name,
            "training": known.training[name], "best_tokens": known.best[name],
        }
        for name, fitted in known.laws.items()
    }  # fmt: skip
    words = [f"{methods.FAMILY}: {len(known.laws)} methods, error = N^-alpha (A + C V^-beta)"]
    words += [method_in_words(name, known) for name in known.laws]
    laws: dict[str, Law] = {}
    answers: dict[str, Answer] = {}
    if families:
        for family, points in families.items():
            laws[family] = methods.pooled(
                points, known, method=method or "", bootstrap=bootstrap, seed=seed
            )
            cells = answer.measured_cells(points, float(np.median(points.stderr)))
            answers[family] = Answer.alone(laws[family], cells)
            words += in_words(family, points, laws[family], [])
        fields = document(laws, answers)
        fields["best_tokens"] = methods.best_tokens(points, laws[family])
        fields["fitted_on"] = fitted_on(next(iter(families.values())), source)
    else:
        method = method or published.METHOD
        if method not in known.laws:
            raise ValueError(
                f"no published method {method!r} with {methods.FEWEST_CELLS} token counts or more: "
                f"there are {', '.join(known.laws)}"
            )
        laws[methods.FAMILY] = known.laws[method]
        fields = sections[method] | {"schema": SCHEMA, "families": {}}
        fields["families"] = {methods.FAMILY: sections[method]}
        fields["fitted_on"] = fitted_on(known.points[method], source)
        words += [f"  {note}" for note in methods.NOTES]
    fields |= {"method": method, "methods": sections, "alone": known.alone, "tasks": {}}
    table = [
        dict.fromkeys(compare.COLUMNS)
        | {
            "family": name, "form": fitted.form, "formula": FORMS[fitted.form].formula,
            "parameters": 4, "sse": fitted.sse, "rmse": fitted.rmse, "note": known.training[name],
        }
        for name, fitted in known.laws.items()
    ]  # fmt: skip
    return Fitted(laws, table, fields, words)


def method_in_words(name: str, known: methods.Published) -> str:
    """One line of a published method: its exponent and its best numbers of tokens."""
    low, high = known.laws[name].intervals["beta"]
    best = ", ".join(
        f"best V at Q = {Q}: {found['V']:g} ({found['share']:.0%} of the draws)"
        for Q, found in known.best[name].items()
    )
    inside = "; prunes inside the LLM" * (name in methods.INSIDE_THE_LLM)
    return (
        f"  {name:12} {known.training[name]:7} beta {known.laws[name].params['beta']:.2f} "
        f"[{low:.2f}, {high:.2f}]   {best}{inside}"
    )


def document(
    laws: Mapping[str, Law], answers: Mapping[str, Answer], *, mean: str = ""
) -> dict[str, Any]:
    """The fields of law.json that hold laws: the first at the top, all but `mean` in "families"."""
    sections = {
        n: fitted.to_dict() | {"answer": answers[n].to_dict()} for n, fitted in laws.items()
    }
    first = next(iter(laws))
    return sections[first] | {
        "schema": SCHEMA,
        "family": first,
        "families": {name: section for name, section in sections.items() if name != mean},
    }


def fitted_on(points: Points, source: str) -> dict[str, Any]:
    """What a law was fitted to, for law.json: rows, cells, trained models if known, LLMs."""
    return {
        "source": source,
        "rows": len(points),
        "cells": int(components.places(points).max()) + 1,
        "models": len(set(points.model)) if points.model else None,
        "llms": sorted(set(points.label) - {""}),
    }


def answer_in_words(found: Answer) -> list[str]:
    """Who answers a question of the planner, for the terminal."""
    if found.misfit:
        return [f"  {found.misfit[0].upper()}{found.misfit[1:]}."]
    shares = ", ".join(f"{form} {share:.0%}" for form, share in found.shares.items())
    return [f"  answers come from the forms that fit: {shares} of the draws"]


def in_words(name: str, points: Points, fitted: Law, comparison: list[dict[str, Any]]) -> list[str]:
    """Lines of text that describe the fit and the comparison of forms."""
    sizes, tokens = np.unique(points.N), np.unique(points.V)
    lines = [
        f"{name}: {len(points)} points, {len(sizes)} LLM sizes ({sizes[0]:g} to {sizes[-1]:g} "
        f"billion), {len(tokens)} token counts ({tokens[0]:g} to {tokens[-1]:g})",
        f"  error = {FORMS[fitted.form].formula}   SSE {fitted.sse:.5g}   rmse {fitted.rmse:.4g}",
    ]
    for parameter, value in fitted.params.items():
        ends = fitted.intervals.get(parameter)
        shown = f"95 % [{ends[0]:.5g}, {ends[1]:.5g}]" if ends else "held"
        lines.append(f"  {parameter:6} {value:10.5g}   {shown}")
    lines += components_in_words(fitted) + [f"  {note}" for note in fitted.notes]
    compared = [row for row in comparison if row["leave_one_size_out_rmse"]]
    return lines + [
        f"  {row['form']:20} left-out size {row['leave_one_size_out_rmse']:.4f}"
        f"   left-out V {row['leave_one_V_out_rmse'] or float('nan'):.4f}   AIC "
        f"{row['aic']:.1f}"
        for row in sorted(compared, key=lambda row: row["leave_one_size_out_rmse"])
    ]


def components_in_words(fitted: Law) -> list[str]:
    """Which standard deviations the rows tell apart, and which they cannot."""
    parts = {k: v for k, v in fitted.components.items() if k != "total"}
    told = [f"{name} {part['sd']:.2g}" for name, part in parts.items() if part["sd"] is not None]
    untold = [f"{name} ({part['why']})" for name, part in parts.items() if part["sd"] is None]
    if not parts:
        return []
    return [
        f"  standard deviations: {', '.join(told) or 'none'}"
        + (f"; not told apart: {'; '.join(untold)}" if untold else "")
    ]


def against_published(name: str, points: Points, fitted: Law) -> tuple[dict[str, Any], list[str]]:
    """Whether the published exponents lie in the fitted intervals, as fields and as lines of text.

    Each exponent is compared with its own interval, both together with the joint region.
    """
    pair = published.EXPONENTS[name]
    fields: dict[str, Any] = {"exponents": pair, "notes": list(published.NOTES[name])}
    if not fitted.form.startswith("multiplicative"):
        return fields, []
    fields["inside"] = _inside(pair, fitted.intervals)
    joint = fields["together"] = compare.with_exponents(points, fitted, pair)
    intervals = {"": fitted.intervals}
    if not fitted.identified["D"]:
        intervals[" (with D held at 0)"] = compare.without_floor(points, fitted)
        fields["inside_with_D_0"] = _inside(pair, intervals[" (with D held at 0)"])
    words = []
    for condition, ends in intervals.items():
        for key, value in pair.items():
            place = "inside" if _inside(pair, ends)[key] else "outside"
            low, high = ends[key]
            words.append(
                f"  published {key} {value:g} lies {place} [{low:.4g}, {high:.4g}]{condition}"
            )
    words.append(
        f"  both together: SSE {joint['sse']:.5g}, {'inside' if joint['inside'] else 'outside'} "
        f"the joint 95 % region, which ends at {joint['limit']:.5g}"
    )
    return fields, words


def _inside(values: Mapping[str, float], ends: Mapping[str, Any]) -> dict[str, bool]:
    return {key: ends[key][0] <= value <= ends[key][1] for key, value in values.items()}
