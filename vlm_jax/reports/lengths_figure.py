# SPDX-License-Identifier: Apache-2.0
"""The figure of how long the texts of a data set are."""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.reports.canvas import Canvas, Figure
from vlm_jax.reports.colors import OKABE_ITO


def draw(
    edges: Sequence[int],
    counts: Sequence[int],
    out_dir: Path | str,
    *,
    unit: str,
    limit: int | None = None,
) -> Figure:
    """Writes lengths.png, lengths.svg and lengths.csv: a bar for each bin of a histogram.

    Args:
      edges: the least length of each bin, ascending; the last bin has no end.
      counts: texts in each bin.
      unit: of the lengths, such as tokens.
      limit: the length that a row keeps, drawn as a line; None for none.
    """
    last = max((i for i, count in enumerate(counts) if count), default=0)
    shown = max(last + 1, sum(edge < limit for edge in edges) + 1 if limit else 0)
    shown = min(shown, len(edges))
    canvas = Canvas(
        x=f"{unit} of text of an example, from", y="examples", title="Lengths of the texts"
    )
    canvas.bars("texts", range(shown), counts[:shown], width=0.9, color=OKABE_ITO[0])
    canvas.axes.set_xticks(range(shown), [str(edge) for edge in edges[:shown]], rotation=60)
    if limit is not None:
        below = [i for i in range(len(edges)) if edges[i] < limit]
        edge = below[-1] if below else 0
        step = edges[edge + 1] - edges[edge] if edge + 1 < len(edges) else edges[edge]
        at = edge - 0.5 + min((limit - edges[edge]) / step, 1)
        canvas.line("kept", [at, at], [0, max(counts)], color=OKABE_ITO[1], dash="--",
                    name=f"{limit} are kept")  # fmt: skip
        canvas.legend()
    total = sum(counts)
    return canvas.save(
        out_dir,
        "lengths",
        caption=f"Lengths of {total:,} texts in {unit}.",
        alt=f"Histogram of the {unit} of {total:,} texts",
    )
