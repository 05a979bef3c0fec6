# SPDX-License-Identifier: Apache-2.0
"""For a given inference budget: which language model, and how many visual tokens?

    import vlm_jax

    points = vlm_jax.read_points("rows.jsonl")             # or vlm_jax.published("reasoning")
    law = vlm_jax.fit(points)                              # error = A N^-alpha V^-beta + D
    best = vlm_jax.plan(law, flops=1e12, text_tokens=50)   # best.N, best.V, best.interval

    model = vlm_jax.describe("configs/base.py", llm="qwen1.5-4b", tokens=16)
    vlm_jax.request_cost(model, text_tokens=50, chip="v5e").seconds

    row = vlm_jax.train_cell("configs/demo.py", "runs/demo", cell="10k-v4-token_packer-s0")
    vlm = vlm_jax.load("runs/demo/cells/10k-v4-token_packer-s0")
    vlm.generate("page.png", "What does it say?", max_new_tokens=16)[0].text

Everything is imported on first use: fitting and planning need no JAX.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_jax.cost.model import (
        Description,
        RequestCost,
        describe,
        read_config,
        request_cost,
    )
    from vlm_jax.grids.run import cell_names, train_cell
    from vlm_jax.law.law import Law, fit
    from vlm_jax.law.points import Points
    from vlm_jax.law.published import points as published
    from vlm_jax.planning.question import Plan, plan, read_law
    from vlm_jax.rows.records import Row, read_points
    from vlm_jax.rows.records import read as read_rows
    from vlm_jax.serving.model import VLM, Answer, load

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "Answer",
    "Description",
    "Law",
    "Plan",
    "Points",
    "RequestCost",
    "Row",
    "cell_names",
    "describe",
    "fit",
    "load",
    "plan",
    "published",
    "read_config",
    "read_law",
    "read_points",
    "read_rows",
    "request_cost",
    "train_cell",
]


def __getattr__(name: str) -> Any:
    """Names of the catalog, imported on first use."""
    match name:
        case "VLM" | "Answer" | "load":
            without_notices()
            from vlm_jax.serving import model as serving

            return getattr(serving, name)
        case "cell_names" | "train_cell":
            without_notices()
            from vlm_jax.grids import run

            return getattr(run, name)
        case "Description" | "RequestCost" | "describe" | "read_config" | "request_cost":
            from vlm_jax.cost import model as described

            return getattr(described, name)
        case "Law" | "fit":
            from vlm_jax.law import law

            return getattr(law, name)
        case "Points":
            from vlm_jax.law.points import Points

            return Points
        case "published":
            from vlm_jax.law.published import points

            return points
        case "Plan" | "plan" | "read_law":
            from vlm_jax.planning import question

            return getattr(question, name)
        case "Row" | "read_points":
            from vlm_jax.rows import records

            return getattr(records, name)
        case "read_rows":
            from vlm_jax.rows.records import read

            return read
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def without_notices() -> None:
    """Keeps transformers from saying that PyTorch is missing: only its tokenizers are used."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __dir__() -> list[str]:
    """The catalog, for people and completion."""
    return sorted([*__all__, "__version__", "__doc__", "__file__", "__name__", "__path__"])
