# SPDX-License-Identifier: Apache-2.0
"""The rows of a run in three parts: the grid's own method, blind models, other methods."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_jax.rows import records


@dataclass(frozen=True)
class Run:
    """All rows of a run and three disjoint parts of them.

    `main` are the sighted rows of `method`, to which the law is fitted; `other` are sighted rows of
    other methods. `method` is "" while no sighted row is finished.
    """

    rows: Sequence
    method: str
    main: Sequence
    blind: Sequence
    other: Sequence

    @property
    def families(self) -> list[str]:
        """The families that occur in any row."""
        return sorted({family for row in self.rows for family in row.families})


def of(rows: Sequence, method: str | None = None) -> Run:
    """The run of these rows; `method` is the grid's own method.

    If it is None or has no rows, it is the method with the most cells, among equals the first by
    name, so that the order of rows does not matter.
    """
    counts = records.methods(rows)
    if method not in counts:
        method = next(iter(counts), "")
    sighted = [row for row in rows if not row.blind]
    return Run(
        rows,
        method,
        [row for row in sighted if row.method == method],
        [row for row in rows if row.blind],
        [row for row in sighted if row.method != method],
    )


def mean_over_seeds(scores: Sequence[dict]) -> tuple[float, float]:
    """Mean and standard error over seeds: the shared questions' error plus the seeds' spread."""
    values = np.array([s["score"] for s in scores], float)
    sampling = np.mean([s["stderr"] ** 2 for s in scores])
    between = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
    return float(values.mean()), float(np.sqrt(sampling + between))


def by_tokens(rows: Sequence, family: str) -> dict[int | float, tuple[float, float]]:
    """V -> (mean score, standard error) over the seeds of rows with the family, by rising V."""
    found: dict[int | float, list[dict]] = {}
    for row in rows:
        if family in row.families:
            found.setdefault(row.V, []).append(row.families[family])
    return {V: mean_over_seeds(found[V]) for V in sorted(found)}


def with_most_methods(rows: Sequence) -> int | None:
    """The LLM size, in parameters, of rows of most methods; of several the largest."""
    methods: dict[int, set[str]] = {}
    for row in rows:
        methods.setdefault(row.llm_parameters, set()).add(row.method)
    return max(methods, key=lambda size: (len(methods[size]), size), default=None)
