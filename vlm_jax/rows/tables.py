# SPDX-License-Identifier: Apache-2.0
"""Reads results measured by other tools as cells; an error names the wrong column or unit.

A table (CSV, JSONL or a JSON list) has columns N (billions), V and either error or accuracy
(fraction or percent), optionally Q, stderr, family (one line per family and cell), label, seed,
model (rows of one trained model share it), method (the compressor) and frames (of a video; V is of
one frame). In the place of error or
accuracy a column `results` may name an lmms-eval results file. Such a file may also be read
directly, with N and V (and Q) added at its top level.
"""

import csv
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.law.points import Cell
from vlm_jax.rows import lmms_eval

Line = Mapping[str, Any]  # column -> value
Place = tuple[float, float, float, str, int, str, str, float]  # N, V, Q, label, seed, model, ...

N_UNITS = {"billions": 1.0, "millions": 1e-3, "parameters": 1e-9}
LARGEST_N_BILLIONS = 3e3  # three trillion parameters: more means that N has another unit
SMALLEST_N_BILLIONS = 100.0  # if even the smallest LLM has more, N may count millions
RISING, FEWEST_TO_JUDGE = (
    0.3,
    6,
)  # rank correlation, and cells, from which a column looks upside down
SCORES = ("error", "accuracy", "results")


def read(
    path: str | Path,
    *,
    n_unit: str | None = None,
    text_tokens: float = 0.0,
    tasks: Mapping[str, lmms_eval.Task] | None = None,
) -> list[Cell]:
    """The cells of a table of another tool; repeated identical lines count once.

    `tasks` says how results of lmms-eval are read (default: `lmms_eval.table`). `n_unit` is one of
    N_UNITS; None means billions and refuses numbers too large for that. `text_tokens` is the Q of
    tables without that column. Raises ValueError, with file and line, for a missing column, a value
    that is not a number, percent mixed with fractions, an error outside 0..1, and a cell that
    occurs twice with different values.
    """
    path = Path(path)
    if n_unit is not None and n_unit not in N_UNITS:
        raise ValueError(f"N is counted in {', '.join(N_UNITS)}, got {n_unit!r}")
    lines = _lines(path)
    if not lines:
        raise ValueError(f"{path}: no rows: it needs column names and a line for each cell")
    column = _score_column(path, lines)
    tasks = lmms_eval.table() if tasks is None else tasks
    scores = [  # one line per cell and family: place, family, score, stderr
        (where, line, *score)
        for where, line in lines
        for score in _scores(path, where, line, column, tasks)
    ]
    unit = 1.0
    if column != "results":
        unit = _unit(path, [(where, score) for where, _, _, score, _ in scores], column)
    repeated: list[int] = []
    first_lines: dict[tuple[Place, str], tuple[int, tuple[float, float]]] = {}
    cells: dict[Place, Cell] = {}
    for where, line, family, score, stderr in scores:
        N = size(_number(path, where, line, "N"), n_unit, f"{path}:{where}")
        V = _number(path, where, line, "V")
        Q = (
            _number(path, where, line, "Q")
            if line.get("Q") not in (None, "")
            else float(text_tokens)
        )
        label = str(line.get("label") or line.get("llm") or "")
        seed = int(_number(path, where, line, "seed")) if line.get("seed") not in (None, "") else 0
        error = score * unit if column == "error" else 1.0 - score * unit
        if not -1e-9 <= error <= 1 + 1e-9:
            raise ValueError(f"{path}:{where}: error = 1 - score must lie in 0..1, got {error:g}")
        model, method = (str(line.get(name) or "") for name in ("model", "method"))
        if model and seed:
            model = f"{model}, seed {seed}"
        frames = 1.0 if line.get("frames") in (None, "") else _number(path, where, line, "frames")
        key, value = (
            (N, V, Q, label, seed, model, method, frames),
            (min(max(error, 0.0), 1.0), stderr * unit),
        )
        if (key, family) in first_lines:
            first, first_value = first_lines[key, family]
            if first_value[0] != value[0] or not _alike(first_value[1], stderr * unit):
                raise ValueError(
                    f"{path}:{where}: N={N:g}, V={V:g} was already in line {first} with error "
                    f"{_measured(first_value)}, now {_measured(value)}: keep one, or add a "
                    "column `seed` if both were measured"
                )
            repeated.append(where)
            continue
        first_lines[key, family] = where, value
        cell = Cell(N, V, Q, label, seed, {}, model, method, frames)
        cells.setdefault(key, cell).errors[family] = value
    if n_unit is None and min(cell.N for cell in cells.values()) > SMALLEST_N_BILLIONS:
        raise ValueError(
            f"{path}: every N is above {SMALLEST_N_BILLIONS:g} billion parameters: if N counts "
            "millions pass --n-unit=millions, if these LLMs are so large --n-unit=billions"
        )
    if repeated:
        warnings.warn(
            f"{path}: {len(repeated)} lines (the first is {repeated[0]}) repeat an earlier one and "
            "do not count: add a column `seed` if they were measured again",
            stacklevel=2,
        )
    return list(cells.values())


def _alike(one: float, another: float) -> bool:
    """Whether two standard errors are the same, or both unknown."""
    return one == another or (math.isnan(one) and math.isnan(another))


def _measured(value: tuple[float, float]) -> str:
    """An error and its standard error, if it is known."""
    return f"{value[0]:g}" + ("" if math.isnan(value[1]) else f" ± {value[1]:g}")


def upside_down(cells: Sequence[Cell]) -> str:
    """A sentence if errors rise with both N and V, as a column under the wrong name does; or ""."""
    error = [float(np.mean([e for e, _ in cell.errors.values()])) for cell in cells]
    if len(cells) < FEWEST_TO_JUDGE or np.ptp(error) == 0:
        return ""
    rises = []
    for column in ([cell.N for cell in cells], [cell.V for cell in cells]):
        if np.ptp(column) == 0:
            return ""
        ranks = [np.unique(values, return_inverse=True)[1] for values in (column, error)]
        rises.append(float(np.asarray(np.corrcoef(ranks))[0, 1]))
    if min(rises) < RISING:
        return ""
    return (
        "errors rise with N and with V: if the column `accuracy` holds errors, or `error` holds "
        "accuracies, rename it"
    )


def _lines(path: Path) -> list[tuple[int, Line]]:
    """(line number, fields) of each row of the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path}: not text in UTF-8 ({problem}): save it as UTF-8") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
        return [(reader.line_num, {k: v for k, v in row.items() if k}) for row in reader]
    place = ""
    try:
        if path.suffix == ".json":
            loaded = json.loads(text)
            rows = list(enumerate(loaded if isinstance(loaded, list) else [loaded], 1))
        elif path.suffix in (".jsonl", ".ndjson"):
            rows = []
            for i, line in enumerate(text.splitlines(), 1):
                place = f":{i}"
                if line.strip():
                    rows.append((i, json.loads(line)))
        else:
            raise ValueError(
                f"{path}: unknown table format {path.suffix!r}: give .csv, .jsonl or .json"
            )
    except json.JSONDecodeError as problem:
        raise ValueError(f"{path}{place}: not JSON: {problem}") from None
    if bad := [i for i, row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{path}:{bad[0]}: a row is an object with N, V and error or accuracy")
    return rows


def _score_column(path: Path, lines: Sequence[tuple[int, Line]]) -> str:
    columns = {column for _, line in lines for column in line}
    present = [name for name in SCORES if name in columns]
    missing = [name for name in ("N", "V") if name not in columns]
    if present == ["results"] and missing and path.suffix == ".json":
        raise ValueError(
            f"{path}: an lmms-eval results file does not say how large the LLM is or how many "
            f"visual tokens it saw: add {' and '.join(missing)} at its top level, or list such "
            "files in a table with columns N,V,results"
        )
    if missing:
        raise ValueError(
            f"{path}: column {', '.join(missing)} missing: needed are N, V and one of "
            f"{', '.join(SCORES)}; found {', '.join(sorted(columns))}"
        )
    if len(present) != 1:
        raise ValueError(
            f"{path}: needs exactly one of the columns {', '.join(SCORES)}, has "
            f"{' and '.join(present) or 'none'}; found {', '.join(sorted(columns))}"
        )
    return present[0]


def _scores(
    path: Path, where: int, line: Line, column: str, tasks: Mapping[str, lmms_eval.Task]
) -> list[tuple[str, float, float]]:
    """(family, score, stderr) of one line; several for an lmms-eval file."""
    if column != "results":
        stderr = math.nan
        if line.get("stderr") not in (None, ""):
            stderr = _number(path, where, line, "stderr")
            if stderr < 0:
                raise ValueError(
                    f"{path}:{where}: stderr is {stderr:g}: it cannot be negative; leave it empty "
                    "where it is unknown"
                )
        return [(str(line.get("family") or "all"), _number(path, where, line, column), stderr)]
    results = line.get("results")
    if isinstance(results, str):
        file = path.parent / results
        if not file.exists():
            raise ValueError(f"{path}:{where}: results file {file} does not exist")
        results = json.loads(file.read_text(encoding="utf-8")).get("results")
    if not isinstance(results, dict) or not results:
        raise ValueError(f"{path}:{where}: no `results` of lmms-eval (task -> metrics) found")
    if not (found := lmms_eval.scores(f"{path}:{where}", results, tasks)):
        raise ValueError(f"{path}:{where}: no task of `results` has a metric")
    return found


def has_results(path: str | Path) -> bool:
    """Whether a table's scores are results of lmms-eval."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if Path(path).suffix == ".csv":
        return "results" in [name.strip() for name in text.split("\n", 1)[0].split(",")]
    return '"results"' in text[:20_000]


def _number(path: Path, where: int, line: Line, name: str) -> float:
    value: Any = line.get(name)
    try:
        number = float(value)
    except (TypeError, ValueError):
        shown = "empty" if value in (None, "") else repr(value)
        raise ValueError(
            f"{path}:{where}: {name} is {shown}, a number was expected: write one, or leave the "
            "line out"
        ) from None
    if not math.isfinite(number):
        raise ValueError(
            f"{path}:{where}: {name} is {value}: leave the line out, or measure it again"
        )
    return number


def _unit(path: Path, scores: Sequence[tuple[int, float]], column: str) -> float:
    """The factor that makes fractions of a column: 1, or 0.01 if its scores are percentages.

    `scores` are (line, score).
    """
    for where, score in scores:
        if not 0 <= score <= 100:
            raise ValueError(
                f"{path}:{where}: {column} is {score:g}: give fractions (0..1) or percent (0..100)"
            )
    small = [(where, score) for where, score in scores if 0 < score <= 1]
    large = [(where, score) for where, score in scores if score > 1]
    if small and large:
        raise ValueError(
            f"{path}: {column} is {small[0][1]:g} in line {small[0][0]} and {large[0][1]:g} in "
            f"line {large[0][0]}, {len(small)} values in 0..1 and {len(large)} above 1: {column} "
            "cannot exceed 1, or fractions and percent are mixed; write all of them as fractions"
        )
    return 0.01 if large else 1.0


def size(N: float, n_unit: str | None, where: str) -> float:
    """N in billions; raises ValueError for one that is too large for the unit not to be said."""
    if n_unit is None and N >= LARGEST_N_BILLIONS:
        raise ValueError(
            f"{where}: N = {N:g} billion parameters is more than any LLM has: if N counts "
            "parameters pass --n-unit=parameters, if millions of them --n-unit=millions, if it is "
            "right --n-unit=billions"
        )
    return N * N_UNITS[n_unit or "billions"]
