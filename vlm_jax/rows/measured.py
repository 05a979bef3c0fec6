# SPDX-License-Identifier: Apache-2.0
"""Reads files of results as the points that laws are fitted to, family by family."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_jax.law import published
from vlm_jax.law.points import Cell, Points, of_cells
from vlm_jax.rows import lmms_eval, records, scores, tables

MEAN = "mean of families"


@dataclass(frozen=True)
class Measured:
    """What the results of one or several files hold.

    Attributes:
      families: family -> points; their mean comes first if there are several families.
      tasks: task -> points; empty for tables.
      rows: the rows of a grid, one for each point; empty for other files.
      note: which rows these are, in sentences.
      about: of scores: the tasks of each average, their divisors, protocols and files.
      method: the method of all points; None if the files do not say.
    """

    families: dict[str, Points]
    tasks: dict[str, Points]
    rows: list[records.Row]
    note: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    method: str | None = None


def of_published(name: str, *, text_tokens: float = 0.0) -> Measured:
    """The published points of arXiv 2411.03312, "reasoning" or "ocr"."""
    points = published.points(name, text_tokens=text_tokens)
    return Measured({name: points}, {}, [], method=published.METHOD)


def read(
    paths: Sequence[str | Path],
    *,
    compressor: str | None = None,
    family: str | None = None,
    n_unit: str | None = None,
    text_tokens: float = 0.0,
    mme: int = scores.PERCEPTION,
    tasks_table: str | Path | None = None,
) -> Measured:
    """The points of several files of one kind: rows of grids, scores of benchmarks, or tables.

    Args:
      compressor: the method whose rows are read; by default the one with the most cells.
      family: read this family or task only.
      n_unit: the unit of N in a table, a key of `tables.N_UNITS`.
      text_tokens: Q for tables and scores without Q.
      mme: the divisor of MME's points, see `scores.MME`.
      tasks_table: of results of lmms-eval, see `lmms_eval.table`.
    Raises:
      ValueError: for a mix of kinds, and for a cell that was measured twice.
    """
    of_scores = [scores.is_scores(path) for path in paths]
    of_grid = [not s and records.is_rows(p) for s, p in zip(of_scores, paths, strict=True)]
    if (any(of_grid) or any(of_scores)) and not (all(of_grid) or all(of_scores)):
        raise ValueError(
            "--rows mixes rows of a grid, scores of benchmarks or other tables: fit them separately"
        )
    if all(of_scores):
        return of_benchmarks(
            scores.read(paths, n_unit=n_unit, text_tokens=text_tokens, mme=mme), family
        )
    rows: list[records.Row] = []
    note = ""
    if of_grid[0]:
        all_rows = records.comparable([row for path in paths for row in records.read(path)])
        method = compressor or records.main_method(all_rows)
        rows = records.of_method([row for row in all_rows if not row.blind], method)
        note = rows_used_note(rows, all_rows)
        of_families = records.cells(rows, by="families")
        of_tasks = records.cells(rows, by="tasks")
    else:
        of_families, of_tasks = [], []
        known = lmms_eval.table(tasks_table)
        results = [tables.has_results(path) for path in paths]
        if any(results) != all(results):
            raise ValueError("--rows mixes results of lmms-eval with other tables: fit them apart")
        if tasks_table is not None and not any(results):
            raise ValueError("--tasks is for results of lmms-eval, and there are none in --rows")
        for path in paths:
            of_families += tables.read(path, n_unit=n_unit, text_tokens=text_tokens, tasks=known)
        check_once(of_families)
        of_families = of_one_method(of_families, compressor)
        words = [tables.upside_down(of_families)]
        if all(results):
            of_tasks = of_families
            of_families, about_families = lmms_eval.families(of_tasks, known)
            words += about_families
        note = "\n".join(filter(None, words))
    used = rows[0].method if rows else (of_families[0].method or None)
    families, tasks = names_of(of_families), names_of(of_tasks)
    if family is not None:
        cells = of_tasks if family in tasks else of_families
        return Measured({family: of_cells(cells, family)}, {}, rows, note, method=used)
    points = {name: of_cells(of_families, name) for name in families}
    if len(points) > 1:
        points = {MEAN: of_cells(of_families)} | points
    every_task = {name: of_cells(of_tasks, name) for name in tasks}
    return Measured(points, every_task, rows, note, method=used)


def methods_of(paths: Sequence[str | Path], *, n_unit: str | None = None) -> list[str]:
    """The methods in files of rows or in tables with a column `method`, those of most rows first.

    Raises ValueError for scores and for tables that name no method.
    """
    if any(scores.is_scores(path) for path in paths):
        raise ValueError("--compressor=all: scores of benchmarks do not say their method")
    if all(records.is_rows(path) for path in paths):
        return list(records.methods([row for path in paths for row in records.read(path)]))
    cells = [cell for path in paths for cell in tables.read(path, n_unit=n_unit)]
    counts = Counter(cell.method for cell in cells)
    if "" in counts:
        raise ValueError(f"--compressor=all: {counts['']} rows have no method: fill that column")
    return [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def of_benchmarks(averages: scores.Averages, family: str | None) -> Measured:
    """The points of scores of benchmarks: all averages, or one average or task."""
    families, tasks = averages.families, averages.tasks
    if family is not None:
        every = tasks | families
        if family not in every:
            raise ValueError(f"no average or task {family!r}: there are {', '.join(every)}")
        families, tasks = {family: every[family]}, {}
    note = "\n".join(scores.notes(averages.about))
    return Measured(families, tasks, [], note, averages.about)


def names_of(cells: Sequence[Cell]) -> list[str]:
    """The families or tasks of cells, sorted."""
    return sorted({name for cell in cells for name in cell.errors})


def of_one_method(cells: Sequence[Cell], name: str | None) -> list[Cell]:
    """The cells of one method. Raises ValueError for several without a choice, and for none."""
    methods = sorted({cell.method for cell in cells})
    if name is None and len(methods) > 1:
        raise ValueError(
            f"the table holds the methods {', '.join(repr(m) for m in methods)}, which are "
            "different models and have no common law: choose with --compressor"
        )
    if name is not None and name not in methods:
        raise ValueError(f"no row of method {name!r}; there are {', '.join(map(repr, methods))}")
    return [cell for cell in cells if name in (None, cell.method)]


def check_once(cells: Sequence[Cell]) -> None:
    """Raises ValueError if the same N, V, Q and label occur twice with one seed."""
    keys = set()
    for cell in cells:
        key = (
            cell.N, cell.V, cell.Q, cell.label, cell.seed, cell.model, cell.method, cell.frames
        )  # fmt: skip
        if key in keys:
            raise ValueError(
                f"N={cell.N:g}, V={cell.V:g} (seed {cell.seed}) occurs twice in the files of "
                f"--rows: keep one, or add a column `seed` if both were measured"
            )
        keys.add(key)


def rows_used_note(rows: Sequence[records.Row], all_rows: Sequence[records.Row]) -> str:
    """A sentence: which rows of a grid a law is fitted to, and which are not used."""
    others = {name: n for name, n in records.methods(all_rows).items() if name != rows[0].method}
    unused = [f"{n} cells of {name}" for name, n in others.items()]
    unused += [f"{sum(row.blind for row in all_rows)} blind rows"] * any(
        row.blind for row in all_rows
    )
    return f"{len(rows)} rows of {rows[0].method}" + (
        f"; not used: {', '.join(unused)}" if unused else ""
    )
