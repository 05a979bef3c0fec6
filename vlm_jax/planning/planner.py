# SPDX-License-Identifier: Apache-2.0
"""Searches the LLM size and the visual tokens with the least predicted error within a budget.

N LLM parameters in billions   V visual tokens   Q text tokens   error = 1 - score

With the paper's cost 2 N (Q + V) and its law A N^-alpha V^-beta + D the answer has a closed form,
V* = Q beta / (alpha - beta), whatever the budget and whatever fixed cost an encoder adds. The
search depends on neither that law nor that cost: for each V it takes the largest N that every limit
allows, then refines V. tests/test_planner.py compares it with the closed form.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.compressors.method import Number
from vlm_jax.law.forms import Numbers
from vlm_jax.planning.costs import NEVER, UNITS, Cost
from vlm_jax.planning.mixture import Mixture


@dataclasses.dataclass(frozen=True)
class Budget:
    """Upper limits, each (unit of UNITS, amount); the first is the budget the user gave."""

    limits: tuple[tuple[str, Number], ...]


@dataclasses.dataclass(frozen=True)
class Between:
    """Any V from `low` to `high`, whole or not."""

    low: Number
    high: Number


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One affordable configuration with its predicted error and cost in the budget's unit."""

    N: Number
    V: Number
    compressor: str
    error: Number
    cost: Number

    def rank(self) -> tuple[Number, Number]:
        """What the better candidate has less of: error, then cost."""
        return self.error, self.cost


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched.

    `llms` is a list of N, or None for every size up to `most`; `tokens` maps each compressor to its
    list of V, or to all V `Between` two values. `others` are the laws of compressors that have
    their own; `law` answers for the rest.
    """

    law: Mixture
    cost: Cost
    budget: Budget
    llms: tuple[Number, ...] | None
    tokens: Mapping[str, Sequence[Number] | Between]
    most: Number = np.inf
    others: Mapping[str, Mixture] = dataclasses.field(default_factory=dict)

    def law_of(self, compressor: str) -> Mixture:
        """The law that answers for a compressor."""
        return self.others.get(compressor, self.law)

    def predicted(self, N: Numbers, V: Number, compressor: str) -> Any:
        """The error averaged over text lengths, in the shape of N."""
        return sum(
            share * self.law_of(compressor).error(N, V, q) for q, share in self.cost.workload.texts
        )

    def draws(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """Paired draws of the error, float64[worlds, candidates]; None for a law without draws."""
        columns: dict[int, np.ndarray] = {}
        for kind in {c.compressor for c in candidates}:
            mine = [i for i, c in enumerate(candidates) if c.compressor == kind]
            N, V = (np.array([getattr(candidates[i], axis) for i in mine]) for axis in "NV")
            law, texts = self.law_of(kind), self.cost.workload.texts
            found = [(share, law.draws(N, V, Q)) for Q, share in texts]
            if any(errors is None for _, errors in found):
                return None
            errors = sum(share * errors for share, errors in found)
            columns |= {i: errors[:, k] for k, i in enumerate(mine)}
        return np.stack([columns[i] for i in range(len(candidates))], axis=1)

    def affordable(self, V: Number, compressor: str) -> list[float]:
        """The N to try at V: the listed ones within all limits, or the ends of what they allow."""
        if self.llms is not None:
            return [
                float(N)
                for N in self.llms
                if self.law_of(compressor).answers_at(N, V) and self.allows(N, V, compressor)
            ]
        allowed = [(self.cost.lowest, self.most)]
        for unit, amount in self.budget.limits:
            allowed = [
                (max(low, a), min(high, b))
                for low, high in allowed
                for a, b in self.cost.within(unit, amount, V, compressor)
                if max(low, a) <= min(high, b)
            ]
        # If the error falls with N everywhere, the largest N is enough; a fit may bend otherwise.
        return [
            float(N)
            for low, high in allowed
            for N in (high, *np.geomspace(max(low, high / 1e3), high, 9)[:-1])
        ]

    def allows(self, N: Number, V: Number, compressor: str) -> bool:
        """Whether a configuration is within all limits."""
        return all(
            self.cost.amount(unit, N, V, compressor) <= limit * (1 + 1e-9)
            for unit, limit in self.budget.limits
        )

    def at(self, V: Number, compressor: str) -> list[Candidate]:
        """Every affordable candidate at this V."""
        choices = self.affordable(V, compressor)
        if not choices:
            return []
        unit = self.budget.limits[0][0]
        return [
            Candidate(N, V, compressor, float(error), self.cost.amount(unit, N, V, compressor))
            for N, error in zip(
                choices, self.predicted(np.array(choices), V, compressor), strict=True
            )
        ]

    def best_at(self, V: Number, compressor: str) -> Candidate | None:
        """The best affordable LLM at this V, or None."""
        return min(self.at(V, compressor), key=Candidate.rank, default=None)

    def listed(self, compressor: str, V: Sequence[Number]) -> list[Candidate]:
        """The best candidate at each listed V."""
        return [candidate for v in V if (candidate := self.best_at(v, compressor)) is not None]

    def continuous(self, compressor: str, low: Number, high: Number) -> list[Candidate]:
        """The best candidate over V from `low` to `high` in a list; empty if none fits."""
        from scipy.optimize import minimize_scalar  # slow to import, and not needed for a list of V

        grid = np.unique([low, *np.geomspace(low, high, 129), high])
        candidates = self.listed(compressor, [float(v) for v in grid])
        if not candidates:
            return []
        best = min(candidates, key=lambda c: c.error)
        nearest = int(np.searchsorted(grid, best.V))
        ends = grid[max(nearest - 1, 0)], grid[min(nearest + 1, len(grid) - 1)]

        def error(log_v: Number) -> float:
            candidate = self.best_at(float(np.exp(log_v)), compressor)
            return np.inf if candidate is None else candidate.error

        # A tight tolerance, because the error is flat around its minimum.
        minimum = minimize_scalar(
            error, bounds=tuple(np.log(ends)), method="bounded", options={"xatol": 1e-10}
        )
        refined = self.best_at(float(np.exp(minimum.x)), compressor)
        return [min((c for c in (best, refined) if c is not None), key=lambda c: c.error)]

    def candidates(self) -> list[Candidate]:
        """Every candidate, best first. Raises ValueError, naming the cheapest, if nothing fits."""
        candidates: list[Candidate] = []
        for compressor, V in self.tokens.items():
            if isinstance(V, Between):
                candidates += self.continuous(compressor, V.low, V.high)
            elif self.llms is None:
                candidates += self.listed(compressor, V)
            else:
                candidates += [candidate for v in V for candidate in self.at(v, compressor)]
        if not candidates:
            raise ValueError(self._nothing())
        return sorted(candidates, key=Candidate.rank)

    def _nothing(self) -> str:
        sizes = [self.cost.lowest] if self.llms is None else self.llms
        lows = {c: V.low if isinstance(V, Between) else min(V) for c, V in self.tokens.items()}
        words = []
        for unit, limit in self.budget.limits:
            amount, kind, V, N = min(
                (self.cost.amount(unit, N, V, c), c, V, N) for c, V in lows.items() for N in sizes
            )
            if unit == "p95" and amount >= NEVER:
                words.append(f"no server keeps up with {self.cost.workload.rate:g} requests per "
                             "second: raise --batch or --chips")  # fmt: skip
            elif amount > limit:
                words.append(
                    f"the cheapest is N={N:g} billion, V={V:g}, {kind}: "
                    f"{amount:.4g} {UNITS[unit]}, and the limit is {limit:.4g}"
                )
        return "nothing meets the budget: " + (
            "; ".join(words) or "no candidate meets all limits together"
        )


def marginal(search: Search, chosen: Candidate) -> dict[str, Number | None]:
    """What one more visual token and one more billion parameters gain and cost at a choice.

    Gains are reductions of error; costs are in the budget's unit. At an optimum inside the range
    both gains per cost are equal; if tokens gain less per cost, spend on parameters.
    """
    unit = search.budget.limits[0][0]
    N, V, kind = chosen.N, chosen.V, chosen.compressor
    amount = search.cost.amount(unit, N, V, kind)
    token = chosen.error - float(search.predicted(N, V + 1, kind))
    billion = chosen.error - float(search.predicted(N + 1, V, kind))
    token_cost = search.cost.amount(unit, N, V + 1, kind) - amount
    billion_cost = search.cost.amount(unit, N + 1, V, kind) - amount
    return {
        "error_saved_by_one_more_token": token,
        "error_saved_by_one_more_billion": billion,
        "cost_of_one_more_token": token_cost,
        "cost_of_one_more_billion": billion_cost,
        # A slope, not a step of 1: near V = 1 one token is a doubling.
        "gain_per_cost_tokens_over_parameters": _ratio(search, chosen),
    }


def _ratio(search: Search, chosen: Candidate) -> float | None:
    unit, step = search.budget.limits[0][0], 1e-3

    def slope(N: Number, V: Number) -> float | None:
        price = search.cost.amount(unit, N, V, chosen.compressor) - chosen.cost
        return (
            (chosen.error - float(search.predicted(N, V, chosen.compressor))) / price
            if price > 0
            else None
        )

    tokens = slope(chosen.N, chosen.V * (1 + step))
    parameters = slope(chosen.N * (1 + step), chosen.V)
    return None if tokens is None or not parameters else tokens / parameters
