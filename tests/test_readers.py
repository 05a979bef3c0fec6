# SPDX-License-Identifier: Apache-2.0
"""A broken row of an official file is named; its fields are used or refused, never made up."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import made_scores as made
import pytest
import tiny

from vlm_jax.evals.readers import text_of, texts_of
from vlm_jax.evals.tasks import TASKS

EXAMPLES = Path(__file__).parent / "published" / "benchmarks"
GQA, DOCVQA = "data/testdev_balanced_questions.json", "val_v1.0_withQT.json"
ASKED = "v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERED = "v2_mscoco_val2014_annotations.json"


def broken(folder, task, file, place, value):
    """A copy of an example in which the value at a place in a file is another one."""
    home = Path(shutil.copytree(EXAMPLES / task / "annotations", folder / "annotations"))
    at = whole = json.loads((home / file).read_text())
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    (home / file).write_text(json.dumps(whole))
    return home


def refused(capsys, task, home):
    """The message of a score with these annotations, which ends with 2 and one line."""
    file = EXAMPLES / task / "predictions.jsonl"
    flags = [f"--task={task}", f"--predictions={file}", f"--annotations={home}"]
    message = made.score(capsys, *flags, code=2)
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("task, file, place, value, words", [
    ("gqa", GQA, ["90000005", "answer"], None, ["90000005"]),
    ("gqa", GQA, ["90000005", "types"], {"structural": "query"}, ["row 90000005", "'semantic'"]),
    ("vqav2", ASKED, ["questions", 5, "question"], 7, ["row 5"]),
    ("vqav2", ANSWERED, ["annotations", 5, "answer_type"], [], ["row 5"]),
    ("vqav2", ANSWERED, ["annotations", 5, "image_id"], 1.5, ["row 5", "float"]),
    ("vizwiz", "val.json", [4, "answers"], None, ["row 4"]),
    ("vizwiz", "val.json", [4, "question"], None, ["row 4"]),
    ("docvqa", DOCVQA, ["data", 4, "question"], None, ["row 4"]),
    ("docvqa", DOCVQA, ["data", 4, "questionId"], None, ["row 4"]),
    ("docvqa", DOCVQA, ["data", 4, "answers"], [None], ["row 4", "None where a text"]),
    ("ocrbench", "OCRBench/OCRBench.json", [5, "answers"], None, ["row 5", "None"]),
    ("ocrbench", "OCRBench/OCRBench.json", [5, "type"], float("nan"), ["row 5"]),
    ("chartqa", "ChartQA Dataset/test/test_human.json", [2, "label"], float("nan"), ["row 2"]),
    ("scienceqa", "problems.json", ["17", "answer"], -1, ["row 17", "its answer is -1"]),
    ("scienceqa", "problems.json", ["17", "choices"], "ab", ["row 17", "a list is needed"]),
])  # fmt: skip
def test_a_broken_row_is_named(tmp_path, capsys, task, file, place, value, words):
    message = refused(capsys, task, broken(tmp_path, task, file, place, value))
    for word in words:
        assert word in message


@pytest.mark.parametrize("task, file, field, value, words", [
    ("pope", "coco/coco_pope_random.json", "label", "maybe", ["row 0", "not yes or no"]),
    ("pope", "coco/coco_pope_random.json", "text", None, ["row 0"]),
    ("nlvr", "dev/dev.json", "label", True, ["row 0"]),
    ("nlvr", "dev/dev.json", "identifier", None, ["row 0"]),
    ("ai2d", "test.jsonl", "answer", "9", ["row 0", "its answer is 9"]),
    ("ai2d", "test.jsonl", "options", [None], ["row 0", "None where a text"]),
    ("mmmu", "validation.jsonl", "answer", "Z", ["row 0", "its answer is 'Z'"]),
    ("mathvista", "testmini.jsonl", "question", 5, ["row 0"]),
])  # fmt: skip
def test_a_broken_line_is_named(tmp_path, capsys, task, file, field, value, words):
    home = Path(shutil.copytree(EXAMPLES / task / "annotations", tmp_path / "annotations"))
    rows = [json.loads(line) for line in (home / file).read_text().splitlines()]
    made.lines(home / file, [rows[0] | {field: value}, *rows[1:]])
    message = refused(capsys, task, home)
    for word in words:
        assert word in message


@pytest.mark.parametrize("task, file, place, value, words", [
    ("gqa", GQA, ["90000005", "answer"], None, "question '90000005': its answer is None"),
    ("vqav2", ANSWERED, ["annotations", 5, "answers", 0, "answer"], 2, "its answer is 2"),
    ("vqav2", ANSWERED, ["annotations", 5, "answer_type"], float("nan"), "its type is nan"),
    ("docvqa", DOCVQA, ["data", 4, "questionId"], None, "question 'None': its id is None"),
])  # fmt: skip
def test_a_field_of_another_type_is_refused(tmp_path, task, file, place, value, words):
    # In another process, in which no import hook checks types.
    home = broken(tmp_path, task, file, place, value)
    flags = [f"--task={task}", f"--predictions={EXAMPLES / task / 'predictions.jsonl'}"]
    command = [sys.executable, "-m", "vlm_jax", "score", *flags, f"--annotations={home}"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_an_id_of_vqav2_that_is_there_twice_is_refused_and_one_without_answers_is_said(tmp_path):
    home = Path(shutil.copytree(EXAMPLES / "vqav2" / "annotations", tmp_path / "annotations"))
    whole = json.loads((home / ANSWERED).read_text())
    last = whole["annotations"].pop()
    (home / ANSWERED).write_text(json.dumps(whole))
    assert "1 questions of" in TASKS["vqav2"].read(home).notes[0]
    whole["annotations"] += [last, last]
    (home / ANSWERED).write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="is in it twice"):
        TASKS["vqav2"].read(home)


def test_numbers_are_texts_and_nothing_else_is():
    assert texts_of(["a", 1, 2.5]) == ("a", "1", "2.5")
    for value in (None, True, float("nan"), [], {}):
        with pytest.raises(TypeError):
            text_of(value)


@pytest.mark.parametrize("column, value, words", [
    ("answer", "E", "its answer is 'E', which is none of its options"),
    ("answer", "nan", "have no answer"),
    ("index", "-5", "its index is -5"),
    ("index", "one", "row 1"),
    ("answer", "A\tA", "too many fields"),
    ("question", b"caf\xe9", "m.tsv is no text in UTF-8"),
])  # fmt: skip
def test_a_broken_row_of_mmbench_is_named(tmp_path, capsys, column, value, words):
    file = EXAMPLES / "mmbench" / "annotations" / "mmbench_dev_20230712.tsv"
    rows = [line.split(b"\t") for line in file.read_bytes().strip(b"\n").split(b"\n")]
    rows[2][rows[0].index(column.encode())] = value if isinstance(value, bytes) else value.encode()
    (tmp_path / "m.tsv").write_bytes(b"\n".join(map(b"\t".join, rows)))
    assert words in refused(capsys, "mmbench", tmp_path / "m.tsv")


def test_rotations_without_their_question_are_said(tmp_path):
    file = EXAMPLES / "mmbench" / "annotations" / "mmbench_dev_20230712.tsv"
    rows = file.read_text().strip("\n").split("\n")
    group = rows[1].split("\t")[0]
    (tmp_path / "m.tsv").write_text("\n".join([rows[0], *rows[2:]]))
    rotations = sum(int(row.split("\t")[0]) % 1_000_000 == int(group) for row in rows[2:])
    assert TASKS["mmbench"].read(tmp_path).notes[0].startswith(f"{rotations} rows are rotations")


def test_a_score_of_no_question_is_refused(tmp_path, capsys):
    home = Path(shutil.copytree(EXAMPLES / "scienceqa" / "annotations", tmp_path / "annotations"))
    problems = json.loads((home / "problems.json").read_text())
    for problem in problems.values():
        problem["image"] = None
    (home / "problems.json").write_text(json.dumps(problems))
    file = EXAMPLES / "scienceqa" / "predictions.jsonl"
    flags = ["--task=scienceqa", f"--predictions={file}", f"--annotations={home}"]
    assert made.score(capsys, *flags)["n"] == len(file.read_text().splitlines())
    assert "none of the" in made.score(capsys, *flags, "--protocol=llava", code=2)


def test_the_error_of_a_single_cluster_is_unknown(tmp_path, capsys):
    made.questions(tmp_path, 4, of_image=4)
    file = made.answers(tmp_path / "a.jsonl", [True, False, True, True])
    shown = made.score(capsys, *made.own(tmp_path, file))
    assert (shown["value"], shown["stderr"]) == (75, None)
