# SPDX-License-Identifier: Apache-2.0
"""A bounded Levenberg-Marquardt solver for many least-squares problems at once.

Problems may differ in data, weights and fixed parameters.

A parameter vector is [log coefficients, D, exponents]: logarithms keep coefficients positive and
make A and its exponents a straight valley; D stays linear so that its bound 0 can be reached
exactly. After each step the coefficients and D are solved anew at the step's exponents by
non-negative least squares (variable projection): a coefficient whose logarithm ran away to the
bound comes back as soon as the exponents give it work.

B problems   K terms   E exponents   P = K + 1 + E parameters   n places   m measured coordinates
"""

import itertools

import numpy as np

Array = np.ndarray

LOG_COEFFICIENT = (-60.0, 30.0)
FLOOR = (0.0, 1.0)  # D is the error left at any size
EXPONENT = (-2.0, 5.0)  # negative: the error grows with size, which a fit must be able to show


def bounds(design: Array) -> tuple[Array, Array]:
    """The lower and upper bounds of a parameter vector, float64[P] each."""
    terms, exponents, _ = design.shape
    box = np.array([LOG_COEFFICIENT] * terms + [FLOOR] + [EXPONENT] * exponents)
    return box[:, 0], box[:, 1]


def predict(design: Array, theta: Array) -> Array:
    """Predicted errors float64[B, n] at the places of `design` [K, E, n] for `theta` [B, P]."""
    return _terms(design, theta).sum(1) + theta[:, design.shape[0], None]


def _terms(design: Array, theta: Array) -> Array:
    terms, exponents, n = design.shape
    powers = theta[:, terms + 1 :] @ design.transpose(1, 0, 2).reshape(exponents, terms * n)
    return np.exp(theta[:, :terms, None] - powers.reshape(-1, terms, n))


def jacobian(design: Array, theta: Array) -> tuple[Array, Array]:
    """The derivative of `predict` by `theta`, float64[B, P, n], and its value, float64[B, n]."""
    terms, exponents, n = design.shape
    each = _terms(design, theta)
    columns = np.empty((len(theta), terms + 1 + exponents, n))
    columns[:, :terms] = each
    columns[:, terms] = 1.0
    for e in range(exponents):
        columns[:, terms + 1 + e] = -(each * design[:, e]).sum(1)
    return columns, each.sum(1) + theta[:, terms, None]


def loss_of(residual: Array, weight: Array, huber: float | int | None) -> Array:
    """Weighted sums of squares, float64[B]; linear beyond `huber`, in units of error."""
    if huber is None:
        return (weight * residual**2).sum(-1)
    size = np.sqrt(weight) * np.abs(residual)
    return np.where(size <= huber, size**2, huber * (2 * size - huber)).sum(-1)


def measured(values: Array, mix: Array | None) -> Array:
    """Values at places [..., n] as measured coordinates [..., m]; the same without `mix` [m, n]."""
    return values if mix is None else values @ mix.T


def project(
    design: Array, y: Array, weight: Array, theta: Array, fixed: Array, mix: Array | None = None
) -> Array:
    """`theta` [B, P] with its free coefficients and D by non-negative least squares, exactly.

    All 2^(K+1) sets of positive coefficients are solved and the best feasible one is taken. `y` and
    `weight` are float64[B, m], `fixed` bool[B, P].
    """
    terms = design.shape[0]
    unit = theta.copy()
    unit[:, :terms] = 0.0
    each = _terms(design, unit)
    level = each.max(2)  # columns of one size, or the products overflow
    each /= level[:, :, None]
    columns = np.concatenate([each, np.ones_like(each[:, :1])], axis=1)
    columns = measured(columns, mix)
    # exp(bound) would overflow for a column of size 1e30, whose coefficient is tiny
    now = np.exp(np.minimum(theta[:, :terms] + np.log(level), 700.0))
    now = np.concatenate([now, theta[:, terms : terms + 1]], axis=1)
    held = fixed[:, : terms + 1]
    y = y - (np.where(held, now, 0.0)[:, None] @ columns)[:, 0]
    weighted = columns * weight[:, None]
    gram, right = weighted @ columns.transpose(0, 2, 1), (weighted @ y[:, :, None])[:, :, 0]
    ridge = 1e-14 * np.einsum("bkk->bk", gram)
    sets = np.array(list(itertools.product((False, True), repeat=terms + 1)))
    used = sets[:, None] & ~held  # [2^(K+1), B, K + 1], as what follows
    pairs = used[..., :, None] & used[..., None, :]
    matrix = np.where(pairs, gram, 0.0)
    matrix += np.eye(terms + 1) * np.where(used, ridge, 1.0)[..., None, :]
    target = np.where(used, right, 0.0)
    found = np.linalg.solve(matrix, target[..., None])[..., 0]
    explained = (target * found).sum(-1)
    gain = np.where((found >= 0).all(-1) & (explained > 0), explained, 0.0)
    first = gain.argmax(0), np.arange(len(theta))
    best = np.where(held, now, np.where(gain[first][:, None] > 0, found[first], 0.0))
    result = theta.copy()
    with np.errstate(divide="ignore"):
        logs = np.log(best[:, :terms]) - np.log(level)
    result[:, :terms] = np.where(held[:, :terms], theta[:, :terms], logs)
    result[:, terms] = np.where(held[:, terms], theta[:, terms], best[:, terms])
    low, high = bounds(design)
    return np.clip(result, low, high)


def solve(
    design: Array,
    y: Array,
    weight: Array,
    start: Array,
    *,
    fixed: Array | None = None,
    huber: float | int | None = None,
    iterations: int = 300,
    mix: Array | None = None,
) -> tuple[Array, Array]:
    """Solves B least-squares problems: parameters float64[B, P] and losses float64[B].

    `start` is float64[B, P]; `y` and `weight` are float64[B, m] or broadcast to it (weight 0 leaves
    a point out), where m = n unless `mix` float64[m, n] turns errors at places into what was
    measured; `fixed` bool[B, P] holds parameters at their start. A parameter is frozen at its bound
    while the gradient pushes it outward.
    """
    low, high = bounds(design)
    theta = np.clip(start, low, high)
    count, size = theta.shape
    y = np.broadcast_to(y, (count, design.shape[2] if mix is None else len(mix)))
    weight = np.broadcast_to(weight, y.shape)
    fixed = (
        np.zeros((count, size), bool) if fixed is None else np.broadcast_to(fixed, (count, size))
    )
    damping = np.full(count, 1e-3)
    loss = loss_of(y - measured(predict(design, theta), mix), weight, huber)
    zero = 1e-22 * (weight * y**2).sum(-1)  # a loss below this is rounding
    small_gains = np.zeros(count, int)
    active = np.arange(count)
    diagonal = np.arange(size)
    for _ in range(iterations):
        current = theta[active]
        columns, value = jacobian(design, current)
        columns = measured(columns, mix)
        residual = y[active] - measured(value, mix)
        w = weight[active]
        if huber is not None:
            scaled = np.sqrt(w) * np.abs(residual)
            w = w * np.minimum(1.0, huber / np.maximum(scaled, 1e-300))
        weighted = columns * w[:, None]
        gradient = (weighted @ residual[:, :, None])[:, :, 0]
        hessian = weighted @ columns.transpose(0, 2, 1)
        frozen = (
            fixed[active]
            | ((current <= low) & (gradient < 0))
            | ((current >= high) & (gradient > 0))
        )
        gradient[frozen] = 0.0
        hessian[frozen[:, :, None] | frozen[:, None, :]] = 0.0
        scale = np.maximum(
            hessian[:, diagonal, diagonal], 1e-14 * hessian.max((1, 2))[:, None] + 1e-30
        )
        hessian[:, diagonal, diagonal] += damping[active, None] * scale + np.where(
            frozen, 1.0, 1e-15 * scale
        )
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        trial = np.clip(current + np.clip(step, -8.0, 8.0), low, high)
        projected = project(design, y[active], w, trial, fixed[active], mix)
        with np.errstate(over="ignore"):  # a step too far has an infinite loss, and is refused
            trial_loss, projected_loss = (
                loss_of(y[active] - measured(predict(design, at), mix), weight[active], huber)
                for at in (trial, projected)
            )
        trial = np.where((projected_loss < trial_loss)[:, None], projected, trial)
        trial_loss = np.minimum(trial_loss, projected_loss)
        better = trial_loss < loss[active]
        gain = loss[active] - trial_loss
        # cosine between the residual and each column: the scale-free measure of a stationary point
        flat = np.abs(gradient / np.sqrt(scale)).max(1) <= 1e-9 * np.sqrt(loss[active]) + 1e-30
        # a step that is refused for a loss as small counts too: at a bound they take turns
        small = (np.abs(gain) <= 1e-11 * loss[active]) & (damping[active] < 1e-2)
        small_gains[active] = np.where(small, small_gains[active] + 1, 0)
        theta[active[better]] = trial[better]
        loss[active[better]] = trial_loss[better]
        damping[active] = np.where(
            better, np.maximum(damping[active] / 6, 1e-14), damping[active] * 4
        )
        done = (
            flat
            | (small_gains[active] >= 2)
            | (damping[active] > 1e8)
            | (loss[active] <= zero[active])
        )
        active = active[~done]
        if not len(active):
            break
    return theta, loss


def starts(design: Array, y: Array, weight: Array, count: int, rng: np.random.Generator) -> Array:
    """Starting vectors float64[count, P]: exponents at random, the rest by non-negative fits."""
    from scipy.optimize import nnls

    terms, exponents, _ = design.shape
    signs = np.where(rng.random((count, exponents)) < 0.85, 1.0, -1.0)
    drawn = signs * np.exp(rng.uniform(np.log(0.003), np.log(2.0), (count, exponents)))
    drawn = np.clip(drawn, *EXPONENT)
    theta = np.zeros((count, terms + 1 + exponents))
    theta[:, terms + 1 :] = drawn
    root = np.sqrt(weight)
    for row, each in zip(theta, _terms(design, theta), strict=True):
        level = each.max(1)  # columns of one size, or nnls meets numbers of 1e-20
        matrix = np.vstack([each / level[:, None], np.ones_like(y)]) * root
        solution = nnls(matrix.T, root * y)[0]
        row[:terms] = np.log(np.maximum(solution[:terms], 1e-3 * y.max() + 1e-12) / level)
        row[terms] = solution[terms]
    return theta
