# SPDX-License-Identifier: Apache-2.0
"""What varies besides the law: trained models, cells and seeds, told apart as far as rows allow.

A row is law(N, V, Q) + its model's deviation + its cell's deviation + the rest (its seed). The rows
are turned into orthogonal coordinates of three kinds, the strata of a split-plot design: the means
of trained models, what is left of the means of cells, and what is left of rows. The law says
nothing of the third. Each of the other two has a variance of its own, the mean square of its
residuals, which keeps intervals right for few models because no component has to be positive
(Searle, Casella and McCulloch, Variance Components, 1992, chapters 4 and 5); how many degrees of
freedom stand behind the variance of a parameter is Satterthwaite's count.

n places (distinct N, V, Q)   m coordinates   P parameters
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_jax.law.points import Points
from vlm_jax.law.solve import FLOOR, Array, jacobian, measured, predict

CELLS, MODELS = 0, 1  # strata
PLACE = ("N", "V", "Q", "frames")
RANK = 1e-9  # of the largest singular value: what is smaller is rounding
MANY, BINS = 500, 20  # places, and bins of N and of V that take their place
LEAST_DOF = 0.05  # of a stratum whose residuals the law can take up entirely: nothing is known
QUESTION = (
    "the number of questions, from the rows' standard errors; cells that answer the same questions "
    "share most of it, so it moves all of them together and no residual shows it"
)


@dataclass(frozen=True)
class System:
    """Rows as a fit sees them.

    Attributes:
      N, V, Q, frames: float64[n], the places.
      mean, total: float64[n], the weighted mean error of each place and the sum of its weights.
      target, weight: float64[m], what was measured and how it counts.
      mix: float64[m, n], from errors at places to coordinates; None if they are the same.
      stratum: int[m], CELLS or MODELS.
      size: float64[m], the total weight of a coordinate's model; 1 for cells.
      pure, pure_dof: weighted squares, and their number, of rows around cells and models.
      rows: the number of rows.
    """

    N: Array
    V: Array
    Q: Array
    frames: Array
    mean: Array
    total: Array
    target: Array
    weight: Array
    mix: Array | None
    stratum: Array
    size: Array
    pure: float
    pure_dof: int
    rows: int

    @property
    def place(self) -> tuple[Array, Array, Array, Array]:
        """N, V, Q and frames, float64[n] each."""
        return self.N, self.V, self.Q, self.frames

    @property
    def shared(self) -> bool:
        """Whether some trained model has several places."""
        return self.mix is not None


@dataclass(frozen=True)
class Noise:
    """The scatter around a fitted law.

    Attributes:
      scale: float, the mean square of one coordinate of weight 1.
      dof: float64[P], the degrees of freedom behind the variance of each parameter.
      strata: name of the stratum -> (mean square, degrees of freedom).
      sd, sd_dof: the standard deviation of one new row of a new model, and its degrees of freedom.
      components: name -> (its standard deviation or None if it is not told apart, why).
    """

    scale: float
    dof: Array
    strata: dict[int, tuple[float, float]]
    sd: float
    sd_dof: float
    components: dict[str, tuple[float | None, str]]


def places(points: Points) -> Array:
    """int[rows]: equal numbers where N, V and Q are equal, such as the seeds of one cell."""
    return _together(points.place)


def _together(columns: Sequence[Array]) -> Array:
    """int[n]: equal numbers where all columns are equal, ascending by the first column, then by the
    second: what `np.unique` says of the rows, which it would sort as rows."""
    code = np.zeros(len(columns[0]), int)
    for column in columns:
        distinct, which = np.unique(column, return_inverse=True)
        code = np.unique(code * len(distinct) + which, return_inverse=True)[1]
    return code.ravel()


def system(points: Points, weight: Array, *, alone: bool = False) -> System:
    """The rows as independent coordinates; `alone` takes every row for a place of its own."""
    place = np.arange(len(points)) if alone else places(points)
    first = np.unique(place, return_index=True)[1]
    total = np.bincount(place, weight)
    mean = np.bincount(place, weight * points.error) / total
    at = {k: x[first] for k, x in zip(PLACE, points.place, strict=True)}
    count = len(total)
    model = _models(points.model, len(points))
    pairs = np.unique(model * count + place)
    shared = not alone and np.any(np.bincount(pairs // count) > 1)
    if not shared:
        pure = float((weight * (points.error - mean[place]) ** 2).sum())
        return System(
            **at, mean=mean, total=total, target=mean, weight=total, mix=None,
            stratum=np.full(count, CELLS), size=np.ones(count),
            pure=pure, pure_dof=len(points) - count, rows=len(points),
        )  # fmt: skip
    # Rows of one model at one place first: what is left is at most models x places.
    root = np.sqrt(weight)
    models = model.max() + 1
    of_model = np.bincount(model, weight)
    means = np.zeros((models, len(points)))
    means[model, np.arange(len(points))] = root / np.sqrt(of_model[model])
    incidence = np.zeros((len(points), count))
    incidence[np.arange(len(points)), place] = root
    left = incidence - means.T @ (means @ incidence)
    basis, length, _ = np.linalg.svd(left, full_matrices=False)
    basis = basis[:, length > 1e-9 * length[0]].T
    directions = np.vstack([means, basis])
    scaled = root * points.error
    target = directions @ scaled
    return System(
        **at, mean=mean, total=total, target=target, weight=np.ones(len(target)),
        mix=directions @ incidence,
        stratum=np.array([MODELS] * models + [CELLS] * len(basis)),
        size=np.concatenate([of_model, np.ones(len(basis))]),
        pure=max(float((scaled**2).sum() - (target**2).sum()), 0.0),
        pure_dof=len(points) - len(target), rows=len(points),
    )  # fmt: skip


def many(rows: System) -> bool:
    """Whether there are too many places to fit them a thousand times, see `condensed`."""
    return not rows.shared and len(rows.N) > MANY


def condensed(
    rows: System, predicted: Callable[[Array, Array, Array, Array], Array] | None = None
) -> System:
    """Many places as few: bins of N and V with their mean place, mean error and total weight.

    With `predicted` (N, V, Q, frames -> errors) of a law fitted to all rows, a bin's error is the
    law at its mean place plus its mean residual: the law's curvature inside a bin then costs
    nothing, and the fit to the bins is the fit to all rows.
    """
    group = _together([_bins(values) for values in rows.place])
    total = np.bincount(group, rows.weight)

    def mean(values: Array) -> Array:
        return np.bincount(group, rows.weight * values) / total

    at = {"N": np.exp(mean(np.log(rows.N))), "V": np.exp(mean(np.log(rows.V))), "Q": mean(rows.Q)}
    at["frames"] = np.exp(mean(np.log(rows.frames)))
    error = mean(rows.mean)
    if predicted is not None:
        left = rows.mean - predicted(*rows.place)
        error = predicted(at["N"], at["V"], at["Q"], at["frames"]) + mean(left)
    return replace(
        rows, **at, mean=error, target=error, total=total, weight=total,
        stratum=np.full(len(total), CELLS), size=np.ones(len(total)),
    )  # fmt: skip


def _bins(values: Array) -> Array:
    """int[n]: equal numbers for values near each other; at most BINS of them."""
    distinct, which = np.unique(values, return_inverse=True)
    return which.ravel() * min(BINS, len(distinct)) // len(distinct)


def _models(names: Sequence[str], count: int) -> Array:
    """int[count]: the trained model of each row; one without a name is alone."""
    own = [name or f"\0{i}" for i, name in enumerate(names)] or range(count)
    return np.unique(np.array(list(own)), return_inverse=True)[1].ravel()


def tangent(design: Array, rows: System, theta: Array) -> Array:
    """The law's derivative in each coordinate, float64[P, m], in units of noise.

    0 for a D that lies at its bound of 0, which does not move.
    """
    columns = measured(jacobian(design, theta[None])[0][0], rows.mix) * np.sqrt(rows.weight)
    if theta[design.shape[0]] <= FLOOR[0]:
        columns[design.shape[0]] = 0.0
    return columns


def leverage(columns: Array) -> Array:
    """float64[m]: how far each coordinate pulls its own fitted value."""
    return (basis_of(columns) ** 2).sum(1)


def basis_of(columns: Array) -> Array:
    """float64[m, rank]: orthonormal columns that span the rows of `columns` [k, m].

    By the singular values of a k x k triangle: those of thousands of rows take a hundred times as
    long where the linear algebra has several threads.
    """
    basis, triangle = np.linalg.qr(columns.T)
    directions, lengths, _ = np.linalg.svd(triangle)
    kept = lengths > RANK * lengths[0]
    return basis if kept.all() else basis @ directions[:, kept]


def balanced(design: Array, rows: System, theta: Array) -> System:
    """The rows with each coordinate weighted by one over its stratum's variance.

    That of few models is taken larger by (dof + 2) / dof: taken too small by chance it would tie D,
    and with it beta, to what the models happen to show.
    """
    if not rows.shared:
        return rows
    strata, relative = _strata(design, rows, theta)
    variance = {kind: square for kind, (square, _) in strata.items()}
    variance[MODELS] *= 1 + 2 / strata[MODELS][1]
    return replace(rows, weight=1 / (relative * np.array([variance[k] for k in rows.stratum])))


def _strata(
    design: Array, rows: System, theta: Array
) -> tuple[dict[int, tuple[float, float]], Array]:
    """Stratum -> (mean square, degrees of freedom); and each coordinate's share of it, [m]."""
    square = (rows.target - measured(predict(design, theta[None])[0], rows.mix)) ** 2
    pull = leverage(tangent(design, rows, theta))
    relative = np.ones(len(square))
    strata: dict[int, tuple[float, float]] = {}
    for kind in (CELLS, MODELS):
        chosen = rows.stratum == kind
        if kind == MODELS:  # a model of more rows has a more variable sum
            mean = rows.size[chosen].mean()
            extra = max(square[chosen].mean() / max(strata[CELLS][0], 1e-300) - 1, 0.0) / mean
            relative[chosen] = (1 + extra * rows.size[chosen]) / (1 + extra * mean)
        dof = max(float((1 - pull[chosen]).sum()), LEAST_DOF)
        strata[kind] = max(float((square / relative)[chosen].sum()) / dof, 1e-300), dof
    return strata, relative


def noise(design: Array, rows: System, theta: Array, spread: float, stderr: float) -> Noise:
    """The scatter of `balanced` rows around the law `theta` float64[P].

    `spread` is the mean of 1 / weight over rows, `stderr` the rows' typical standard error or nan.
    """
    size = len(theta)
    if rows.shared:
        strata, _ = _strata(design, rows, theta)
        columns = tangent(design, rows, theta)
        inverse = np.linalg.pinv(columns @ columns.T, rcond=1e-12) @ columns
        shares = {k: (inverse[:, rows.stratum == k] ** 2).sum(1) for k in strata}
        total = shares[CELLS] + shares[MODELS]
        known = sum(shares[k] ** 2 / strata[k][1] for k in strata)
        dof = np.where(total > 0, total**2 / np.maximum(known, 1e-300), strata[CELLS][1])
        return Noise(1.0, dof, strata, *_of_a_new_row(rows, strata, spread, stderr))
    residual = rows.target - predict(design, theta[None])[0]
    left = len(residual) - size
    if left > 0:
        strata = {CELLS: (float((rows.weight * residual**2).sum() / left), float(left))}
    else:  # as many parameters as cells: the seeds alone say how noisy they are
        strata = {CELLS: (rows.pure / rows.pure_dof, float(rows.pure_dof))}
    scale, count = strata[CELLS]
    return Noise(scale, np.full(size, count), strata, *_of_a_new_row(rows, strata, spread, stderr))


def _of_a_new_row(
    rows: System, strata: dict[int, tuple[float, float]], spread: float, stderr: float
) -> tuple[float, float, dict[str, tuple[float | None, str]]]:
    """The standard deviation of a new row, its degrees of freedom, and its components."""
    cells, seeds = strata[CELLS], rows.rows / len(rows.N)
    parts: list[tuple[float, tuple[float, float]]] = []  # (share, (mean square, dof))
    told: dict[str, tuple[float | None, str]] = {}
    if rows.shared:
        per_model = float(rows.size[rows.stratum == MODELS].mean())
        gain = (strata[MODELS][0] - cells[0]) / per_model
        told["model"] = _sd(gain * spread), f"{strata[MODELS][1]:.1f} degrees of freedom"
        if gain > 0:
            parts += [(1 / per_model, strata[MODELS]), (-1 / per_model, cells)]
    else:
        told["model"] = None, "no trained model has several cells: part of the seed's"
    if rows.pure_dof:
        seed = rows.pure / rows.pure_dof, float(rows.pure_dof)
        gain = (cells[0] - seed[0]) / seeds
        told["cell"] = _sd(gain * spread), "beyond the seeds; holds what the form misses"
        told["seed"] = _sd(seed[0] * spread), f"{rows.pure_dof} degrees of freedom"
        parts += [(1 / seeds, cells), (1 - 1 / seeds, seed)] if gain > 0 else [(1.0, seed)]
    else:
        told["cell"] = None, "one row for each cell: part of the seed's"
        told["seed"] = _sd(cells[0] * spread), "with the cell's, and what the form misses"
        parts.append((1.0, cells))
    told["question"] = (
        (stderr, QUESTION) if np.isfinite(stderr) else (None, "no standard errors in the rows")
    )
    total = sum(share * square for share, (square, _) in parts)
    known = sum((share * square) ** 2 / dof for share, (square, dof) in parts)
    return float(np.sqrt(total * spread)), float(total**2 / max(known, 1e-300)), told


def _sd(variance: float) -> float:
    return float(np.sqrt(max(variance, 0.0)))
