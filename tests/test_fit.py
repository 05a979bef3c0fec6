# SPDX-License-Identifier: Apache-2.0
"""vlm-jax fit from its command line: what it writes, what it says, and what it refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import made_rows
import numpy as np
import pytest
from test_records import grid

from vlm_jax.__main__ import main
from vlm_jax.law import law, published
from vlm_jax.reports import fitted
from vlm_jax.rows import records


@pytest.fixture
def drawn(monkeypatch):
    """Takes the place of drawing, which other tests hold; lists what would have been drawn."""
    calls = []

    def draw(families, laws, out, **how):
        calls.append(dict(families))
        return [], []

    monkeypatch.setattr(fitted, "draw", draw)
    return calls


def run(capsys, *argv):
    code = main(["fit", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_published_points_give_the_stable_fields(tmp_path, capsys, drawn):
    code, out, err = run(capsys, "--published=reasoning", f"--out={tmp_path}", "--bootstrap=100")
    assert code == 0
    written, printed = json.loads((tmp_path / "law.json").read_text()), json.loads(out)
    for name in ("form", "A", "alpha", "beta", "D", "rmse", "sse", "intervals"):
        assert written[name] == printed[name]
    assert written["sse"] <= 3.7938e-4 and written["D"] == 0
    assert written["alpha"] == pytest.approx(0.0709, abs=5e-5)
    assert len(written["samples"]["values"]) == 100 and "samples" not in out
    assert printed["files"] == [str(tmp_path / "law.json"), str(tmp_path / "comparison.csv")]
    assert printed["published"]["inside"] == {"alpha": True, "beta": True}
    assert printed["published"]["inside_with_D_0"] == {"alpha": False, "beta": True}
    assert "D is not identifiable" in err and "published alpha 0.077 lies inside" in err
    assert printed["extrapolation"]["held_out"]["N"] == 7
    assert law.Law.from_json((tmp_path / "law.json").read_text()).error(7, 36) == pytest.approx(
        0.487, abs=2e-3
    )
    with open(tmp_path / "comparison.csv", newline="") as file:
        forms = {row["form"]: row for row in csv.DictReader(file)}
    assert float(forms["multiplicative"]["sse"]) == pytest.approx(written["sse"])
    assert float(forms["interaction"]["aic"]) < float(forms["multiplicative"]["aic"])


def test_the_same_command_writes_the_same_law(tmp_path, capsys, drawn):
    for name in ("a", "b"):
        run(capsys, "--published=ocr", f"--out={tmp_path / name}", "--bootstrap=50")
    assert (tmp_path / "a/law.json").read_text() == (tmp_path / "b/law.json").read_text()


def test_rows_of_a_grid_give_a_law_per_family_task_and_their_mean(tmp_path, capsys, drawn):
    records.write(tmp_path / "rows.jsonl", grid())
    code, out, _ = run(
        capsys, f"--rows={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'o'}", "--bootstrap=50"
    )
    fields = json.loads(out)
    assert code == 0 and fields["n"] == 24
    assert fields["family"] == "mean of families"
    assert sorted(fields["families"]) == ["reasoning", "text"]
    assert sorted(fields["tasks"]) == ["count", "digits", "exist"]
    assert list(drawn[0]) == ["mean of families", "reasoning", "text"]
    rows = records.read(tmp_path / "rows.jsonl")
    for name, found in (("text", fields["families"]["text"]), (None, fields)):
        direct = law.fit(records.points(rows, name), bootstrap=0)
        assert found["intervals"] == direct.intervals
        assert {key: found[key] for key in direct.params} == direct.params
    assert fields["tasks"]["digits"]["alpha"] == pytest.approx(fields["families"]["text"]["alpha"])
    saved = json.loads((tmp_path / "o/law.json").read_text())
    assert law.Law.from_dict(saved["families"]["text"]).samples.shape == (50, 4)

    code, out, _ = run(
        capsys,
        f"--rows={tmp_path / 'rows.jsonl'}",
        f"--out={tmp_path / 'o'}",
        "--family=digits",
        "--bootstrap=0",
    )
    alone = json.loads(out)
    assert alone["alpha"] == fields["tasks"]["digits"]["alpha"] and list(alone["families"]) == [
        "digits"
    ]


def test_a_table_may_be_split_over_files(tmp_path, capsys, drawn):
    points = published.points("ocr")
    for name, keep in (("small", points.N < 3), ("large", points.N > 3)):
        part = points.where(keep)
        lines = [
            f"{n},{v},{100 * (1 - e)}" for n, v, e in zip(part.N, part.V, part.error, strict=True)
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["N,V,accuracy", *lines]))
    both = [f"--rows={tmp_path / 'small.csv'}", f"--rows={tmp_path / 'large.csv'}"]
    code, out, _ = run(capsys, *both, f"--out={tmp_path}", "--bootstrap=0", "--form=interaction")
    fields = json.loads(out)
    assert code == 0 and fields["gamma"] == pytest.approx(0.0046, abs=1e-4)
    assert fields["A"] and fields["alpha"] and fields["beta"] and fields["D"] == 0

    code, _, err = run(capsys, both[0], both[0], f"--out={tmp_path}")
    assert code == 2 and "N=0.5, V=1" in err and "twice" in err


@pytest.mark.parametrize(
    "text,flags,message",
    [
        ("N,V,error\n7e9,1,.3\n", [], "pass --n-unit=parameters"),
        (
            "N,V,error\n7,1,.3\n7,4,.2\n",
            [],
            "2 points cannot fit the 4 parameters A, alpha, beta, D",
        ),
        (
            "N,V,error\n" + "".join(f"7,{v},{0.5 - v / 100}\n" for v in range(1, 9)),
            [],
            "one LLM size",
        ),
        (
            "N,V,error\n" + "".join(f"{v},7,{0.5 - v / 100}\n" for v in range(1, 9)),
            [],
            "one number of visual",
        ),
        ("N,V,error\n1,1,nan\n", [], "error is nan"),
        ("N,V,error\n1,1,.5\n", ["--bootstrap=-1"], "0 or more draws, got -1"),
        ("N,V,error\n1,1,.5\n", ["--family=ocr"], "no family or task 'ocr'"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, drawn, text, flags, message):
    (tmp_path / "t.csv").write_text(text)
    code, out, err = run(capsys, f"--rows={tmp_path / 't.csv'}", f"--out={tmp_path / 'o'}", *flags)
    assert code == 2 and out == ""
    assert err.startswith("vlm-jax fit: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "o/law.json").exists()


def test_a_missing_file_and_an_unwritable_folder_are_user_errors(tmp_path, capsys, drawn):
    code, _, err = run(capsys, f"--rows={tmp_path / 'none.csv'}", f"--out={tmp_path}")
    assert code == 2 and "none.csv" in err
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "--published=ocr", f"--out={tmp_path / 'file'}", "--bootstrap=0")
    assert code == 2 and "file" in err


def test_without_matplotlib_the_law_is_still_written(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("vlm_jax.reports")]:
        monkeypatch.delitem(sys.modules, name)
    import vlm_jax

    monkeypatch.delattr(vlm_jax, "reports", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(capsys, "--published=ocr", f"--out={tmp_path}", "--bootstrap=20")
    assert code == 0 and "no figures: pip install 'vlm-jax[report]'" in err
    assert (tmp_path / "law.json").exists() and json.loads(out)["form"] == "multiplicative"


def stems(files) -> set:
    """The figures among the files, each of which must have its picture twice and its numbers."""
    figures = [Path(name) for name in files if name.endswith(".png")]
    for path in figures:
        assert {str(path.with_suffix(s)) for s in (".svg", ".csv")} < set(files) and path.exists()
    return {path.stem for path in figures}


def test_figures_stand_beside_the_law_and_count_what_the_paper_does_not(tmp_path, capsys):
    code, out, _ = run(
        capsys, "--published=ocr", f"--out={tmp_path}", "--bootstrap=20", "--chip=v6e"
    )
    files = json.loads(out)["files"]
    assert code == 0 and len(np.unique(files)) == len(files)
    assert stems(files) == {
        f"ocr_{kind}"
        for kind in (
            "flops_q0", "flops_q50", "extrapolation", "frontier_over_q", "optimal_v",
            "equal_compute_q0", "equal_compute_q50", "total_flops", "question_pass", "latency",
        )
    }  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "--published=ocr", f"--out={tmp_path}", "--chip=v9")
    assert "--chip: 'v9' is no choice: choose one of v4, v5e" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_that_names_its_llms_has_the_whole_cost_drawn(tmp_path, capsys):
    points = published.points("ocr")
    rows = list(zip(points.label, points.N, points.V, points.error, strict=True))
    for name, lines in (
        ("named", ["label,N,V,error", *(f"{n},{N},{V},{e}" for n, N, V, e in rows)]),
        ("bare", ["N,V,error", *(f"{N},{V},{e}" for _, N, V, e in rows)]),
    ):
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        code, out, err = run(
            capsys, f"--rows={tmp_path / name}.csv", f"--out={tmp_path / name}", "--bootstrap=10"
        )
        drawn = stems(json.loads(out)["files"])
        assert code == 0 and ("all_latency" in drawn) == (name == "named")
        assert ("in a column `label`" in err) == (name == "bare")


def test_a_grid_s_law_uses_one_method_and_says_which(tmp_path, capsys):
    rows = made_rows.rows(methods=made_rows.METHODS, timing=True)
    records.write(tmp_path / "rows.jsonl", rows)
    flags = [f"--rows={tmp_path / 'rows.jsonl'}", f"--out={tmp_path}", "--bootstrap=20"]
    code, out, err = run(capsys, *flags, "--family=text")
    assert code == 0 and json.loads(out)["n"] == 12
    assert "12 rows of token_packer; not used: 9 cells of quecc, 9 cells of quecc, pool" in err
    assert {"text_measured_time", "text_total_flops"} < stems(json.loads(out)["files"])
    assert "no figure of text against time on v5e: the largest LLM has less than 0.1" in err
    code, out, _ = run(
        capsys, *flags, "--family=text", "--compressor=quecc, query separate", "--bootstrap=0"
    )
    assert code == 0 and json.loads(out)["n"] == 9
    code, _, err = run(capsys, *flags, "--compressor=mqt")
    assert code == 2 and "no row of 'mqt'; there are token_packer; quecc" in err


def test_fitting_does_not_import_jax():
    modules = "vlm_jax.verbs.fit, vlm_jax.law.families, vlm_jax.reports.fitted"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
