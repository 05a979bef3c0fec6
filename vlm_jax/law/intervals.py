# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals calibrated for about 12 points: profile likelihood, and draws for bands.

The profile of a parameter is the least loss with that parameter held; its interval is where the
profile stays below loss (1 + t^2 / dof), t being Student's at dof = points - parameters (Bates and
Watts, Nonlinear Regression Analysis, 1988, chapter 6). It follows curvature and bounds, which an
estimate plus-minus two standard errors does not.
"""

from collections.abc import Callable

import numpy as np

from vlm_jax.law.components import Noise, System, leverage, tangent
from vlm_jax.law.solve import Array, bounds, loss_of, measured, predict, solve

LARGEST_T = 1e4  # below one tenth of a degree of freedom Student's quantile has no meaning


def profile(
    design: Array,
    rows: System,
    best: Array,
    noise: Noise,
    *,
    level: float = 0.95,
    huber: float | int | None = None,
    held: Array | None = None,
) -> tuple[Array, Array]:
    """Each parameter's interval float64[P, 2], and whether each end is closed, bool[P, 2].

    `best` float64[P] is the fitted parameter vector, `noise` how the rows scatter around it;
    `held` bool[P] marks parameters that stay at it. An end that is not closed is a bound of the
    search: the points do not limit the parameter on that side.
    """
    from scipy.special import stdtrit  # Student's quantile; scipy.stats takes 0.3 s to import

    low, high = bounds(design)
    size = len(best)
    held = np.zeros(size, bool) if held is None else held
    t = np.minimum(stdtrit(noise.dof, 0.5 + level / 2), LARGEST_T)
    fitted = measured(predict(design, best[None]), rows.mix)
    floor = loss_of(rows.target - fitted, rows.weight, huber)[0]
    limit = np.repeat(floor + t**2 * noise.scale, 2)
    count = 2 * size
    parameter = np.repeat(np.arange(size), 2)
    outward = np.tile([-1.0, 1.0], size)
    search_bound = np.where(outward < 0, low[parameter], high[parameter])
    fixed = np.tile(held, (count, 1))
    fixed[np.arange(count), parameter] = True

    # sqrt(profile - floor) is close to linear in the parameter, so brackets are cut in that scale.
    def height(loss: Array, problems: Array) -> Array:
        room = np.maximum(limit[problems] - floor, 1e-300)
        return np.sqrt(np.maximum(loss - floor, 0.0) / room) - 1.0

    # The last solution below the limit is a warm start for the next.
    inside = np.tile(best, (count, 1))
    inner, inner_height = best[parameter], np.full(count, -1.0)
    step = 0.5 * t[parameter] * _spread(design, rows, best, noise)[parameter]
    outer, outer_height = np.full(count, np.nan), np.full(count, np.nan)
    searching = np.arange(count)
    for _ in range(60):
        trial = inner[searching] + outward[searching] * step[searching]
        trial = np.where(
            outward[searching] < 0,
            np.maximum(trial, search_bound[searching]),
            np.minimum(trial, search_bound[searching]),
        )
        theta, h = _held(design, rows, inside, fixed, parameter, searching, trial, huber, height)
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
        theta, h = _held(design, rows, inside, fixed, parameter, searching, trial, huber, height)
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
    rows: System,
    inside: Array,
    fixed: Array,
    which: Array,
    problems: Array,
    at: Array,
    huber: float | int | None,
    height: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
    start = inside[problems].copy()
    start[np.arange(len(problems)), which[problems]] = at
    theta, loss = solve(
        design, rows.target[None], rows.weight[None], start,
        fixed=fixed[problems], huber=huber, iterations=100, mix=rows.mix,
    )  # fmt: skip
    return theta, height(loss, problems)


def _spread(design: Array, rows: System, best: Array, noise: Noise) -> Array:
    """A first step for each parameter: its standard error if the law were linear, clipped."""
    low, high = bounds(design)
    columns = tangent(design, rows, best)
    covariance = np.linalg.pinv(columns @ columns.T, rcond=1e-12) * noise.scale
    return np.clip(np.sqrt(np.maximum(np.diag(covariance), 0.0)), 1e-7, 0.1 * (high - low))


def draws(
    design: Array,
    rows: System,
    best: Array,
    noise: Noise,
    *,
    count: int,
    rng: np.random.Generator,
    huber: float | int | None = None,
) -> Array:
    """`count` bootstrap parameter vectors, float64[count, P], of the law fitted to new rows.

    The new rows are the fit plus resampled residuals, each divided by sqrt(1 - leverage). In each
    draw all of a stratum are scaled by one chi-square draw of its degrees of freedom, so that a
    dozen points spread like Student's t and not like the normal, which is too narrow. Where trained
    models are shared, too few of their deviations are left to be resampled: both strata are normal.
    """
    fitted = measured(predict(design, best[None]), rows.mix)[0]
    root = np.sqrt(rows.weight)
    start = np.tile(best, (count, 1))
    if rows.shared:
        pure = rng.standard_normal((count, len(root)))
    else:
        pull = np.minimum(leverage(tangent(design, rows, best)), 0.9)
        left = root * (rows.target - fitted) / np.sqrt(1 - pull)
        left = left - left.mean()
        left = left * np.sqrt(noise.scale / max(left.var(), 1e-300))
        pure = left[rng.integers(0, len(left), (count, len(left)))]
    for kind, (_, dof) in noise.strata.items():
        dof = max(dof, 1.0)
        pure[:, rows.stratum == kind] *= np.sqrt(dof / rng.chisquare(dof, (count, 1)))
    noisy = fitted + pure / root
    return solve(design, noisy, rows.weight[None], start, huber=huber, mix=rows.mix)[0]
