# SPDX-License-Identifier: Apache-2.0
"""Several methods in one run stand side by side on its page, and only one has the law."""

import json

import made_rows
from test_report import make, page_of

from vlm_jax.reports import figures
from vlm_jax.reports import run as runs


def test_methods_stand_side_by_side_and_the_law_says_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "run_figures", lambda *a, **k: [])
    rows = made_rows.rows(seeds=(0, 1), methods=made_rows.METHODS)
    page = page_of(make(tmp_path, rows))
    caption, _ = next(t for t in page.rawdata_tables() if t[0].startswith("Score of each method"))
    assert "The law is fitted to the lines of token_packer alone." in caption
    start = page.elements.index(page.all("section", id="methods")[0])
    stop = page.elements.index(page.all("section", id="cells")[0])
    inside = page.elements[start:stop]
    titles = [e["text"] for e in inside if e.get("scope") == "col"]
    texts = [e["text"] for e in inside if e["tag"] == "td" or e.get("scope") == "row"]
    lines = [dict(zip(titles, texts[i : i + len(titles)], strict=True))
             for i in range(0, len(texts), len(titles))]  # fmt: skip
    found = {(line["method"], line["V"]): line for line in lines}
    assert list(found)[0] == ("token_packer", "1") and list(found)[-1] == ("blind", "–")
    assert len(found) == len(lines) == 4 + 3 * 3 + 2 + 1
    for (method, V), line in found.items():
        for family in ("reasoning", "text"):
            means = []
            for n in made_rows.SIZES:
                scores = [
                    r.families[family] for r in rows if r.llm_parameters == n
                    and (r.blind if method == "blind" else not r.blind and r.method == method
                         and str(r.V) == V)
                ]  # fmt: skip
                shown = line[f"{family}, {n // 1000}k"]
                if not scores:
                    assert shown == "–"
                    continue
                mean, spread = runs.mean_over_seeds(scores)
                assert shown == f"{mean:.3f} ± {spread:.3f}"
                means.append((mean, spread))
            wanted = "–"
            if len(means) == 3:
                spread = sum(s**2 for _, s in means) ** 0.5 / 3
                wanted = f"{sum(m for m, _ in means) / 3:.3f} ± {spread:.3f}"
            assert line[f"{family}, mean"] == wanted
    for said in (
        "The law is fitted to the 24 rows of token_packer. Not used: 4 of pool, 18 of quecc, "
        "18 of quecc, pool, query separate, 18 of quecc, query separate, 6 of blind models.",
        "token_packer against quecc, query separate at the same LLM and V",
    ):
        assert said in page.words
    fields = json.loads((tmp_path / "law.json").read_text())
    assert fields["method"] == "token_packer" and fields["n"] == 24


def test_the_grid_s_own_method_is_the_one_that_the_run_names(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "run_figures", lambda *a, **k: [])
    rows = made_rows.rows(methods=made_rows.METHODS)
    folder = make(tmp_path, rows, run={"command": "x", "method": "quecc, query separate"})
    page = page_of(folder)
    assert "The law is fitted to the 9 rows of quecc, query separate." in page.words
    assert json.loads((folder / "law.json").read_text())["n"] == 9
