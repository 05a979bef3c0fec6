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
from vlm_jax.cost import queue, roofline
from vlm_jax.cost.calibration import IDEAL, Calibration
from vlm_jax.cost.chips import Chip
from vlm_jax.cost.lifetime import LLAVA, Recipe, paper_training_flops, training_flops
from vlm_jax.models.sizes import LLMSize, ViTSize

UNITS = {
    "flops": "FLOPs per request",
    "ms": "milliseconds per batch",
    "ttft": "milliseconds to the first token",
    "tpot": "milliseconds per output token",
    "p95": "milliseconds to the answer for 95 % of requests",
    "dollars": "dollars per million requests",
    "hbm": "bytes of memory per batch",
    "lifetime": "FLOPs of training and of all requests",
    "lifetime_dollars": "dollars of training and of all requests",
}
TIMES = ("ms", "ttft", "tpot", "p95", "dollars", "lifetime_dollars")  # what a chip is needed for
NEVER = 1e15  # milliseconds of a server that cannot keep up
SMALLEST_N = 1e-9  # one parameter: the lower end for the paper's cost, which has no architecture


@dataclasses.dataclass(frozen=True)
class Workload:
    """The requests: text lengths with their shares, generated tokens, and requests per batch.

    With a `rate`, requests per second, `batch` is the most that the server takes at once. `frames`
    are those of a video, of V tokens each; 1 is an image. `requests` are those of the model's life,
    after a training by `recipe`.
    """

    texts: tuple[tuple[Number, Number], ...]  # (Q, share); shares sum to 1
    G: Number = 0
    batch: int = 1
    cached_text: bool = False
    rate: Number | None = None
    requests: Number | None = None
    recipe: Recipe = LLAVA
    frames: Number = 1

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
        """FLOPs of one request, or of the model's life."""
        work = self.workload
        if unit not in ("flops", "lifetime"):
            raise ValueError(
                f"the paper's cost is FLOPs; a limit in {UNITS[unit]} needs --cost=full"
            )
        text = (0 if work.cached_text else work.Q) + work.G
        flops = cost.paper_flops(N, work.frames * V, Q=text)
        if unit == "lifetime":
            return self.training(N, V, compressor) + float((work.requests or 0) * flops)
        return float(flops)

    def within(
        self, unit: str, limit: Number, V: Number, compressor: str
    ) -> list[tuple[float, float]]:
        """The one range of N that costs at most `limit`."""
        return [(self.lowest, limit / self.amount(unit, 1.0, V, compressor))]

    def training(self, N: Number, V: Number, compressor: str) -> float:
        """FLOPs of training this configuration."""
        return float(paper_training_flops(N, V, self.workload.recipe))

    def parts(self, N: Number, V: Number, compressor: str) -> dict[str, dict[str, Number]]:
        """This cost has no parts but those of the model's life."""
        if self.workload.requests is None:
            return {}
        answered = self.workload.requests * self.amount("flops", N, V, compressor)
        return {"lifetime": {"training": self.training(N, V, compressor), "requests": answered}}


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
    calibration: Calibration = IDEAL
    stored: roofline.Stored = roofline.AS_CHIP
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
        """FLOPs, milliseconds, dollars by phase and bytes by kind, averaged over text lengths.

        Of the times "ttft" is all but decoding, "tpot" decoding for each token after the first.
        """
        totals: dict[str, dict[str, Number]] = {}
        sized, work = (self.vit, self.compressor(compressor, V), llm), self.workload
        width = self.chip.bytes_per_number if self.chip else 2
        for Q, share in work.texts:
            request = roofline.Request(Q, work.G, work.batch, None, work.cached_text, work.frames)
            need = roofline.memory(*sized, request, bytes_per_number=width, stored=self.stored)
            parts = {
                "flops": dataclasses.asdict(roofline.request_flops(*sized, request)),
                "hbm": dataclasses.asdict(need),
            }
            if self.chip:
                parts["ms"] = ms = self._milliseconds(*sized, request, self.chip)
                parts["ttft"] = {phase: time for phase, time in ms.items() if phase != "decode"}
                parts["tpot"] = {"decode": ms["decode"] / max(work.G - 1, 1)}
                price = self.dollars_per_hour / 3.6e6 / work.batch * 1e6
                parts["dollars"] = {phase: price * time for phase, time in ms.items()}
            for unit, values in parts.items():
                sums = totals.setdefault(unit, dict.fromkeys(values, 0.0))
                for name, value in values.items():
                    # Memory must hold the longest text, the others are means.
                    sums[name] = (
                        max(sums[name], value) if unit == "hbm" else sums[name] + share * value
                    )
        if work.requests is not None:
            training = training_flops(*sized, work.recipe)
            totals["lifetime"] = {
                "training": training,
                "requests": work.requests * sum(totals["flops"].values()),
            }
            if self.chip:
                speed = self.chip.peak_flops * work.recipe.efficiency
                totals["lifetime_dollars"] = {
                    "training": training / speed * self.dollars_per_hour / 3600,
                    "requests": work.requests / 1e6 * sum(totals["dollars"].values()),
                }
        if self.chip and work.rate:
            totals["p95"] = {"response": self._response(*sized, self.chip, work.rate)}
        return totals

    def _milliseconds(
        self, vit: ViTSize, method: Method, llm: LLMSize, request: roofline.Request, chip: Chip
    ) -> dict[str, Number]:
        """Milliseconds of each phase of a batch."""
        seconds = roofline.seconds(
            vit, method, llm, request, chip, calibration=self.calibration, stored=self.stored
        )
        return {phase: 1e3 * time for phase, time in seconds.items()}

    def _response(
        self, vit: ViTSize, method: Method, llm: LLMSize, chip: Chip, rate: Number
    ) -> float:
        """Milliseconds that 95 % of requests do not exceed; NEVER if the server is overloaded."""
        work, sizes = self.workload, np.arange(1, self.workload.batch + 1)
        # Times of a few batches; between them they are straight but for one bend.
        known = np.unique(np.geomspace(1, work.batch, 8).round().astype(int))
        times = [
            sum(
                share * time
                for Q, share in work.texts
                for time in self._milliseconds(
                    vit, method, llm,
                    roofline.Request(
                        Q, work.G, int(batch), None, work.cached_text, work.frames
                    ), chip,
                ).values()
            )
            for batch in known
        ]  # fmt: skip
        every = np.interp(sizes, known, times) / 1e3
        return min(1e3 * queue.response_seconds(every.tolist(), rate), NEVER)

    def _totals(self, unit: str, V: Number, compressor: str) -> np.ndarray:
        """The cost in `unit` at each described size, ascending N."""
        if unit in TIMES and self.chip is None:
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

    def training(self, N: Number, V: Number, compressor: str) -> float:
        """FLOPs of training this configuration."""
        method, recipe = self.compressor(compressor, V), self.workload.recipe
        spent = [training_flops(self.vit, method, llm, recipe) for llm in self.sizes.values()]
        return _line(N, np.array(list(self.sizes)), np.array(spent, np.float64))

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
