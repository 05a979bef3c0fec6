# SPDX-License-Identifier: Apache-2.0
"""The page of a run says what its rows say, once each, and loads nothing from anywhere.

Over 400 lines: the tests share the reading of one page, which takes seconds to make.
"""

import csv
import dataclasses
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import made_rows
import numpy as np
import pytest
from markupsafe import escape

from vlm_jax.__main__ import main
from vlm_jax.law import answer, law
from vlm_jax.law.points import Points
from vlm_jax.reports import (
    cost_figures,
    figures,
    findings,
    limits,
    planner_page,
    score_tables,
    tables,
)
from vlm_jax.reports import page as pages
from vlm_jax.reports import report as reports
from vlm_jax.reports import run as runs
from vlm_jax.rows import records

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page as a list of (tag, attributes, text inside); fails on tags that do not nest."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {[e['tag'] for e in self.open]}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.open], **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data
        if not {"script", "style"} & {e["tag"] for e in self.open}:
            self.words += data

    def all(self, tag, **wanted) -> list[dict]:
        return [
            e for e in self.elements
            if e["tag"] == tag and all(e.get(k) == v for k, v in wanted.items())
        ]  # fmt: skip

    def table(self, start: str) -> dict:
        """Row head -> column title -> text, of the table whose caption starts so."""
        html = self.rawdata_tables()
        return next(rows for caption, rows in html if caption.startswith(start))

    def rawdata_tables(self):
        tables, titles, rows = [], [], {}
        for element in self.elements:
            if element["tag"] == "table":
                titles, rows = [], {}
            elif element["tag"] == "caption":
                tables.append((element["text"], rows))
            elif element["tag"] == "th" and element["scope"] == "col":
                titles.append(element["text"])
            elif element["tag"] == "th":
                current = rows[element["text"]] = {}
            elif element["tag"] == "td":
                current[titles[len(current) + 1]] = element["text"]
        return tables


def make(folder, rows, **files):
    """A run folder with these rows and JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    records.write(folder / "rows.jsonl", rows)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def page_of(folder) -> Page:
    reports.write(folder)
    return Page((folder / "report/index.html").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A made run with everything, reported once: its rows, folder, what was said, its page."""
    rows = made_rows.rows()
    folder = make(
        tmp_path_factory.mktemp("run"),
        rows,
        baselines={"majority": {"count": 0.3, "relation": 0.5, "digits": 0.1, "words": 0.02}},
        run={"command": "vlm-jax grid --config=x.py", "config": "abc", "phases": {"cells": 500.0}},
    )
    made = reports.write(folder)
    return rows, folder, made, Page((folder / "report/index.html").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without drawing, for tests that read words and tables."""
    monkeypatch.setattr(figures, "run_figures", lambda *a, **k: [])


def test_every_row_stands_in_the_tables_exactly_once(run):
    rows, _, _, page = run
    shown = [e["data-cell"] for e in page.all("tr") if "data-cell" in e]
    assert sorted(shown) == sorted(row.cell for row in rows)


def test_the_tables_hold_the_rows_numbers_and_the_margin_over_the_blind_model(run):
    rows, _, _, page = run
    table = page.table("Cells of the grid")
    floor = {r.llm: r.families for r in rows if r.blind}
    for row in rows:
        if row.blind or row.compressor == "pool":
            continue
        line = table[row.cell]
        for name, score in (row.tasks | row.families).items():
            assert line[name] == f"{score['score']:.3f} ± {score['stderr']:.3f}"
        for family, score in row.families.items():
            low = floor[row.llm][family]
            spread = (score["stderr"] ** 2 + low["stderr"] ** 2) ** 0.5
            above = f"{score['score'] - low['score']:+.3f} ± {spread:.3f}".replace("-", "−")
            assert line[f"{family}, above blind"] == above
        assert line["V"] == str(row.V) and line["seed"] == str(row.seed)
    assert set(page.table("Baseline cells")) == {
        r.cell for r in rows if r.blind or r.compressor == "pool"
    }
    assert page.table("Always giving")["relation"]["score"] == "0.500"


def test_a_reader_sees_eight_columns_and_the_rest_folds_out(run):
    rows, folder, _, page = run
    for table in page.all("table"):
        start = page.elements.index(table)
        heads = []
        for element in page.elements[start + 1 :]:
            if element["tag"] == "tbody":
                break
            if element["tag"] == "th":
                heads.append(element)
        shown = [e["text"] for e in heads if "more" not in (e.get("class") or "")]
        assert len(shown) <= tables.MOST_FIRST
    assert len(page.all("input", type="checkbox")) >= 3
    with (folder / "report/cells.csv").open(newline="") as file:
        table = {line["cell"]: line for line in csv.DictReader(file)}
    assert set(table) == {row.cell for row in rows}
    for row in rows:
        line = table[row.cell]
        assert float(line["reasoning"]) == row.families["reasoning"]["score"]
        assert float(line["request, FLOPs"]) == sum(row.flops.values())


def test_many_rows_leave_what_folds_out_to_cells_csv(undrawn, tmp_path):
    few = page_of(make(tmp_path / "few", made_rows.rows())).table("Cells of the grid")
    rows = made_rows.rows(seeds=range(9), blind=False)
    many = page_of(make(tmp_path / "many", rows)).table("Cells of the grid")
    assert len(many) == 9 * 12 > score_tables.MOST_WIDE
    assert all(set(line) < set(next(iter(few.values()))) for line in many.values())
    assert (tmp_path / "many/report/cells.csv").read_text().count("\n") == len(rows) + 1


def test_a_sort_key_is_the_number_itself(run):
    rows, _, _, page = run
    keys = [float(e["data-sort"]) for e in page.all("td") if e["text"].endswith(" FLOPs")]
    start = page.elements.index(page.all("section", id="cells")[0])
    line = next(e for e in page.elements[start:] if e.get("data-cell") == rows[0].cell)
    at = page.elements.index(line)
    # a text that is its own key has no other
    sorts = [e.get("data-sort", e["text"]) for e in page.elements[at + 1 : at + 8]]
    first = rows[0]
    assert sorts[:6] == [
        first.cell, first.llm, str(first.llm_parameters), str(first.V), "0", "token_packer",
    ]  # fmt: skip
    assert float(sorts[6]) == pytest.approx(first.families["reasoning"]["score"], rel=1e-7)
    assert all(key > 0 for key in keys)


def test_the_page_loads_nothing(run):
    _, folder, _, page = run
    for element in page.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            if name in element:
                assert element[name].startswith(("data:", "#")), (
                    element["tag"],
                    element[name][:80],
                )
    html = (folder / "report/index.html").read_text()
    text = "".join(e["text"] for e in page.all("style") + page.all("script"))
    assert "url(" not in text and "@import" not in text and "fetch" not in text
    assert "http://" not in html and "https://" not in html


def test_the_page_can_be_read_by_ear_and_by_keyboard(run):
    _, _, made, page = run
    (html,) = page.all("html")
    assert html["lang"] == "en"
    assert page.all("meta", name="viewport")
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch(r"h\d", e["tag"])]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert page.all("h1")[0]["text"].endswith("?")
    targets = [e["id"] for e in page.elements if "id" in e]
    assert len(targets) == len(set(targets))
    links = [e["href"][1:] for e in page.all("a") if e["href"].startswith("#")]
    assert set(links) == {e["id"] for e in page.all("section")} <= set(targets)
    assert len(page.all("caption")) == len(page.all("table"))
    for head in page.all("th"):
        assert head["scope"] in ("col", "row")
        if head["scope"] == "col":
            assert head["aria-sort"] == "none"
    assert len(page.all("button", type="button")) == len(page.all("th", scope="col"))
    for region in page.all("div", role="region"):
        assert region["tabindex"] == "0" and region["aria-label"]
    images = page.all("img")
    assert len(images) == made["figures"] > 15
    assert all(len(e["alt"]) > 20 and int(e["width"]) > 200 for e in images)
    for image in images:
        kind, _, picture = image["src"].partition(",")
        assert kind == "data:image/svg+xml"
        assert ElementTree.fromstring(unquote(picture)).tag.endswith("svg")


def test_the_answer_follows_the_planted_laws(run):
    _, _, made, page = run
    assert "Parameters before visual tokens" in page.words
    assert "Visual tokens before parameters" in page.words
    assert "reasoning gains more from a larger LLM than text" in page.words
    assert "text gains more from more visual tokens than reasoning" in page.words
    assert "12 of 12 cells beat the blind score" in page.words
    assert "token_packer against pool at the same LLM and V: better in 2" in page.words
    for family, (_, alpha, beta, _) in made_rows.LAWS.items():
        assert made["laws"][family]["alpha"] == pytest.approx(alpha, abs=0.08)
        assert made["laws"][family]["beta"] == pytest.approx(beta, abs=0.05)


def test_the_page_says_how_it_was_made_and_what_it_does_not_show(run):
    rows, folder, _, page = run
    for fact in ("c" * 16, "d" * 16, "a" * 40, "x86_64, 2 cores", "0.10.2", "8 min 20 s"):
        assert fact in page.words
    assert page.all("pre")[0]["text"] == "vlm-jax grid --config=x.py"
    for limit in ("250k parameters, 2,000 times fewer", "there is one seed (0)", "3 sizes"):
        assert limit in page.words
    assert (folder / "report/figures/reasoning_scores.csv").is_file()


def test_the_page_holds_the_planner_of_what_was_measured(run):
    """Its data is that of the run's law.json: a plan from it is `vlm-jax plan`'s."""
    rows, folder, _, page = run
    (held,) = page.all("script", type="application/json")
    data = json.loads(held["text"])
    assert data["offers"]["paper"]["own"]["llms"] == sorted({r.llm_parameters / 1e9 for r in rows})
    assert [name for name, _ in data["laws"]["families"]["weights"]] == ["reasoning", "text"]
    assert data["start"]["cost"] == "paper" and "not known here" in data["without_full"]
    again, why = planner_page.of_run(runs.of(rows), folder / "law.json")
    assert json.loads(json.dumps(again)) == data and not why
    without, why = planner_page.of_run(runs.of(rows), folder / "none.json")
    assert without is None and "no law.json" in why


def test_law_json_is_written_as_fit_writes_it(run):
    _, folder, made, _ = run
    fields = json.loads((folder / "law.json").read_text())
    assert law.Law.from_dict(fields).form == "multiplicative"
    assert set(fields["families"]) == {"reasoning", "text"}
    for family, wanted in made["laws"].items():
        assert fields["families"][family]["alpha"] == wanted["alpha"]


def test_a_current_law_json_is_read_and_an_old_one_fitted_anew(run, tmp_path, undrawn):
    rows, folder, made, _ = run
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run/law.json"
    fields = json.loads(path.read_text())
    fields["families"]["text"]["alpha"] = 0.4321
    path.write_text(json.dumps(fields))
    assert reports.write(tmp_path / "run")["laws"]["text"]["alpha"] == 0.4321
    os.utime(path, ns=(0, 0))
    assert reports.write(tmp_path / "run")["laws"]["text"] == made["laws"]["text"]
    assert json.loads(path.read_text())["families"]["text"]["alpha"] != 0.4321


def test_an_exponent_counts_exactly_when_its_interval_leaves_out_zero(tmp_path, undrawn):
    flat = {family: (0.5, 0.0, 0.0, 0.0) for family in made_rows.LAWS}
    page = page_of(make(tmp_path, made_rows.rows(laws=flat, noise=0.02)))
    fitted = json.loads((tmp_path / "law.json").read_text())["families"]
    rows = [
        r for r in records.read(tmp_path / "rows.jsonl") if not r.blind and r.compressor != "pool"
    ]
    settled = 0
    for fields in fitted.values():
        for name in findings.GREEK:
            _, fall, _ = findings.effect(law.Law.from_dict(fields), name, rows)
            low, high = fields["intervals"][name]
            settled += (low > 0 and fall[0] > 0) or (high < 0 and fall[1] < 0)
    assert page.words.count("An interval includes 0") == 4 - settled >= 2
    assert len(re.findall("(A larger LLM|More visual tokens) (helped|hurt)", page.words)) == settled


def test_the_fall_of_the_error_is_the_law_s_between_the_ends_of_the_grid():
    rows = [row for row in made_rows.rows() if not row.blind and row.compressor != "pool"]
    fitted = law.fit(records.points(rows, "text"))
    fall, (low, high), _ = findings.effect(fitted, "beta", rows)
    middle = (25e-6 * 250e-6) ** 0.5
    assert fall == pytest.approx(float(fitted.error(middle, 1) - fitted.error(middle, 36)))
    A, alpha, beta, _ = made_rows.LAWS["text"]
    assert low < A * middle**-alpha * (1 - 36**-beta) < high


def test_a_law_that_misses_the_cells_gives_no_answer(run):
    rows = [row for row in made_rows.rows() if not row.blind and row.compressor != "pool"]
    fitted = law.fit(records.points(rows, "text"), bootstrap=50)
    missed = dataclasses.replace(fitted, misfit={"sentence": "misses the cells by 0.1"})
    found = findings.Findings()
    findings._law(found, "text", missed, rows)
    ((_, sentence),) = found.answer
    assert sentence.startswith("No answer from the law: its multiplicative form misses the cells")
    assert "250k with 36 (" in sentence and "the law's best" not in sentence
    assert not found.shows and not found.open  # nor what its exponents would say


def test_a_grid_no_better_than_blind_is_said_to_say_nothing(tmp_path, undrawn):
    laws = {f: (1 - score, 0.0, 0.0, 0.0) for f, score in made_rows.BLIND.items()}
    page = page_of(make(tmp_path, made_rows.rows(laws=laws, noise=0.0)))
    assert page.words.count("none of 12 cells beats the blind score") == 2


def test_names_from_rows_cannot_become_markup(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(1)">'
    rows = made_rows.rows(tasks={evil: "text", "b&b": "text"})
    rows = [dataclasses.replace(r, machine=evil, llm=r.llm + evil, prompt=f"'{evil}") for r in rows]
    rows = [dataclasses.replace(r, cell=r.cell + evil) for r in rows]
    page = page_of(make(tmp_path, rows, run={"command": evil, "phases": {evil: 1}}))
    assert len(page.all("script")) == 3  # the planner, its data, and what sorts tables
    assert not [e for e in page.elements if "onerror" in e]
    assert evil in page.words and "b&b" in page.words
    shown = [e["data-cell"] for e in page.all("tr") if "data-cell" in e]
    assert sorted(shown) == sorted(row.cell for row in rows)
    assert escape(evil) in (tmp_path / "report/index.html").read_text()


def test_no_template_marks_a_text_as_safe():
    assert pages.TEMPLATES.autoescape is True
    names = pages.TEMPLATES.list_templates()
    planner = {f"planner{end}" for end in (".html", ".css", ".js", "_page.js", "_search.js")}
    planner |= {"planner_part.html", "planner_figure.js"}
    chat = {f"chat{end}" for end in (".html", ".css", ".js")}
    page = {"head.html", "page.html", "parts.html", "style.css", "sort.js"}
    assert page | planner | chat == set(names)
    texts = [pages.TEMPLATES.loader.get_source(pages.TEMPLATES, name)[0] for name in names]
    assert not any(re.search(r"\|\s*safe\b|autoescape", text) for text in texts)


def test_a_table_has_as_many_cells_in_a_row_as_titles():
    row = [tables.words("a"), tables.numeral(1)]
    assert tables.Table("c", ["x", "y"], [row]).textual == [True, False]
    for titles in (["x"], ["x", "y", "z"]):
        with pytest.raises(ValueError, match="zip"):
            _ = tables.Table("c", titles, [row]).textual


@pytest.mark.parametrize(
    "keep, why",
    [
        (lambda r: r.V < 16 and not r.blind and r.llm_parameters < 40_000, "4 points cannot fit"),
        (lambda r: r.llm_parameters == 250_000, "alpha cannot be fitted"),
        (lambda r: r.V == 4, "beta cannot be fitted"),
        (lambda r: r.blind, "There is no finished cell of the grid yet"),
        (lambda r: False, "There is no finished cell of the grid yet"),
    ],
)
def test_a_partial_run_has_a_page_that_says_why_there_is_no_law(tmp_path, capsys, keep, why):
    sizes, tokens = (25_000, 40_000, 60_000, 80_000, 120_000, 250_000), (1, 2, 4, 9, 16, 36)
    every = made_rows.rows(sizes=sizes, tokens=tokens, tasks={"count": "reasoning"})
    rows = [row for row in every if keep(row)]
    make(tmp_path, rows)
    assert main(["report", f"--workdir={tmp_path}"]) == 0
    page = Page((tmp_path / "report/index.html").read_text())
    assert why in page.words
    shown = [e["data-cell"] for e in page.all("tr") if "data-cell" in e]
    assert sorted(shown) == sorted(row.cell for row in rows)
    assert not (tmp_path / "law.json").exists()
    made = json.loads(capsys.readouterr().out)
    assert made["laws"] == {} and made["cells"] == len(rows)
    assert len(page.all("img")) == made["figures"]


def test_seeds_are_averaged_in_words_and_apart_in_the_table(tmp_path, undrawn):
    rows = made_rows.rows(seeds=(0, 1, 2))
    page = page_of(make(tmp_path, rows))
    assert "there is one seed" not in page.words
    assert "12 of 12 cells beat" in page.words
    mean, spread = findings.by_cell(
        [r for r in rows if not r.blind and r.compressor == "token_packer"], "text"
    )[("250k", 36)]
    assert f"score {mean:.3f} ± {spread:.3f}" in page.words


def test_cells_of_two_encoders_and_machines_say_so():
    rows = [row for row in made_rows.rows(seeds=(0, 1)) if not row.blind and row.V > 1]
    made = [
        dataclasses.replace(
            row, train=row.train | {"encoder": f"of {row.seed}"}, machine=f"m{row.seed}"
        )
        for row in rows
    ]
    told = " ".join(limits.of_cells(made))
    half = len(rows) // 2
    assert f"That all cells read the same features: {half} and {half} rows" in told
    assert "same features" not in " ".join(limits.of_cells(rows))
    assert "on m0 or m1, in batches" in cost_figures.measured_seconds(made)[1]


def test_equal_rows_give_an_equal_page(tmp_path, undrawn):
    rows = made_rows.rows(tasks={"words": "text"})
    for order, name in ((1, "a"), (-1, "b")):
        make(tmp_path / name / "run", rows)
        lines = (tmp_path / name / "run/rows.jsonl").read_text().splitlines()[::order]
        (tmp_path / name / "run/rows.jsonl").write_text("\n".join(lines))
        reports.write(tmp_path / name / "run")
    a, b = ((tmp_path / name / "run/report/index.html").read_text() for name in "ab")
    assert a == b


def test_without_matplotlib_the_page_has_its_tables_and_says_what_is_missing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    make(tmp_path, made_rows.rows())
    assert main(["report", "--workdir", str(tmp_path)]) == 0
    assert 'pip install "vlm_jax[report]"' in capsys.readouterr().err
    page = Page((tmp_path / "report/index.html").read_text())
    assert 'pip install "vlm_jax[report]"' in page.words and not page.all("img")


def test_what_a_user_can_mend_is_one_line(tmp_path, capsys):
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    assert "no rows.jsonl" in capsys.readouterr().err
    make(tmp_path, made_rows.rows())
    (tmp_path / "baselines.json").write_text("{")
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    assert "baselines.json is not JSON" in capsys.readouterr().err
    (tmp_path / "baselines.json").write_text("[1]")
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    assert "not an object" in capsys.readouterr().err


def test_a_law_that_misses_its_cells_gives_way_to_the_best_form_that_fits():
    N, V, _ = map(  # two seeds
        np.ravel, np.meshgrid([0.5, 1.0, 4.0, 16.0], [1.0, 2.0, 4.0, 9.0, 36.0], [0, 1])
    )
    noise = 0.002 * np.random.default_rng(0).standard_normal(len(N))
    error = 0.05 * N**-0.5 + 0.4 * V**-0.9 + 0.1 + noise
    points = Points(N=N, V=V, Q=np.full(len(N), 9.0), error=error, label=[""] * len(N),
                    stderr=np.full(len(N), np.nan))  # fmt: skip
    asked = law.fit(points, bootstrap=0)
    assert asked.misfit["sentence"]
    found, _ = answer.answer(points, asked, bootstrap=50)
    best = reports.shown(points, asked, found)
    assert best.form == next(iter(found.shares)) != "multiplicative"
    assert not best.misfit["sentence"] and "alpha" in best.intervals
    assert best.notes[0].startswith(f"The multiplicative form {asked.misfit['sentence']}. Of the")
    assert reports.shown(points, best, found) is best
    nothing = answer.Answer("cells", {}, {}, None)
    assert reports.shown(points, asked, nothing) is asked


def test_a_form_without_a_closed_optimum_answers_at_one_cost():
    rows = [row for row in made_rows.rows() if not row.blind and row.compressor != "pool"]
    fitted = law.fit(records.points(rows, "text"), "additive", bootstrap=50)
    found = findings.Findings()
    findings._what_to_buy(found, "text", fitted, rows, True)
    ((_, sentence),) = found.answer
    assert sentence.startswith("By the additive form, at a cost 2N(Q+V) of")
    assert "FLOPs" in sentence and "the best measured V is 36 (in" in sentence
    findings._what_to_buy(found, "text", dataclasses.replace(fitted, samples=None), rows, True)
    assert "the best V depends on the cost" in found.answer[-1][1]
