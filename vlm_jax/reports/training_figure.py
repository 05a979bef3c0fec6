# SPDX-License-Identifier: Apache-2.0
"""Prune or train: trained compressors beside selections of patches that need no training."""

from collections.abc import Mapping, Sequence

from vlm_jax.compressors.kinds import CONTROL, FREE, PLAIN, TRAINED, kind_of
from vlm_jax.reports.amounts import llm_text
from vlm_jax.reports.canvas import Canvas, Figure
from vlm_jax.reports.colors import Looks
from vlm_jax.reports.findings import SURE, margin
from vlm_jax.reports.run import Run, by_tokens, mean_over_seeds, with_most_methods

# How each kind is drawn, the last one above: one LLM has one color in all figures.
DASHES = {CONTROL: ":", FREE: "--", TRAINED: "-"}
NAMES = {
    TRAINED: "trained compressors",
    FREE: "training-free selections",
    CONTROL: "random and uniform",
}

Best = Mapping[int | float, tuple[float, float]]  # V -> score and standard error of the best method


def prune_or_train(run: Run, out_dir, *, name: str, looks: Looks) -> list[Figure]:
    """Mean score against V of both kinds, a panel per family, at the LLM size with most methods.

    None for runs without trained compressors and selections of one size.
    """
    size = with_most_methods([*run.main, *run.other])
    rows = [row for row in [*run.main, *run.other] if row.llm_parameters == size]
    if not {TRAINED, FREE} <= {kind_of(row.compressor) for row in rows}:
        return []
    families = sorted({family for row in rows for family in row.families})
    tokens = sorted({row.V for row in rows})
    look = looks[size / 1e9]
    canvas = Canvas(
        x="visual tokens V",
        y="mean score",
        title="Prune or train?",
        height=2.9,
        panels=families,
        across=len(families),
    )
    found = []
    for panel, family in enumerate(families):
        canvas.turn_to(panel)
        shown = [row for row in rows if family in row.families]
        # All patches are a selection too: the last point of each.
        plain = by_tokens([r for r in shown if kind_of(r.compressor) == PLAIN], family)
        best: dict[str, Best] = {}
        for kind, dash in DASHES.items():
            of_kind = [row for row in shown if kind_of(row.compressor) == kind]
            style = {"color": "0.45" if kind == CONTROL else look.color, "N_billions": size / 1e9}
            curves, label = [], NAMES[kind]
            for method in sorted({row.method for row in of_kind}):
                curve = by_tokens([row for row in of_kind if row.method == method], family)
                curves.append(curve | plain if kind != TRAINED else curve)
                V, score = list(curves[-1]), [s for s, _ in curves[-1].values()]
                canvas.line(method, V, score, dash=dash, name=label, V=V, **style)
                canvas.points(method, V, score, area=7.0, hollow=True, V=V, **style)
                label = None  # once in the legend
            best[kind] = _best(curves)
            V = list(best[kind])
            score, stderr = zip(*best[kind].values(), strict=True) if V else ((), ())
            series = f"best of {NAMES[kind]}"
            canvas.points(series, V, score, stderr=stderr, area=14.0, V=V, **style)
        blind = [r for r in run.blind if r.llm_parameters == size and family in r.families]
        if blind:
            level, _ = mean_over_seeds([row.families[family] for row in blind])
            ends = [tokens[0], tokens[-1]]
            canvas.line("blind", ends, [level] * 2, dash="-.", color="0.7",
                        name="without the image", V=0)  # fmt: skip
        canvas.log_x(base10=False, ticks=[v for v in tokens if float(v).is_integer()])
        canvas.axes.margins(x=0.1)
        found.append(f"{family}: {verdict(best[TRAINED], best[FREE])}")
    canvas.legend()
    caption = (
        f"A line for each method, with the LLM of {llm_text(size / 1e9)}; filled marks are the "
        "best of each kind at each V, bars one standard error with the seeds' spread. The "
        "uncompressed model is the last point of the selections, which all answer with its "
        f"weights. Differences between the best beyond {SURE} standard errors: {'; '.join(found)}."
    )
    alt = f"Scores against visual tokens, trained and training-free. {'; '.join(found)}."
    return [canvas.save(out_dir, name, caption=caption, alt=alt)]


def verdict(trained: Best, free: Best) -> str:
    """At which of the V that both were measured at one kind is surely better than the other."""
    wins: dict[str, list[str]] = {"training": [], "selection": []}
    for V in sorted(trained.keys() & free.keys()):
        difference, spread = margin(trained[V], free[V])
        if abs(difference) > SURE * spread:
            wins["training" if difference > 0 else "selection"].append(f"{V:g}")
    said = [f"{kind} is better at V = {', '.join(at)}" for kind, at in wins.items() if at]
    return " and ".join(said) or "none"


def _best(curves: Sequence[Best]) -> Best:
    """V -> score and standard error of the best of these methods, by rising V."""
    tokens = sorted({V for curve in curves for V in curve})
    return {V: max(curve[V] for curve in curves if V in curve) for V in tokens}
