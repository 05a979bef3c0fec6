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

from vlm_jax import compressors
from vlm_jax.compressors.method import Method, Number
from vlm_jax.cost import flops as cost
from vlm_jax.cost import roofline
from vlm_jax.cost.chips import Chip
from vlm_jax.law.forms import Numbers
from vlm_jax.law.law import Law
from vlm_jax.models.sizes import LLMSize, ViTSize

UNITS = {
    "flops": "FLOPs per request",
    "ms": "milliseconds per batch",
    "dollars": "dollars per million requests",
    "hbm": "bytes of memory per batch",
}
SMALLEST_N = 1e-9  # one parameter: the lower end for the paper's cost, which has no architecture


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A weighted mean of laws, one per task family; weights sum to 1."""

    laws: Mapping[str, Law]
    weights: Mapping[str, Number]

    def error(self, N: Numbers, V: Numbers, Q: Numbers = 0) -> Any:
        """The weighted predicted error, a fraction."""
        return sum(w * self.laws[name].error(N, V, Q) for name, w in self.weights.items())

    def interval(
        self,
        N: Number,
        V: Number,
        Q: Number,
        *,
        level: Number = 0.95,
        measured: bool = False,
    ) -> tuple[Number, Number] | None:
        """The interval of the error at `level`; None for a law without draws and residuals.

        Families are fitted to the same models, so their errors are added as if fully correlated: an
        upper bound of the width. `measured` adds the scatter of one newly trained model.
        """
        low = high = 0.0
        for name, weight in self.weights.items():
            law = self.laws[name]
            ends: Sequence[np.ndarray]
            if law.samples is not None:
                ends = law.band(N, V, Q, level=level, measured=measured)
            elif law.rmse > 0:
                ends = list(law.error(N, V, Q) + 1.96 * law.rmse * np.array([-1, 1]))
            else:
                return None
            low, high = low + weight * float(ends[0]), high + weight * float(ends[1])
        return low, high

    def outside(self, N: Number, V: Number, Q: Number) -> list[str]:
        """A sentence for each of N, V and Q outside the range of which some law was fitted."""
        sentences = []
        place = {"N": N, "V": V, "Q": Q}
        names = {"N": "billion LLM parameters", "V": "visual tokens", "Q": "text tokens"}
        for axis, value in place.items():
            ends = [
                law.domain[axis]
                for name, law in self.laws.items()
                if self.weights.get(name) and axis in law.domain
            ]
            if not ends:
                continue
            low, high = max(e[0] for e in ends), min(e[1] for e in ends)
            if axis == "Q" and self.error(N, V, low) == self.error(N, V, value):
                continue  # this law does not read Q
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                sentences.append(
                    f"extrapolates {axis}: {value:.4g} {names[axis]}, "
                    f"fitted on {low:.4g} to {high:.4g}"
                )
        return sentences


@dataclasses.dataclass(frozen=True)
class Workload:
    """The requests: text lengths with their shares, generated tokens, and requests per batch."""

    texts: tuple[tuple[Number, Number], ...]  # (Q, share); shares sum to 1
    G: Number = 0
    batch: int = 1
    cached_text: bool = False

    @property
    def Q(self) -> float:
        """The mean number of text tokens."""
        return sum(q * share for q, share in self.texts)


@dataclasses.dataclass(frozen=True)
class PaperCost:
    """2 N (Q + V + G) of arXiv 2411.03312: only the LLM's weights count; cached text is free."""

    workload: Workload
    name: str = "paper"
    lowest = SMALLEST_N

    def amount(self, unit: str, N: Number, V: Number, compressor: str) -> float:
        """FLOPs of one request, the only unit of this cost."""
        if unit != "flops":
            raise ValueError(
                f"the paper's cost is FLOPs; a limit in {UNITS[unit]} needs --cost=full"
            )
        text = 0 if self.workload.cached_text else self.workload.Q
        return float(cost.paper_flops(N, V, Q=text + self.workload.G))

    def largest(self, unit: str, limit: Number, V: Number, compressor: str) -> float:
        """The N that costs exactly `limit`."""
        return limit / self.amount(unit, 1.0, V, compressor)


@dataclasses.dataclass(frozen=True)
class FullCost:
    """Every phase of a request; between the described LLMs by linear interpolation in N.

    `sizes` maps N in billions to shapes. At a described size the cost is exact; above the largest
    one it is extrapolated from the last two sizes; N below the smallest size is not offered.
    """

    workload: Workload
    sizes: Mapping[Number, LLMSize]
    vit: ViTSize
    query: str = "none"  # of the compressors that read the question
    heads: int = 8
    chip: Chip | None = None
    efficiency: Mapping[str, Number] | None = None
    dollars_per_hour: Number = 0.0  # for the chip, all of them together
    name: str = "full"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", dict(sorted(self.sizes.items())))

    @property
    def lowest(self) -> float:
        """The smallest N that is offered, in billions."""
        return min(self.sizes)

    def compressor(self, kind: str, V: Number) -> Method:
        """The compressor `kind` at V tokens."""
        return compressors.describe(dict(kind=kind, tokens=V, heads=self.heads, query=self.query))

    def details(self, llm: LLMSize, V: Number, compressor: str) -> dict[str, dict[str, Number]]:
        """FLOPs and milliseconds by phase and bytes by kind, averaged over text lengths."""
        totals: dict[str, dict[str, Number]] = {}
        for Q, share in self.workload.texts:
            request = roofline.Request(
                Q, self.workload.G, self.workload.batch, None, self.workload.cached_text
            )
            request_sizes = (self.vit, self.compressor(compressor, V), llm, request)
            width = self.chip.bytes_per_number if self.chip else 2
            parts = {
                "flops": dataclasses.asdict(roofline.request_flops(*request_sizes)),
                "hbm": dataclasses.asdict(roofline.memory(*request_sizes, bytes_per_number=width)),
            }
            if self.chip:
                seconds = roofline.seconds(*request_sizes, self.chip, efficiency=self.efficiency)
                parts["ms"] = {phase: 1e3 * s for phase, s in seconds.items()}
            for unit, values in parts.items():
                sums = totals.setdefault(unit, dict.fromkeys(values, 0.0))
                for name, value in values.items():
                    # Memory must hold the longest text, the others are means.
                    sums[name] = (
                        max(sums[name], value) if unit == "hbm" else sums[name] + share * value
                    )
        return totals

    def _knots(self, unit: str, V: Number, compressor: str) -> tuple[np.ndarray, np.ndarray]:
        if unit in ("ms", "dollars") and self.chip is None:
            raise ValueError(f"a limit in {UNITS[unit]} needs --chip")
        kind = "ms" if unit == "dollars" else unit
        totals = [
            sum(self.details(llm, V, compressor)[kind].values()) for llm in self.sizes.values()
        ]
        if unit == "dollars":
            factor = self.dollars_per_hour / 3.6e6 / self.workload.batch * 1e6
            totals = [ms * factor for ms in totals]
        return np.array(list(self.sizes)), np.maximum.accumulate(totals)

    def parts(self, N: Number, V: Number, compressor: str) -> dict[str, dict[str, Number]]:
        """`details` at any N."""
        details = [self.details(llm, V, compressor) for llm in self.sizes.values()]
        sizes = np.array(list(self.sizes))
        return {
            unit: {
                name: _line(N, sizes, np.array([d[unit][name] for d in details])) for name in names
            }
            for unit, names in details[0].items()
        }

    def amount(self, unit: str, N: Number, V: Number, compressor: str) -> float:
        """The cost in `unit` (a key of UNITS) of one request, or batch for ms and hbm."""
        return _line(N, *self._knots(unit, V, compressor))

    def largest(self, unit: str, limit: Number, V: Number, compressor: str) -> float:
        """The largest N that costs at most `limit`; 0 if none does."""
        sizes, totals = self._knots(unit, V, compressor)
        if limit < totals[0]:
            return 0.0
        return _line(limit, totals, sizes)


def _line(x: Number, xs: np.ndarray, ys: np.ndarray) -> float:
    """y at x on the line through the points, extrapolated at the end; one point: through zero."""
    if len(xs) == 1:
        return float(ys[0] * x / xs[0])
    if x > xs[-1]:
        return float(ys[-1] + (x - xs[-1]) * (ys[-1] - ys[-2]) / max(xs[-1] - xs[-2], 1e-300))
    return float(np.interp(x, xs, ys))


Cost = PaperCost | FullCost


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


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched.

    `llms` is a list of N, or None for every size; `tokens` maps each compressor to its list of V,
    or to all V `Between` two values.
    """

    law: Mixture
    cost: Cost
    budget: Budget
    llms: tuple[Number, ...] | None
    tokens: Mapping[str, Sequence[Number] | Between]

    def predicted(self, N: Numbers, V: Number) -> Any:
        """The error averaged over text lengths, in the shape of N."""
        return sum(share * self.law.error(N, V, q) for q, share in self.cost.workload.texts)

    def affordable(self, V: Number, compressor: str) -> list[Number]:
        """The N to try at V: the listed ones within all limits, or the largest and smaller ones."""
        limit = min(
            self.cost.largest(unit, amount, V, compressor) for unit, amount in self.budget.limits
        )
        if self.llms is not None:
            return [N for N in self.llms if N <= limit * (1 + 1e-9)]
        if limit < self.cost.lowest:
            return []
        # If the error falls with N everywhere, the largest N is enough; a fit may bend otherwise.
        below = np.geomspace(max(self.cost.lowest, limit / 1e3), limit, 9)[:-1]
        return [limit, *(float(N) for N in below)]

    def best_at(self, V: Number, compressor: str) -> Candidate | None:
        """The best affordable LLM at this V, or None."""
        choices = self.affordable(V, compressor)
        if not choices:
            return None
        errors = self.predicted(np.array(choices), V)
        N = choices[int(errors.argmin())]
        amount = self.cost.amount(self.budget.limits[0][0], N, V, compressor)
        return Candidate(N, V, compressor, float(errors.min()), amount)

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
            else:
                candidates += self.listed(compressor, V)
        if not candidates:
            raise ValueError(self._nothing())
        return sorted(candidates, key=lambda c: (c.error, c.cost))

    def _nothing(self) -> str:
        N = self.cost.lowest if self.llms is None else min(self.llms)
        lows = {c: V.low if isinstance(V, Between) else min(V) for c, V in self.tokens.items()}
        words = []
        for unit, limit in self.budget.limits:
            amount, kind, V = min((self.cost.amount(unit, N, V, c), c, V) for c, V in lows.items())
            if amount > limit:
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
    token = chosen.error - float(search.predicted(N, V + 1))
    billion = chosen.error - float(search.predicted(N + 1, V))
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
        return (chosen.error - float(search.predicted(N, V))) / price if price > 0 else None

    tokens = slope(chosen.N, chosen.V * (1 + step))
    parameters = slope(chosen.N * (1 + step), chosen.V)
    return None if tokens is None or not parameters else tokens / parameters


def runner_ups(others: Sequence[Candidate], high: Number, *, count: int = 10) -> list[Candidate]:
    """The best `count` of `others` with a predicted error of at most `high`, best first."""
    return sorted((c for c in others if c.error <= high), key=lambda c: (c.error, c.cost))[:count]
