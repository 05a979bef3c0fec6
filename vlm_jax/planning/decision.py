# SPDX-License-Identifier: Apache-2.0
"""How sure a choice is: the chance that each candidate is best, what choosing it may lose, and what
keeps the choice from being better.

A draw is one world: one form and one set of parameters of the law, the same for all candidates. In
each world one candidate is best, and choosing another loses the difference of their errors: its
regret. Differences within a world are far better known than either error: overlapping intervals
of two candidates do not say that one may be the other's equal.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.compressors.method import Number
from vlm_jax.planning.costs import NEVER, UNITS
from vlm_jax.planning.planner import Between, Budget, Candidate, Search

EPSILON = 0.005  # of error: candidates within it are as good as the choice
MORE = 1.25  # what a relaxed limit is multiplied by where every size is possible


@dataclasses.dataclass(frozen=True)
class Odds:
    """Of each candidate: the share of worlds in which it is best, and its mean regret there."""

    best: np.ndarray
    regret: np.ndarray


def odds(draws: np.ndarray, weights: np.ndarray | None = None) -> Odds:
    """The odds of candidates from errors float64[worlds, candidates]; of equals the first is best.

    `weights` are those of the worlds, by default equal.
    """
    worlds, count = draws.shape
    weights = np.ones(worlds) if weights is None else weights
    best = np.bincount(draws.argmin(1), weights, minlength=count) / weights.sum()
    return Odds(best, weights @ (draws - draws.min(1, keepdims=True)) / weights.sum())


def near(
    search: Search, chosen: Candidate, others: Sequence[Candidate], epsilon: Number
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is known of the choice, and every other candidate within `epsilon` of it, best first.

    Both carry p_best and regret, None for a law without draws; of the choice also the regret that
    19 of 20 worlds do not exceed. Within epsilon is what the law expects to err by at most that
    much more.
    """
    everyone = [chosen, *others]
    draws = search.draws(everyone)
    gaps = [one.error - chosen.error for one in everyone]
    found = None if draws is None else odds(draws)
    known = [
        dataclasses.asdict(one)
        | {
            "p_best": None if found is None else float(found.best[i]),
            "regret": None if found is None else float(found.regret[i]),
        }
        for i, one in enumerate(everyone)
    ]
    of_choice = {name: known[0][name] for name in ("p_best", "regret")}
    of_choice["regret_95"] = (
        None if draws is None else float(np.quantile(draws[:, 0] - draws.min(1), 0.95))
    )
    of_choice |= {"candidates": len(everyone), "epsilon": epsilon}
    return of_choice, [k for k, gap in zip(known[1:], gaps[1:], strict=True) if gap <= epsilon]


def limits(search: Search, chosen: Candidate) -> list[dict[str, Any]]:
    """Each limit with what the choice uses of it, and what more of it alone would buy.

    A limit binds if without it, the others kept, a candidate of less error would be chosen; "next"
    is the one that needs least more of it, "without" the best. Where every size is possible, "next"
    is the choice with a quarter more.
    """
    found = []
    for unit, limit in search.budget.limits:
        used = search.cost.amount(unit, chosen.N, chosen.V, chosen.compressor)
        entry: dict[str, Any] = {
            "unit": unit, "words": UNITS[unit], "limit": limit, "used": used, "binds": False,
        }  # fmt: skip
        kept = tuple(pair for pair in search.budget.limits if pair[0] != unit)
        if search.llms is None or any(isinstance(V, Between) for V in search.tokens.values()):
            looser = Budget((*kept, (unit, limit * MORE)))
            better = dataclasses.replace(search, budget=looser).candidates()[0]
            if better.error < chosen.error - 1e-9:
                entry |= {"binds": True, "next": _gain(search, chosen, better, unit, limit)}
        else:
            # Without any limit left, the cost in this unit still orders equals.
            free = dataclasses.replace(search, budget=Budget((*kept, (unit, np.inf))))
            better_ones = [
                one
                for one in free.candidates()
                if one.error < chosen.error
                and not (
                    unit == "p95"
                    and search.cost.amount(unit, one.N, one.V, one.compressor) >= NEVER
                )
            ]
            if better_ones:
                cheapest = min(
                    better_ones,
                    key=lambda one: search.cost.amount(unit, one.N, one.V, one.compressor),
                )
                entry |= {
                    "binds": True,
                    "next": _gain(search, chosen, cheapest, unit, limit),
                    "without": _gain(search, chosen, better_ones[0], unit, limit),
                }
        found.append(entry)
    return found


def _gain(
    search: Search, chosen: Candidate, better: Candidate, unit: str, limit: Number
) -> dict[str, Any]:
    """What a better candidate needs of a limit and saves in error."""
    needs = search.cost.amount(unit, better.N, better.V, better.compressor)
    return {
        "N": better.N, "V": better.V, "compressor": better.compressor, "needs": needs,
        "more": needs / limit - 1, "error_saved": chosen.error - better.error,
    }  # fmt: skip
