# SPDX-License-Identifier: Apache-2.0
"""Whether a form misses the cells by more than their noise: such a law gives no answer.

Two signs, each with a test at one in a thousand and a size that matters. The cells scatter around
the law by several times what their seeds and their questions explain (Fisher's F). Or what the law
leaves over is a smooth surface in ln N and ln V, which noise is not: the F test of a polynomial
beside the law's own tangent, which needs neither seeds nor standard errors.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlm_jax.law.components import CELLS, RANK, Noise, System, tangent
from vlm_jax.law.solve import Array, measured, predict

CHANCE = 1e-3
TIMES = 3.0  # the noise: below it, unmeasured chance of training explains the scatter as well
SURFACE_TIMES = 2.0  # the noise: the size of a smooth rest that matters
LARGE = 0.02  # the size of a smooth rest that matters where no noise is known, a fraction
POWERS = ((2, 0), (1, 1), (0, 2), (0, 3), (3, 0), (2, 1), (1, 2))  # of ln N and ln V
SPARE = 3  # degrees of freedom that the surface must leave


@dataclass(frozen=True)
class Misfit:
    """How far a form misses the cells.

    Attributes:
      scatter: the standard deviation of a cell's mean around the law.
      noise: what seeds and questions explain of it; nan if neither is known.
      chance: the probability of such a scatter if the form is right; nan if noise is not known.
      surface, surface_chance: the size of the smooth rest and its probability; nan for few cells.
      chi_square: scatter^2 / noise^2, per degree of freedom.
    """

    scatter: float
    noise: float
    chance: float
    surface: float
    surface_chance: float

    @property
    def chi_square(self) -> float:
        """Per degree of freedom; nan without noise."""
        return (self.scatter / self.noise) ** 2 if self.noise > 0 else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The fields, chi_square and sentence, with None for nan."""
        numbers = asdict(self) | {"chi_square": self.chi_square}
        plain = {k: float(x) if np.isfinite(x) else None for k, x in numbers.items()}
        return plain | {"sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """Why the law gives no answer; "" if it does."""
        if self.chance < CHANCE and self.scatter > TIMES * self.noise:
            return (
                f"misses the cells by {self.scatter:.2g}, {self.scatter / self.noise:.1f} times "
                f"their noise of {self.noise:.2g} (chi-square {self.chi_square:.0f} for each "
                f"degree of freedom, chance {self.chance:.1g})"
            )
        known = SURFACE_TIMES * self.noise if self.noise > 0 else LARGE
        if self.surface_chance < CHANCE and self.surface > known:
            return (
                f"leaves a smooth pattern of size {self.surface:.2g} in N and V "
                f"(chance {self.surface_chance:.1g})"
            )
        return ""


def test(design: Array, rows: System, theta: Array, noise: Noise, stderr: float) -> Misfit:
    """Tests the law `theta` float64[P] against the rows it was fitted to, see `Misfit`."""
    from scipy.special import fdtrc  # Fisher's F, the upper tail

    square, dof = noise.strata[CELLS]
    nan = float("nan")
    if not rows.shared and len(rows.target) <= len(theta):
        return Misfit(nan, nan, nan, nan, nan)
    seeds = rows.rows / len(rows.N)
    known, count = 0.0, np.inf
    if rows.pure_dof:
        known, count = rows.pure / rows.pure_dof / seeds, float(rows.pure_dof)
    if np.isfinite(stderr):
        # of the same questions for all seeds, so that seeds do not lessen it
        known, count = known + stderr**2, max(count, 30.0) if rows.pure_dof else np.inf
    scatter = float(np.sqrt(square / seeds))
    chance = nan
    if known > 0:
        finite = min(count, 1e6)
        chance = float(fdtrc(dof, finite, max(scatter**2 / known, 0.0)))
    surface, surface_chance = _surface(design, rows, theta)
    return Misfit(scatter, float(np.sqrt(known)) if known > 0 else nan, chance, surface,
                  surface_chance)  # fmt: skip


def _surface(design: Array, rows: System, theta: Array) -> tuple[float, float]:
    """(size, chance) of a smooth surface in what the law leaves over."""
    from scipy.special import fdtrc

    root = np.sqrt(rows.weight)
    left = root * (rows.target - measured(predict(design, theta[None])[0], rows.mix))
    x, y = (np.log(values / np.exp(np.log(values).mean())) for values in (rows.N, rows.V))
    own = tangent(design, rows, theta)
    own = own[np.abs(own).max(1) > 0]
    rank, _ = _outside(own, left)
    shapes = [p for p in POWERS if p[0] < len(np.unique(x)) and p[1] < len(np.unique(y))]
    shapes = shapes[: max(len(left) - rank - SPARE, 0)]
    if not shapes:
        return float("nan"), float("nan")
    extra = np.stack([root * measured(x**a * y**b, rows.mix) for a, b in shapes])
    columns = np.vstack([own, extra])
    both, rest = _outside(columns / np.linalg.norm(columns, axis=1, keepdims=True), left)
    more, dof = both - rank, len(left) - both
    gained = float((left**2).sum()) - rest
    if more <= 0 or dof <= 0 or rest <= 0:
        return float("nan"), float("nan")
    chance = float(fdtrc(more, dof, gained / more / (rest / dof)))
    return float(np.sqrt(max(gained, 0.0) / rows.total.sum())), chance


def _outside(columns: Array, left: Array) -> tuple[int, float]:
    """(rank, squares of `left` [m] outside) of what the rows of `columns` [k, m] span."""
    count = len(columns)
    short = max(count + 1 - len(left), 0)  # zeros add nothing, and the triangle is whole
    matrix = np.pad(np.vstack([columns, left]).T, [(0, short), (0, 0)])
    triangle = np.asarray(np.linalg.qr(matrix, mode="r"))
    directions, lengths, _ = np.linalg.svd(triangle[:count, :count])
    dropped = lengths <= RANK * lengths[0]
    missed = directions[:, dropped].T @ triangle[:count, count]
    return int((~dropped).sum()), float(triangle[count, count] ** 2 + (missed**2).sum())
