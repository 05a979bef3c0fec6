# SPDX-License-Identifier: Apache-2.0
"""Figures of scores against visual tokens: the grid with its blind models, and all methods."""

import numpy as np

from vlm_jax.reports.canvas import (
    MARKERS,
    OKABE_ITO,
    Canvas,
    Figure,
    parameters_text,
    size_colors,
)
from vlm_jax.reports.run import Run, mean_over_seeds

DASHES = ("-", "--", ":", "-.")


def scores_against_tokens(
    run: Run, family: str, out_dir, *, name: str, majority: int | float | None = None
) -> Figure:
    """Mean score of the grid's method against V per LLM size, with the blind score of that size.

    `majority` is the score of always answering the commonest answer.
    """
    canvas = Canvas(
        x="visual tokens V", y=f"mean score on {family}", title=f"{family}: score against V"
    )
    sizes = sorted({row.llm_parameters for row in run.rows})
    colors = dict(zip(sizes, size_colors(len(sizes)), strict=True))
    tokens = sorted({row.V for row in run.main if family in row.families})
    blind_at = tokens[0] / 2.2
    for i, n in enumerate(sizes):
        style = {"color": colors[n], "marker": MARKERS[i % len(MARKERS)], "N_billions": n / 1e9}
        text = parameters_text(n / 1e9)
        V, score, stderr = _by_tokens([r for r in run.main if r.llm_parameters == n], family)
        if len(V):
            canvas.line(text, V, score, color=colors[n], N_billions=n / 1e9, V=V)
            canvas.points(text, V, score, stderr=stderr, V=V, **style)
            canvas.write(text, V[-1], score[-1], color=colors[n])
        blind = [r.families[family] for r in run.blind if r.llm_parameters == n
                 and family in r.families]  # fmt: skip
        if blind:
            score, stderr = mean_over_seeds(blind)
            canvas.points(f"{text} blind", [blind_at], [score], stderr=[stderr], V=0, **style)
            _level(canvas, f"{text} blind", blind_at, tokens[-1], score, color=colors[n])
    if majority is not None:
        _level(
            canvas, "commonest answer", blind_at, tokens[-1], majority,
            color="0.4", dash="-.", name="commonest answer",
        )  # fmt: skip
    _token_axis(canvas, tokens, blind_at if run.blind else None)
    caption = (
        f"Mean score of {run.method} on {family}: one curve per LLM size, bars of one standard "
        "error."
    )
    if run.blind:
        caption += (
            " Dotted lines repeat the blind score of the same size, which never sees the image."
        )
    alt = f"Mean score on {family} against visual tokens for {len(sizes)} LLM sizes."
    return canvas.save(out_dir, name, caption=caption, alt=alt)


def methods(run: Run, family: str, out_dir, *, name: str) -> list[Figure]:
    """Mean score against V, a curve per method, at the LLM size that most methods were run with.

    Returns an empty list if there is only one method.
    """
    sighted = [row for row in [*run.main, *run.other] if family in row.families]
    methods_of_size = {}
    for row in sighted:
        methods_of_size.setdefault(row.llm_parameters, set()).add(row.method)
    if not methods_of_size or max(map(len, methods_of_size.values())) < 2:
        return []
    size = max(methods_of_size, key=lambda n: (len(methods_of_size[n]), n))
    drawn = [method for method in sorted(methods_of_size[size]) if method != run.method]
    if run.method in methods_of_size[size]:
        drawn.insert(0, run.method)
    text = parameters_text(size / 1e9)
    canvas = Canvas(
        x="visual tokens V",
        y=f"mean score on {family}",
        title=f"{family}: methods at {text}",
        height=2.75 + 0.13 * len(drawn),
    )
    tokens = set()
    for i, method in enumerate(drawn):
        of_method = [row for row in sighted if row.llm_parameters == size and row.method == method]
        V, score, stderr = _by_tokens(of_method, family)
        tokens |= set(V.tolist())
        # Black first, for the grid's own method; no yellow, which does not print.
        color = OKABE_ITO[(6, 0, 1, 2, 3, 4, 5)[i % 7]]
        # Methods share their V: shifted a little, so that no bar hides another.
        x = V * 1.04 ** (i - (len(drawn) - 1) / 2)
        common = {"color": color, "N_billions": size / 1e9, "V": V}
        canvas.line(method, x, score, dash=DASHES[i // 7 % 4], name=method, **common)
        marker = {"marker": MARKERS[i % len(MARKERS)], "area": 34.0, "name": method}
        canvas.points(method, x, score, stderr=stderr, **marker, **common)
    blind = [row.families[family] for row in run.blind
             if row.llm_parameters == size and family in row.families]  # fmt: skip
    if blind:
        score, _ = mean_over_seeds(blind)
        _level(canvas, "blind", min(tokens), max(tokens), score, color="0.4", name="blind")
    # An adaptive method has a mean V between the marks.
    _token_axis(canvas, sorted(v for v in tokens if v.is_integer()))
    caption = (
        f"Mean score on {family} with the LLM of {text} parameters: one curve per method, bars of "
        "one standard error, points of equal V shifted a little. The table of methods has the "
        "other LLM sizes."
    )
    alt = f"Mean score on {family} against visual tokens for {len(drawn)} methods at {text}."
    return [canvas.save(out_dir, name, caption=caption, alt=alt)]


def _token_axis(canvas, tokens, blind_at=None) -> None:
    """Exactly the V that were run, and the place of the blind models; the legend below."""
    canvas.log_x(base10=False, ticks=tokens)
    if blind_at is not None:
        canvas.axes.set_xticks([blind_at, *tokens], ["blind", *(f"{v:g}" for v in tokens)])
        canvas.axes.minorticks_off()
    canvas.axes.margins(x=0.1)
    canvas.legend()


def _level(canvas, series, start, stop, score, *, dash=":", **style) -> None:
    """A horizontal line at `score`."""
    canvas.line(series, [start, stop], [score] * 2, dash=dash, V=0, **style)


def _by_tokens(rows, family) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(V, mean score, standard error) over seeds, by rising V."""
    scores = {}
    for row in rows:
        if family in row.families:
            scores.setdefault(row.V, []).append(row.families[family])
    V = sorted(scores)
    means = np.array([mean_over_seeds(scores[v]) for v in V]).reshape(-1, 2)
    return np.array(V, float), means[:, 0], means[:, 1]
