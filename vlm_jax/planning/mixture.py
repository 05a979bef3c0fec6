# SPDX-License-Identifier: Apache-2.0
"""The error that a plan minimizes: a weighted mean over families of what answers for each.

N LLM parameters in billions   V visual tokens   Q text tokens   error = 1 - score
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.compressors.method import Number
from vlm_jax.law.answer import CELLS_ALONE, SAME, Answer
from vlm_jax.law.forms import Numbers
from vlm_jax.law.law import Law

AXES = {
    "N": "billion LLM parameters",
    "V": "visual tokens",
    "Q": "text tokens",
    "frames": "frames",
}


def order_of(name: str, count: int) -> np.ndarray:
    """int[count]: the order of a family's draws, which come form by form; its own, by its name."""
    return np.random.default_rng(list(name.encode())).permutation(count)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A weighted mean of laws, one per task family; weights sum to 1.

    `answers` holds who answers for each family, forms that fit or measured cells; a family without
    one is answered by its law. `method` is the compressor that the laws were fitted with; `others`
    are the laws of other compressors, by their names. `frames` are those for which it is asked.
    """

    laws: Mapping[str, Law]
    weights: Mapping[str, Number]
    answers: Mapping[str, Answer] = dataclasses.field(default_factory=dict)
    method: str | None = None
    others: Mapping[str, "Mixture"] = dataclasses.field(default_factory=dict)
    frames: Number = 1

    def __post_init__(self) -> None:
        alone = {name: Answer.alone(law) for name, law in self.laws.items()}
        object.__setattr__(self, "answers", alone | dict(self.answers))

    def error(self, N: Numbers, V: Numbers, Q: Numbers = 0) -> Any:
        """The weighted predicted error, a fraction."""
        return sum(
            w * self.answers[name].error(N, V, Q, frames=self.frames) for name, w in self._counted()
        )

    def _counted(self) -> list[tuple[str, Number]]:
        """(family, weight) of those with a weight: the others need no answer at a place."""
        return [(name, weight) for name, weight in self.weights.items() if weight]

    def asked_for(self, frames: Number) -> "Mixture":
        """The same laws, asked for videos of so many frames."""
        others = {name: one.asked_for(frames) for name, one in self.others.items()}
        return dataclasses.replace(self, frames=frames, others=others)

    @property
    def kind(self) -> str | None:
        """The compressor of `method`, which also names its variant and its query."""
        return self.method.split(",")[0] if self.method else None

    def draws(self, N: Numbers, V: Numbers, Q: Numbers = 0, *, count: int = 1000) -> Any:
        """Paired draws of the error, float64[count, places]; None for a law without draws.

        A row is one world for all places. Families are drawn independently of each other.
        """
        total: Any = 0.0
        for name, weight in self._counted():
            answer = self.answers[name]
            if any(law.samples is None for law in answer.forms.values()):
                return None
            drawn = answer.draws(N, V, Q, count=count, frames=self.frames)
            total = total + weight * drawn[order_of(name, count)]
        return total

    def noise(self) -> float:
        """The standard deviation of the error of one newly trained and measured cell."""
        of = [w * self.laws[name].scatter[0] for name, w in self.weights.items()]
        return max(float(np.hypot.reduce(of)), 1e-4)

    def cells(self) -> list[tuple[float, float]] | None:
        """(N, V) of the places that can be answered for; None if all can."""
        places: set[tuple[float, float]] | None = None
        for name, weight in self.weights.items():
            answer = self.answers[name]
            if weight and answer.by == CELLS_ALONE and answer.cells is not None:
                cells = answer.cells
                kept = np.ones(len(cells.N), bool)
                if cells.frames is not None:
                    kept = np.abs(np.log(cells.frames / self.frames)) <= SAME
                here = set(zip(cells.N[kept].tolist(), cells.V[kept].tolist(), strict=True))
                places = here if places is None else places & here
        return None if places is None else sorted(places)

    def answers_at(self, N: Number, V: Number) -> bool:
        """Whether there is an answer for a place: always, unless the measured cells answer."""
        places = self.cells()
        return places is None or any(
            max(abs(np.log(N / n)), abs(np.log(V / v))) <= SAME for n, v in places
        )

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
        for name, weight in self._counted():
            law, answer = self.laws[name], self.answers[name]
            at: dict[str, Any] = {"frames": self.frames}
            ends: Sequence[np.ndarray]
            if law.samples is not None and list(answer.forms) == [law.form]:
                ends = law.band(N, V, Q, level=level, measured=measured, **at)
            elif all(form.samples is not None for form in answer.forms.values()):
                errors = answer.draws(N, V, Q, count=4000, measured=measured, **at)
                ends = list(np.quantile(errors, [0.5 - level / 2, 0.5 + level / 2], axis=0))
            elif law.rmse > 0:
                ends = list(law.error(N, V, Q, **at) + 1.96 * law.rmse * np.array([-1, 1]))
            else:
                return None
            low, high = low + weight * float(ends[0]), high + weight * float(ends[1])
        return low, high

    def domain(self, axis: str) -> tuple[float, float] | None:
        """The range of N, V or Q on which every law of weight was fitted; None if none says."""
        ends = [
            law.domain[axis]
            for name, law in self.laws.items()
            if self.weights.get(name) and axis in law.domain
        ]
        return (max(e[0] for e in ends), min(e[1] for e in ends)) if ends else None

    def outside(self, N: Number, V: Number, Q: Number) -> list[str]:
        """A sentence for each of N, V, Q and frames outside the range of which a law was fitted."""
        sentences = []
        for axis, value in {"N": N, "V": V, "Q": Q, "frames": self.frames}.items():
            if (ends := self.domain(axis)) is None:
                continue
            low, high = ends
            if axis == "Q" and self.error(N, V, low) == self.error(N, V, value):
                continue  # this law does not read Q
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                sentences.append(
                    f"extrapolates {axis}: {value:.4g} {AXES[axis]}, "
                    f"fitted on {low:.4g} to {high:.4g}"
                )
        return sentences
