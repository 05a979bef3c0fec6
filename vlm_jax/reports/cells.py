# SPDX-License-Identifier: Apache-2.0
"""Quantities that figures need from points and a law: means over seeds, frontiers, the best V.

N is LLM parameters in billions, V visual tokens, Q text tokens.
"""

import dataclasses

import numpy as np

from vlm_jax.law.forms import FORMS
from vlm_jax.law.law import logarithmic
from vlm_jax.law.solve import predict


@dataclasses.dataclass(frozen=True)
class Cells:
    """One entry per (N, V): the mean error over its seeds.

    N is in billions, V and Q in tokens, error and stderr are fractions. The standard error combines
    the sampling error of the test questions, which all seeds share and averaging does not reduce,
    with the spread between seeds, which averaging reduces. It is NaN where unknown.
    """

    N: np.ndarray
    V: np.ndarray
    Q: np.ndarray
    error: np.ndarray
    stderr: np.ndarray
    seeds: np.ndarray

    def of_size(self, n: int | float) -> "Cells":
        """The cells of one LLM size, by rising V."""
        order = np.flatnonzero(self.N == n)
        order = order[np.argsort(self.V[order])]
        return Cells(*(getattr(self, f.name)[order] for f in dataclasses.fields(self)))

    @property
    def sizes(self) -> np.ndarray:
        """The distinct N, rising."""
        return np.unique(self.N)

    def at(self, Q: int | float | None) -> "Cells":
        """The same cells with Q text tokens; None keeps the measured Q."""
        return self if Q is None else dataclasses.replace(self, Q=np.full(self.N.shape, float(Q)))

    @property
    def flops(self) -> np.ndarray:
        """2 N (Q + V) of each cell."""
        return simple_flops(self.N, self.V, self.Q)


def simple_flops(N, V, Q):
    """FLOPs of a request as arXiv 2411.03312 counts them, 2 N (Q + V), of arrays.

    Equal to `paper_flops` of cost/flops.py for numbers, which a test checks.
    """
    return 2e9 * np.asarray(N, float) * (np.asarray(Q, float) + np.asarray(V, float))


def average(points) -> Cells:
    """Points (one per cell and seed) to cells (one per N and V), by rising N, then V."""
    place, first = places(points)
    seeds = np.bincount(place).astype(float)
    Q, error = mean_of(place, points.Q), mean_of(place, points.error)
    squares = np.bincount(place, (points.error - error[place]) ** 2)
    between = np.where(seeds > 1, squares / np.maximum(seeds - 1, 1) / seeds, 0.0)
    known = np.isfinite(points.stderr)
    counted = np.bincount(place, known)
    sampling = np.bincount(place, np.where(known, points.stderr, 0.0) ** 2)
    sampling = np.where(counted > 0, sampling / np.maximum(counted, 1), np.nan)
    sampling = np.where((counted == 0) & (seeds > 1), 0.0, sampling)
    return Cells(
        points.N[first], points.V[first], Q, error, np.sqrt(sampling + between), seeds
    )  # fmt: skip


def places(points) -> tuple[np.ndarray, np.ndarray]:
    """int[points]: the cell of each point, in the order of `average`; int[cells]: a point of
    each."""
    order = np.lexsort((points.V, points.N))
    new = (np.diff(points.N[order]) > 0) | (np.diff(points.V[order]) > 0)
    place = np.empty(len(order), int)
    place[order] = np.concatenate([[0], np.cumsum(new)])
    return place, order[np.concatenate([[True], new])]


def mean_of(place, values) -> np.ndarray:
    """float[cells]: the mean of `values`, one for each point, over the points of each cell."""
    return np.bincount(place, values) / np.bincount(place)


def pareto(cost, error) -> np.ndarray:
    """bool[cells]: whether no other cell is better in cost or error and as good in the other."""
    cost, error = np.asarray(cost, float), np.asarray(error, float)
    order = np.lexsort((error, cost))
    dearer = np.ones(len(order), bool)  # than the cell before
    dearer[1:] = np.diff(cost[order]) > 0
    best = error[order][dearer]  # at each cost
    cheaper = np.concatenate([[np.inf], np.minimum.accumulate(best)[:-1]])
    at = np.cumsum(dearer) - 1
    kept = np.empty(len(order), bool)
    kept[order] = (error[order] == best[at]) & (best < cheaper)[at]
    return kept


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The law's best (N, V) for each budget of 2N(Q+V) inside the measured N and V."""

    flops: np.ndarray
    N: np.ndarray
    V: np.ndarray
    error: np.ndarray


def frontier(law, N, V, *, Q: int | float, budgets: int = 60) -> Frontier:
    """Best error for each budget from the lowest to the highest cost in N, V=(low, high).

    N is continuous; a budget larger than the largest N needs is spent on more V, as in the
    published plot.
    """
    low, high = simple_flops(N[0], V[0], Q), simple_flops(N[1], V[1], Q)
    flops = np.geomspace(max(low, 1.0), high, budgets)
    tokens = np.geomspace(V[0], V[1], 400)
    affordable = flops[:, None] / (2e9 * (Q + tokens[None]))
    sizes = np.minimum(affordable, N[1])
    error = np.asarray(law.error(sizes, np.broadcast_to(tokens, sizes.shape), Q), float)
    # A tolerance of 1e-9: the cheapest corner is affordable in spite of rounding.
    error = np.where(sizes >= N[0] * (1 - 1e-9), error, np.inf)
    best = error.argmin(1)
    row = np.arange(budgets)
    return Frontier(flops, sizes[row, best], tokens[best], error[row, best])


def best_tokens(alpha, beta, Q, V):
    """V* = Q beta / (alpha - beta), limited to V=(low, high): the optimum of the simple cost.

    Minimizes N^-alpha V^-beta at constant N (Q + V). Where V does not help (beta <= 0) the answer
    is the lowest V; where it helps at least as much as N (beta >= alpha) it is the highest.
    Arguments broadcast.
    """
    alpha, beta, Q = np.broadcast_arrays(*(np.asarray(x, float) for x in (alpha, beta, Q)))
    with np.errstate(divide="ignore", invalid="ignore"):
        best = Q * beta / (alpha - beta)
    best = np.where(beta <= 0, V[0], np.where(beta >= alpha, V[1], best))
    return np.clip(best, *V)


def exponent_draws(law) -> np.ndarray | None:
    """float[draws, 2]: bootstrap draws of (alpha, beta), or None if the law has none."""
    if law.samples is None or not {"alpha", "beta"} <= set(law.params):
        return None
    names = FORMS[law.form].names  # the order of the columns, unlike `params`
    return np.asarray(law.samples, float)[:, [names.index("alpha"), names.index("beta")]]


def error_draws(law, N, V, Q):
    """float[draws, n]: the error at n places under each bootstrap draw; None without draws."""
    if law.samples is None:
        return None
    return predict(FORMS[law.form].design(N, V, Q), logarithmic(law.form, law.samples))


def equal_compute(flops, N, *, spread: int | float = 1.5) -> list[int]:
    """Indices of cells, one per size, with similar costs; empty if no two are within `spread`.

    `spread` is the largest ratio of costs. More sizes are preferred to a smaller ratio; among equal
    numbers the smallest ratio of highest to lowest cost is chosen.
    """
    flops, N = np.asarray(flops, float), np.asarray(N, float)
    nearest = []  # for every target, which is a cell's cost, the nearest cell of each size
    for n in np.unique(N):
        of_size = np.flatnonzero(N == n)
        nearest.append(of_size[np.abs(np.log(flops[of_size] / flops[:, None])).argmin(1)])
    chosen = np.array(nearest)
    found = flops[chosen]
    near = np.maximum(found / flops, flops / found) <= spread
    ratio = np.where(near, found, 0.0).max(0) / np.where(near, found, np.inf).min(0)
    merits = [
        (count, -r, -target)
        for target, (count, r) in enumerate(zip(near.sum(0), ratio, strict=True))
        if count > 1 and r <= spread
    ]
    if not merits:
        return []
    best = -max(merits)[2]
    return chosen[near[:, best], best].tolist()
