# SPDX-License-Identifier: Apache-2.0
"""Student's t and the exact sign test in plain Python, where scipy would take longer to import.

Formulas: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.5 and 26.7.
"""

import math

ALPHA = 0.05
POWER = 0.8
STEPS = 200


def t_p_value(t: float, df: int) -> float:
    """The two-sided p-value of Student's t with `df` degrees of freedom."""
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(df: int, alpha: float = ALPHA) -> float:
    """The t whose two-sided p-value is `alpha`, by bisection."""
    low, high = 0.0, 1.0
    while t_p_value(high, df) > alpha:
        high *= 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_p_value(middle, df) > alpha else (low, middle)
    return (low + high) / 2


def sign_test(fewer: int, more: int) -> float:
    """The exact two-sided p-value that two kinds of pairs are equally likely; 1 for none.

    On single questions that one of two models answers, it is McNemar's test in its exact form.
    """
    n, k = fewer + more, min(fewer, more)
    log_half = n * math.log(0.5)
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half
        for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def factor(df: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """A difference of this many standard errors is found with probability `power` at `alpha`, if
    they are estimated with `df` degrees of freedom."""
    return t_quantile(df, alpha) + t_quantile(df, 2 * (1 - power))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this point
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    upper, lower = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = lower
    for m in range(1, STEPS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            lower = 1 / (1 + term * lower or tiny)
            upper = 1 + term / upper or tiny
            fraction *= lower * upper
        if abs(lower * upper - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a
