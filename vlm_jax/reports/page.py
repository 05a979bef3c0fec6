# SPDX-License-Identifier: Apache-2.0
"""The page of one run: question, answer, figures, tables, how it was made, how to repeat it."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from vlm_jax.reports import findings, markup, score_tables
from vlm_jax.reports.canvas import Figure, seconds_text
from vlm_jax.reports.markup import Cell, numeral, words
from vlm_jax.reports.run import Run

MOST_VALUES = 5  # of one fact, before they are counted instead of listed
QUESTION = "For a given inference budget, which language model and how many visual tokens?"
# Figures that a reader wants first; the others of a family are folded away.
FIRST = ("_scores", "_methods", "_flops_measured_q", "_optimal_v", "_total_flops")


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
) -> str:
    """The HTML of one run.

    Args:
        run: every results row, parted; `laws` family -> Law; `reasons` family -> why it has none.
        majority: task -> score of always giving its commonest answer.
        name: of the run, for the lead.
        facts: what is known of how it was started: "command", "config", "phases" (name -> seconds).
        missing: why nothing could be drawn, where that is so.
    """
    rows = run.rows
    said = findings.derive(run, laws, reasons=reasons, majority=by_family(rows, majority))
    parts = [
        ("answer", "The answer of this run", _answer(said)),
        ("figures", "Figures", _figures(figures, missing)),
        ("methods", "Methods side by side", score_tables.methods(run)),
        ("cells", "All cells", _cells(run)),
        ("baselines", "Baselines", _baselines(run, majority)),
        ("law", "The law's parameters", _laws(run, laws, reasons)),
        ("tasks", "Tasks", _tasks(run, majority)),
        ("made", "How it was made", _made(rows, facts)),
        ("repeat", "How to repeat it", _repeat(rows, facts)),
    ]
    created = max((row.created for row in rows), default="")
    lead = f"Run {name}, {len(rows)} finished cells" + (f", last at {created}." if created else ".")
    return markup.page(QUESTION, lead, parts)


def by_family(rows: Sequence, majority: Mapping[str, int | float]) -> dict[str, float]:
    """Family -> mean score of commonest answers over its tasks, where every task has one."""
    tasks = {}
    for row in rows:
        for task, score in row.tasks.items():
            tasks.setdefault(score["family"], set()).add(task)
    return {
        family: float(np.mean([majority[task] for task in sorted(members)]))
        for family, members in tasks.items()
        if members <= majority.keys()
    }


def _answer(said: findings.Findings) -> str:
    note = (
        "Brackets hold 95 % intervals; ± is one standard error. N is LLM parameters, V visual "
        "and Q text tokens."
    )
    parts = [f'<p class="soft">{note}</p>', _sentences(said.answer)]
    for title, sentences in (
        ("What this run shows", said.shows),
        ("What it does not show", said.open),
    ):
        nothing = "<p>Nothing that its intervals allow to say.</p>"
        parts.append(f"<h3>{title}</h3>" + (_sentences(sentences) if sentences else nothing))
    return "\n".join(parts)


def _sentences(said: Sequence[tuple[str, str]]) -> str:
    """Sentences grouped by family, those about all families last."""
    families = sorted(dict.fromkeys(family for family, _ in said), key=lambda f: (not f, f))
    parts = []
    for family in families:
        mine = [sentence for about, sentence in said if about == family]
        head = f"<dt>{escape(family or 'all families')}</dt>"
        parts.append(head + "".join(f"<dd>{escape(sentence)}</dd>" for sentence in mine))
    return f"<dl>{''.join(parts)}</dl>"


def _figures(figures: Sequence[Figure], missing: str) -> str:
    if not figures:
        why = missing or "no cell is finished, so there is nothing to draw."
        return f"<p>None: {escape(why)}</p>"
    parts = []
    for family in dict.fromkeys(figure.section for figure in figures):
        mine = [figure for figure in figures if figure.section == family]
        first = [f for f in mine if not family or f.name.endswith(FIRST)]
        rest = [f for f in mine if f not in first]
        parts.append(f"<h3>{escape(family or 'All families')}</h3>" + _gallery(first))
        if rest:
            about = "the paper's Q = 0 and 50, extrapolation, other costs"
            parts.append(
                f"<details><summary>{len(rest)} more figures of {escape(family)}: {about}</summary>"
                f"{_gallery(rest)}</details>"
            )
    return "\n".join(parts)


def _gallery(figures: Sequence[Figure]) -> str:
    return '<div class="figures">' + "\n".join(markup.figure(f) for f in figures) + "</div>"


def _cells(run: Run) -> str:
    if not run.main:
        return "<p>No cell of the grid is finished.</p>"
    caption = (
        f"Cells of the grid: {run.method}. Scores are fractions ± one standard error of the test "
        "questions; a grey margin above the blind score of the same LLM is within 1.96 standard "
        "errors. FLOPs are per request. A button in the head sorts."
    )
    kept = sorted(run.main, key=lambda r: (r.llm_parameters, r.V, r.seed))
    return score_tables.row_table(caption, kept, run.rows)


def _baselines(run: Run, majority: Mapping[str, int | float]) -> str:
    parts = []
    if others := [*run.blind, *run.other]:
        caption = (
            "Baseline cells. Blind models see the mean image instead of the image; the other "
            "methods stand beside the grid's own at the same LLM and V."
        )
        kept = sorted(others, key=lambda r: (score_tables.kind(r), r.llm_parameters, r.V, r.seed))
        parts.append(score_tables.row_table(caption, kept, run.rows))
    else:
        parts.append("<p>No blind model and no other method was run.</p>")
    if majority:
        caption = "Always giving the commonest answer of a task."
        lines = [[words(t), numeral(s, f"{s:.3f}")] for t, s in sorted(majority.items())]
        parts.append(markup.table(caption, ["task", "score"], lines))
    else:
        parts.append("<p>The score of always giving the commonest answer was not recorded.</p>")
    return "\n".join(parts)


def _laws(run: Run, laws: Mapping, reasons: Mapping[str, str]) -> str:
    parts = [f"<p>{escape(_rows_of_the_law(run))}</p>"] if run.main else []
    parts += [
        f"<p>{escape(family)}: no law. {escape(why)}</p>" for family, why in sorted(reasons.items())
    ]
    if laws:
        names = list(dict.fromkeys(name for law in laws.values() for name in law.params))
        titles = ["family", "form", *names, "best V at the measured Q", "misfit (RMSE)", "points"]
        lines = [_law_line(family, law, names, run) for family, law in sorted(laws.items())]
        caption = (
            "Parameters of the fitted law. Each has its 95 % interval beside it. N is in billions "
            "of parameters; the best V minimises the error at fixed 2N(Q+V) within the measured V."
        )
        parts.append(markup.table(caption, titles, lines))
        parts += [_notes(family, law) for family, law in sorted(laws.items())]
    return "\n".join(parts)


def _rows_of_the_law(run: Run) -> str:
    """Which rows the law was fitted to, and which it leaves out."""
    said = f"The law is fitted to the {len(run.main)} rows of {run.method}."
    left = {method: 0 for method in sorted({row.method for row in run.other})}
    for row in run.other:
        left[row.method] += 1
    counts = [f"{count} of {method}" for method, count in left.items()]
    counts += [f"{len(run.blind)} of blind models"] * bool(run.blind)
    return said + (f" Not used: {', '.join(counts)}." if counts else "")


def _law_line(family: str, law, names: Sequence[str], run: Run) -> list[Cell]:
    line = [words(family), words(law.form)]
    for name in names:
        value, ends = law.params.get(name), law.intervals.get(name)
        text = value is not None and findings.number(value)
        line.append(numeral(value, text and text + (f" {findings.interval(ends)}" if ends else "")))
    best = findings.best_tokens(law, [row for row in run.main if family in row.families])
    line.append(numeral(best and best[0], best and f"{best[0]:.0f} [{best[1]:.0f}, {best[2]:.0f}]"))
    return [*line, numeral(law.rmse), numeral(law.n, str(law.n))]


def _notes(family: str, law) -> str:
    notes = [law.notes] if isinstance(law.notes, str) else list(law.notes or ())
    return f"<h3>{escape(family)}</h3>" + markup.bullets(notes) if notes else ""


def _tasks(run: Run, majority: Mapping[str, int | float]) -> str:
    rows, lines = run.rows, []
    for task in score_tables.names(rows)[1]:
        known = next(row.tasks[task] for row in rows if task in row.tasks)
        seen = [row.tasks[task] for row in run.main if task in row.tasks]
        floor = [row.tasks[task] for row in run.blind if task in row.tasks]
        counts = sorted({row.tasks[task]["n"] for row in rows if task in row.tasks})
        best = max(seen, key=lambda s: s["score"], default=None)
        worst = min(seen, key=lambda s: s["score"], default=None)
        line = [words(task), words(known["family"]), words(known["metric"])]
        line += [
            numeral(counts[-1], " or ".join(map(str, counts))),
            score_tables.score_cell(worst),
            score_tables.score_cell(best),
        ]
        line.append(score_tables.score_cell(max(floor, key=lambda s: s["score"], default=None)))
        lines.append([*line, numeral(majority.get(task))])
    caption = "Tasks and the range of their scores over the grid; blind is the best blind model."
    titles = [
        "task",
        "family",
        "metric",
        "questions",
        "worst cell",
        "best cell",
        "blind",
        "commonest",
    ]
    return markup.table(caption, titles, lines) if lines else "<p>No task was scored yet.</p>"


def _made(rows: Sequence, run_facts: Mapping) -> str:
    """What made the rows; where rows disagree, every value with the number of rows that have it."""
    facts = []
    for title, field in (
        ("commit", "commit"),
        ("configuration (hash)", "config_hash"),
        ("data (hash)", "data_hash"),
        ("machine", "machine"),
        ("seed", "seed"),
        ("protocol", "protocol"),
        ("prompt", "prompt"),
        ("answer parser", "parser"),
    ):
        found = _distinct(getattr(row, field) for row in rows)
        if len(found) > MOST_VALUES:  # every cell has a configuration of its own
            found = [(f"{len(found)} different ones, in rows.jsonl", len(rows))]
        facts += [(title, *value) for value in found]
    for library in sorted({library for row in rows for library in row.versions}):
        counted = _distinct(row.versions.get(library, "not recorded") for row in rows)
        facts += [(f"version of {library}", *found) for found in counted]
    if run_facts.get("config"):
        facts.append(("configuration", str(run_facts["config"]), None))
    # Rows of several V may share a model: its training counts once.
    spent = {row.trained_with or row.cell: row.train.get("seconds") or 0 for row in rows}
    facts.append(("training of all cells", seconds_text(sum(spent.values())), None))
    for phase, seconds in (run_facts.get("phases") or {}).items():
        facts.append((f"wall time: {phase}", seconds_text(float(seconds)), None))
    lines = [[words(title), words(value), numeral(n, n and str(n))] for title, value, n in facts]
    caption = "Origin of every number above. A fact with several lines differs between rows."
    return markup.table(caption, ["what", "value", "rows"], lines)


def _distinct(values) -> list[tuple[str, int]]:
    found = {}
    for value in values:
        found[str(value)] = found.get(str(value), 0) + 1
    return sorted(found.items(), key=lambda item: -item[1])


def _repeat(rows: Sequence, facts: Mapping) -> str:
    command = facts.get("command")
    commits = [commit for commit, _ in _distinct(row.commit for row in rows)]
    parts = []
    if commits:
        # Rows made with an installed package name its version.
        way = "Install" if commits[0].startswith("vlm_jax ") else "Check out commit"
        parts.append(f"<p>{way} <code>{escape(commits[0])}</code> and run:</p>")
    if command:
        parts.append(f"<pre><code>{escape(str(command))}</code></pre>")
        parts.append(
            "<p>The same command in the same folder continues a run that was stopped; finished "
            "cells are not repeated.</p>"
        )
    else:
        parts.append("<p>The command that started this run was not recorded.</p>")
    parts.append(
        "<p>This page is made from <code>rows.jsonl</code> and <code>law.json</code> beside the "
        "folder it lies in: <code>vlm-jax report --workdir=DIR</code>. Each figure is there as "
        "PNG, SVG and CSV.</p>"
    )
    return "\n".join(parts)
