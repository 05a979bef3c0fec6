# SPDX-License-Identifier: Apache-2.0
"""What a plan spends: the paper's cost, and every phase of a request between the described LLMs.

N LLM parameters in billions   V visual tokens   Q text tokens   G generated tokens
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax import compressors
from vlm_jax.compressors.method import Method, Number
from vlm_jax.cost import flops as cost
from vlm_jax.cost import roofline
from vlm_jax.cost.chips import Chip
from vlm_jax.models.sizes import LLMSize, ViTSize

UNITS = {
    "flops": "FLOPs per request",
    "ms": "milliseconds per batch",
    "dollars": "dollars per million requests",
    "hbm": "bytes of memory per batch",
}
SMALLEST_N = 1e-9  # one parameter: the lower end for the paper's cost, which has no architecture


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

    def within(
        self, unit: str, limit: Number, V: Number, compressor: str
    ) -> list[tuple[float, float]]:
        """The one range of N that costs at most `limit`."""
        return [(self.lowest, limit / self.amount(unit, 1.0, V, compressor))]

    def parts(self, N: Number, V: Number, compressor: str) -> dict[str, dict[str, Number]]:
        """This cost has no parts."""
        return {}


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
    _memory: dict[Any, Any] = dataclasses.field(
        init=False, default_factory=dict, repr=False, compare=False
    )

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
        """FLOPs, milliseconds, dollars by phase and bytes by kind, averaged over text lengths."""
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
                price = self.dollars_per_hour / 3600 / self.workload.batch * 1e6
                parts["dollars"] = {phase: price * s for phase, s in seconds.items()}
            for unit, values in parts.items():
                sums = totals.setdefault(unit, dict.fromkeys(values, 0.0))
                for name, value in values.items():
                    # Memory must hold the longest text, the others are means.
                    sums[name] = (
                        max(sums[name], value) if unit == "hbm" else sums[name] + share * value
                    )
        return totals

    def _totals(self, unit: str, V: Number, compressor: str) -> np.ndarray:
        """The cost in `unit` at each described size, ascending N."""
        if unit in ("ms", "dollars") and self.chip is None:
            raise ValueError(f"a limit in {UNITS[unit]} needs --chip")
        return np.array(
            [sum(part[unit].values()) for part in self._details(V, compressor)], np.float64
        )

    def _details(self, V: Number, compressor: str) -> list[dict[str, dict[str, Number]]]:
        """`details` of each described size, computed once."""
        key = (V, compressor)
        if key not in self._memory:
            self._memory[key] = [self.details(llm, V, compressor) for llm in self.sizes.values()]
        return self._memory[key]

    def parts(self, N: Number, V: Number, compressor: str) -> dict[str, dict[str, Number]]:
        """`details` at any N."""
        details = self._details(V, compressor)
        sizes = np.array(list(self.sizes))
        return {
            unit: {
                name: _line(N, sizes, np.array([d[unit][name] for d in details])) for name in names
            }
            for unit, names in details[0].items()
        }

    def amount(self, unit: str, N: Number, V: Number, compressor: str) -> float:
        """The cost in `unit` (a key of UNITS) of one request, or batch for ms and hbm."""
        return _line(N, np.array(list(self.sizes)), self._totals(unit, V, compressor))

    def within(
        self, unit: str, limit: Number, V: Number, compressor: str
    ) -> list[tuple[float, float]]:
        """The ranges of N that cost at most `limit`, ascending.

        A larger LLM may cost less than a smaller one (fewer blocks, a smaller vocabulary), so there
        may be several.
        """
        sizes, totals = np.array(list(self.sizes)), self._totals(unit, V, compressor)
        ends = [(float(sizes[0]), float(sizes[0]))] if totals[0] <= limit else []
        for (x0, y0), (x1, y1) in itertools.pairwise(zip(sizes, totals, strict=True)):
            if min(y0, y1) > limit:
                continue
            cut = x0 + (limit - y0) * (x1 - x0) / (y1 - y0) if max(y0, y1) > limit else x1
            ends.append((float(x0 if y0 <= limit else cut), float(cut if y0 <= limit else x1)))
        if totals[-1] <= limit:  # beyond the largest
            slope = _slope(sizes, totals)
            ends.append((float(sizes[-1]), float(sizes[-1] + (limit - totals[-1]) / slope)))
        joined: list[tuple[float, float]] = []
        for low, high in ends:
            if joined and low <= joined[-1][1]:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        return joined


def _slope(xs: np.ndarray, ys: np.ndarray) -> float:
    """By how much y grows per x beyond the last point: as before it, or as a line through zero."""
    if len(xs) > 1 and ys[-1] > ys[-2]:
        return float((ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
    return max(float(ys[-1] / xs[-1]), 1e-300)


def _line(x: Number, xs: np.ndarray, ys: np.ndarray) -> float:
    """y at x on the line through the points, extrapolated at the end; one point: through zero."""
    if len(xs) == 1:
        return float(ys[0] * x / xs[0])
    if x > xs[-1]:
        return float(ys[-1] + (x - xs[-1]) * _slope(xs, ys))
    return float(np.interp(x, xs, ys))


Cost = PaperCost | FullCost
