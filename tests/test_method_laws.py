# SPDX-License-Identifier: Apache-2.0
"""`fit --compressor=all`: a law for each method of the rows, side by side."""

import csv
import json

import made_rows
import numpy as np
import pytest

from vlm_jax.__main__ import main
from vlm_jax.law.answer import Answer, best_tokens
from vlm_jax.law.law import Law, fit
from vlm_jax.law.points import Points
from vlm_jax.rows import records

SELECTED = ("visionzip", "none", "", -0.1)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("vlm_jax.reports.fitted.draw", lambda *given, **more: ([], []))


def run(tmp_path, *flags):
    return main(["fit", f"--out={tmp_path / 'laws'}", "--bootstrap=20", *map(str, flags)])


def test_every_method_has_a_folder_and_its_lines(tmp_path, capsys):
    rows = made_rows.rows(methods=(SELECTED,), seeds=(0, 1))
    records.write(tmp_path / "rows.jsonl", rows)
    assert run(tmp_path, f"--rows={tmp_path / 'rows.jsonl'}", "--compressor=all") == 0
    said = json.loads(capsys.readouterr().out)
    with (tmp_path / "laws" / "methods.csv").open() as file:
        lines = list(csv.DictReader(file))
    families = {"reasoning", "text", "mean of families"}
    assert {(line["method"], line["kind"], line["family"]) for line in lines} == {
        (method, kind, family)
        for method, kind in (("token_packer", "trained"), ("visionzip", "training-free"))
        for family in families
    }
    for line in lines:
        path = tmp_path / "laws" / line["method"] / "law.json"
        fields = json.loads(path.read_text())
        law = Law.from_dict(fields["families"].get(line["family"], fields))
        assert float(line["beta"]) == pytest.approx(law.params["beta"])
        low, high = law.intervals["beta"]
        assert (float(line["beta_low"]), float(line["beta_high"])) == pytest.approx((low, high))
    # pool has two cells of one size
    assert list(said["no_law"]) == ["pool"] and "cannot fit" in said["no_law"]["pool"]


@pytest.mark.parametrize("flags, message", [
    (["--published=methods"], "--rows alone"),
    ([], "no method of these rows has a law: pool: "),
])  # fmt: skip
def test_what_has_no_laws_is_refused(flags, message, tmp_path, capsys):
    pooled = [row for row in made_rows.rows() if row.compressor == "pool"]
    records.write(tmp_path / "rows.jsonl", pooled)
    assert run(tmp_path, f"--rows={tmp_path / 'rows.jsonl'}", "--compressor=all", *flags) == 2
    assert message in capsys.readouterr().err


def test_rows_of_a_table_need_a_method(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text("N,V,error,method\n1,1,0.5,a\n2,4,0.4,\n")
    assert run(tmp_path, f"--rows={path}", "--compressor=all") == 2
    assert "1 rows have no method" in capsys.readouterr().err


@pytest.mark.parametrize("beta, best", [(0.02, 1), (0.3, 36)])
def test_the_best_tokens_are_those_of_the_planted_law(beta, best):
    """Error at one cost is (Q + V)^.1 V^-beta: few tokens win where beta is small."""
    N, V = map(np.ravel, np.meshgrid([0.5, 1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 4.0, 16.0, 36.0]))
    error = 0.5 * N**-0.1 * V**-beta
    noise = 1e-4 * np.random.default_rng(0).standard_normal(len(N))
    points = Points(N=N, V=V, Q=np.full(len(N), 2.0), error=error + noise,
                    stderr=np.full(len(N), np.nan), label=[""] * len(N))  # fmt: skip
    found = best_tokens(Answer.alone(fit(points, bootstrap=50)), points)
    assert found["best_V"] == best and found["best_share"] > 0.9
    assert found["best_at"] == pytest.approx(np.exp(np.log(N * (2 + V)).mean()))
    none = best_tokens(Answer("cells", {}, {}, None), points)
    assert none["best_V"] is None
