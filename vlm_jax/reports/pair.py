# SPDX-License-Identifier: Apache-2.0
"""The measured pair at equal compute that shows the thesis, or its opposite, for each family.

The thesis: at equal compute a larger LLM with fewer visual tokens is better. Which pair is shown
does not depend on its scores: of all pairs within SPREAD in 2N(Q+V) the one whose numbers of tokens
differ most. How all of the pairs came out is counted beside it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_jax.reports.amounts import amount_text
from vlm_jax.reports.findings import SURE, by_cell, margin, number
from vlm_jax.reports.run import Run

SPREAD = 1.25  # largest ratio of the costs of a pair


@dataclass(frozen=True)
class Side:
    """One cell of a pair: its LLM, V, FLOPs 2N(Q+V), and its score with its standard error."""

    llm: str
    parameters: int
    V: int | float
    flops: float
    score: float
    stderr: float

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.llm}, V = {self.V:g}"

    @property
    def text(self) -> str:
        """Its score."""
        return f"{self.score:.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True)
class Pair:
    """A family's pair, the larger LLM first, and sentences: what it shows, and all pairs."""

    family: str
    larger: Side
    smaller: Side
    verdict: str
    all_pairs: str


def pairs(run: Run) -> tuple[list[Pair], list[str]]:
    """The pair of each family, and a sentence for each family without one."""
    found, without = [], []
    for family in run.families:
        rows = [row for row in run.main if family in row.families]
        matched = _matched(_sides(rows, family))
        if not matched:
            without.append(
                f"{family}: no two measured cells of different LLMs cost about the same "
                f"(2N(Q+V) within {SPREAD:g} times) with more visual tokens for the smaller one."
            )
            continue
        shown = max(matched, key=lambda pair: (pair[1].V / pair[0].V, -_ratio(*pair)))
        found.append(_pair(family, shown, matched))
    return found, without


def _sides(rows: Sequence, family: str) -> list[Side]:
    """The cells of a family, seeds averaged."""
    sizes = {row.llm: row.llm_parameters for row in rows}
    Q = float(np.mean([row.Q for row in rows])) if rows else 0.0
    return [
        Side(llm, sizes[llm], V, 2 * sizes[llm] * (Q + V), *score)
        for (llm, V), score in by_cell(rows, family).items()
    ]


def _matched(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
    """Pairs (larger LLM, smaller LLM with more tokens) of about the same cost."""
    ordered = [
        sorted(two, key=lambda side: -side.parameters) for two in itertools.combinations(sides, 2)
    ]
    return [
        (a, b)
        for a, b in ordered
        if a.parameters > b.parameters and a.V < b.V and _ratio(a, b) <= SPREAD
    ]


def _ratio(a: Side, b: Side) -> float:
    """Of their costs, at least 1."""
    return max(a.flops / b.flops, b.flops / a.flops)


def _difference(a: Side, b: Side) -> tuple[float, float]:
    return margin((a.score, a.stderr), (b.score, b.stderr))


def _pair(family: str, shown: tuple[Side, Side], matched: Sequence[tuple[Side, Side]]) -> Pair:
    larger, smaller = shown
    difference, spread = _difference(larger, smaller)
    if difference > SURE * spread:
        words = "the larger LLM with fewer visual tokens is better, as the thesis says"
    elif difference < -SURE * spread:
        words = "the smaller LLM with more visual tokens is better, the opposite of the thesis"
    else:
        words = f"no difference beyond {SURE} standard errors, for the thesis or against it"
    sizes = [_difference(a, b) for a, b in matched]
    pro = sum(d > SURE * s for d, s in sizes)
    con = sum(d < -SURE * s for d, s in sizes)
    costs = f"{amount_text(larger.flops)}FLOPs and {amount_text(smaller.flops)}FLOPs"
    return Pair(
        family,
        larger,
        smaller,
        f"At {costs} {words}: difference {number(difference)} ± {number(spread)}.",
        f"Of {len(matched)} pairs within {SPREAD:g} times in cost, {pro} favor the larger LLM, "
        f"{con} more visual tokens, {len(matched) - pro - con} neither.",
    )
