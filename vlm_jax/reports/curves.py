# SPDX-License-Identifier: Apache-2.0
"""Marks that several figures share: a curve per LLM size over some cost, rings on the best."""

import numpy as np

from vlm_jax.reports import cells as table
from vlm_jax.reports.amounts import llm_text, parameters_text
from vlm_jax.reports.colors import Looks

SIMPLE_FLOPS = "FLOPs per request, 2N(Q+V)"
ERROR = "error (1 − mean score)"
LAW, LOWEST, BEST = "fitted law", "lowest error of the law", "best choice at its cost"


def drawn(law):
    """(the law, "") or, if it is None or misses its cells, (None, why there is no curve of it)."""
    if law is None:
        return None, "No law is drawn because none could be fitted."
    if sentence := law.misfit.get("sentence"):
        return None, f"No law is drawn: its {law.form} form {sentence}."
    return law, ""


def form_of(law) -> str:
    """Which law the curves are, for a caption: one form has a curve with exponents."""
    return (
        f"Curves and bands are the {law.form} form with its 95 % bootstrap interval; a plan weighs "
        "all forms that fit."
    )


def size_curves(canvas, cells, cost, law, looks: Looks) -> bool:
    """Points, and the law's curve and band, for every size; `cost` (one per cell) is the x axis.

    Where a measured cost falls as V grows, no curve joins the points. Returns whether a
    curve of the law was drawn.
    """
    any_curve = False
    for n in cells.sizes:
        look = looks[n]
        color = look.color
        mine = cells.of_size(n)
        x = np.asarray(cost)[cells.N == n][np.argsort(cells.V[cells.N == n])]
        text = parameters_text(n)
        end = (x[-1], mine.error[-1])
        rising = len(x) > 1 and (np.diff(x) >= 0).all()
        if law is not None and rising:
            tokens = np.geomspace(mine.V[0], mine.V[-1], 40)
            # Between cells the cost is a straight line in V: exact for FLOPs but for the square
            # of attention.
            at, q = np.interp(tokens, mine.V, x), mine.Q.mean()
            curve = np.clip(np.asarray(law.error(n, tokens, q), float), 0.0, 1.0)
            if law.samples is not None:
                canvas.band(
                    f"law {text}",
                    at,
                    *law.band(n, tokens, q),
                    color=color,
                    N_billions=n,
                    V=tokens,
                    Q=q,
                )
            canvas.line(f"law {text}", at, curve, color=color, N_billions=n, V=tokens, Q=q)
            end, any_curve = (at[-1], curve[-1]), True
        elif rising:
            canvas.line(
                f"measured {text}",
                x,
                mine.error,
                color=color,
                dash=":",
                N_billions=n,
                V=mine.V,
                Q=mine.Q,
            )
        canvas.points(
            text,
            x,
            mine.error,
            stderr=mine.stderr,
            color=color,
            marker=look.marker,
            area=_area(mine.V),
            name=llm_text(n),
            N_billions=n,
            V=mine.V,
            Q=mine.Q,
        )
        canvas.write(llm_text(n).removesuffix(" parameters"), *end, color=color)
    return any_curve


def _area(V) -> np.ndarray:
    """Mark area in square points, by the logarithm of V: V = 1 is still well visible."""
    return 14 + 7 * np.log2(np.maximum(np.asarray(V, float), 1))


def size_legend(canvas, cells, law) -> None:
    """What a color is, what a size is, and what lines and rings are."""
    lines = [LAW, LOWEST, BEST]
    if law is not None:
        band = law.samples is not None
        lines[0] = f"{LAW}, 95 % interval" if band else LAW
        canvas.sample(lines[0], dash="-", band=band)
    tokens = np.unique(cells.V)
    if len(tokens) > 4:  # as many as tell how areas grow
        tokens = tokens[np.linspace(0, len(tokens) - 1, 4).round().astype(int)]
    for v, area in zip(tokens, _area(tokens), strict=True):
        canvas.sample(f"V = {v:.3g}", area=area)
    canvas.legend(
        blocks={
            "Color: language model": [*map(llm_text, cells.sizes), *lines],
            "Size: visual tokens V": [f"V = {v:.3g}" for v in tokens],
        }
    )


def conclusion(family: str, cells, cost) -> str:
    """A title in two lines: how many visual tokens the best choices have, as the cells say.

    A best choice is a cell that no cheaper one beats. Where the largest LLM alone takes more
    tokens, as when nothing else is left to buy, that is said. Where the lowest error is within 1.96
    standard errors of the cheapest cell's, there is nothing to choose.
    """
    best, most = table.pareto(cost, cells.error), cells.V.max()
    if cells.V.min() == most:
        return f"{family}: error against compute"
    ends = [np.argmin(cost), np.argmin(cells.error)]
    fall, spread = cells.error[ends[0]] - cells.error[ends[1]], np.hypot(*cells.stderr[ends])
    if fall <= 1.96 * spread:  # never where the errors' spread is not known
        return f"{family}: no cell is better than\nthe cheapest beyond chance"
    largest = llm_text(cells.sizes[-1])
    for mine, until in (
        (best, ""),
        (best & (cells.N < cells.sizes[-1]), f"\nuntil the LLM has {largest}"),
    ):
        if mine.any() and (top := cells.V[mine].max()) < most:
            count = f"{top:.3g}" if top == cells.V.min() else f"at most {top:.3g}"
            return f"{family}: the best choices have\n{count} of {most:.3g} visual tokens{until}"
    return f"{family}: the best choices go\nup to all {most:.3g} visual tokens"


def ring_best(canvas, cells, cost) -> None:
    best = table.pareto(cost, cells.error)
    canvas.points(
        BEST,
        np.asarray(cost)[best],
        cells.error[best],
        hollow=True,
        area=_area(cells.V[best]) + 45,
        name=BEST,
        N_billions=cells.N[best],
        V=cells.V[best],
        Q=cells.Q[best],
    )


def limits(canvas, cells) -> None:
    """Lets the y axis follow the measurements: a wide band must not flatten them."""
    spread = np.nan_to_num(cells.stderr)
    low, high = (cells.error - spread).min(), (cells.error + spread).max()
    room = max(high - low, 0.02)
    canvas.axes.set_ylim(max(low - 0.14 * room, 0.0), min(high + 0.22 * room, 1.02))
    canvas.axes.margins(x=0.1)


def span(x) -> tuple[float, float]:
    return float(np.min(x)), float(np.max(x))


def alt_curves(cells, family, asked) -> str:
    worst, best = cells.error.argmax(), cells.error.argmin()
    return (
        f"Scatter plot of error on {family} against FLOPs, {asked}: {len(cells.sizes)} LLM sizes "
        f"from {parameters_text(cells.sizes[0])} to {parameters_text(cells.sizes[-1])}, V from "
        f"{cells.V.min():g} to {cells.V.max():g}. The highest error, {cells.error[worst]:.3f}, is "
        f"{parameters_text(cells.N[worst])} with V={cells.V[worst]:g}; the lowest, "
        f"{cells.error[best]:.3f}, is {parameters_text(cells.N[best])} with V={cells.V[best]:g}."
    )
