# SPDX-License-Identifier: Apache-2.0
"""Which cell to train next: the one that is expected to reduce the decision's regret most per FLOP.

A new cell tells worlds apart: those that predicted its error gain weight. For each cell that can be
trained its result is drawn in many worlds, the worlds are weighed anew by it, and the regret of the
choice that one would make then is averaged. The reduction, divided by the FLOPs of training the
cell, ranks the cells. No law is fitted anew: the draws of the present one are reweighed.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_jax.compressors.method import Number
from vlm_jax.planning.decision import odds
from vlm_jax.planning.planner import Candidate, Search

RESULTS = 200  # results drawn of each cell
NONE = 1e-6  # of expected regret: no cell changes the choice


@dataclasses.dataclass(frozen=True)
class Next:
    """A cell to train, and the expected regret of the decision before and after it."""

    N: Number
    V: Number
    compressor: str
    llm: str | None
    training_flops: Number
    regret_now: Number
    regret_after: Number
    reason: str

    @property
    def worth(self) -> float:
        """Regret saved per FLOP."""
        return (self.regret_now - self.regret_after) / self.training_flops


def expected_regret(errors: np.ndarray, cell: np.ndarray, noise: Number) -> float:
    """The regret to expect of a decision that is made after one more cell is measured.

    `errors` float64[worlds, candidates] and `cell` float64[worlds] are errors in the same worlds,
    `noise` is the standard deviation of the cell's measured error.
    """
    rng = np.random.default_rng(0)
    true = rng.integers(0, len(cell), RESULTS)
    results = cell[true] + noise * rng.standard_normal(RESULTS)
    weights = -0.5 * ((results[:, None] - cell) / noise) ** 2
    weights = np.exp(weights - weights.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    chosen = (weights @ errors).min(1)
    return float((chosen - weights @ errors.min(1)).mean())


def cells(
    search: Search, candidates: Sequence[Candidate], names: Mapping[Number, str]
) -> list[Next]:
    """The cells that may be trained, of most regret saved per FLOP first.

    They are the pairs of a listed LLM and a V of the search, affordable or not; a cell that was
    measured already may be trained once more. None where the choice is certain. Raises ValueError
    where nothing can be predicted: for a law without draws, for measured cells alone, and where
    every size is possible.
    """
    errors = search.draws(candidates)
    if (
        errors is None
        or any(search.law_of(kind).cells() is not None for kind in search.tokens)
        or search.llms is None
    ):
        raise ValueError(
            "--next needs a law with draws (vlm-jax fit --bootstrap=1000) of a form that fits, and "
            "listed LLMs and V (no --continuous)"
        )
    now = odds(errors)
    best, second = np.argsort(-now.best, kind="stable")[[0, -1 if len(now.best) < 2 else 1]]
    between = " and ".join(
        f"N = {candidates[i].N:.4g}, V = {candidates[i].V:.4g} ({now.best[i]:.2f})"
        for i in sorted({int(best), int(second)}, key=lambda i: -now.best[i])
    )
    regret, noise = (
        float(now.regret.min()),
        max(search.law_of(kind).noise() for kind in search.tokens),
    )
    if regret < NONE:
        return []
    places = [
        (float(N), float(V), kind)
        for kind, listed in search.tokens.items()
        if isinstance(listed, Sequence)
        for N in search.llms
        for V in listed
    ]
    trained = search.draws([Candidate(N, V, kind, 0.0, 0.0) for N, V, kind in places])
    assert trained is not None
    found = []
    for number, (N, V, kind) in enumerate(places):
        after = min(expected_regret(errors, trained[:, number], noise), regret)
        flops = search.cost.training(N, V, kind)
        reason = (
            f"the choice is between {between}: training N = {N:.4g}, V = {V:.4g} for {flops:.2g} "
            f"FLOPs is expected to lower its regret from {regret:.4f} to {after:.4f}"
        )
        found.append(Next(N, V, kind, names.get(N), flops, regret, after, reason))
    return sorted(found, key=lambda cell: (-cell.worth, cell.training_flops))
