# SPDX-License-Identifier: Apache-2.0
"""Files for servers hold every question of the split, in the published form."""

import io
import json
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import made_scores as made
import pytest

from vlm_jax.evals import spreadsheet, submission
from vlm_jax.evals.answers import evalai

EXAMPLES = Path(__file__).parent / "published" / "benchmarks"
SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def cells(data):
    """The rows of an .xlsx file: place -> text or number."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    return {
        cell.get("r"): int(cell.find(f"{SHEET}v").text)
        if cell.get("t") is None
        else cell.find(f"{SHEET}is/{SHEET}t").text or ""
        for cell in sheet.iter(f"{SHEET}c")
    }


def test_a_spreadsheet_holds_any_text():
    texts = ["a < b & c", " blanks ", "line\nbreak", "\x00\x0b", "\ud83d", "é\u2028", "_x0041_"]
    found = cells(spreadsheet.table([["n", None, *texts], [1_000_241, "", *texts]]))
    assert found["A2"] == 1_000_241 and "B1" not in found and found["B2"] == ""
    assert [found[f"{letter}2"] for letter in "CDE"] == texts[:3]
    assert (found["F2"], found["G2"]) == ("_x0000__x000B_", "_xD83D_")
    assert (found["H2"], found["I2"]) == ("é\u2028", "_x005F_x0041_")
    wide = cells(spreadsheet.table([list(range(60))]))
    assert (wide["Z1"], wide["AA1"], wide["BH1"]) == (25, 26, 59)
    with pytest.raises(ValueError, match="32767"):
        spreadsheet.table([["x" * 32_768]])


def test_a_task_without_a_server_has_no_submission(tmp_path, capsys):
    made.questions(tmp_path, 2)
    file = made.answers(tmp_path / "a.jsonl", [True, False])
    flag = f"--submission={tmp_path / 'up.json'}"
    message = made.score(capsys, *made.own(tmp_path, file), flag, code=2)
    assert all(task in message for task in submission.FORMATS)
    assert not (tmp_path / "up.json").exists()


def submitted(capsys, task, annotations, predictions, file, *flags):
    """What the verb prints, and the content of the file that it writes."""
    flags = [f"--annotations={annotations}", f"--predictions={predictions}", *flags]
    shown = made.score(capsys, f"--task={task}", *flags, f"--submission={file}")
    return shown, file.read_bytes()


def predicted(task):
    path = EXAMPLES / task / "predictions.jsonl"
    return path, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", ["vqav2", "vizwiz"])
def test_answers_of_vqa_are_normalized_as_llava_does(task, tmp_path, capsys):
    path, rows = predicted(task)
    folder = EXAMPLES / task / "annotations"
    shown, content = submitted(capsys, task, folder, path, tmp_path / "up.json")
    texts = {row["question_id"]: evalai(row["text"]) for row in rows}
    answers = json.loads(content)
    assert shown["value"] > 0 and shown["submission"]["n"] == len(answers) == len(texts)
    if task == "vqav2":
        assert {a["question_id"]: a["answer"] for a in answers} == texts
    else:
        names = [row["image"] for row in json.loads((folder / "val.json").read_text())]
        assert [a["image"] for a in answers] == names
        assert [a["answer"] for a in answers] == [texts[i] for i in range(len(names))]


def test_a_test_split_is_written_and_not_scored(tmp_path, capsys):
    path, rows = predicted("docvqa")
    official = json.loads((EXAMPLES / "docvqa/annotations/val_v1.0_withQT.json").read_text())
    for row in official["data"]:
        del row["answers"]
    annotations = tmp_path / "test_v1.0.json"
    annotations.write_text(json.dumps(official))
    rows[0] = {"question_id": rows[0]["question_id"], "error": "out of memory"}
    path = made.lines(tmp_path / "a.jsonl", rows)
    shown, content = submitted(capsys, "docvqa", annotations, path, tmp_path / "up.json")
    assert "value" not in shown and shown["submission"]["failed"] == 1
    answers = {a["questionId"]: a["answer"] for a in json.loads(content)}
    assert answers == {r["question_id"]: r.get("text", "").strip() for r in rows}
    flags = ["--task=docvqa", f"--annotations={annotations}", f"--predictions={path}"]
    message = made.score(capsys, *flags, code=2)
    assert "test split" in message and "--submission=FILE" in message
    split = [*flags, f"--submission={tmp_path / 'up.json'}", "--model=N=7"]
    assert "this is a test split" in made.score(capsys, *split, code=2)
    made.lines(path, rows[1:])
    other = f"--submission={tmp_path / 'other.json'}"
    assert "1 missing ids" in made.score(capsys, *flags, other, code=2)
    assert not (tmp_path / "other.json").exists()
    submitted(capsys, "docvqa", annotations, path, tmp_path / "up.json", "--allow=missing")


def test_mmbench_is_a_spreadsheet_with_the_column_where_its_server_expects_it(tmp_path, capsys):
    path, rows = predicted("mmbench")
    file = EXAMPLES / "mmbench/annotations/mmbench_dev_20230712.tsv"
    _, content = submitted(capsys, "mmbench", file, path, tmp_path / "up.xlsx")
    found = cells(content)
    head = [found[f"{letter}1"] for letter in "ABCDEFGHI"]
    assert head == [*"index question A B C D prediction answer split".split()]
    texts = {found[f"A{i}"]: found.get(f"G{i}", "") for i in range(2, len(rows) + 2)}
    assert texts == {row["question_id"]: row["text"] for row in rows}
