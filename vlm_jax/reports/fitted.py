# SPDX-License-Identifier: Apache-2.0
"""The files of a fit: law.json, comparison.csv, and figures of every family."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax import files
from vlm_jax.cost import described
from vlm_jax.cost.chips import Chip
from vlm_jax.law import compare
from vlm_jax.law.families import Fitted
from vlm_jax.law.law import Law
from vlm_jax.law.points import Points
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.rows import records


def write(fitted: Fitted, out: Path) -> list[Path]:
    """Writes law.json and comparison.csv into a folder, which is created; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in fitted.fields.items()
    ]
    files.write_text(out / "law.json", "{\n" + ",\n".join(lines) + "\n}\n")
    with files.writing(out / "comparison.csv") as file:
        writer = csv.DictWriter(file, ["family", *compare.COLUMNS])
        writer.writeheader()
        writer.writerows(fitted.comparison)
    return [out / "law.json", out / "comparison.csv"]


def draw(
    families: Mapping[str, Points],
    laws: Mapping[str, Law],
    out: Path,
    *,
    rows: Sequence[records.Row],
    chip: Chip,
) -> tuple[list[Path], list[str]]:
    """Draws the figures of every family; returns their paths and why some could not be drawn.

    Without matplotlib, and for laws without bootstrap draws, there are no figures.
    """
    if any(fitted.samples is None for fitted in laws.values()):
        return [], ["no figures: their bands need --bootstrap of 1 or more draws"]
    notes: list[str] = []
    try:
        from vlm_jax.reports import cost_figures, figures
        from vlm_jax.reports.colors import TooManySizes

        drawn: list[Path] = []
        for name, points in families.items():
            try:
                drawn += figures.law_figures(points, laws[name], out, name)
            except TooManySizes as problem:
                notes.append(f"no figures of {name}: {problem}")
                continue
            if rows:
                if points.N.max() < cost_figures.REAL:
                    notes.append(
                        f"no figure of {name} against time on {chip.name}: the largest LLM has "
                        f"less than {cost_figures.REAL:g} billion parameters"
                    )
                cost_drawn = cost_figures.counted_figures(
                    rows, points, laws[name], out, name, chip=chip
                )
            else:
                try:
                    llms, vit = described_sizes(points)
                except (ValueError, ModuleNotFoundError) as problem:
                    notes.append(f"no figures of the whole cost and of latency: {problem}")
                    continue
                cost_drawn = cost_figures.described_figures(
                    points, laws[name], out, name, llms=llms, vit=vit, chip=chip
                )
            drawn += [path for figure in cost_drawn for path in figure.paths]
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        return [], ["no figures: pip install 'vlm-jax[report]' for matplotlib"]
    return drawn, notes


def described_sizes(points: Points) -> tuple[dict[str, LLMSize], ViTSize]:
    """Label -> shape of every point's LLM, and the encoder.

    Raises ValueError for an LLM without a published shape.
    """
    published = described.published_llms()
    if unknown := sorted(set(points.label) - published.keys()):
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not one of {', '.join(published)}: "
            "name the LLM of every line in a column `label`"
        )
    encoder = ViTSize.of(described.base().vit)
    return {label: published[label][1] for label in set(points.label)}, encoder


def without_draws(fields: Any) -> Any:
    """The same JSON fields, at every depth, without the bootstrap draws."""
    if isinstance(fields, dict):
        return {key: without_draws(value) for key, value in fields.items() if key != "samples"}
    return fields
