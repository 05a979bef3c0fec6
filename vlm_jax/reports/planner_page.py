# SPDX-License-Identifier: Apache-2.0
"""The planner as one HTML file, which plans anew when budget, requests, chip or tasks move."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.planning import exported, parsing
from vlm_jax.reports.cells import simple_flops
from vlm_jax.reports.page import QUESTION, TEMPLATES
from vlm_jax.reports.run import Run


def build(data: Mapping[str, Any], *, source: str) -> str:
    """The HTML of the data of `planning.exported.data`; `source` says which law it is."""
    return TEMPLATES.get_template("planner.html").render(
        question=QUESTION,
        lead=f"Planned in this page by {source}. N is LLM parameters, V visual tokens.",
        planner=data,
        drawn="Computed in the page as vlm-jax plan computes it, from the same draws of the law, "
        "and equal to it. Not here: continuous sizes, waiting at a request rate, the next cell.",
    )


def of_run(run: Run, law: Path) -> tuple[dict[str, Any] | None, str]:
    """The data of the planner in a run's report, or None and why there is none.

    The LLMs and V are those that were measured, by the law.json of the run; the budget begins in
    the middle of what they cost.
    """
    if not run.main:
        return None, "No cell of the grid is finished."
    if not law.is_file():
        return (
            None,
            "There is no law.json: it needs cells that have every family, and enough of them.",
        )
    names = {row.llm_parameters / 1e9: row.llm for row in run.main}
    tokens = sorted({float(row.V) for row in run.main})
    Q = float(np.mean([row.Q for row in run.main]))
    costs = simple_flops(np.array(sorted(names))[:, None], np.array(tokens), Q)
    arguments = dict(
        text_tokens=float(f"{Q:.3g}"), llms=sorted(names), tokens=tokens, cost_model="paper",
        flops=float(f"{np.sqrt(costs.min() * costs.max()):.2g}"),
    )  # fmt: skip
    try:
        own = parsing.read_laws(str(law), None)
        data = exported.data(
            own, parsing.read_families(str(law)), arguments, names=names,
            own_name=parsing.law_name(str(law)),
        )  # fmt: skip
    except ValueError as problem:
        return None, f"{str(problem)[:1].upper()}{str(problem)[1:]}."
    return data, ""
