# SPDX-License-Identifier: Apache-2.0
"""Rows come back as written, torn files are told, and equal tables give equal points."""

import dataclasses
import json
import os

import numpy as np
import pytest

from vlm_jax.law import law, published
from vlm_jax.rows import records, tables
from vlm_jax.rows.records import Row

PAPER = published.points("reasoning")


def row(llm="s", parameters=25_000, V=4, seed=0, *, compressor="quecc", blind=False, scores=None):
    reasoning, text = scores or (0.6, 0.3)
    tasks = {
        "count": dict(family="reasoning", metric="exact", score=reasoning, stderr=0.02, n=100),
        "exist": dict(family="reasoning", metric="exact", score=reasoning, stderr=0.01, n=300),
        "digits": dict(family="text", metric="exact", score=text, stderr=0.02, n=100),
    }
    return Row(
        cell=f"{llm}-{compressor}-{V}-{seed}" + "-blind" * blind,
        llm=llm,
        llm_parameters=parameters,
        vit_parameters=100,
        compressor_parameters=10,
        compressor=compressor,
        query="none",
        blind=blind,
        V=V,
        Q=12.5,
        G=1.5,
        seed=seed,
        tasks=tasks,
        families=records.families_of(tasks),
        flops=dict.fromkeys(("encoder", "compressor", "prefill", "decode"), 1.0),
        train=dict(steps=1, examples=1, flops=1.0, seconds=1.0),
        evaluate_seconds=0.5,
        **dict.fromkeys(("protocol", "prompt", "parser", "data_hash", "config_hash"), "x"),
        commit="abc",
        versions={"jax": "1"},
        machine="cpu",
        created="2026-01-01T00:00:00+00:00",
    )


def grid():
    """Three sizes, four V, two seeds, with a blind row and a pooling baseline beside them."""
    rows = []
    for i, parameters in enumerate((25_000, 80_000, 250_000)):
        for V in (1, 4, 16, 36):
            for seed in (0, 1):
                score = 0.5 + 0.05 * i + 0.02 * np.log(V) + 0.004 * seed
                rows.append(row(f"s{i}", parameters, V, seed, scores=(score, score / 2)))
    rows.append(row("s0", 25_000, 4, blind=True, scores=(0.5, 0.0)))
    rows.append(row("s0", 25_000, 4, compressor="pool", scores=(0.1, 0.1)))
    return rows


def test_a_row_survives_its_line():
    assert Row.from_json(row().to_json()) == row()
    assert "\n" not in row().to_json()


def test_written_rows_are_read_sorted_and_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.write(path, reversed(grid()))
    assert records.read(path) == sorted(grid(), key=lambda r: r.cell)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = [row(V=1).to_json(), row(V=4).to_json()]
    path.write_text("\n".join(whole) + "\n" + row(V=16).to_json()[:200])
    with pytest.warns(UserWarning, match="rows.jsonl:3: incomplete last line"):
        assert len(records.read(path)) == 2
    path.write_text(whole[0][:50] + "\n" + whole[1] + "\n")
    with pytest.raises(ValueError, match="rows.jsonl:1: not JSON"):
        records.read(path)


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(row().to_json() + "\n" + row().to_json() + "\n")
    with pytest.raises(ValueError, match="cell s-quecc-4-0 was already in line 1"):
        records.read(path)
    fields = json.loads(row().to_json())
    for change, message in (
        ({"schema": 7}, "schema 7, this version reads 1"),
        ({"extra": 1}, "unknown fields .'extra'."),
        (
            {"families": {"text": dict(score=62.0, stderr=1.0, n=1)}},
            "score of text must be a fraction",
        ),
    ):
        path.write_text(json.dumps(fields | change) + "\n")
        with pytest.raises(ValueError, match=message):
            records.read(path)
    del fields["seed"]
    with pytest.raises(ValueError, match="missing fields .'seed'."):
        Row.from_json(json.dumps(fields))
    with pytest.raises(ValueError, match="Out of range float"):
        dataclasses.replace(row(), Q=float("nan")).to_json()


def test_a_family_is_the_mean_of_its_tasks_with_their_errors_combined():
    families = row(scores=(0.6, 0.3)).families
    assert families["reasoning"] == {
        "score": 0.6,
        "stderr": pytest.approx(np.hypot(0.02, 0.01) / 2),
        "n": 400,
    }
    assert families["text"] == {"score": 0.3, "stderr": 0.02, "n": 100}


def test_points_are_the_sighted_rows_of_the_grids_compressor():
    points = records.points(grid(), "reasoning")
    assert len(points) == 24 and set(points.V) == {1, 4, 16, 36}
    assert points.N.max() == 2.5e-4  # billions
    assert points.Q.tolist() == [12.5] * 24
    assert points.error.min() == pytest.approx(1 - (0.6 + 0.02 * np.log(36) + 0.004))
    assert len(records.points(grid(), "reasoning", method="pool")) == 1
    assert records.points(grid(), "reasoning", blind=True).error.tolist() == [0.5]
    assert (
        records.points(grid(), "digits").error.tolist()
        == records.points(grid(), "text").error.tolist()
    )


def test_the_mean_over_families_is_the_mean_of_their_points():
    mean, parts = records.points(grid()), [records.points(grid(), f) for f in ("reasoning", "text")]
    np.testing.assert_allclose(mean.error, (parts[0].error + parts[1].error) / 2)
    np.testing.assert_allclose(mean.stderr, np.hypot(parts[0].stderr, parts[1].stderr) / 2)


def test_rows_that_cannot_be_one_grid_are_refused():
    rows = grid()
    again = dataclasses.replace(rows[0], cell="other-name", families=rows[1].families)
    with pytest.raises(
        ValueError, match="s0-quecc-1-0 and other-name are both 25,000 parameters, V=1"
    ):
        records.points(rows + [again], "text")
    asked = dataclasses.replace(rows[0], cell="asked", query="separate")
    with pytest.raises(ValueError, match="quecc was run as|no row of"):
        records.points([asked, dataclasses.replace(asked, cell="b", variant="pool")], "text",
                       method="quecc")  # fmt: skip
    with pytest.raises(ValueError, match="no row of 'mqt'; there are quecc; pool"):
        records.points(rows, "text", method="mqt")
    tie = [r for r in rows if r.V == 4 and r.seed == 0 and r.llm == "s0"]
    with pytest.raises(ValueError, match="methods pool and quecc have 1 cells each.*--compressor"):
        records.points(tie, "text")


def test_methods_of_one_compressor_are_never_mixed():
    asked = [
        dataclasses.replace(row, cell=f"{row.cell}-asked", query="separate")
        for row in grid() if row.compressor == "quecc" and row.V > 1
    ]  # fmt: skip
    pooled = [dataclasses.replace(row, cell=f"{row.cell}-p", variant="pool") for row in asked[:6]]
    every = grid() + asked + pooled
    assert records.methods(every) == {
        "quecc": 24, "quecc, query separate": 18, "quecc, pool, query separate": 6, "pool": 1,
    }  # fmt: skip
    np.testing.assert_array_equal(records.points(every).error, records.points(grid()).error)
    assert len(records.points(every, method="quecc, query separate")) == 18
    # A compressor's bare name is the method of that name, or all there is of it.
    assert len(records.points(every, method="quecc")) == 24
    assert len(records.points(asked, method="quecc")) == 18


def test_rows_of_before_the_later_fields_are_read():
    fields = json.loads(row().to_json())
    for name in records.LATER:
        del fields[name]
    assert Row.from_json(json.dumps(fields)) == row()
    timed = dataclasses.replace(row(), timing=dict(batch=8, seconds_per_example=0.1, new_tokens=2))
    assert Row.from_json(timed.to_json()) == timed


def table(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def csv_of(column, values, points=PAPER, *, n=1.0, q=True):
    lines = [f"N,V,{'Q,' if q else ''}{column}"]
    for i in range(len(points)):
        lines.append(
            f"{float(points.N[i]) * n!r},{points.V[i]:g},{'50,' if q else ''}{values[i]!r}"
        )
    return "\n".join(lines) + "\n"


def test_every_way_to_write_the_same_table_gives_the_same_points(tmp_path):
    error = PAPER.error.tolist()
    accuracy = [1 - e for e in error]
    percent = [100 * a for a in accuracy]
    ways = [
        ("a.csv", csv_of("error", error), {}),
        ("b.csv", csv_of("accuracy", accuracy), {}),
        ("c.csv", "\ufeff" + csv_of("accuracy", percent).replace(",", ", "), {}),
        ("d.csv", csv_of("error", [100 * e for e in error]), {}),
        ("e.csv", csv_of("error", error, n=1e9), {"n_unit": "parameters"}),
        ("f.csv", csv_of("error", error, q=False), {"text_tokens": 50.0}),
        ("g.jsonl", "".join(json.dumps(dict(N=n, V=v, Q=50, error=e)) + "\n"
                            for n, v, e in zip(PAPER.N, PAPER.V, error, strict=True)), {}),
        ("h.json", json.dumps([dict(N=n, V=v, Q=50, error=e)
                               for n, v, e in zip(PAPER.N, PAPER.V, error, strict=True)]), {}),
    ]  # fmt: skip
    for name, text, how in ways:
        points = records.read_points(table(tmp_path, name, text), **how)
        for column in ("N", "V", "error"):
            np.testing.assert_allclose(
                getattr(points, column), getattr(PAPER, column), rtol=1e-12, err_msg=name
            )
        assert points.Q.tolist() == [50.0] * 28


def test_our_own_rows_load_as_points(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.write(path, grid())
    own, direct = records.read_points(path, "text"), records.points(grid(), "text")
    assert sorted(own.error) == sorted(direct.error) and len(own) == 24


def test_a_long_table_holds_families_and_stderr(tmp_path):
    lines = ["N,V,family,accuracy,stderr,seed"]
    for i in range(28):
        for family, plus in (("vqa", 0.0), ("ocr", 0.1)):
            lines.append(f"{PAPER.N[i]},{PAPER.V[i]},{family},{PAPER.error[i] + plus},0.01,3")
    path = table(tmp_path, "long.csv", "\n".join(lines))
    mean, vqa = records.read_points(path), records.read_points(path, "vqa")
    np.testing.assert_allclose(mean.error, vqa.error - 0.05)
    np.testing.assert_allclose(vqa.stderr, 0.01)
    np.testing.assert_allclose(mean.stderr, 0.01 / np.sqrt(2))


@pytest.mark.parametrize(
    "text,message",
    [
        ("N,V,error\n.5,1,.3\n.5,4,31\n", "0.3 in line 2 and 31 in line 3.*percent are mixed"),
        ("N,V,error\n.5,1,.3\n.5,4,-.1\n", ":3: error is -0.1: give fractions"),
        ("N,V,error\n.5,1,.3\n.5,4,1.2\n", "1.2 in line 3.*cannot exceed 1"),
        ("N,V,accuracy\n.5,1,30\n.5,4,131\n", ":3: accuracy is 131: give fractions"),
        ("N,V,error\n.5,1,nan\n", ":2: error is nan"),
        ("N,V,error,stderr\n.5,1,.3,-.1\n", ":2: stderr is -0.1: it cannot be negative"),
        ("N,V,error\n.5,1,\n", ":2: error is empty, a number was expected: write one"),
        ("N,V,error\n.5,one,.3\n", ":2: V is 'one'"),
        ("N,V,error\n0,1,.3\n", "LLM parameters in billions must be positive"),
        ("N,V,error\n1,0,.3\n", "visual tokens must be positive"),
        ("N,V,Q,error\n1,1,-5,.3\n", "text tokens cannot be negative"),
        ("N,error\n.5,.3\n", "column V missing: needed are N, V and one of .*; found N, error"),
        ("N,V,Q\n.5,1,3\n", "has none; found N, Q, V"),
        ("N,V,error,accuracy\n.5,1,.3,.7\n", "has error and accuracy"),
        ("N,V,error\n.5,1,.3\n.5,4,.2\n.5,1,.31\n", ":4: N=0.5, V=1 was already in line 2 .* 0.31"),
        ("N,V,error,stderr\n.5,1,.3,.1\n.5,1,.3,.2\n", "2 with error 0.3 ± 0.1, now 0.3 ± 0.2"),
        ("N,V,error\n7e9,1,.3\n", "pass --n-unit=parameters"),
        ("N,V,error\n25000,1,.3\n", "pass --n-unit=parameters"),
        ("N,V,error\n", "no rows: it needs column names"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_with_the_line_and_the_way_out(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        records.read_points(table(tmp_path, "bad.csv", text))


def test_an_identical_line_counts_once(tmp_path):
    path = table(tmp_path, "twice.csv", "N,V,error\n.5,1,.3\n.5,4,.2\n.5,1,.3\n")
    with pytest.warns(UserWarning, match=r"1 lines \(the first is 4\) repeat an earlier one"):
        assert len(records.read_points(path)) == 2
    path = table(tmp_path, "seeds.csv", "N,V,error,seed\n.5,1,.3,0\n.5,1,.31,1\n")
    assert len(records.read_points(path)) == 2


def test_unknown_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown table format '.txt'"):
        records.read_points(table(tmp_path, "a.txt", "N V"))
    with pytest.raises(ValueError, match="not JSON"):
        records.read_points(table(tmp_path, "a.json", "{"))
    with pytest.raises(ValueError, match="a.jsonl:2: not JSON"):
        records.read_points(table(tmp_path, "a.jsonl", '{"N": 1, "V": 1, "error": 0.3}\nhello\n'))
    (tmp_path / "utf16.csv").write_bytes("N,V,error".encode("utf-16"))
    with pytest.raises(ValueError, match="utf16.csv: not text in UTF-8"):
        records.read_points(tmp_path / "utf16.csv")
    with pytest.raises(FileNotFoundError):
        records.read_points(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="billions, millions, parameters, got 'thousands'"):
        records.read_points(table(tmp_path, "a.csv", "N,V,error\n1,1,.3\n"), n_unit="thousands")


def lmms_eval(accuracy, **more):
    """A results file in the form of lmms-eval: task -> "metric,filter" -> value."""
    return {
        "results": {
            "gqa": {"alias": "gqa", "exact_match,none": accuracy, "exact_match_stderr,none": 0.004},
            "mme": {
                "alias": "mme",
                "mme_cognition_score,none": 250.0,
                "mme_cognition_score_stderr,none": "N/A",
                "mme_perception_score,none": 2000 * accuracy,
                "mme_perception_score_stderr,none": "N/A",
            },
        },
        "config": {"model": "llava"},
    } | more


def test_lmms_eval_results_named_in_a_table_or_carrying_their_cell(tmp_path):
    lines = ["N,V,Q,results"]
    for i in range(28):
        (tmp_path / f"r{i}.json").write_text(json.dumps(lmms_eval(1 - PAPER.error[i])))
        lines.append(f"{PAPER.N[i]},{PAPER.V[i]},50,r{i}.json")
    path = table(tmp_path, "cells.csv", "\n".join(lines))
    gqa, mme, mean = (records.read_points(path, name) for name in ("gqa", "mme", None))
    for points in (gqa, mme, mean):
        np.testing.assert_allclose(points.error, PAPER.error)
    assert gqa.stderr[0] == 0.004 and np.isnan(mme.stderr[0])
    assert law.fit(mean, bootstrap=0, intervals=False).params["alpha"] == pytest.approx(
        0.0709, abs=1e-4
    )

    own = table(tmp_path, "one.json", json.dumps(lmms_eval(0.6, N=7, V=36)))
    assert records.read_points(own, "gqa").error.tolist() == pytest.approx([0.4])
    # Names that lmms-eval has had for one metric, and a group without metrics of its own.
    renamed = lmms_eval(0.6, N=7, V=36)
    renamed["results"] = {
        "mme": {"mme_percetion_score,none": 1500.0, "mme_cognition_score,none": 300.0},
        "mathvista_testmini": {"alias": "mathvista_testmini", " ": " "},
        "mathvista_testmini_cot": {"llm_as_judge_eval,none": 47.5},
        "mathvista_testmini_format": {"gpt_eval_score,none": 45.0},
        "pope": {"pope_accuracy,none": 0.85, "pope_f1_score,none": 0.84, "pope_recall,none": 0.8},
        "textvqa_val": {"exact_match,none": 0.58, "submission,none": None},
    }
    (cell,) = tables.read(table(tmp_path, "renamed.json", json.dumps(renamed)))
    assert {task: round(1 - error, 6) for task, (error, _) in cell.errors.items()} == {
        "mme": 0.75, "mathvista_testmini_cot": 0.475, "mathvista_testmini_format": 0.45,
        "pope": 0.85, "textvqa_val": 0.58,
    }  # fmt: skip
    bare = table(tmp_path, "bare.json", json.dumps(lmms_eval(0.6)))
    with pytest.raises(
        ValueError, match="does not say how large the LLM is.*add N and V at its top level"
    ):
        records.read_points(bare)
    several = lmms_eval(0.6, N=7, V=36)
    several["results"]["vizwiz"] = {"exact_match,none": 0.5, "bleu,none": 0.3}
    with pytest.raises(
        ValueError, match="task vizwiz has metrics exact_match, bleu: keep one.*--tasks"
    ):
        records.read_points(table(tmp_path, "several.json", json.dumps(several)))
    with pytest.raises(ValueError, match="gqa's exact_match = 1.2 is not in 0..1"):
        records.read_points(
            table(tmp_path, "high.json", json.dumps(lmms_eval(1.2, N=7, V=36))), "mme"
        )
    with pytest.raises(ValueError, match="results file .*gone.json does not exist"):
        records.read_points(table(tmp_path, "gone.csv", "N,V,results\n7,36,gone.json\n"))


def test_how_llms_came_by_their_weights_tells_rows_apart_only_where_one_size_has_two_ways():
    def started(llm, parameters, way):
        return dataclasses.replace(row(llm, parameters), llm_weights=way)

    small, tuned = row("s", 25_000), started("tuned", 80_000, "pretrained, LoRA")
    one = records.comparable([small, tuned])
    assert [r.method for r in one] == ["quecc", "quecc"]
    assert [r.llm for r in one] == ["s", "tuned"] and len(records.points(one)) == 2
    assert records.comparable(grid()) == grid()
    several = [small, tuned, row("fresh", 80_000)]
    assert records.comparable(several) == several
    assert records.methods(several) == {"quecc": 2, "quecc, pretrained, LoRA": 1}
    assert len(records.points(several)) == 2
    with pytest.raises(ValueError, match="are both 80,000 parameters"):
        records.points([*several, row("again", 80_000)])
