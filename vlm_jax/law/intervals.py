# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals calibrated for about 12 points: profile likelihood, and draws for bands.

The profile of a parameter is the least loss with that parameter held; its interval is where the
profile stays below loss (1 + t^2 / dof), t being Student's at dof = points - parameters (Bates and
Watts, Nonlinear Regression Analysis, 1988, chapter 6). It follows curvature and bounds, which an
estimate plus-minus two standard errors does not.
"""

from collections.abc import Callable

import numpy as np

from vlm_jax.law.solve import FLOOR, Array, bounds, jacobian, loss_of, predict, solve

RESAMPLINGS = ("residuals", "rows", "cells")


def profile(
    design: Array,
    y: Array,
    weight: Array,
    best: Array,
    *,
    level: float = 0.95,
    huber: float | int | None = None,
    held: Array | None = None,
) -> tuple[Array, Array]:
    """Each parameter's interval float64[P, 2], and whether each end is closed, bool[P, 2].

    `best` float64[P] is the fitted parameter vector; `held` bool[P] marks parameters that stay at
    it. An end that is not closed is a bound of the search: the points do not limit the parameter on
    that side.
    """
    from scipy.special import stdtrit  # Student's quantile; scipy.stats takes 0.3 s to import

    low, high = bounds(design)
    size = len(best)
    held = np.zeros(size, bool) if held is None else held
    dof = len(y) - (~held).sum()
    t = stdtrit(dof, 0.5 + level / 2)
    floor = loss_of(y - predict(design, best[None]), weight, huber)[0]
    limit = floor * (1 + t**2 / dof)
    count = 2 * size
    parameter = np.repeat(np.arange(size), 2)
    outward = np.tile([-1.0, 1.0], size)
    search_bound = np.where(outward < 0, low[parameter], high[parameter])
    fixed = np.tile(held, (count, 1))
    fixed[np.arange(count), parameter] = True

    # sqrt(profile - floor) is close to linear in the parameter, so brackets are cut in that scale.
    def height(loss: Array) -> Array:
        return np.sqrt(np.maximum(loss - floor, 0.0) / max(limit - floor, 1e-300)) - 1.0

    # The last solution below the limit is a warm start for the next.
    inside = np.tile(best, (count, 1))
    inner, inner_height = best[parameter], np.full(count, -1.0)
    step = 0.5 * t * _spread(design, y, weight, best)[parameter]
    outer, outer_height = np.full(count, np.nan), np.full(count, np.nan)
    searching = np.arange(count)
    for _ in range(60):
        trial = inner[searching] + outward[searching] * step[searching]
        trial = np.where(
            outward[searching] < 0,
            np.maximum(trial, search_bound[searching]),
            np.minimum(trial, search_bound[searching]),
        )
        theta, h = _held(
            design, y, weight, inside, fixed, parameter, searching, trial, huber, height
        )
        crossed = h > 0
        outer[searching[crossed]], outer_height[searching[crossed]] = trial[crossed], h[crossed]
        below = searching[~crossed]
        inside[below], inner[below], inner_height[below] = (
            theta[~crossed],
            trial[~crossed],
            h[~crossed],
        )
        step[searching] *= 1.7
        searching = below[inner[below] != search_bound[below]]
        if not len(searching):
            break
    closed = np.isfinite(outer)
    searching = np.flatnonzero(closed)
    for round_ in range(40):
        if not len(searching):
            break
        share = -inner_height[searching] / (outer_height[searching] - inner_height[searching])
        share = np.clip(share, 0.05, 0.95) if round_ % 3 < 2 else np.full(len(searching), 0.5)
        trial = inner[searching] + share * (outer[searching] - inner[searching])
        theta, h = _held(
            design, y, weight, inside, fixed, parameter, searching, trial, huber, height
        )
        crossed = h > 0
        outer[searching[crossed]], outer_height[searching[crossed]] = trial[crossed], h[crossed]
        below = searching[~crossed]
        inside[below], inner[below], inner_height[below] = (
            theta[~crossed],
            trial[~crossed],
            h[~crossed],
        )
        width = np.abs(outer - best[parameter])[searching]
        searching = searching[np.abs(outer - inner)[searching] > 1e-3 * width]
    ends = np.where(closed, inner, search_bound).reshape(size, 2)
    return ends, closed.reshape(size, 2)


def _held(
    design: Array,
    y: Array,
    weight: Array,
    inside: Array,
    fixed: Array,
    which: Array,
    problems: Array,
    at: Array,
    huber: float | int | None,
    height: Callable[[Array], Array],
) -> tuple[Array, Array]:
    start = inside[problems].copy()
    start[np.arange(len(problems)), which[problems]] = at
    theta, loss = solve(
        design, y[None], weight[None], start, fixed=fixed[problems], huber=huber, iterations=100
    )
    return theta, height(loss)


def _tangent(design: Array, weight: Array, best: Array) -> Array:
    """The law's derivative at each point, float64[P, n], in units of the noise; 0 for a D of 0."""
    columns = jacobian(design, best[None])[0][0] * np.sqrt(weight)
    if best[design.shape[0]] <= FLOOR[0]:
        columns[design.shape[0]] = 0.0
    return columns


def _spread(design: Array, y: Array, weight: Array, best: Array) -> Array:
    """A first step for each parameter: its standard error if the law were linear, clipped."""
    low, high = bounds(design)
    columns = _tangent(design, weight, best)
    loss = loss_of(y - predict(design, best[None]), weight, None)[0]
    covariance = np.linalg.pinv(columns @ columns.T, rcond=1e-12) * loss / (len(y) - len(best))
    return np.clip(np.sqrt(np.maximum(np.diag(covariance), 0.0)), 1e-7, 0.1 * (high - low))


def draws(
    design: Array,
    y: Array,
    weight: Array,
    best: Array,
    *,
    count: int,
    rng: np.random.Generator,
    resample: str = "residuals",
    cells: Array | None = None,
    huber: float | int | None = None,
) -> Array:
    """`count` bootstrap parameter vectors, float64[count, P].

    "residuals" keeps the grid and adds resampled residuals to the fit, each divided by sqrt(1 -
    leverage) and all scaled by one chi-square draw, so that a dozen points spread like Student's t
    and not like the normal, which is too narrow. "rows" resamples rows, "cells" whole cells
    (`cells` int[n] is the cell of each row), which assumes no common noise level but needs more
    points.
    """
    if resample not in RESAMPLINGS:
        raise ValueError(f"cannot resample {resample!r}: choose one of {', '.join(RESAMPLINGS)}")
    n, size = len(y), len(best)
    start = np.tile(best, (count, 1))
    if resample == "residuals":
        fitted = predict(design, best[None])[0]
        root = np.sqrt(weight)
        pure = root * (y - fitted) / np.sqrt(1 - np.minimum(_leverage(design, weight, best), 0.9))
        pure = pure - pure.mean()
        pure = pure * np.sqrt(
            (weight * (y - fitted) ** 2).sum() / (n - size) / max(pure.var(), 1e-300)
        )
        widen = np.sqrt((n - size) / rng.chisquare(n - size, (count, 1)))
        noise = pure[rng.integers(0, n, (count, n))] * widen / root
        return solve(design, fitted + noise, weight[None], start, huber=huber)[0]
    if resample == "rows" or cells is None:
        cells = np.arange(n)
    cells = np.unique(cells, return_inverse=True)[1]
    members = cells.max() + 1
    picked = rng.multinomial(members, np.full(members, 1 / members), count)
    return solve(design, y[None], weight * picked[:, cells], start, huber=huber)[0]


def _leverage(design: Array, weight: Array, best: Array) -> Array:
    """float64[n]: how far each point pulls its own fitted value, from the law's tangent plane."""
    columns = _tangent(design, weight, best)
    directions, lengths, _ = np.linalg.svd(columns.T, full_matrices=False)
    return (directions[:, lengths > 1e-9 * lengths[0]] ** 2).sum(1)
