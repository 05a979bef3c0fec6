# SPDX-License-Identifier: Apache-2.0
"""What the paper's figures leave out: every phase in the cost, time, and the blind score.

These figures need results rows (scaling/records.py), which count each phase of a request; points
alone do not.
"""

from collections.abc import Sequence

import numpy as np

from vlm_jax.reports import cells as table
from vlm_jax.reports.canvas import (
    HATCHES,
    MARKERS,
    OKABE_ITO,
    Canvas,
    Figure,
    amount_text,
    parameters_text,
    size_colours,
)
from vlm_jax.reports.curves import ERROR, limits, ring_best, size_curves
from vlm_jax.scaling import cost, roofline
from vlm_jax.scaling.chips import CHIPS

ALL_PHASES = "counted FLOPs per request, all phases"
PHASES = ("encoder", "compressor", "question", "prefill", "decode")


def scores_against_tokens(
    rows: Sequence, family: str, out_dir, *, name: str, majority: int | float | None = None
) -> Figure:
    """Mean score against V per LLM size, with its blind score and other compressors beside it.

    `rows` are all rows of a run; `majority` is the score of always answering the commonest answer.
    """
    main, blind, other = split(rows)
    canvas = Canvas(
        x="visual tokens V", y=f"mean score on {family}", title=f"{family}: score against V"
    )
    sizes = sorted({row.llm_parameters for row in rows})
    colours = dict(zip(sizes, size_colours(len(sizes)), strict=True))
    tokens = sorted({row.V for row in main + other if family in row.families})
    blind_at = tokens[0] / 2.2
    other_sizes = sorted({row.llm_parameters for row in other if family in row.families})
    for i, n in enumerate(sizes):
        style = {"colour": colours[n], "marker": MARKERS[i % len(MARKERS)], "N_billions": n / 1e9}
        text = parameters_text(n / 1e9)
        V, score, stderr = _by_tokens([row for row in main if row.llm_parameters == n], family)
        if len(V):
            canvas.line(text, V, score, colour=colours[n], N_billions=n / 1e9, V=V)
            canvas.points(text, V, score, stderr=stderr, V=V, **style)
            canvas.write(text, V[-1], score[-1], colour=colours[n], size=7.5)
        V, score, stderr = _by_tokens([row for row in other if row.llm_parameters == n], family)
        if len(V):
            kinds = "/".join(sorted({row.compressor for row in other}))
            canvas.points(
                f"{text} {kinds}",
                V,
                score,
                stderr=stderr,
                hollow=True,
                V=V,
                name=kinds if n == other_sizes[0] else None,
                **style,
            )
        _, score, stderr = _by_tokens([row for row in blind if row.llm_parameters == n], family)
        if len(score):
            canvas.points(f"{text} blind", [blind_at], score[:1], stderr=stderr[:1], V=0, **style)
            canvas.line(
                f"{text} blind",
                [blind_at, tokens[-1]],
                [score[0]] * 2,
                colour=colours[n],
                dash=":",
                V=0,
            )
    if majority is not None:
        canvas.line(
            "commonest answer",
            [blind_at, tokens[-1]],
            [majority] * 2,
            colour="0.4",
            dash="-.",
            name="commonest answer",
        )
    canvas.log_x(base10=False, ticks=tokens)
    if blind:
        canvas.axes.set_xticks([blind_at, *tokens], ["blind", *(f"{v:g}" for v in tokens)])
        canvas.axes.minorticks_off()
    canvas.axes.margins(x=0.1)
    canvas.legend()
    caption = (
        f"Mean score on {family}: one curve per LLM size, bars of one standard error. "
        + (
            "Dotted lines repeat the blind score of the same size, which never sees the image. "
            if blind
            else ""
        )
        + ("Hollow marks are other compressors. " if other else "")
    )
    alt = f"Mean score on {family} against visual tokens for {len(sizes)} LLM sizes."
    return canvas.save(out_dir, name, caption=caption.strip(), alt=alt)


def split(rows: Sequence) -> tuple[list, list, list]:
    """Rows of the grid, blind rows, and rows of every compressor but the commonest one."""
    seeing = [row for row in rows if not row.blind]
    kinds = [row.compressor for row in seeing]
    # Among equally common compressors the first by name, so that the order of rows changes nothing.
    usual = max(sorted(set(kinds)), key=kinds.count) if kinds else None
    return (
        [row for row in seeing if row.compressor == usual],
        [row for row in rows if row.blind],
        [row for row in seeing if row.compressor != usual],
    )


def _by_tokens(rows, family):
    """(V, mean score, standard error) over seeds, by rising V; the error is that of cells.Cells."""
    rows = [row for row in rows if family in row.families]
    V, means, errors = sorted({row.V for row in rows}), [], []
    for v in V:
        found = [row.families[family] for row in rows if row.V == v]
        score, stderr = mean_over_seeds(found)
        means.append(score)
        errors.append(stderr)
    return np.array(V, float), np.array(means), np.array(errors)


def mean_over_seeds(scores: Sequence[dict]) -> tuple[float, float]:
    """Mean and standard error over seeds: the shared questions' error plus the seeds' spread."""
    values = np.array([s["score"] for s in scores], float)
    sampling = np.mean([s["stderr"] ** 2 for s in scores])
    between = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
    return float(values.mean()), float(np.sqrt(sampling + between))


def phases(rows: Sequence, out_dir, *, name: str) -> Figure:
    """FLOPs of one request by phase, for the smallest and largest LLM at fewest and most V."""
    main = split(rows)[0]
    sizes = sorted({row.llm_parameters for row in main})
    corner = {}
    for n in (sizes[0], sizes[-1]):
        mine = sorted(
            (row for row in main if row.llm_parameters == n), key=lambda row: (row.V, row.seed)
        )
        for row in (mine[0], mine[-1]):
            corner.setdefault((n, row.V), row)
    labels = [f"{parameters_text(n / 1e9)}\nV={v:g}" for n, v in corner]
    shares = np.array(
        [[row.flops.get(phase, 0.0) for phase in PHASES] for row in corner.values()], float
    )
    totals = shares.sum(1)
    canvas = Canvas(x="", y="share of the request's FLOPs", title="What a request costs, by phase")
    base = np.zeros(len(corner))
    for phase, flops, colour, hatch in zip(PHASES, shares.T, OKABE_ITO, HATCHES, strict=False):
        part = flops / totals
        canvas.axes.bar(
            range(len(corner)),
            part,
            0.7,
            base,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.6,
            label=phase,
        )
        canvas.note(
            phase,
            "bar",
            range(len(corner)),
            y=part,
            low=base,
            high=base + part,
            label=flops,
            N_billions=[n / 1e9 for n, _ in corner],
            V=[v for _, v in corner],
        )
        base = base + part
    for i, total in enumerate(totals):
        canvas.write_above(f"{amount_text(total)}FLOPs", i, 1.0, gap=2)
    canvas.axes.set_xticks(range(len(corner)), labels)
    canvas.axes.set_ylim(0, 1.08)
    canvas.legend(columns=3)
    first, last = shares[0], shares[-1]
    caption = (
        "Share of each phase in the FLOPs of one request, the total on top; the paper's 2N(Q+V) "
        f"counts the prefill alone. The prefill is {100 * first[3] / totals[0]:.0f} % of the total "
        f"in the first bar and {100 * last[3] / totals[-1]:.0f} % in the last."
    )
    alt = "Stacked bars of FLOPs by phase: " + "; ".join(
        f"{label.replace(chr(10), ' ')}: prefill {100 * share[3] / total:.0f} %"
        for label, share, total in zip(labels, shares, totals, strict=True)
    )
    return canvas.save(out_dir, name, caption=caption, alt=alt + ".")


def error_against_cost(
    points, law, spent, out_dir, *, family, name, x, title, words, Q=None, unit=""
) -> Figure:
    """Figure 1 with another x axis: `spent` is one number per point, such as seconds on a chip.

    `x` labels the axis and `unit` its ticks, `words` says in the caption what it counts; the
    caption compares the best cells with those of 2N(Q+V) at Q text tokens (None: as measured).
    """
    cells = table.average(points).at(Q)
    mean = np.array(
        [
            np.mean(np.asarray(spent)[(points.N == n) & (points.V == v)])
            for n, v in zip(cells.N, cells.V, strict=True)
        ]
    )
    canvas = Canvas(x=x, y=ERROR, title=title)
    size_curves(canvas, cells, mean, law)
    ring_best(canvas, cells, mean)
    limits(canvas, cells)
    canvas.log_x(unit=unit)
    canvas.legend()
    best, simple = table.pareto(mean, cells.error), table.pareto(cells.flops, cells.error)
    listed = "; ".join(
        f"{parameters_text(n)} with V={', '.join(f'{v:g}' for v in cells.V[best & (cells.N == n)])}"
        for n in np.unique(cells.N[best])
    )
    moved = (
        "the same cells as at 2N(Q+V)"
        if (best == simple).all()
        else f"differs from 2N(Q+V) in {int((best != simple).sum())} of {len(best)} cells"
    )
    caption = f"Error on {family} against {words} Not beaten by a cheaper cell: {listed}; {moved}."
    return canvas.save(
        out_dir, name, caption=caption, alt=f"Error on {family} against {x}. Best: {listed}."
    )


def described_figures(
    points, law, out_dir, name, *, llms, vit, chip, Q: int | float = 50, G: int | float = 16
) -> list[Figure]:
    """Error against what a described model costs: every phase, a question pass too, and seconds.

    `llms` maps each of `points.label` to a cost.LLM, `vit` is a cost.ViT, `chip` a chips.Chip; Q
    text tokens, G generated ones, one request at a time. The compressors are TokenPacker and, with
    the question pass, QueCC.
    """

    def compressor(kind, query, V):
        return cost.Compressor(kind=kind, tokens=V, heads=8, query=query)

    def flops(kind, query):
        return np.array(
            [
                cost.request_flops(vit, compressor(kind, query, V), llms[label], Q=Q, G=G).total
                for label, V in zip(points.label, points.V, strict=True)
            ]
        )

    request = roofline.Request(Q=Q, G=G)
    seconds = np.array(
        [
            sum(
                roofline.seconds(
                    vit, compressor("token_packer", "none", V), llms[label], request, chip
                ).values()
            )
            for label, V in zip(points.label, points.V, strict=True)
        ]
    )
    asked = f"Q = {Q:g}, G = {G:g}"
    file = slug(name)
    return [
        error_against_cost(
            points,
            law,
            flops("token_packer", "none"),
            out_dir,
            family=name,
            name=f"{file}_total_flops",
            x=ALL_PHASES,
            title=f"{name}: every phase counted",
            words=f"the FLOPs of encoder, TokenPacker, prefill and decoding at {asked}.",
            Q=Q,
        ),
        error_against_cost(
            points,
            law,
            flops("quecc", "separate"),
            out_dir,
            family=name,
            name=f"{file}_question_pass",
            x=ALL_PHASES,
            title=f"{name}: with a question pass",
            words="the same with QueCC, whose separate pass of the question "
            f"through the LLM counts too, at {asked}. The errors are those measured with "
            "TokenPacker.",
            Q=Q,
        ),
        error_against_cost(
            points,
            law,
            seconds,
            out_dir,
            family=name,
            name=f"{file}_latency",
            x=f"least time per request on one {chip.name}",
            title=f"{name}: latency on {chip.name}",
            words=f"the least seconds a {chip.name} needs for one request at "
            f"{asked}, batch 1: each phase at the slower of peak FLOP/s and memory bandwidth.",
            Q=Q,
            unit="s",
        ),
    ]


def counted_figures(rows, points, law, out_dir, family, *, chip=CHIPS["v5e"]) -> list[Figure]:
    """Error against what a request costs: every phase, measured seconds, least seconds on a chip.

    `points` are those of `rows`, one by one.
    """
    file = slug(family)
    drawn = [
        error_against_cost(
            points,
            law,
            np.array([sum(row.flops.values()) for row in rows], float),
            out_dir,
            family=family,
            name=f"{file}_total_flops",
            x=ALL_PHASES,
            title=f"{family}: every phase counted",
            words="all FLOPs of a request: encoder, compressor, question pass, prefill and "
            "decoding.",
        )
    ]
    asked = np.array([sum(task["n"] for task in row.tasks.values()) for row in rows], float)
    measured = np.array([row.evaluate_seconds for row in rows], float) / np.maximum(asked, 1)
    if (measured > 0).all():
        drawn.append(
            error_against_cost(
                points,
                law,
                measured,
                out_dir,
                family=family,
                name=f"{file}_measured_time",
                unit="s",
                x="measured time per test question",
                title=f"{family}: measured time",
                words="the measured wall time of the evaluation per question on "
                f"{rows[0].machine}, in batches, with "
                "compilation and with image features from a cache where the run kept them.",
            )
        )
    drawn.append(
        error_against_cost(
            points,
            law,
            np.array([least_seconds(row, chip) for row in rows]),
            out_dir,
            family=family,
            name=f"{file}_latency",
            unit="s",
            x=f"least time per request on one {chip.name}",
            title=f"{family}: latency on {chip.name}",
            words=f"the time below which one {chip.name} cannot answer one request: each phase at "
            "the slower of its FLOPs at peak and of reading its weights. Launching programs, which "
            "dominates for tiny models, is not in it.",
        )
    )
    return drawn


def least_seconds(row, chip) -> float:
    """Seconds below which `chip` cannot answer a request: its FLOPs and weights, nothing else."""
    passes = {
        "encoder": row.vit_parameters,
        "compressor": row.compressor_parameters,
        "prefill": row.llm_parameters,
        "question": row.llm_parameters if row.flops.get("question") else 0,
        "decode": max(row.G - 1, 0) * row.llm_parameters,
    }
    return sum(
        max(
            row.flops.get(phase, 0) / chip.peak_flops,
            numbers * chip.bytes_per_number / chip.hbm_bytes_per_s,
        )
        for phase, numbers in passes.items()
    )


def slug(text: str) -> str:
    """`text` as a part of a file name."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text)
