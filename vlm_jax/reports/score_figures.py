# SPDX-License-Identifier: Apache-2.0
"""Scores against visual tokens, of every method side by side, and of all sizes at equal compute."""

from collections.abc import Mapping

import numpy as np

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.reports import cells as table
from vlm_jax.reports.amounts import amount_text, llm_text, parameters_text
from vlm_jax.reports.canvas import Canvas, Figure
from vlm_jax.reports.colors import Looks
from vlm_jax.reports.run import Run, by_tokens, mean_over_seeds, with_most_methods

ACROSS = 3  # panels side by side


def scores_against_tokens(
    run: Run,
    family: str,
    out_dir,
    *,
    name: str,
    looks: Looks,
    majority: int | float | None = None,
) -> Figure:
    """Mean score of the grid's method against V per LLM size, beside the blind score of that size.

    `majority` is the score of always answering the commonest answer.
    """
    canvas = Canvas(
        x="visual tokens V",
        y=f"mean score on {family}",
        title=f"{family}: score against visual tokens",
        height=3.3,
    )
    # Blind models of other weights than those that are shown are trained otherwise.
    kinds = {row.llm_weights for row in run.main}
    unseeing = [row for row in run.blind if row.llm_weights in kinds and family in row.families]
    sizes = sorted({row.llm_parameters for row in [*run.main, *unseeing]})
    tokens = sorted({row.V for row in run.main if family in row.families})
    blind_at = tokens[0] / 2.2
    for n in sizes:
        look = looks[n / 1e9]
        style = {"color": look.color, "marker": look.marker, "N_billions": n / 1e9}
        text = parameters_text(n / 1e9)
        V, score, stderr = _by_tokens([r for r in run.main if r.llm_parameters == n], family)
        if len(V):
            canvas.line(text, V, score, color=look.color, N_billions=n / 1e9, V=V)
            canvas.points(text, V, score, stderr=stderr, V=V, name=llm_text(n / 1e9), **style)
        blind = [r.families[family] for r in unseeing if r.llm_parameters == n]
        if blind:
            score, stderr = mean_over_seeds(blind)
            canvas.points(f"{text} blind", [blind_at], [score], stderr=[stderr], V=0, **style)
            _level(
                canvas,
                f"{text} blind",
                blind_at,
                tokens[-1],
                score,
                color=look.color,
                N_billions=n / 1e9,
            )
    if unseeing:
        canvas.sample("without the image (blind)", dash=":")
    if majority is not None:
        _level(
            canvas, "commonest answer", blind_at, tokens[-1], majority,
            color="0.4", dash="-.", name="commonest answer",
        )  # fmt: skip
    _token_axis(canvas, tokens, blind_at if unseeing else None)
    caption = (
        f"Mean score of {run.method} on {family}: one curve per LLM size, bars of one standard "
        "error."
    )
    if unseeing:
        caption += (
            " Dotted lines repeat the blind score of the same size, which never sees the image."
        )
    alt = f"Mean score on {family} against visual tokens for {len(sizes)} LLM sizes."
    return canvas.save(out_dir, name, caption=caption, alt=alt)


def methods(run: Run, family: str, out_dir, *, name: str, looks: Looks) -> list[Figure]:
    """Mean score against V, a panel per method, at the LLM size that most methods were run with.

    None where there is one method only.
    """
    sighted = [row for row in [*run.main, *run.other] if family in row.families]
    size = with_most_methods(sighted)
    found = {row.method for row in sighted if row.llm_parameters == size}
    if len(found) < 2:
        return []
    shown = [method for method in sorted(found) if method != run.method]
    if run.method in found:
        shown.insert(0, run.method)
    curves, named, llms = {}, {}, {}
    for method in shown:
        mine = [row for row in sighted if row.llm_parameters == size and row.method == method]
        curves[method], llms[method] = _by_tokens(mine, family), {row.llm for row in mine}
        described = COMPRESSORS.get(mine[0].compressor)
        plain = described is not None and not described.compresses
        named[method] = method.replace(mine[0].compressor, "no compression", 1) if plain else method
    blind = [row for row in run.blind if row.llm_parameters == size and family in row.families]
    tokens = sorted({v for V, _, _ in curves.values() for v in V.tolist()})
    first = max(shown, key=lambda method: curves[method][1].max())
    V, score, _ = curves[first]
    at = float(V[score.argmax()])
    said = f"{score.max():.2f}".lstrip("0") + f" with {at:.3g} visual token{'s' * (at != 1)}"
    canvas = Canvas(
        x="visual tokens V",
        y="mean score",
        title=f"{family}: {named[first]} scores best,\n{said}",
        height=1.2 + 1.1 * -(-len(shown) // ACROSS),
        panels=list(named.values()),
        across=min(ACROSS, len(shown)),
    )
    for panel, method in enumerate(shown):
        canvas.turn_to(panel)
        for other in shown:
            if other != method:
                canvas.shadow(*curves[other][:2])
        V, score, stderr = curves[method]
        common = {"color": looks[size / 1e9].color, "N_billions": size / 1e9, "V": V}
        canvas.line(method, V, score, **common)
        canvas.points(method, V, score, stderr=stderr, area=16.0, **common)
        # That of the same LLM: others of this size may come by their weights otherwise.
        if unseeing := [row.families[family] for row in blind if row.llm in llms[method]]:
            _level(canvas, "blind", min(tokens), max(tokens), mean_over_seeds(unseeing)[0],
                   color="0.4", name="without the image")  # fmt: skip
        # An adaptive method has a mean V between the marks.
        canvas.log_x(base10=False, ticks=[v for v in tokens if v.is_integer()])
        canvas.axes.margins(x=0.1)
    canvas.legend()
    caption = (
        f"Mean score on {family} with the LLM of {llm_text(size / 1e9)}: a panel per method, the "
        "others in pale gray; bars are one standard error. The table of methods has the other LLM "
        "sizes."
    )
    alt = (
        f"Mean score on {family} against visual tokens for {len(shown)} methods, a panel each. "
        f"The best is {named[first]}: {said}."
    )
    return [canvas.save(out_dir, name, caption=caption, alt=alt)]


def equal_compute(
    groups: Mapping[str, table.Cells], out_dir, *, name, looks: Looks, Q=None
) -> list[Figure]:
    """Figure 4: a bar per LLM size for each group, V such that all cost about the same.

    `groups` maps a family or task to its cells, all with the same (N, V). None where no two sizes
    can be matched.
    """
    first = next(iter(groups.values())).at(Q)
    chosen = table.equal_compute(first.flops, first.N)
    if len(chosen) < 2:
        return []
    q, spent = float(first.Q.mean()), first.flops[chosen]
    canvas = Canvas(x="", y="mean score", title=f"Equal compute, Q = {q:.3g}")
    width = 0.8 / len(chosen)
    for i, at in enumerate(chosen):
        n, v = first.N[at], first.V[at]
        scores, spread = [], []
        for cells in groups.values():
            match = np.flatnonzero((cells.N == n) & (cells.V == v))
            scores.append(1 - cells.error[match[0]] if len(match) else np.nan)
            spread.append(cells.stderr[match[0]] if len(match) else np.nan)
        x = np.arange(len(groups)) + (i - (len(chosen) - 1) / 2) * width
        canvas.bars(
            f"{parameters_text(n)}, V={v:g}",
            x,
            scores,
            width=width * 0.94,
            stderr=spread,
            color=looks[n].color,
            hatch=looks[n].hatch,
            name=f"{parameters_text(n)}, V={v:g}",
            N_billions=n,
            V=v,
            Q=q,
            flops=first.flops[at],
            label=list(groups),
        )
        for at_x, score, bar in zip(x, scores, np.nan_to_num(spread), strict=True):
            if np.isfinite(score):
                canvas.write_above(f"{score:.2f}".lstrip("0"), at_x, score + bar, size=6.5)
    canvas.axes.set_xticks(range(len(groups)), list(groups))
    canvas.axes.set_ylim(0, min(1.0, canvas.axes.get_ylim()[1]) * 1.1)
    canvas.legend()
    caption = (
        "Scores where every LLM size spends about the same: 2N(Q+V) between "
        f"{amount_text(spent.min())}FLOPs and {amount_text(spent.max())}FLOPs at Q = {q:.3g}. "
        "Larger LLMs (further right in a group) pay with fewer visual tokens. Bars start at zero; "
        "error bars are one standard error."
    )
    alt = f"Bar chart of scores at equal compute for {', '.join(groups)}."
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
    found = by_tokens(rows, family)
    means = np.array(list(found.values())).reshape(-1, 2)
    return np.array(list(found), float), means[:, 0], means[:, 1]
