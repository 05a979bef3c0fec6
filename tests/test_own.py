# SPDX-License-Identifier: Apache-2.0
"""A user's own questions, and what is refused in any file: each error says the way out."""

import json
import subprocess
import sys

import made_scores as made
import pytest
import tiny

from vlm_jax.evals import scoring
from vlm_jax.evals.task import Question
from vlm_jax.evals.tasks import own


def test_own_questions_are_scored_by_a_named_metric(tmp_path, capsys):
    made.lines(tmp_path / "q.jsonl", [
        {"id": "a", "image": "1.png", "question": "What color?", "answer": "Dark  Red"},
        {"id": 7, "images": ["1.png", "2.png"], "question": "How many?", "answers": ["two", 2]},
        {"id": "c", "question": "Who?", "answer": "Zoë", "labels": {"kind": "name"}},
    ])  # fmt: skip
    made.lines(tmp_path / "p.jsonl", [
        {"question_id": "a", "text": "It is dark red."},
        {"question_id": 7, "text": "2"},
        {"question_id": "c", "text": "zoë "},
    ])  # fmt: skip
    flags = ["--task=own", f"--annotations={tmp_path / 'q.jsonl'}",
             f"--predictions={tmp_path / 'p.jsonl'}"]  # fmt: skip
    exact = made.score(capsys, *flags, "--metric=exact_match")
    inside = made.score(capsys, *flags, "--metric=contains")
    assert exact["value"] == pytest.approx(200 / 3) and inside["value"] == 100
    assert exact["subscores"] == {"kind.name": 100} and exact["n"] == 3
    message = made.score(capsys, *flags, code=2)
    assert "--metric is missing" in message
    assert "--metric" in made.score(capsys, *flags, "--protocol=llava", code=2)
    assert "exact_match" in made.score(capsys, *flags, "--metric=exact", code=2)


@pytest.mark.parametrize("metric, text, value", [
    ("exact_match", " 10 ", 1), ("exact_match", "10.4", 0), ("contains", "it is 10 m", 1),
    ("anls", "10", 1), ("anls", "1", 0.5), ("anls", "7", 0),
    ("vqa", "The ten.", 1), ("vqa", "11", 0),
    ("relaxed", "10.4", 1), ("relaxed", "10.6", 0), ("relaxed", "TEN", 1),
])  # fmt: skip
def test_a_metric_is_what_its_name_says(metric, text, value):
    question = Question(id=1, text="?", answers=("10", "ten"))
    assert own.TASK.protocols[metric].grade(question, text).value == pytest.approx(value)


def test_ten_answers_give_the_soft_score_of_vqa():
    question = Question(id=1, text="?", answers=("a cat", "Cat", *["dog"] * 8))
    values = [own.TASK.protocols["vqa"].grade(question, text).value for text in ("cat", "dogs")]
    assert values == pytest.approx([0.6, 0])


@pytest.mark.parametrize("row, words", [
    ({"id": 1, "question": "?", "answr": "x"}, "unknown field 'answr'"),
    ({"id": 1, "answer": "x"}, "question is None"),
    ({"id": None, "question": "?", "answer": "x"}, "id is None"),
    ({"id": 1, "question": "?", "answer": "x", "answers": ["y"]}, "both answer and answers"),
    ({"id": 1, "question": "?", "answer": {"a": 1}}, "not a text or a number"),
    ({"id": 1, "question": "?", "answer": "x", "labels": ["a"]}, "labels is"),
    ({"id": 1, "question": "?"}, "have no answer, as in a test split"),
])  # fmt: skip
def test_a_wrong_field_of_a_question_is_named_with_its_line(tmp_path, capsys, row, words):
    made.lines(tmp_path / "questions.jsonl", [row])
    file = made.answers(tmp_path / "a.jsonl", [True])
    assert words in made.score(capsys, *made.own(tmp_path, file), code=2)


@pytest.mark.parametrize("content, words", [
    ('{"question_id": 0, "text": "yes"}\n{"question_id": 1, "te', ["line 2", "cut short"]),
    ("", ["is empty"]),
    ('{"question_id": 0, "text": null}', ["line 1", "`text` is None"]),
    ('{"question_id": 0}', ["line 1", "`text` is None", "question_id"]),
    ('{"question": 0, "text": "yes"}', ["line 1", "needs question_id"]),
    ("[1, 2]", ["line 1", "a list, not an object"]),
    ('{"question_id": "x0", "text": ""}', ["none of its 1 ids", "'x0'", "'0'"]),
    ('{"question_id": 0, "text": ""}', ["1 missing ids", "'1'", "--allow=missing"]),
    ("".join(f'{{"question_id": {i}, "text": ""}}\n' for i in (0, 1, 1)),
     ["1 duplicate ids", "line 3", "--allow=duplicate"]),
    ("".join(f'{{"question_id": {i}, "text": ""}}\n' for i in (0, 1, 2)),
     ["1 surplus ids", "'2'", "--allow=surplus"]),
    (b"\xff\xfe\x00", ["a.jsonl"]),
])  # fmt: skip
def test_a_broken_file_of_predictions_is_refused(tmp_path, capsys, content, words):
    made.questions(tmp_path, 2)
    file = tmp_path / "a.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = made.score(capsys, *made.own(tmp_path, file), code=2)
    for word in words:
        assert word in message
    assert message.count("\n") == 1


def test_what_is_allowed_is_counted(tmp_path, capsys):
    made.questions(tmp_path, 4)
    rows = [(0, "no"), (0, "yes"), (1, "yes"), (9, "yes"), (3, "")]
    file = made.lines(tmp_path / "a.jsonl", [{"question_id": i, "text": t} for i, t in rows])
    allow = "--allow=missing,surplus,duplicate"
    shown = made.score(capsys, *made.own(tmp_path, file), allow)
    counts = {name: shown[name] for name in ("missing", "surplus", "duplicate", "failed", "empty")}
    assert counts == {"missing": 1, "surplus": 1, "duplicate": 1, "failed": 1, "empty": 1}
    assert (shown["n"], shown["value"]) == (4, 50)
    assert "missing" in made.score(capsys, *made.own(tmp_path, file), "--allow=missin", code=2)


def test_failures_are_apart_from_wrong_answers_and_said(tmp_path, capsys):
    made.questions(tmp_path, 4)
    rows = [dict(text="yes"), dict(text="no"), dict(error="out of memory"),
            dict(text="[LMMS_EVAL_REQUEST_FAILED after 5 retries] 503")]  # fmt: skip
    file = made.lines(tmp_path / "a.jsonl", [{"question_id": i, **r} for i, r in enumerate(rows)])
    assert made.main(["score", *made.own(tmp_path, file)]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert (shown["value"], shown["failed"], shown["n"]) == (25, 2, 4)
    assert shown["parser"] == {"whole text": 2, "failed": 2}
    assert "2 of the answers could not be made" in err


@pytest.mark.parametrize("text", ["", "." * 40, "⁰é\u2028\x00", "\ud83d", " \n\t", "9" * 5000])
def test_any_text_is_an_answer(tmp_path, capsys, text):
    made.questions(tmp_path, 2)
    rows = [{"question_id": 0, "text": text}, {"question_id": 1, "text": "yes"}]
    file = made.lines(tmp_path / "a.jsonl", rows)
    kept = tmp_path / "samples.jsonl"
    shown = made.score(capsys, *made.own(tmp_path, file), f"--samples={kept}")
    assert shown["value"] == 50
    assert made.score(capsys, "--compare", kept, kept)["difference"] == 0


@pytest.mark.parametrize("flags, words", [
    (["--task=ocrbanch", "--predictions=a", "--annotations=b"], "did you mean ocrbench?"),
    (["--task=own", "--metric=contains", "--predictions=a"], "--annotations is missing"),
    (["--predictions=a", "--annotations=b"], "--task is missing"),
    (["--task=ocrbench", "--protocol=x", "--predictions=a", "--annotations=b"], "lmms-eval"),
    (["--task=ocrbench", "--metric=anls", "--predictions=a", "--annotations=b"], "--task=own"),
    (["--task=ocrbench", "--predictions=a", "--annotations=nowhere"], "nowhere"),
    (["--task=ocrbench", "--predictions=a", "--annotations=b", "--full=c"], "--downsampled"),
    (["--compare", "a", "b", "--samples=c"], "--samples is not for --compare"),
    (["--task=ocrbench", "--predictions=a", "--annotations=b", "--difference=1"], "for --compare"),
    (["--task=ocrbench", "--predictions=a", "--annotations=b", "--across-protocols"],
     "--across-protocols is for --compare"),
    (["--compare", "nowhere", "b"], "nowhere"),
])  # fmt: skip
def test_a_wrong_flag_is_refused_with_the_way_out(flags, words, capsys):
    assert words in made.score(capsys, *flags, code=2)


def test_a_file_that_is_read_is_not_written_over(tmp_path, capsys):
    made.questions(tmp_path, 2)
    file = made.answers(tmp_path / "a.jsonl", [True] * 2)
    before = file.read_bytes()
    (tmp_path / "link").symlink_to(file)
    for name in ("a.jsonl", "questions.jsonl", "link"):
        flags = [*made.own(tmp_path, file), f"--samples={tmp_path / name}"]
        assert "another name" in made.score(capsys, *flags, code=2)
    assert file.read_bytes() == before


def test_a_score_starts_fast_and_imports_no_library(tmp_path):
    made.questions(tmp_path, 3)
    file = made.answers(tmp_path / "a.jsonl", [True] * 3)
    program = (
        "import sys, time\nfrom vlm_jax.__main__ import main\nmain(sys.argv[1:])\n"
        "print([m for m in ('jax', 'numpy', 'scipy', 'PIL') if m in sys.modules])\n"
        "print(time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "score", *made.own(tmp_path, file)],
        cwd=tiny.ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    _, libraries, seconds = done.stdout.splitlines()
    assert libraries == "[]" and float(seconds) < 0.7


def test_an_old_file_and_files_of_several_versions_are_said():
    names = dict(old="old: 2,910 lines, newer ones have 3,000", new="release 2", other="unknown")
    files = {name: dict(name=f"{name}.json", known=known) for name, known in names.items()}
    assert scoring.old_files([files["new"], files["other"]]) == []
    (old,) = scoring.old_files([files["old"], files["other"]])
    assert old == "old.json is not the current file: old: 2,910 lines, newer ones have 3,000"
    assert "mixed versions: new.json is current" in scoring.old_files(list(files.values()))[1]
