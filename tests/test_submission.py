# SPDX-License-Identifier: Apache-2.0
"""Files for servers hold every question of the split, in the published form."""

import io
import zipfile
from xml.etree import ElementTree

import made_scores as made
import pytest

from vlm_jax.evals import spreadsheet, submission

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
