# SPDX-License-Identifier: Apache-2.0
"""A run's rows become figures and one HTML page.

Reads DIR/rows.jsonl and, where they exist, DIR/law.json (if no older than the rows),
DIR/baselines.json ({"majority": {task: score}}), DIR/run.json ({"command", "config", "method",
"phases"}). Writes DIR/report/index.html, cells.csv and figures/ beside it, and, if it fitted the
law itself, DIR/law.json. Rows of clips have a page for each number of frames: that of the most is
DIR/report/index.html, the others are in DIR/report/frames-T.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlm_jax import files
from vlm_jax.law import answer
from vlm_jax.law import families as families_module
from vlm_jax.law import law as laws_module
from vlm_jax.law.law import Law
from vlm_jax.law.points import Points
from vlm_jax.reports import figures, page, planner_page, score_tables
from vlm_jax.reports import run as runs
from vlm_jax.reports.canvas import Output
from vlm_jax.reports.colors import TooManySizes
from vlm_jax.reports.run import Run
from vlm_jax.rows import measured, records


def write(workdir: Path | str, *, png: bool = False) -> dict:
    """Writes the report of a run folder; returns its path, counts, laws and reasons as a dict.

    `png` adds each figure as PNG to its SVG and CSV, which takes as long again as drawing.

    Without matplotlib the page has no figures and says so. Raises ValueError or OSError for a file
    that is missing or invalid.
    """
    workdir = files.path_of(workdir)
    if not (workdir / "rows.jsonl").is_file():
        raise FileNotFoundError(
            f"no rows.jsonl in {workdir}: vlm-jax grid --config=FILE --workdir={workdir} makes it"
        )
    with files.copied(workdir, ("rows.jsonl", "baselines.json", "run.json")) as home:
        return _write(home, png) | {"report": str(workdir / "report" / "index.html")}


def _write(workdir: Path, png: bool) -> dict:
    """`write` in a folder on the disk."""
    # Sorted, so that the page does not depend on the order in which cells finished.
    rows = sorted(
        records.comparable(records.read(workdir / "rows.jsonl")),
        key=lambda row: (row.llm_parameters, row.V, row.seed, row.cell),
    )
    several = sorted({row.frames for row in rows})
    if several in ([], [1]):
        found = _page(workdir, rows, workdir / "report", png=png)
    else:
        found = _pages(workdir, rows, several, png=png)
    table = score_tables.row_table("", rows, rows)
    score_tables.write_csv(table, workdir / "report" / "cells.csv")
    return found


def _pages(workdir: Path, rows: Sequence, several: Sequence[int], *, png: bool) -> dict:
    """A page for each number of frames, and law.json of all of them; the report as a dict.

    On a page V counts the tokens of all frames: the LLM reads them as it reads those of one image,
    and cost and law at one number of frames are of that V.
    """
    facts = read_object(workdir / "run.json")
    laws, reasons = laws_of(workdir, runs.of(rows, facts.get("method")))
    pages = {T: f"frames-{T}/index.html" for T in several[:-1]} | {several[-1]: "index.html"}
    for T, page_path in pages.items():
        told = f"Clips of {T} frames: V counts the tokens of all of them. "
        if others := [path for other, path in pages.items() if other != T]:
            told += f"Other numbers of frames: {', '.join(others)}. "
        told += f"The law of all rows is in law.json (vlm-jax fit --form={_form(several)})."
        of_page = [replace(row, V=row.V * T, frames=1) for row in rows if row.frames == T]
        home = (workdir / "report" / page_path).parent
        found = _page(workdir, of_page, home, png=png, frames=told)
    return found | {
        "cells": len(rows),
        "laws": {family: {"form": law.form, **law.params} for family, law in laws.items()},
        "no_law": reasons,
        "pages": {str(T): path for T, path in pages.items()},
    }


def _form(several: Sequence[int]) -> str:
    """The form of the law of rows with these numbers of frames."""
    return "frames" if len(several) > 1 else "multiplicative"


def _page(workdir: Path, rows: Sequence, home: Path, *, png: bool, frames: str = "") -> dict:
    """The page of some rows, and its figures, in the folder `home`; the report as a dict.

    `frames` says of which clips they are; "" for images.
    """
    majority = read_object(workdir / "baselines.json").get("majority", {})
    facts = read_object(workdir / "run.json")
    run = runs.of(rows, facts.get("method"))
    if frames:
        laws, reasons = fitted(run)
        laws = all_shown(run, laws, answers_of(run, laws))
    else:
        laws, reasons = laws_of(workdir, run)
    missing = ""
    try:
        drawn = figures.run_figures(
            run,
            laws,
            Output(home / "figures", png=png),
            majority=page.by_family(rows, majority),
        )
    except (ModuleNotFoundError, TooManySizes) as error:
        # A grid of many hours must not end without its tables because matplotlib is missing.
        drawn, missing = [], str(error)
    planner, no_planner = None, "The planner in the page is of images: vlm-jax plan --frames=T."
    if not frames:
        planner, no_planner = planner_page.of_run(run, workdir / "law.json")
    html = page.build(
        run,
        laws,
        drawn,
        reasons=reasons,
        majority=majority,
        name=workdir.resolve().name,
        facts=facts,
        missing=missing,
        planner=planner,
        no_planner=no_planner,
        frames=frames,
    )
    home.mkdir(parents=True, exist_ok=True)
    files.write_text(home / "index.html", html)
    return {
        "cells": len(rows),
        "figures": len(drawn),
        "laws": {family: {"form": law.form, **law.params} for family, law in laws.items()},
        "no_law": reasons,
        "no_figures": missing,
    }


def laws_of(workdir: Path, run: Run) -> tuple[dict, dict[str, str]]:
    """(family -> Law, family -> why there is none) of the grid's method, from law.json or fitted.

    If law.json is missing or older than the rows, the laws are fitted and it is written. A law that
    misses its cells gives way to the best form that fits, see `shown`.
    """
    families = sorted({family for row in run.main for family in row.families})
    path = workdir / "law.json"
    if path.is_file() and path.stat().st_mtime_ns >= (workdir / "rows.jsonl").stat().st_mtime_ns:
        fields = read_object(path)
        stored = fields.get("families") or ({families[0]: fields} if len(families) == 1 else {})
        laws = {f: laws_module.Law.from_dict(law) for f, law in stored.items() if f in families}
        answers = {family: answer.Answer.from_dict(stored[family]) for family in laws}
        missing = f"{path} holds no law of it."
        reasons = {family: missing for family in families if family not in laws}
    else:
        laws, reasons = fitted(run)
        answers = answers_of(run, laws)
        if laws and (document := law_document(run, laws, answers)):
            files.write_text(path, json.dumps(document) + "\n")
    return all_shown(run, laws, answers), reasons


def points_of(run: Run, family: str) -> Points:
    """The cells of the grid's method that have the family."""
    return records.points([row for row in run.main if family in row.families], family)


def fitted(run: Run) -> tuple[dict, dict[str, str]]:
    """(family -> Law, family -> why there is none) of the grid's method."""
    laws, reasons = {}, {}
    form = _form(sorted({row.frames for row in run.main}))
    for family in sorted({family for row in run.main for family in row.families}):
        try:
            laws[family] = laws_module.fit(points_of(run, family), form)
        except ValueError as error:
            reasons[family] = f"{str(error)[:1].upper()}{str(error)[1:]}."
    return laws, reasons


def answers_of(run: Run, laws: Mapping) -> dict:
    """Family -> what a plan answers from, by tests of all forms."""
    return {family: answer.answer(points_of(run, family), law)[0] for family, law in laws.items()}


def all_shown(run: Run, laws: Mapping, answers: Mapping) -> dict:
    """Family -> the law that a page shows."""
    return {
        family: shown(points_of(run, family), law, answers[family]) for family, law in laws.items()
    }


def shown(points: Points, law: Law, found: answer.Answer) -> Law:
    """The law of a page: the one that was asked for, or the best form that fits where it does not.

    A plan weighs all forms that fit by the same tests. If none does, the law is the one that was
    asked for, and the page says that it misses its cells.
    """
    if not (missed := law.misfit.get("sentence")) or not found.shares:
        return law
    best = laws_module.fit(points, next(iter(found.shares)))
    shares = ", ".join(f"{form} {share:.0%}" for form, share in found.shares.items())
    why = f"The {law.form} form {missed}. Of the forms that fit, a plan draws {shares}."
    return replace(best, notes=[why, *best.notes])


def law_document(run: Run, laws: Mapping, answers: Mapping) -> dict | None:
    """The content of law.json in the form of `vlm-jax fit`; None if cells lack a family.

    The top level is the law of the mean over families, or of the only family; "families" has the
    law of each family.
    """
    first = points_of(run, next(iter(laws)))
    if len(laws) > 1:
        try:
            first = records.points(run.main)
            form = _form(sorted({row.frames for row in run.main}))
            mean = laws_module.fit(first, form)
        except ValueError:
            return None
        laws = {measured.MEAN: mean, **laws}
        answers = {measured.MEAN: answer.answer(first, mean)[0], **answers}
    return families_module.document(laws, answers, mean=measured.MEAN) | {
        "method": run.method,
        "fitted_on": families_module.fitted_on(first, "rows.jsonl"),
    }


def read_object(path: Path) -> dict:
    """The JSON object in a file, {} if there is no file. Raises ValueError for other content."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): repair or remove it") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not an object: repair or remove it"
        )
    return content
