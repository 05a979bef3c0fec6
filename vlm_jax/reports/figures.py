# SPDX-License-Identifier: Apache-2.0
"""The figures of arXiv 2411.03312 from any rows, with intervals, each beside its numbers.

Numbers follow the paper's: (1) error against inference FLOPs, (2) extrapolation to the largest
size, (3) the frontier over question lengths, (4) bars at equal compute. N is LLM parameters in
billions, V visual tokens, Q text tokens, and FLOPs are 2 N (Q + V) unless an axis says otherwise.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm_jax.law import law as laws_module
from vlm_jax.reports import cells as table
from vlm_jax.reports import cost_figures, score_figures, training_figure
from vlm_jax.reports.amounts import parameters_text
from vlm_jax.reports.canvas import Canvas, Figure, few_of
from vlm_jax.reports.colors import NO_LLM, Looks, of_lengths, of_sizes
from vlm_jax.reports.cost_figures import slug
from vlm_jax.reports.curves import (
    ERROR,
    LOWEST,
    SIMPLE_FLOPS,
    alt_curves,
    conclusion,
    drawn,
    form_of,
    limits,
    ring_best,
    size_curves,
    size_legend,
    span,
)
from vlm_jax.reports.run import Run
from vlm_jax.reports.score_figures import equal_compute
from vlm_jax.rows import records

QUESTION_LENGTHS = (0, 10, 50, 100, 200, 500)


def law_figures(points, law, out_dir, name) -> list[Path]:
    """The paths of every figure that points and a law (or None) allow: NAME_*.png, .svg, .csv.

    Figure 2 also predicts a size twice the largest: for the published points, 14B. Raises
    TooManySizes for more sizes than can be told apart.
    """
    looks = of_sizes(points.N)
    asked = (None, 0.0, 50.0) if points.Q.max() > 0 else (0.0, 50.0)
    made = points_figures(
        points, law, out_dir, name, looks=looks, asked=asked, beyond=2 * float(points.N.max())
    )
    cells = {name: table.average(points)}
    for Q in (0, 50):
        at = f"{slug(name)}_equal_compute_q{Q}"
        made += equal_compute(cells, out_dir, name=at, looks=looks, Q=Q)
    return [path for figure in made for path in figure.paths]


def run_figures(run: Run, laws, out_dir, *, majority=None) -> list[Figure]:
    """Every figure that a run's rows allow, one family after the other, those of all last.

    `laws` maps a family to its law and may lack any; `majority` maps a family to the score of its
    commonest answers. Figure 1 is at the measured Q. Raises TooManySizes for more sizes than can be
    told apart.
    """
    looks = of_sizes(row.llm_parameters / 1e9 for row in run.rows)
    made, groups = [], {}
    for family in run.families:
        mine = []
        if measured := [row for row in run.main if family in row.families]:
            mine.append(
                score_figures.scores_against_tokens(
                    run,
                    family,
                    out_dir,
                    name=f"{slug(family)}_scores",
                    looks=looks,
                    majority=(majority or {}).get(family),
                )
            )
            mine += score_figures.methods(
                run, family, out_dir, name=f"{slug(family)}_methods", looks=looks
            )
            points, law = records.points(measured, family), laws.get(family)
            groups[family] = table.average(points)
            asked = (None,) if points.Q.max() > 0 else (0.0, 50.0)
            mine += points_figures(points, law, out_dir, family, looks=looks, asked=asked)
            mine += cost_figures.counted_figures(
                measured, points, law, out_dir, family, looks=looks
            )
        made += [replace(figure, section=family) for figure in mine]
    made += training_figure.prune_or_train(run, out_dir, name="prune_or_train", looks=looks)
    if groups:
        made += equal_compute(groups, out_dir, name="equal_compute", looks=looks)
        made.append(cost_figures.phases(run.main, out_dir, name="phases"))
    return made


def points_figures(
    points,
    law,
    out_dir,
    name,
    *,
    looks: Looks,
    asked: Sequence[int | float | None],
    beyond: int | float | None = None,
) -> list[Figure]:
    """Figures 1 to 3 of one family of points, figure 1 for each Q of `asked` (None: as measured).

    Without a law, or with one that misses the cells, there is figure 1 with the points alone.
    `beyond` adds to figure 2 the prediction for a size (billions) that nobody measured.
    """
    cells = table.average(points)
    file = slug(name)
    made = [
        error_against_flops(
            cells, law, out_dir, family=name, looks=looks, Q=Q,
            name=f"{file}_flops_" + ("measured_q" if Q is None else f"q{Q:g}"),
        )
        for Q in asked
    ]  # fmt: skip
    law, _ = drawn(law)
    if law is not None:
        made += extrapolation(
            points, law, out_dir, family=name, name=f"{file}_extrapolation", looks=looks,
            beyond=beyond,
        )  # fmt: skip
        made.append(
            question_lengths(cells, law, out_dir, family=name, name=f"{file}_frontier_over_q")
        )
        made += optimal_tokens(cells, law, out_dir, family=name, name=f"{file}_optimal_v")
    return made


def error_against_flops(cells, law, out_dir, *, family, name, Q, looks: Looks) -> Figure:
    """Figure 1: a curve per LLM size, marks growing with V, the law with its band and frontier."""
    law, why = drawn(law)
    cells = cells.at(Q)
    q = float(cells.Q.mean())
    asked = f"Q = {q:.3g}" + (" as measured" if Q is None else "")
    named = family if Q is None else f"{family} at Q = {Q:g}"
    title = conclusion(named, cells, cells.flops)
    canvas = Canvas(x=f"{SIMPLE_FLOPS}, Q = {q:.2g} text tokens", y=ERROR, title=title, height=3.6)
    size_curves(canvas, cells, cells.flops, law, looks)
    if law is not None:
        best = table.frontier(law, span(cells.N), span(cells.V), Q=q)
        canvas.line(
            "frontier of the law",
            best.flops,
            np.clip(best.error, 0.0, 1.0),
            dash="--",
            name=LOWEST,
            N_billions=best.N,
            V=best.V,
            Q=q,
        )
    ring_best(canvas, cells, cells.flops)
    limits(canvas, cells)
    canvas.log_x()
    size_legend(canvas, cells, law)
    law_words = (
        f"{form_of(law)} The dashed line is the lowest error that this form gives at each cost."
        if law is not None
        else why
    )
    caption = (
        f"Error on {family} against the LLM's prefill FLOPs at {asked} text tokens. One color and "
        "marker per LLM size, marks growing with the number of visual tokens V; bars are one "
        f"standard error, rings mark the best choices, which no cheaper cell beats. {law_words}"
    )
    return canvas.save(out_dir, name, caption=caption, alt=alt_curves(cells, family, asked))


def extrapolation(points, law, out_dir, *, family, name, looks: Looks, beyond=None) -> list[Figure]:
    """Figure 2: the largest size as the law of the others predicts it; needs three sizes.

    Its band is that of a new cell, which a measured one must be compared with; the band of a size
    that nobody measured is the law's.
    """
    sizes = np.unique(points.N)
    if len(sizes) < 3:
        return []
    largest = sizes[-1]
    try:
        without = laws_module.fit(points.where(points.N < largest), form=law.form, intervals=False)
    except ValueError:
        return []
    held_out = table.average(points.where(points.N == largest))
    q, text = float(held_out.Q.mean()), parameters_text(largest)
    predicted = np.asarray(without.error(largest, held_out.V, q), float)
    off = predicted - held_out.error
    canvas = Canvas(x="visual tokens V", y=ERROR, title=f"{family}: {text} from smaller sizes")
    tokens = np.geomspace(*span(table.average(points).V), 40)
    look = looks[largest]
    canvas.band(
        "predicted",
        tokens,
        *without.band(largest, tokens, q, measured=True),
        color=look.color,
        name="95 % interval of a new cell",
        N_billions=largest,
        V=tokens,
        Q=q,
    )
    canvas.line(
        "predicted",
        tokens,
        without.error(largest, tokens, q),
        color=look.color,
        dash="--",
        name=f"{text} predicted",
        N_billions=largest,
        V=tokens,
        Q=q,
    )
    canvas.points(
        "measured",
        held_out.V,
        held_out.error,
        stderr=held_out.stderr,
        color=look.color,
        marker=look.marker,
        name=f"{text} measured",
        N_billions=largest,
        V=held_out.V,
        Q=q,
    )
    if beyond is not None:
        far = parameters_text(beyond)
        canvas.band(
            f"{far} predicted",
            tokens,
            *law.band(beyond, tokens, q),
            color=NO_LLM,
            N_billions=beyond,
            V=tokens,
            Q=q,
        )
        canvas.line(
            f"{far} predicted",
            tokens,
            law.error(beyond, tokens, q),
            color=NO_LLM,
            dash=":",
            name=f"{far} predicted from all",
            N_billions=beyond,
            V=tokens,
            Q=q,
        )
    spread = np.nan_to_num(held_out.stderr)
    shown = [held_out.error - spread, held_out.error + spread, predicted]
    if beyond is not None:
        shown.append(np.asarray(law.error(beyond, tokens, q), float))
    low, high = span(np.concatenate(shown))
    # Half a range more on either side: a wide band must not flatten the points.
    room = 0.5 * max(high - low, 0.02)
    canvas.axes.set_ylim(max(low - room, 0.0), min(high + room, 1.05))
    canvas.log_x(base10=False, ticks=held_out.V)
    canvas.legend()
    worst = np.abs(off).max()
    low, high = without.band(largest, held_out.V, q, measured=True)
    inside = int(((held_out.error >= low) & (held_out.error <= high)).sum())
    words = f"The mean absolute miss is {np.abs(off).mean():.4f}, the largest {worst:.4f}"
    held = f"{inside} of {len(off)} measured cells lie in the 95 % interval of a newly trained one"
    caption = (
        f"The {law.form} form fitted without {text} predicts {text} on {family}. {words} (error is "
        "between 0 and 1); relative to the measured error that is at most "
        f"{100 * np.abs(off / held_out.error).max():.1f} %. {held}. "
        "The mean signed miss is "
        f"{off.mean():+.4f}: positive means that {text} is better than predicted."
    )
    alt = f"Predicted and measured error of {text} on {family} against visual tokens. {words}."
    return [canvas.save(out_dir, name, caption=caption, alt=alt)]


def question_lengths(cells, law, out_dir, *, family, name) -> Figure:
    """Figure 3a: the law's frontier for several question lengths, each ending in its best V."""
    canvas = Canvas(
        x=SIMPLE_FLOPS, y="error of the law", title=f"{family}: the frontier as Q grows"
    )
    for i, (Q, look) in enumerate(of_lengths(QUESTION_LENGTHS).items()):
        color = look.color
        best = table.frontier(law, span(cells.N), span(cells.V), Q=Q)
        error = np.clip(best.error, 0.0, 1.0)
        canvas.line(f"Q={Q:g}", best.flops, error, color=color, N_billions=best.N, V=best.V, Q=Q)
        # Marks every 12th budget, shifted from curve to curve: distinct without color.
        every = slice(2 * i, None, 12)
        canvas.points(
            f"Q={Q:g}",
            best.flops[every],
            error[every],
            color=color,
            marker=look.marker,
            area=16,
            name=f"Q={Q:g}: V*={_best_at(law, cells, Q):.3g}",
            N_billions=best.N[every],
            V=best.V[every],
            Q=Q,
        )
    canvas.log_x()
    canvas.legend(columns=3)
    caption = (
        f"The lowest error on {family} that the law gives at each cost, for questions of Q text "
        "tokens. V* is the best number of visual tokens while N can still grow; the longer the "
        "question, the cheaper a visual token beside it. A curve bends where the largest measured "
        "LLM is reached and only V is left to grow."
    )
    alt = f"Frontiers of error against FLOPs on {family} for Q from 0 to 500."
    return canvas.save(out_dir, name, caption=caption, alt=alt)


def _best_at(law, cells, Q) -> float:
    """The V of the law's frontier where no end of the measured N binds, as far as it has such."""
    if {"alpha", "beta"} <= set(law.params) and law.form == "multiplicative":
        return float(table.best_tokens(law.params["alpha"], law.params["beta"], Q, span(cells.V)))
    best = table.frontier(law, span(cells.N), span(cells.V), Q=Q)
    return float(best.V[len(best.V) // 2])


def optimal_tokens(cells, law, out_dir, *, family, name) -> list[Figure]:
    """The best V against Q with its bootstrap interval; only the multiplicative law has it."""
    draws = table.exponent_draws(law)
    if law.form != "multiplicative" or draws is None:
        return []
    edges, Q = span(cells.V), np.arange(0.0, 501.0, 10.0)
    best = table.best_tokens(law.params["alpha"], law.params["beta"], Q, edges)
    drawn = table.best_tokens(draws[:, :1], draws[:, 1:], Q, edges)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    canvas = Canvas(
        x="text tokens Q of a request",
        y="best number of visual tokens V*",
        title=f"{family}: best V",
    )
    canvas.band("V*", Q, low, high, color=NO_LLM, name="95 % interval", Q=Q)
    canvas.line("V*", Q, best, color=NO_LLM, name="V* = Q β / (α − β)", Q=Q)
    for limit in edges:
        canvas.line(
            f"measured limit V={limit:g}",
            Q[[0, -1]],
            [limit, limit],
            color="0.5",
            dash=":",
            V=limit,
        )
    canvas.axes.set_yscale("log", base=2)
    ticks = few_of(np.unique(cells.V))
    canvas.axes.set_yticks(ticks, [f"{v:g}" for v in ticks])
    canvas.axes.minorticks_off()
    canvas.axes.set_ylim(edges[0] / 1.3, edges[1] * 1.3)
    canvas.legend()
    caption = (
        f"The number of visual tokens that minimizes the law's error on {family} at fixed 2N(Q+V), "
        f"with N free. Held inside the measured V ({edges[0]:g} to {edges[1]:g}, dotted); where β "
        "≥ α it is the highest. It holds for every budget and any D."
    )
    ends = f"{best[0]:.3g} at Q=0, {best[5]:.3g} at Q=50, {best[-1]:.3g} at Q=500"
    alt = f"Best V on {family} against Q: {ends}."
    return [canvas.save(out_dir, name, caption=caption, alt=alt)]
