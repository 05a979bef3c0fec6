# SPDX-License-Identifier: Apache-2.0
"""The points that a law is fitted to, family by family, out of files of results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_jax.law import published
from vlm_jax.law.points import Cell, Points, of_cells
from vlm_jax.rows import records, tables

MEAN = "mean of families"


@dataclass(frozen=True)
class Measured:
    """Family -> points, led by their mean where there are several; task -> points.

    `rows` are a grid's, one by one those of the points, and `note` says which they are; of other
    sources there are none, nor any tasks.
    """

    families: dict[str, Points]
    tasks: dict[str, Points]
    rows: list[records.Row]
    note: str = ""


def of_published(name: str, *, text_tokens: float = 0.0) -> Measured:
    """The published points of arXiv 2411.03312, "reasoning" or "ocr"."""
    return Measured({name: published.points(name, text_tokens=text_tokens)}, {}, [])


def read(
    paths: Sequence[str | Path],
    *,
    compressor: str | None = None,
    family: str | None = None,
    n_unit: str | None = None,
    text_tokens: float = 0.0,
) -> Measured:
    """The points of several files, all of a grid's rows or all of other tables.

    Args:
      compressor: the method of a grid's rows; the one with most cells unless given.
      family: one family or task alone.
      n_unit: what a table counts N in, a key of `tables.N_UNITS`.
      text_tokens: Q of the rows of a table without a Q.
    Raises:
      ValueError: for files that do not go together, and a place that was measured twice.
    """
    own = [records.is_rows(path) for path in paths]
    if any(own) and not all(own):
        raise ValueError("--rows mixes rows of a grid with other tables: fit them apart")
    rows: list[records.Row] = []
    note = ""
    if own[0]:
        every = [row for path in paths for row in records.read(path)]
        method = compressor or records.main_method(every)
        rows = records.of_method([row for row in every if not row.blind], method)
        note = used(rows, every)
        of_families = records.cells(rows, by="families")
        of_tasks = records.cells(rows, by="tasks")
    else:
        of_families, of_tasks = [], []
        for path in paths:
            of_families += tables.read(path, n_unit=n_unit, text_tokens=text_tokens)
        check_once(of_families)
    families, tasks = names_of(of_families), names_of(of_tasks)
    if family is not None:
        cells = of_tasks if family in tasks else of_families
        return Measured({family: of_cells(cells, family)}, {}, rows, note)
    found = {name: of_cells(of_families, name) for name in families}
    if len(found) > 1:
        found = {MEAN: of_cells(of_families)} | found
    return Measured(found, {name: of_cells(of_tasks, name) for name in tasks}, rows, note)


def names_of(cells: Sequence[Cell]) -> list[str]:
    """The families or tasks of cells, sorted."""
    return sorted({name for cell in cells for name in cell.errors})


def check_once(cells: Sequence[Cell]) -> None:
    """ValueError for a place that occurs twice with one seed."""
    seen = set()
    for cell in cells:
        key = (cell.N, cell.V, cell.Q, cell.label, cell.seed)
        if key in seen:
            raise ValueError(
                f"N={cell.N:g}, V={cell.V:g} (seed {cell.seed}) occurs twice in the files of "
                f"--rows: keep one, or add a column `seed` if both were measured"
            )
        seen.add(key)


def used(rows: Sequence[records.Row], every: Sequence[records.Row]) -> str:
    """Which rows of a grid a law is fitted to, in a sentence."""
    others = {name: n for name, n in records.methods(every).items() if name != rows[0].method}
    left = [f"{n} cells of {name}" for name, n in others.items()]
    left += [f"{sum(row.blind for row in every)} blind rows"] * any(row.blind for row in every)
    return f"{len(rows)} rows of {rows[0].method}" + (
        f"; not used: {', '.join(left)}" if left else ""
    )
