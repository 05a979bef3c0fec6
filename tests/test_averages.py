# SPDX-License-Identifier: Apache-2.0
"""Scores of benchmarks become the paper's averages, and mixed rules become no law."""

import json

import made_scores as made
import pytest

from vlm_jax.__main__ import main
from vlm_jax.law import published
from vlm_jax.reports import fitted
from vlm_jax.rows import measured, scores


def score(task, value, N=7.0, V=36.0, **changed):
    """A printed score with the columns of its model."""
    return dict(
        task=task, protocol="llava", metric="m", value=value, stderr=1.0, unit="percent", n=100,
        failed=0, subscores={}, files=[dict(name="a.json", sha256="0" * 64)], N=N, V=V,
    ) | changed  # fmt: skip


def mme(points, cognition, **where):
    return score("mme", points, **where) | dict(
        unit="points", stderr=20.0, subscores=dict(cognition=cognition)
    )


def laid(tmp_path, rows):
    return made.lines(tmp_path / "scores.jsonl", rows)


def test_an_average_is_the_mean_of_fractions_with_the_divisors_it_names(tmp_path):
    rows = [mme(1500, 300, Q=40), score("gqa", 60.0, Q=20), score("pope", 85.0, Q=30),
            score("docvqa", 20.0), score("textvqa", 40.0), score("vqav2", 75.0),
            score("ocrbench", 300, unit="points", n=1000, stderr=None)]  # fmt: skip
    found = scores.read([laid(tmp_path, rows)], text_tokens=5.0)
    reasoning = found.families["reasoning"]
    assert 1 - reasoning.error[0] == pytest.approx((0.75 + 0.6 + 0.85) / 3)
    assert reasoning.stderr[0] == pytest.approx((3 * 0.01**2) ** 0.5 / 3)
    assert (reasoning.Q[0], found.families["ocr"].Q[0]) == (30, 5)
    assert 1 - found.families["ocr"].error[0] == pytest.approx(0.3)
    assert 1 - found.tasks["ocrbench"].error[0] == pytest.approx(0.3)
    assert set(found.tasks) == {row["task"] for row in rows}
    divisors = found.about["divisors"]
    assert (divisors["mme"]["divisor"], divisors["gqa"]["divisor"]) == (2000, 100)
    assert all(entry["reason"] for entry in divisors.values())
    missing = found.about["averages"]["reasoning"]["missing"]
    assert len(missing) == 6 and "ai2d" in missing
    assert any("not the paper's average" in line for line in scores.notes(found.about))
    whole = scores.read([laid(tmp_path, rows)], mme=scores.WITH_COGNITION)
    assert 1 - whole.tasks["mme"].error[0] == pytest.approx(1800 / 2800)


def test_a_law_is_fitted_to_a_folder_of_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fitted, "draw", lambda *_, **__: ([], []))
    points = published.points("reasoning")
    folder = tmp_path / "scores"
    folder.mkdir()
    (folder / "predictions.jsonl").write_text('{"question_id": 1, "text": "a"}\n')
    for i, (N, V, error) in enumerate(zip(points.N, points.V, points.error, strict=True)):
        rows = [score(task, 100 * (1 - error), N=N, V=V) for task in scores.AVERAGES["reasoning"]
                if task != "mme"] + [mme(2000 * (1 - error), 0, N=N, V=V)]  # fmt: skip
        made.lines(folder / f"{i}.jsonl", rows)
    flags = [f"--rows={folder}", f"--out={tmp_path / 'law'}", "--bootstrap=0", "--weights=equal"]
    assert main(["fit", *flags]) == 0
    out, err = capsys.readouterr()
    law = json.loads(out)
    assert law["sse"] == pytest.approx(3.7938e-4, rel=1e-3)
    assert law["alpha"] == pytest.approx(0.0709, abs=5e-5)
    assert law["scores"]["averages"]["reasoning"]["missing"] == []
    assert "reasoning is the mean of mme, gqa" in err and "not the paper's" not in err


def test_a_report_of_evaluate_counts_with_the_whole_image_alone(tmp_path):
    def report(view, value):
        return dict(
            settings=dict(visual_tokens=16, view=view), score=score("gqa", value), N=2.0, V=None
        )

    plain = score("gqa", 50.0)
    del plain["N"], plain["V"]
    reports = [report("whole image", 50.0), report("blind", 40.0)]
    for number, one in enumerate(reports):
        del one["V"]
        one["score"] = plain
        made.lines(tmp_path / f"{number}.json", [one])
    found = scores.read([tmp_path])
    assert found.about["unused"] == [str(tmp_path / "1.json")]
    assert any("1.json" in line for line in scores.notes(found.about))
    (point,) = found.families.values()
    assert (point.N.tolist(), point.V.tolist(), point.error.tolist()) == ([2.0], [16.0], [0.5])


@pytest.mark.parametrize("rows, words", [
    ([score("gqa", 60.0), score("gqa", 61.0, V=9.0, protocol="paper")], "protocol is 'llava'"),
    ([score("gqa", 60.0), score("gqa", 61.0, V=9.0, n=50)], "n is 100"),
    ([score("gqa", 60.0), score("gqa", 61.0, V=9.0, files=[dict(name="b", sha256="1" * 64)])],
     "files is a.json 000000000000"),
    ([score("gqa", 60.0), score("gqa", 61.0)], "is also in"),
    ([score("gqa", 60.0), score("pope", 61.0, V=9.0)], "has no score of"),
    ([score("gqa", 60.0, Q=1.0), score("pope", 61.0)], "has Q in the scores of some"),
    ([score("gqa", 60.0, N=None)], "N is None"),
    ([score("gqa", 60.0, N=7e9)], "--n-unit=parameters"),
    ([score("gqa", 160.0)], "not in 0..100"),
    ([score("gqa", None)], "not a number"),
])  # fmt: skip
def test_scores_without_a_common_rule_are_refused(tmp_path, rows, words):
    with pytest.raises(ValueError, match="scores.jsonl:|the model") as error:
        measured.read([laid(tmp_path, rows)])
    assert words in str(error.value)


def test_kinds_of_files_are_not_mixed_and_an_empty_folder_says_so(tmp_path):
    (tmp_path / "table.csv").write_text("N,V,error\n1,1,.5\n")
    with pytest.raises(ValueError, match="mixes"):
        measured.read([laid(tmp_path, [score("gqa", 60.0)]), tmp_path / "table.csv"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no scores of"):
        measured.read([empty])
    file = laid(tmp_path, [score("gqa", 60.0)])
    file.write_text(file.read_text() + '{"task": "gq')
    with pytest.raises(ValueError, match=r"scores.jsonl:2: not JSON, or cut short"):
        measured.read([file])


def test_one_task_of_scores_can_be_fitted_alone(tmp_path):
    file = laid(tmp_path, [score("gqa", 60.0), score("docvqa", 30.0)])
    assert list(measured.read([file], family="gqa").families) == ["gqa"]
    assert list(measured.read([file], family="ocr").families) == ["ocr"]
    with pytest.raises(ValueError, match="no average or task 'text'"):
        measured.read([file], family="text")
