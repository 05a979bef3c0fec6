# SPDX-License-Identifier: Apache-2.0
"""Reads scores of public benchmarks as points for the law: the averages of arXiv 2411.03312.

A score is the JSON object that `vlm-jax score --model=...` prints, with N (billions), V and
optionally Q, label and seed of the model; or a report of `vlm-jax evaluate --tasks`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.law.points import Cell, Points, of_cells
from vlm_jax.rows import tables

# The paper, section 3.2 and section 4.4; ChartQA counts as reasoning there.
AVERAGES = {
    "reasoning": (
        "mme", "gqa", "ai2d", "mmbench", "mmmu", "scienceqa", "mathvista", "pope", "chartqa",
    ),
    "ocr": ("docvqa", "textvqa"),
}  # fmt: skip
PERCEPTION, WITH_COGNITION = 2000, 2800  # points of MME
UNPUBLISHED = "how the paper maps each score to 0..1 is not published"
PERCENT = "the score is a percentage"
MME = {
    PERCEPTION: "the ten subtasks of perception have 200 points each; without cognition, as in the "
    f"paper's table of methods; {UNPUBLISHED}; --mme=2800 adds cognition",
    WITH_COGNITION: "the ten subtasks of perception and the four of cognition have 200 points "
    f"each; {UNPUBLISHED}",
}
OF_A_TASK = ("protocol", "metric", "n", "files")  # what all scores of one task share
WHOLE_IMAGE = "whole image"  # of evaluate's views; blind and downsampled runs are other models
Place = tuple[float, float, str, int]  # N, V, label, seed


@dataclass(frozen=True)
class Score:
    """One score of one model; value and stderr are fractions, stderr is NaN where unknown."""

    where: str
    task: str
    place: Place
    Q: float | None
    value: float
    stderr: float
    failed: int
    rules: Mapping[str, Any]


@dataclass(frozen=True)
class Averages:
    """Points by average and by task, and what they are made of, for law.json."""

    families: dict[str, Points]
    tasks: dict[str, Points]
    about: dict[str, Any]


def is_scores(path: str | Path) -> bool:
    """Whether a path is a folder, or a file that begins with a score."""
    path = Path(path)
    if path.is_dir():
        return True
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    try:
        first, _ = json.JSONDecoder().raw_decode(path.read_text(encoding="utf-8-sig").lstrip())
    except ValueError:
        return False
    return isinstance(first, dict) and _is_score(first)


def read(
    paths: Sequence[str | Path],
    *,
    n_unit: str | None = None,
    text_tokens: float = 0.0,
    mme: int = PERCEPTION,
) -> Averages:
    """The averages of the scores in files, and in the .json and .jsonl files of folders.

    Args:
      n_unit: of N, a key of `tables.N_UNITS`.
      text_tokens: Q of scores without it.
      mme: the divisor of MME, a key of `MME`.
    Raises:
      ValueError: for a score without N or V, one that is there twice, models with other tasks than
        the first, and scores of one task by two protocols or of other files.
    """
    rows = _rows(paths)
    unused = [where for where, row in rows if not _counts(row)]
    found = [_score(where, row, n_unit, mme) for where, row in rows if _counts(row)]
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no scores of `vlm-jax score` in it")
    check_rules(found)
    by_task: dict[str, dict[Place, Score]] = defaultdict(dict)
    for score in found:
        if (other := by_task[score.task].get(score.place)) is not None:
            raise ValueError(
                f"{score.where}: {score.task} of {_named(score.place)} is also in {other.where}: "
                "keep one, or give the models different seeds or labels"
            )
        by_task[score.task][score.place] = score
    tasks = {
        name: of_cells(_cells({name: scores}, name, text_tokens))
        for name, scores in sorted(by_task.items())
    }
    families, about = {}, {}
    for name, members in _families(by_task).items():
        cells = _cells({task: by_task[task] for task in members}, name, text_tokens)
        families[name] = of_cells(cells)
        about[name] = dict(
            tasks=members, missing=[t for t in AVERAGES.get(name, ()) if t not in members]
        )
    return Averages(families, tasks, dict(
        averages=about,
        divisors={name: _divisor(name, scores, mme) for name, scores in sorted(by_task.items())},
        rules={name: next(iter(s.values())).rules for name, s in sorted(by_task.items())},
        unused=unused,
        failed={n: sum(x.failed for x in s.values()) for n, s in sorted(by_task.items())},
    ))  # fmt: skip


def notes(about: Mapping[str, Any]) -> list[str]:
    """What a reader of the law must know of its averages, in sentences."""
    words = []
    for name, average in about["averages"].items():
        words.append(f"{name} is the mean of {', '.join(average['tasks'])}")
        if average["missing"]:
            words.append(
                f"  it is not the paper's average: it lacks {', '.join(average['missing'])}"
            )
    if about["unused"]:
        words.append(
            "not used, because they have no score or are of blind or smaller images: "
            + ", ".join(about["unused"])
        )
    failed = {name: count for name, count in about["failed"].items() if count}
    if failed:
        words.append(
            "answers that could not be made count as wrong: "
            + ", ".join(f"{count} of {name}" for name, count in failed.items())
        )
    return words


def check_rules(scores: Sequence[Score]) -> None:
    """Raises ValueError unless all scores of a task have one protocol, metric, n and files."""
    first: dict[str, Score] = {}
    for score in scores:
        other = first.setdefault(score.task, score)
        for name in OF_A_TASK:
            if score.rules[name] != other.rules[name]:
                raise ValueError(
                    f"{score.task}: {name} is {_short(other.rules[name])} in {other.where} and "
                    f"{_short(score.rules[name])} in {score.where}: these numbers have no common "
                    "law; score all models by one protocol on the same files"
                )


def _rows(paths: Sequence[str | Path]) -> list[tuple[str, dict[str, Any]]]:
    """(file and line, object) of every score."""
    rows = []
    for given in map(Path, paths):
        inside = (
            [p for p in sorted(given.iterdir()) if p.suffix in (".json", ".jsonl")]
            if given.is_dir()
            else [given]
        )
        for path in inside:
            if given.is_dir() and not is_scores(path):
                continue  # answers, samples and other files of the same folder
            text = path.read_text(encoding="utf-8-sig")
            lines = [text] if path.suffix == ".json" else text.split("\n")
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = str(path) if path.suffix == ".json" else f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as problem:
                    raise ValueError(f"{where}: not JSON, or cut short: {problem}") from None
                if not isinstance(row, dict) or not _is_score(row):
                    raise ValueError(f"{where}: no score of `vlm-jax score`")
                rows.append((where, row))
    return rows


def _is_score(row: Mapping[str, Any]) -> bool:
    report = isinstance(row.get("score", 0), dict | None) and "settings" in row
    return report or {"task", "protocol", "value", "unit", "files"} <= row.keys()


def _counts(row: Mapping[str, Any]) -> bool:
    """Whether a report has a score, of a model that sees whole images; a plain score counts."""
    if "settings" not in row:
        return True
    return row["score"] is not None and row["settings"].get("view", WHOLE_IMAGE) == WHOLE_IMAGE


def _score(where: str, row: Mapping[str, Any], n_unit: str | None, mme: int) -> Score:
    columns = dict(row)
    if "settings" in row:
        columns = {"V": row["settings"].get("visual_tokens")} | row["score"] | columns
    for name in ("N", "V"):
        if not isinstance(columns.get(name), int | float):
            raise ValueError(
                f"{where}: {name} is {columns.get(name)!r:.40}: give the model's size in billions "
                'and visual tokens to the score, as in `vlm-jax score --model="N=7,V=36"`'
            )
    N = tables.size(float(columns["N"]), n_unit, where)
    value, largest = _value(where, columns, mme)
    if not 0 <= value / largest <= 1:
        raise ValueError(f"{where}: {columns['task']} is {value:g}, not in 0..{largest:g}")
    known = columns.get("stderr") is not None and value == columns["value"]
    return Score(
        where=where,
        task=columns["task"],
        place=(N, float(columns["V"]), str(columns.get("label", "")), int(columns.get("seed", 0))),
        Q=None if columns.get("Q") is None else float(columns["Q"]),
        value=value / largest,
        stderr=columns["stderr"] / largest if known else math.nan,
        failed=columns.get("failed", 0),
        rules={name: columns[name] for name in OF_A_TASK},
    )


def _value(where: str, columns: Mapping[str, Any], mme: int) -> tuple[float, float]:
    """A score and its largest value."""
    if not isinstance(columns["value"], int | float):
        raise ValueError(f"{where}: the value is {columns['value']!r:.40}, not a number")
    value = float(columns["value"])
    if columns["task"] == "mme":
        if mme == WITH_COGNITION:
            if "cognition" not in columns.get("subscores", {}):
                raise ValueError(f"{where}: --mme=2800 needs the sub-score cognition")
            value += columns["subscores"]["cognition"]
        return value, float(mme)
    return value, 100.0 if columns["unit"] == "percent" else float(columns["n"])


def _divisor(name: str, scores: Mapping[Place, Score], mme: int) -> dict[str, Any]:
    if name == "mme":
        return dict(divisor=mme, reason=MME[mme])
    if name == "ocrbench":
        n = next(iter(scores.values())).rules["n"]
        return dict(divisor=n, reason="one point for each question")
    return dict(divisor=100, reason=PERCENT)


def _families(by_task: Mapping[str, Any]) -> dict[str, list[str]]:
    """The paper's averages over those of their tasks that are there; else the mean of all."""
    families = {
        name: [task for task in members if task in by_task] for name, members in AVERAGES.items()
    }
    families = {name: members for name, members in families.items() if members}
    return families or {f"mean of {', '.join(sorted(by_task))}": sorted(by_task)}


def _cells(
    by_task: Mapping[str, Mapping[Place, Score]], name: str, text_tokens: float
) -> list[Cell]:
    """One cell for each model, with its mean Q over the tasks."""
    places = dict.fromkeys(place for scores in by_task.values() for place in scores)
    cells = []
    for place in places:
        if missing := [task for task, scores in by_task.items() if place not in scores]:
            raise ValueError(
                f"{_named(place)} has no score of {', '.join(missing)}, which others have: {name} "
                "is a mean over the same tasks; score them, or leave the task out of the files"
            )
        of = {task: scores[place] for task, scores in by_task.items()}
        if 0 < sum(s.Q is None for s in of.values()) < len(of):
            raise ValueError(
                f"{_named(place)} has Q in the scores of some tasks of {name} and not in others: "
                "give it to all or to none"
            )
        tokens = [text_tokens if s.Q is None else float(s.Q) for s in of.values()]
        cells.append(
            Cell(
                N=place[0],
                V=place[1],
                Q=sum(tokens) / len(tokens),
                label=place[2],
                seed=place[3],
                errors={task: (1 - s.value, s.stderr) for task, s in of.items()},
            )
        )
    return cells


def _named(place: Place) -> str:
    N, V, label, seed = place
    return f"{label or 'the model'} (N={N:g}, V={V:g}, seed {seed})"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{file['name']} {file['sha256'][:12]}" for file in value)
    return repr(value)
