# SPDX-License-Identifier: Apache-2.0
"""The laws of several methods side by side: one line for each method and family."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax import files
from vlm_jax.compressors.kinds import kind_of
from vlm_jax.law.answer import Answer, best_tokens
from vlm_jax.law.families import Fitted
from vlm_jax.rows.measured import Measured

PARAMETERS = ("A", "alpha", "beta", "D")  # those that every form has


def lines(method: str, measurements: Measured, fit: Fitted) -> list[dict[str, Any]]:
    """The lines of one method, a family each.

    best_V is the measured V of least error at the cost `best_at`, N (Q + V) in billions, with its
    share of the draws; None where no form fits.
    """
    compressor = measurements.rows[0].compressor if measurements.rows else method
    found = []
    for family, points in measurements.families.items():
        law = fit.laws[family]
        section = fit.fields["families"].get(family, fit.fields)
        answer = Answer.from_dict(section)
        line: dict[str, Any] = {
            "method": method, "kind": kind_of(compressor), "family": family, "rows": len(points),
            "sizes": len(set(points.N.tolist())), "token_counts": len(set(points.V.tolist())),
            "form": law.form,
        }  # fmt: skip
        for name in PARAMETERS:
            line[name] = law.params.get(name)
            low, high = law.intervals.get(name) or (None, None)
            line |= {f"{name}_low": low, f"{name}_high": high}
        line["misfit"] = law.misfit.get("sentence", "")
        line["answers"] = ", ".join(answer.shares) or "measured cells"
        found.append(line | best_tokens(answer, points))
    return found


def write(table: Sequence[dict[str, Any]], path: Path) -> Path:
    """Writes the lines of all methods as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(path) as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return path
