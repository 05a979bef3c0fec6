# SPDX-License-Identifier: Apache-2.0
"""Tables of scores: every method side by side, and a line for each row."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlm_jax import files
from vlm_jax.compressors.kinds import kind_of
from vlm_jax.reports import findings
from vlm_jax.reports.cost_figures import PHASES
from vlm_jax.reports.run import Run, mean_over_seeds
from vlm_jax.reports.tables import (
    MOST_FIRST,
    Table,
    TableCell,
    amount,
    numeral,
    parameters,
    seconds,
    words,
)

MOST_WIDE = 100  # rows: of more, a page holds the columns that come first, and cells.csv all


def score_cell(score: Mapping | None) -> TableCell:
    """A score with its standard error, or a dash."""
    if score is None:
        return numeral(None)
    return TableCell(f"{score['score']:.3f} ± {score['stderr']:.3f}", score["score"])


def margin_cell(row, family: str, blind: Mapping) -> TableCell:
    """A row's score minus the blind score of its LLM; open within 1.96 standard errors."""
    if row.blind or family not in row.families or row.llm not in blind:
        return numeral(None)
    score = row.families[family]
    difference, spread = findings.margin((score["score"], score["stderr"]), blind[row.llm])
    text = f"{difference:+.3f} ± {spread:.3f}".replace("-", "−")
    return TableCell(text, difference, open=difference <= findings.SURE * spread)


def methods(run: Run) -> Table:
    """Scores by method and V, one line each; means over LLMs first, then each family and LLM."""
    llms = list(dict.fromkeys(r.llm for r in sorted(run.rows, key=lambda r: r.llm_parameters)))
    grouped = {}
    for row in run.rows:
        # A blind model reads no image, whatever its V.
        key = ("blind", None) if row.blind else (row.method, row.V)
        grouped.setdefault(key, {}).setdefault(row.llm, []).append(row)
    if not grouped:
        return Table("", [], [])
    several = len(llms) > 1
    titles = ["method", "kind", "V"] + [f"{family}, mean" for family in run.families if several]
    titles += ["question pass, FLOPs", "request, FLOPs"]
    titles += [f"{family}, {llm}" for family in run.families for llm in llms] + ["seeds"]
    order = {"blind": 2, run.method: 0}
    lines = []
    for (method, V), by_llm in sorted(
        grouped.items(), key=lambda item: (order.get(item[0][0], 1), item[0][0], item[0][1] or 0)
    ):
        scores_of = {
            (family, llm): mean_over_seeds([row.families[family] for row in rows])
            for family in run.families
            for llm, rows in by_llm.items()
            if all(family in row.families for row in rows)
        }
        kinds = {kind_of(row.compressor) for rows in by_llm.values() for row in rows}
        line = [words(method), words("" if V is None else ", ".join(sorted(kinds)))]
        line.append(numeral(V, V and f"{V:.4g}"))
        for family in run.families if several else ():
            scores = [scores_of.get((family, llm)) for llm in llms]
            line.append(mean_cell(None if None in scores else mean_of(scores)))
        largest = [row for row in by_llm.get(llms[-1], ()) if method != "blind"]
        for total in (lambda row: row.flops["question"], lambda row: sum(row.flops.values())):
            line.append(amount(np.mean([total(row) for row in largest]) if largest else None))
        line += [mean_cell(scores_of.get((family, llm))) for family in run.families for llm in llms]
        counts = sorted({len(rows) for rows in by_llm.values()})
        seeds = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
        lines.append([*line, numeral(counts[-1], seeds)])
    caption = (
        "Score of each method at each V. Fractions ± one standard error, of the test questions and "
        "of the seeds where there are several; a mean is over all LLMs, and missing where one is; "
        f"FLOPs are of one request at {llms[-1]}. The law is fitted to the lines of "
        f"{run.method or 'no method yet'} alone."
    )
    scores = [t for t in titles if t.endswith(", mean")] or [
        f"{f}, {llms[0]}" for f in run.families
    ]
    first = ["method", "kind", "V", *scores[: MOST_FIRST - 5], "request, FLOPs", "seeds"]
    return Table(caption, titles, lines, first=first)


def mean_of(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of (score, standard error) pairs, as if they were independent."""
    values, errors = np.array(scores).T
    return float(values.mean()), float(np.sqrt((errors**2).sum()) / len(errors))


def mean_cell(score: tuple[float, float] | None) -> TableCell:
    """A (score, standard error) pair, or a dash."""
    return score_cell(score and {"score": score[0], "stderr": score[1]})


def names(rows: Sequence) -> tuple[list[str], list[str]]:
    """Families and tasks that occur in any row."""
    families = sorted({family for row in rows for family in row.families})
    return families, sorted({task for row in rows for task in row.tasks})


def row_table(caption: str, rows: Sequence, all_rows: Sequence) -> Table:
    """One line per row, with the blind score of its LLM for each family, from `all_rows`."""
    families, tasks = names(all_rows)
    blind = {
        family: findings.blind_scores([row for row in all_rows if row.blind], family)
        for family in families
    }
    several = any(row.frames != 1 for row in all_rows)
    titles = ["cell", "LLM", "N, parameters", "V", *["frames"] * several, "seed", "method"]
    for family in families:
        titles += [family, f"{family}, blind", f"{family}, above blind"]
    titles += [*tasks, "Q, tokens", "G, tokens"]
    titles += [f"{phase}, FLOPs" for phase in PHASES] + ["request, FLOPs"]
    titles += ["training steps", "training, FLOPs", "training time", "evaluation time"]
    lines = []
    for row in rows:
        line = [words(row.cell), words(row.llm), parameters(row.llm_parameters)]
        line += [numeral(row.V, f"{row.V:.4g}")]
        line += [numeral(row.frames, str(row.frames))] * several
        line += [numeral(row.seed, str(row.seed)), words(kind(row))]
        for family in families:
            floor = blind[family].get(row.llm)
            line.append(score_cell(row.families.get(family)))
            line.append(mean_cell(floor))
            line.append(margin_cell(row, family, blind[family]))
        line += [score_cell(row.tasks.get(task)) for task in tasks]
        line += [numeral(row.Q), numeral(row.G)]
        phases = [row.flops.get(phase) for phase in PHASES]
        line += [amount(value) for value in (*phases, sum(row.flops.values()))]
        steps = row.train.get("steps")
        line += [numeral(steps, steps and f"{steps:,}"), amount(row.train.get("flops"))]
        line += [seconds(row.train.get("seconds")), seconds(row.evaluate_seconds)]
        lines.append(line)
    above = [f"{family}, above blind" for family in families if any(blind.values())]
    first = ["cell", "N, parameters", "V", *[*families, *above][: MOST_FIRST - 4], "request, FLOPs"]
    return Table(caption, titles, lines, keys=[row.cell for row in rows], first=first)


def kind(row) -> str:
    """The method of a row, or "blind"."""
    return "blind" if row.blind else row.method


def write_csv(table: Table, path: Path) -> None:
    """Every cell of a table by its sort key, which is the number or the text itself."""
    with files.writing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.titles)
        writer.writerows([cell.sort for cell in row] for row in table.rows)
