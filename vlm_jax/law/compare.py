# SPDX-License-Identifier: Apache-2.0
"""Compares the forms of the law: errors on cells left out of the fit, AIC and BIC."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vlm_jax.law.components import condensed, many, noise, system
from vlm_jax.law.forms import FORMS
from vlm_jax.law.intervals import profile
from vlm_jax.law.law import EFFECTS, Law, check, fit, minimum, to_vector, weights
from vlm_jax.law.points import Points
from vlm_jax.law.solve import FLOOR, predict, solve, starts

COLUMNS = (
    "form", "formula", "parameters", "sse", "rmse", "aic", "aicc", "bic",
    "leave_one_size_out_rmse", "leave_one_V_out_rmse", "leave_largest_size_out_rmse", "note",
)  # fmt: skip


FOLDS = 12  # of more sizes or token counts, neighbors are left out together
FOLD_STARTS = 12  # in addition to the fit to all points, which is nearly always close
FOLD_ITERATIONS = 100  # a fold that goes on gains less than the digits that are shown


def leave_out(
    points: Points,
    form: str,
    column: str,
    *,
    seed: int = 0,
    huber: float | int | None = None,
    weighting: str = "stderr",
    near: np.ndarray | None = None,
) -> dict[float, np.ndarray]:
    """Cross-validation: value of `column` ("N" or "V") -> errors predicted by a fit without it.

    Each array is float64[points of that value]. `near` is the solver vector of the fit to all
    points, if it is known. Raises ValueError when a fold has too few points, sizes or token counts.
    """
    values = getattr(points, column)
    distinct = np.unique(values)
    folds = np.arange(len(distinct)) * min(len(distinct), FOLDS) // len(distinct)
    for fold in range(folds.max() + 1):
        check(points.where(~np.isin(values, distinct[folds == fold])), form)
    rows = system(points, weights(points, weighting), alone=True)
    if huber is None:  # what is left out are whole cells, so their means will do
        rows = system(replace(points, model=[]), weights(points, weighting))
    if many(rows):
        rows = condensed(rows)
    fold_of_row = folds[
        np.clip(np.searchsorted(distinct, getattr(rows, column)), 0, len(folds) - 1)
    ]
    design = FORMS[form].design(*rows.place)
    if near is None:
        near, _ = minimum(design, rows, seed=seed, huber=huber)
    guesses = starts(design, rows.mean, rows.weight, FOLD_STARTS, np.random.default_rng(seed))
    guesses = np.vstack([near, guesses])
    # one solve for all folds: the weight of a point left out is 0
    count = folds.max() + 1
    included = np.repeat(fold_of_row != np.arange(count)[:, None], len(guesses), axis=0)
    first = np.tile(guesses, (count, 1))
    theta, loss = solve(
        design, rows.mean[None], included * rows.weight, first, huber=huber,
        iterations=FOLD_ITERATIONS,
    )  # fmt: skip
    best = loss.reshape(count, -1).argmin(1) + np.arange(count) * len(guesses)
    predicted = predict(FORMS[form].design(*points.place), theta[best])
    return {float(v): predicted[fold, values == v] for v, fold in zip(distinct, folds, strict=True)}


def compare(
    points: Points,
    laws: Mapping[str, Law] | None = None,
    *,
    seed: int = 0,
    huber: float | None = None,
    weighting: str = "stderr",
) -> list[dict[str, Any]]:
    """One row per form with the fields COLUMNS; None, with a note, if the points are too few.

    `laws` are those of these points that are fitted already, by form.
    """
    rows = []
    several = len(np.unique(points.place[3])) > 1
    for name, form in FORMS.items():
        if form.reads_frames != several:
            continue
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
            "form": name,
            "formula": form.formula,
            "note": "",
        }
        row["parameters"] = len(form.names)
        rows.append(row)
        try:
            check(points, name)
        except ValueError as problem:
            row["note"] = str(problem)
            continue
        fitted = (laws or {}).get(name) or fit(
            points, name, bootstrap=0, seed=seed, huber=huber, weighting=weighting, intervals=False
        )
        row |= {"sse": fitted.sse, "rmse": fitted.rmse} | fitted.criteria
        theta = to_vector(name, fitted.params)
        for column, field in (("N", "leave_one_size_out_rmse"), ("V", "leave_one_V_out_rmse")):
            try:
                folds = leave_out(
                    points, name, column,
                    seed=seed, huber=huber, weighting=weighting, near=theta,
                )  # fmt: skip
            except ValueError as problem:
                row["note"] = f"{field}: {problem}"
                continue
            row[field] = _rmse(points, column, folds)
            if column == "N":
                largest = max(folds)
                row["leave_largest_size_out_rmse"] = _rmse(points, "N", {largest: folds[largest]})
    return rows


def _rmse(points: Points, column: str, folds: Mapping[float, np.ndarray]) -> float:
    values = getattr(points, column)
    misses = [predicted - points.error[values == value] for value, predicted in folds.items()]
    return float(np.sqrt(np.mean(np.concatenate(misses) ** 2)))


def with_exponents(points: Points, law: Law, exponents: Mapping[str, float]) -> dict[str, Any]:
    """How well fixed exponents (name -> value) fit when A and D are fitted again.

    Returns sse, limit (where the joint 95 % region ends, F statistic), inside (sse <= limit), A and
    D. Unweighted least squares, for the multiplicative forms only.
    """
    from scipy.optimize import lsq_linear
    from scipy.special import fdtri  # the quantile of Fisher's F

    form = FORMS[law.form]
    design = form.design(points.N, points.V, points.Q)
    theta = to_vector(law.form, law.params | dict(exponents) | {"A": 1.0, "D": 0.0})
    columns = np.stack([predict(design, theta[None])[0], np.ones(len(points))], axis=1)
    solution = lsq_linear(columns, points.error, bounds=([0.0, FLOOR[0]], [np.inf, FLOOR[1]]))
    dof, count = len(points) - len(form.names), len(exponents)
    limit = law.sse * (1 + count / dof * fdtri(count, dof, 0.95))
    sse = float(2 * solution.cost)
    A, D = solution.x.tolist()
    return {"sse": sse, "limit": float(limit), "inside": bool(sse <= limit), "A": A, "D": D}


def without_floor(points: Points, law: Law) -> dict[str, list[float]]:
    """Name -> [low, high]: the 95 % intervals of an unweighted fit with D held at 0."""
    design = FORMS[law.form].design(points.N, points.V, points.Q)
    names, rows = FORMS[law.form].names, system(points, np.ones(len(points)), alone=True)
    held = np.array([name == "D" for name in names])
    start = to_vector(law.form, law.params | {"D": 0.0})
    best, loss = solve(design, rows.target[None], rows.weight[None], start[None], fixed=held[None])
    dof = len(points) - (~held).sum()
    around = replace(
        noise(design, rows, best[0], 1.0, np.nan),
        scale=float(loss[0] / dof), dof=np.full(len(names), float(dof)),
    )  # fmt: skip
    ends, _ = profile(design, rows, best[0], around, held=held)
    return {name: ends[names.index(name)].tolist() for name in law.params if name in EFFECTS}


def extrapolate(
    points: Points,
    law: Law,
    *,
    bootstrap: int,
    seed: int = 0,
    huber: float | int | None = None,
    weighting: str = "stderr",
) -> dict[str, Any]:
    """Predicts the largest size by a fit without it, and twice that size by `law`.

    Returns "held_out" (N, V, measured, predicted, low, high, rmse, largest_miss) and "beyond" (N,
    V, predicted, low, high); errors are fractions. Bands are 95 %: of one new measurement for the
    held-out size, of the law itself for the size beyond. "held_out" is missing if the smaller sizes
    are too few for a fit; both are missing without bootstrap draws. The other arguments are those
    of `law.fit`.
    """
    if not bootstrap or points.frames is not None:
        return {}  # a prediction for a video needs its frames
    largest = points.N.max()
    predictions: dict[str, Any] = {}
    smaller, left_out = points.where(points.N < largest), points.where(points.N == largest)
    try:
        law_of_smaller = fit(
            smaller, law.form, bootstrap=bootstrap, seed=seed, huber=huber, weighting=weighting,
            intervals=False,
        )  # fmt: skip
    except ValueError:
        pass
    else:
        predicted = law_of_smaller.error(left_out.N, left_out.V, left_out.Q)
        low, high = law_of_smaller.band(left_out.N, left_out.V, left_out.Q, measured=True)
        predictions["held_out"] = {
            "N": float(largest),
            "V": left_out.V.tolist(),
            "measured": left_out.error.tolist(),
            "predicted": predicted.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "rmse": float(np.sqrt(np.mean((predicted - left_out.error) ** 2))),
            "largest_miss": float(np.abs(predicted - left_out.error).max()),
        }
    V, Q = np.unique(points.V), float(points.Q.mean())
    low, high = law.band(2 * largest, V, Q)
    predictions["beyond"] = {
        "N": float(2 * largest),
        "V": V.tolist(),
        "predicted": law.error(2 * largest, V, Q).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }
    return predictions
