# SPDX-License-Identifier: Apache-2.0
"""Figures of costs beyond the paper's: all phases of a request, a question pass, and time.

The costs are those of results rows (rows/records.py), which count each phase of a request, or of
models that are described by their sizes.
"""

from collections.abc import Sequence

import numpy as np

from vlm_jax import compressors
from vlm_jax.cost import calibration, roofline
from vlm_jax.cost import flops as cost
from vlm_jax.cost.chips import CHIPS
from vlm_jax.reports import cells as table
from vlm_jax.reports.amounts import amount_text, parameters_text
from vlm_jax.reports.canvas import Canvas, Figure
from vlm_jax.reports.colors import HATCHES, Looks, of_sizes
from vlm_jax.reports.colors import PHASES as COLORS
from vlm_jax.reports.curves import (
    ERROR,
    drawn,
    form_of,
    limits,
    ring_best,
    size_curves,
    size_legend,
)

ALL_PHASES = "counted FLOPs per request, all phases"
PHASES = tuple(COLORS)
REAL = 0.1  # billions of parameters: the time of a smaller LLM is that of launching its programs


def phases(rows: Sequence, out_dir, *, name: str) -> Figure:
    """FLOPs of one request by phase, for the smallest and largest LLM at fewest and most V."""
    sizes = sorted({row.llm_parameters for row in rows})
    corner = {}
    for n in (sizes[0], sizes[-1]):
        of_size = sorted(
            (row for row in rows if row.llm_parameters == n), key=lambda row: (row.V, row.seed)
        )
        for row in (of_size[0], of_size[-1]):
            corner.setdefault((n, row.V), row)
    labels = [f"{parameters_text(n / 1e9)}\nV={v:g}" for n, v in corner]
    shares = np.array(
        [[row.flops.get(phase, 0.0) for phase in PHASES] for row in corner.values()], float
    )
    totals = shares.sum(1)
    canvas = Canvas(x="", y="share of the request's FLOPs", title="What a request costs, by phase")
    base = np.zeros(len(corner))
    for phase, flops, hatch in zip(PHASES, shares.T, HATCHES, strict=False):
        color = COLORS[phase]
        part = flops / totals
        canvas.axes.bar(
            range(len(corner)),
            part,
            0.7,
            base,
            color=color,
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
    points, law, spent, out_dir, *, family, name, x, title, words, looks: Looks, Q=None, unit=""
) -> Figure:
    """Figure 1 with another x axis: `spent` is one number per point, such as seconds on a chip.

    `x` labels the axis and `unit` its ticks, `words` describes the cost in the caption; the
    caption compares the best cells with those of 2N(Q+V) at Q text tokens (None: as measured).
    """
    law, why = drawn(law)
    cells = table.average(points).at(Q)
    mean = table.mean_of(table.places(points)[0], spent)
    canvas = Canvas(x=x, y=ERROR, title=title, height=3.5)
    if not size_curves(canvas, cells, mean, law, looks):
        law = None
    ring_best(canvas, cells, mean)
    limits(canvas, cells)
    canvas.log_x(unit=unit)
    size_legend(canvas, cells, law)
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
    curves = why if law is None else form_of(law)
    caption = (
        f"Error on {family} against {words} Not beaten by a cheaper cell: {listed}; {moved}. "
        f"{curves}"
    )
    return canvas.save(
        out_dir,
        name,
        caption=caption.strip(),
        alt=f"Error on {family} against {x}. Best: {listed}.",
    )


def described_figures(
    points, law, out_dir, name, *, llms, vit, chip, Q: int | float = 50, G: int | float = 16
) -> list[Figure]:
    """Error against what a described model costs: every phase, a question pass too, and seconds.

    `llms` maps each of `points.label` to an LLMSize, `vit` is a ViTSize, `chip` a chips.Chip; Q
    text tokens, G generated ones, one request at a time. The compressors are TokenPacker and, with
    the question pass, QueCC.
    """

    def compressor(kind, query, V):
        return compressors.describe(dict(kind=kind, tokens=V, heads=8, query=query))

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
    looks = of_sizes(points.N)
    workload = f"Q = {Q:g}, G = {G:g}"
    file = slug(name)
    return [
        error_against_cost(
            points,
            law,
            flops("token_packer", "none"),
            out_dir,
            family=name,
            looks=looks,
            name=f"{file}_total_flops",
            x=ALL_PHASES,
            title=f"{name}: every phase counted",
            words=f"the FLOPs of encoder, TokenPacker, prefill and decoding at {workload}.",
            Q=Q,
        ),
        error_against_cost(
            points,
            law,
            flops("quecc", "separate"),
            out_dir,
            family=name,
            looks=looks,
            name=f"{file}_question_pass",
            x=ALL_PHASES,
            title=f"{name}: with a question pass",
            words="the same with QueCC, whose separate pass of the question "
            f"through the LLM counts too, at {workload}. The errors are those measured with "
            "TokenPacker.",
            Q=Q,
        ),
        error_against_cost(
            points,
            law,
            seconds,
            out_dir,
            family=name,
            looks=looks,
            name=f"{file}_latency",
            x=f"least time per request on one {chip.name}",
            title=f"{name}: latency on {chip.name}",
            words=f"the least seconds a {chip.name} needs for one request at "
            f"{workload}, batch 1: each phase at the slower of peak FLOP/s and memory bandwidth.",
            Q=Q,
            unit="s",
        ),
    ]


def counted_figures(
    rows, points, law, out_dir, family, *, chip=CHIPS["v5e"], looks: Looks | None = None
) -> list[Figure]:
    """Error against what a request costs: every phase, measured seconds, least seconds on a chip.

    `points` are those of `rows`, one by one. No seconds on a chip where the largest LLM is a toy.
    """
    looks = looks or of_sizes(points.N)
    file = slug(family)
    made = [
        error_against_cost(
            points,
            law,
            np.array([sum(row.flops.values()) for row in rows], float),
            out_dir,
            family=family,
            looks=looks,
            name=f"{file}_total_flops",
            x=ALL_PHASES,
            title=f"{family}: every phase counted",
            words="all FLOPs of a request: encoder, compressor, question pass, prefill and "
            "decoding.",
        )
    ]
    if (measured := measured_seconds(rows)) is not None:
        seconds, words = measured
        made.append(
            error_against_cost(
                points,
                law,
                seconds,
                out_dir,
                family=family,
                looks=looks,
                name=f"{file}_measured_time",
                unit="s",
                x="measured time per test question",
                title=f"{family}: measured time",
                words=words,
            )
        )
    if points.N.max() < REAL:
        return made
    made.append(
        error_against_cost(
            points,
            law,
            np.array([sum(calibration.row_seconds(row, chip).values()) for row in rows]),
            out_dir,
            family=family,
            looks=looks,
            name=f"{file}_latency",
            unit="s",
            x=f"least time per request on one {chip.name}",
            title=f"{family}: latency on {chip.name}",
            words=f"the time below which one {chip.name} cannot answer one request: each phase at "
            "the slower of its FLOPs at peak and of reading its weights. Launching programs, which "
            "dominates for tiny models, is not in it.",
        )
    )
    return made


def measured_seconds(rows: Sequence) -> tuple[np.ndarray, str] | None:
    """Seconds per question of every row, and how they were measured in words; None without any."""
    machine = " or ".join(sorted({row.machine for row in rows}))
    if all(row.timing for row in rows):
        batches = sorted({row.timing["batch"] for row in rows})
        seconds = np.array([row.timing["seconds_per_example"] for row in rows], float)
        return seconds, (
            f"the measured time of answering a question on {machine}, in batches of "
            f"{' or '.join(map(str, batches))}, once everything is compiled. Image features come "
            "from a cache, so the encoder is not in it."
        )
    questions = np.array([sum(task["n"] for task in row.tasks.values()) for row in rows], float)
    seconds = np.array([row.evaluate_seconds for row in rows], float) / np.maximum(questions, 1)
    if not (seconds > 0).all():
        return None
    return seconds, (
        f"the measured wall time of the evaluation per question on {machine}, in batches, with "
        "loading, compilation, and image features from a cache where the run kept them."
    )


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text)
