# SPDX-License-Identifier: Apache-2.0
"""Results of lmms-eval as scores: which metric of a task counts, its maximum and its family."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_jax.law.points import Cell

FILE = Path(__file__).with_name("lmms_eval.toml")
# Metrics that lmms-eval reports as fractions in every task that has them.
FRACTIONS = (
    "exact_match", "acc", "acc_norm", "accuracy", "anls", "relaxed_accuracy", "relaxed_overall",
)  # fmt: skip
FIELDS: dict[str, tuple[type, ...]] = {
    "family": (str,), "metrics": (list,), "divisor": (int, float),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One task of lmms-eval, see lmms_eval.toml."""

    family: str
    metrics: tuple[str, ...]
    divisor: float = 1.0


def table(path: str | Path | None = None) -> dict[str, Task]:
    """Task -> how it is read, from FILE and, over it, from a file of the same form.

    Raises ValueError for unknown fields and a divisor that is not positive.
    """
    tasks: dict[str, Task] = {}
    for file in (FILE, path):
        if file is None:
            continue
        try:
            with open(file, "rb") as opened:
                found = tomllib.load(opened)
        except tomllib.TOMLDecodeError as problem:
            raise ValueError(f"{file}: not TOML: {problem}") from None
        for name, fields in found.items():
            tasks[name] = _task(f"{file}: [{name}]", name, fields)
    return tasks


def _task(where: str, name: str, fields: Any) -> Task:
    if not isinstance(fields, dict):
        raise ValueError(f'{where}: a task is a section, as in [gqa] and metrics = ["exact_match"]')
    for key, value in fields.items():
        if key not in FIELDS or not isinstance(value, FIELDS[key]):
            raise ValueError(
                f"{where}: {key} = {value!r}: a task has family (text), metrics (a list of names) "
                "and divisor (a number)"
            )
    divisor = float(fields.get("divisor", 1.0))
    metrics = tuple(str(metric) for metric in fields.get("metrics", ()))
    if not divisor > 0 or not metrics:
        raise ValueError(
            f"{where}: needs one of metrics or more and a divisor above 0, got {list(metrics)} and "
            f"{divisor:g}"
        )
    return Task(fields.get("family", name), metrics, divisor)


def scores(
    where: str, results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task]
) -> list[tuple[str, float, float]]:
    """(task, score, stderr) of every task that has a metric; fractions, stderr nan where unknown.

    A group of tasks has an entry of its own without any metric: its tasks follow. Raises ValueError
    for a metric that cannot be told, without a known maximum, or outside it.
    """
    return [
        (name, *_score(f"{where}: task {name}", name, metrics, tasks.get(name)))
        for name, metrics in results.items()
        if any("," in key for key in metrics)
    ]


def _score(
    where: str, name: str, metrics: Mapping[str, Any], task: Task | None
) -> tuple[float, float]:
    values = {
        key: float(value)
        for key, value in metrics.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    way_out = (
        f'keep one in the file, or name it in a table for --tasks: [{name}] metrics = ["NAME"], '
        "divisor = its largest value"
    )
    plain = list(dict.fromkeys(key.split(",")[0] for key in values))
    wanted = task.metrics if task else plain
    chosen = next((n for n in wanted if n in values or n in plain), None)
    if chosen is None or (task is None and len(plain) > 1):
        raise ValueError(f"{where} has metrics {', '.join(plain) or 'none'}: {way_out}")
    keys = [chosen] if chosen in values else [k for k in values if k.split(",")[0] == chosen]
    if len(keys) > 1:
        raise ValueError(f"{where} has {chosen} by several filters, {', '.join(keys)}: {way_out}")
    (key,) = keys
    metric, its_filter = key.split(",", 1)
    if task is None and metric not in FRACTIONS:
        raise ValueError(f"{where}: the largest value of {metric} is not known: {way_out}")
    divisor = task.divisor if task else 1.0
    if not 0 <= values[key] <= divisor:
        raise ValueError(
            f"{where}: {name}'s {metric} = {values[key]:g} is not in 0..{divisor:g}: "
            "if it is counted otherwise, give its divisor in a table for --tasks"
        )
    stderr = metrics.get(f"{metric}_stderr,{its_filter}")  # lmms-eval writes "N/A" for none
    spread = float(stderr) if isinstance(stderr, int | float) else math.nan
    return values[key] / divisor, spread / divisor


def families(cells: Sequence[Cell], tasks: Mapping[str, Task]) -> tuple[list[Cell], list[str]]:
    """The cells with the mean of each family for its tasks, and what the families are, in words.

    Standard errors are combined as independent. Raises ValueError for a cell without a task that
    others have: means over different tasks have no common law.
    """
    every = list(dict.fromkeys(name for cell in cells for name in cell.errors))
    grouped: dict[str, list[str]] = {}
    for name in every:
        grouped.setdefault(tasks[name].family if name in tasks else name, []).append(name)
    for cell in cells:
        if missing := [name for name in every if name not in cell.errors]:
            raise ValueError(
                f"N={cell.N:g}, V={cell.V:g} has no result of {', '.join(missing)}, which others "
                "have: a family is a mean over the same tasks; evaluate it, or drop the task"
            )
    made = []
    for cell in cells:
        means = {}
        for family, names in grouped.items():
            errors, stderrs = zip(*(cell.errors[name] for name in names), strict=True)
            spread = math.sqrt(sum(s * s for s in stderrs)) / len(names)
            means[family] = sum(errors) / len(names), spread
        made.append(replace(cell, errors=means))
    words = [f"{family} is the mean of {', '.join(names)}" for family, names in grouped.items()]
    return made, words
