# SPDX-License-Identifier: Apache-2.0
"""The figure of a plan: the least predicted error within a budget at each V."""

import math
from pathlib import Path

import numpy as np

from vlm_jax.compressors.method import tilings
from vlm_jax.planning import costs, planner
from vlm_jax.reports.amounts import amount_text, parameters_text
from vlm_jax.reports.canvas import Canvas, Figure
from vlm_jax.reports.colors import MARKERS, OKABE_ITO

DASHES = ("-", "--", ":", "-.")  # curves that coincide must not hide each other
MOST_COMPRESSORS = len(OKABE_ITO) - 1  # the last color, yellow, does not print as a line


def draw(search: planner.Search, out_dir: Path | str) -> Figure:
    """Writes plan.png, plan.svg and plan.csv: a curve and a band per compressor, and the choice.

    Each point is the best LLM that the budget allows at that V, with its size. Raises ValueError if
    nothing meets the budget, and for more compressors than colors.
    """
    if len(search.tokens) > MOST_COMPRESSORS:
        raise ValueError(
            f"{len(search.tokens)} compressors cannot be told apart in a figure: "
            f"at most {MOST_COMPRESSORS}"
        )
    unit, limit = search.budget.limits[0]
    chosen, Q = search.candidates()[0], search.cost.workload.Q
    canvas = Canvas(
        x="visual tokens V (log scale)",
        y="predicted error",
        title=f"What {amount_text(limit)}{costs.UNITS[unit]} buys",
    )
    for number, (kind, V) in enumerate(search.tokens.items()):
        continuous = isinstance(V, planner.Between)
        grid = (
            np.unique([*np.geomspace(V.low, V.high, 65), chosen.V])
            if continuous
            else np.array(sorted(V))
        )
        curve = search.listed(kind, [float(v) for v in grid])
        marks = (
            search.listed(kind, [float(v) for v in tilings(math.isqrt(round(V.high)))])
            if continuous
            else curve
        )
        if not curve:
            continue
        color = OKABE_ITO[number]
        x, y = [c.V for c in curve], [c.error for c in curve]
        ends = [search.law_of(kind).interval(c.N, c.V, Q) for c in curve]
        if all(end is not None for end in ends):
            low, high = zip(*ends, strict=True)
            canvas.band(kind, x, low, high, color=color, N_billions=[c.N for c in curve], V=x, Q=Q)
        canvas.line(
            kind,
            x,
            y,
            color=color,
            dash=DASHES[number % 4],
            N_billions=[c.N for c in curve],
            V=x,
            Q=Q,
        )
        canvas.points(
            kind,
            [c.V for c in marks],
            [c.error for c in marks],
            color=color,
            marker=MARKERS[number],
            name=kind,
            N_billions=[c.N for c in marks],
            V=[c.V for c in marks],
            Q=Q,
        )
        if kind == chosen.compressor:
            for c in marks:
                canvas.write_above(parameters_text(c.N), c.V, c.error, gap=3)
    canvas.points(
        "chosen",
        [chosen.V],
        [chosen.error],
        color="black",
        marker="o",
        area=90.0,
        hollow=True,
        name=f"chosen: {parameters_text(chosen.N)}, V = {chosen.V:.3g}",
        N_billions=chosen.N,
        V=chosen.V,
        Q=Q,
    )
    canvas.log_x(ticks=[1, 4, 16, 64, 256])
    canvas.legend()
    words = (
        f"Each point is the best LLM that {amount_text(limit)}{costs.UNITS[unit]} pay for at "
        f"that V (with its size), for questions of {Q:g} text tokens; the ring is "
        f"the choice. Bands: 95 % interval of the law."
    )
    alt = (
        f"Predicted error against visual tokens; lowest, {chosen.error:.3f}, at V = {chosen.V:.3g} "
        f"with an LLM of {parameters_text(chosen.N)} parameters."
    )
    return canvas.save(out_dir, "plan", caption=words, alt=alt)
