# SPDX-License-Identifier: Apache-2.0
"""The page of one run: question, answer, figures, tables, how it was made, how to repeat it.

Values are collected here; templates/page.html defines the layout, style.css the appearance.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np

from vlm_jax.reports import findings, pair, score_tables
from vlm_jax.reports.amounts import seconds_text
from vlm_jax.reports.canvas import Figure
from vlm_jax.reports.run import Run
from vlm_jax.reports.tables import Table, TableCell, numeral, words

MOST_VALUES = 5  # of one fact; more are counted instead of listed
QUESTION = "For a given inference budget, which language model and how many visual tokens?"
# Field of a row about its origin -> its name on the page.
ORIGIN = {
    "commit": "commit", "config_hash": "configuration (hash)", "data_hash": "data (hash)",
    "machine": "machine", "seed": "seed", "protocol": "protocol", "prompt": "prompt",
    "parser": "answer parser",
}  # fmt: skip
KINDS = {".svg": "image/svg+xml", ".csv": "text/csv;charset=utf-8"}
# Percent signs stand for these in a data: URI of text, which is a quarter shorter than base64.
KEPT = " /:;,=!?()[]{}@$*+~|^'&"
# Figures that are shown; the others of a family are folded.
FIRST = ("_scores", "_methods", "_flops_measured_q", "_optimal_v", "_total_flops")


def data_uri(file: Path) -> str:
    """A file of text as a data: URI."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".svg":
        # A double quote takes three letters here; an SVG has many, and few single ones in them.
        text = text.replace("\n", " ").translate({ord("'"): '"', ord('"'): "'"})
    # The names of XML's spaces look like addresses, of which the page has none.
    text = quote(text, safe=KEPT).replace("http:", "http%3A")
    return f"data:{KINDS[file.suffix]},{text}"


def size(svg: Path) -> dict[str, int]:
    """Width and height of an SVG, so that the page does not move while it loads."""
    sides = re.search(r'<svg[^>]* width="(.+?)pt" height="(.+?)pt"', svg.read_text())
    return {"width": round(float(sides[1])), "height": round(float(sides[2]))}


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # for every template, whatever its suffix
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Orders mean something: of compressors, of families. "<" and "&" are escaped by `tojson`.
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False}
TEMPLATES.filters |= {"data_uri": data_uri, "size": size}


def build(
    run: Run,
    laws: Mapping,
    figures: Sequence[Figure],
    *,
    reasons: Mapping[str, str],
    majority: Mapping[str, int | float],
    name: str,
    facts: Mapping,
    missing: str = "",
    planner: Mapping | None = None,
    no_planner: str = "",
    frames: str = "",
) -> str:
    """The HTML of one run.

    Args:
        run: all results rows; `laws` family -> Law; `reasons` family -> why it has none.
        majority: task -> score of always giving its commonest answer.
        name: of the run, for the lead.
        facts: how the run was started: "command", "config", "phases" (name -> seconds).
        missing: why there are no figures, or "".
        planner: the data of `planning.exported.data`; None without, `no_planner` says why.
        frames: of which clips the rows are, in a sentence; "" for images.
    """
    rows = run.rows
    sentences = findings.derive(run, laws, reasons=reasons, majority=by_family(rows, majority))
    at_equal_cost, without_pair = pair.pairs(run)
    created = max((row.created for row in rows), default="")
    return TEMPLATES.get_template("page.html").render(
        question=QUESTION,
        lead=f"Run {name}, {len(rows)} finished cells{created and ', last at '}{created}."
        f"{frames and ' '}{frames}",
        pairs=at_equal_cost,
        without_pair=without_pair,
        planner=planner,
        no_planner=no_planner,
        answer=_grouped(sentences.answer),
        shows=_grouped(sentences.shows),
        open=_grouped(sentences.open),
        galleries=_galleries(figures),
        missing=missing,
        methods=score_tables.methods(run),
        cells=_cells(run),
        baselines=_baselines(run),
        commonest=_commonest(majority),
        fitted_to=_fitted_to(run),
        reasons=sorted(reasons.items()),
        laws=_laws(run, laws),
        notes=[(family, law.notes) for family, law in sorted(laws.items()) if law.notes],
        tasks=_tasks(run, majority),
        origin=_origin(rows, facts),
        commit=next((commit for commit, _ in _distinct(row.commit for row in rows)), ""),
        command=facts.get("command"),
    )


def by_family(rows: Sequence, majority: Mapping[str, int | float]) -> dict[str, float]:
    """Family -> mean score of commonest answers over its tasks, if every task has one."""
    tasks = {}
    for row in rows:
        for task, score in row.tasks.items():
            tasks.setdefault(score["family"], set()).add(task)
    return {
        family: float(np.mean([majority[task] for task in sorted(members)]))
        for family, members in tasks.items()
        if members <= majority.keys()
    }


def _grouped(sentences: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(family, its sentences), those about all families last."""
    families = sorted({family for family, _ in sentences}, key=lambda family: (not family, family))
    return [
        (family, [sentence for about, sentence in sentences if about == family])
        for family in families
    ]


def _galleries(figures: Sequence[Figure]) -> list[tuple[str, list[Figure], list[Figure]]]:
    """(family, figures that are shown, figures that are folded)."""
    galleries = {}
    for figure in figures:
        first, rest = galleries.setdefault(figure.section, ([], []))
        is_first = not figure.section or figure.name.endswith(FIRST)
        (first if is_first else rest).append(figure)
    return [(family, *parts) for family, parts in galleries.items()]


def _cells(run: Run) -> Table:
    caption = (
        f"Cells of the grid: {run.method}. Scores are fractions ± one standard error of the test "
        "questions; a gray margin above the blind score of the same LLM is within 1.96 standard "
        "errors. FLOPs are per request. A button in the head sorts."
    )
    kept = sorted(run.main, key=lambda r: (r.llm_parameters, r.V, r.seed))
    return _narrow(score_tables.row_table(caption, kept, run.rows))


def _narrow(table: Table) -> Table:
    """The same, without the columns that fold out if there are too many rows for a page."""
    if len(table.rows) <= score_tables.MOST_WIDE:
        return table
    more = f"The other {sum(table.folded)} columns are in cells.csv beside the page."
    return replace(table.narrow, caption=f"{table.caption} {more}")


def _baselines(run: Run) -> Table:
    caption = (
        "Baseline cells. Blind models see the mean image instead of the image; the other "
        "methods are next to the grid's own at the same LLM and V."
    )
    others = [*run.blind, *run.other]
    kept = sorted(others, key=lambda r: (score_tables.kind(r), r.llm_parameters, r.V, r.seed))
    return _narrow(score_tables.row_table(caption, kept, run.rows))


def _commonest(majority: Mapping[str, int | float]) -> Table:
    lines = [[words(t), numeral(s, f"{s:.3f}")] for t, s in sorted(majority.items())]
    return Table("Always giving the commonest answer of a task.", ["task", "score"], lines)


def _laws(run: Run, laws: Mapping) -> Table:
    names = list(dict.fromkeys(name for law in laws.values() for name in law.params))
    titles = ["family", "form", *names, "best V at the measured Q", "misfit (RMSE)", "points"]
    lines = [_law_line(family, law, names, run) for family, law in sorted(laws.items())]
    caption = (
        "Parameters of the fitted law. Each is followed by its 95 % interval. N is in billions "
        "of parameters; the best V minimizes the error at fixed 2N(Q+V) within the measured V."
    )
    first = ["family", "form", *[n for n in ("alpha", "beta", "D") if n in names], *titles[-3:]]
    return Table(caption, titles, lines, first=first)


def _fitted_to(run: Run) -> str:
    """Which rows the law was fitted to, and which it leaves out."""
    if not run.main:
        return ""
    sentence = f"The law is fitted to the {len(run.main)} rows of {run.method}."
    others = sorted(Counter(row.method for row in run.other).items())
    counts = [f"{count} of {method}" for method, count in others]
    counts += [f"{len(run.blind)} of blind models"] * bool(run.blind)
    return sentence + (f" Not used: {', '.join(counts)}." if counts else "")


def _law_line(family: str, law, names: Sequence[str], run: Run) -> list[TableCell]:
    line = [words(family), words(law.form)]
    for name in names:
        value, ends = law.params.get(name), law.intervals.get(name)
        text = value is not None and findings.number(value)
        line.append(numeral(value, text and text + (f" {findings.interval(ends)}" if ends else "")))
    best = findings.best_tokens(law, [row for row in run.main if family in row.families])
    line.append(numeral(best and best[0], best and f"{best[0]:.0f} [{best[1]:.0f}, {best[2]:.0f}]"))
    return [*line, numeral(law.rmse), numeral(law.n, str(law.n))]


def _tasks(run: Run, majority: Mapping[str, int | float]) -> Table:
    rows, lines = run.rows, []
    for task in score_tables.names(rows)[1]:
        example = next(row.tasks[task] for row in rows if task in row.tasks)
        of_grid = [row.tasks[task] for row in run.main if task in row.tasks]
        of_blind = [row.tasks[task] for row in run.blind if task in row.tasks]
        counts = sorted({row.tasks[task]["n"] for row in rows if task in row.tasks})
        best = max(of_grid, key=lambda s: s["score"], default=None)
        worst = min(of_grid, key=lambda s: s["score"], default=None)
        blind = max(of_blind, key=lambda s: s["score"], default=None)
        line = [words(task), words(example["family"]), words(example["metric"])]
        line.append(numeral(counts[-1], " or ".join(map(str, counts))))
        line += [score_tables.score_cell(score) for score in (worst, best, blind)]
        lines.append([*line, numeral(majority.get(task))])
    caption = "Tasks and the range of their scores over the grid; blind is the best blind model."
    titles = ["task", "family", "metric", "questions"]
    titles += ["worst cell", "best cell", "blind", "commonest"]
    return Table(caption, titles, lines)


def _origin(rows: Sequence, of_run: Mapping) -> Table:
    """The origin of the rows; if rows differ, every value with the number of its rows."""
    facts = []
    for field, title in ORIGIN.items():
        values = _distinct(getattr(row, field) for row in rows)
        if len(values) > MOST_VALUES:  # every cell has its own configuration
            values = [(f"{len(values)} different ones, in rows.jsonl", len(rows))]
        facts += [(title, *value) for value in values]
    for library in sorted({library for row in rows for library in row.versions}):
        counted = _distinct(row.versions.get(library, "not recorded") for row in rows)
        facts += [(f"version of {library}", *values) for values in counted]
    if of_run.get("config"):
        facts.append(("configuration", str(of_run["config"]), None))
    # Rows of several V may share a model: its training counts once.
    spent = {row.trained_with or row.cell: row.train.get("seconds") or 0 for row in rows}
    facts.append(("training of all cells", seconds_text(sum(spent.values())), None))
    for phase, seconds in (of_run.get("phases") or {}).items():
        facts.append((f"wall time: {phase}", seconds_text(float(seconds)), None))
    lines = [[words(title), words(value), numeral(n, n and str(n))] for title, value, n in facts]
    caption = "Origin of every number above. A fact with several lines differs between rows."
    return Table(caption, ["what", "value", "rows"], lines)


def _distinct(values) -> list[tuple[str, int]]:
    return Counter(map(str, values)).most_common()
