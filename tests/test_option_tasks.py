# SPDX-License-Identifier: Apache-2.0
"""Benchmarks with options and no judge: awkward answers, test splits, rotations, prompts."""

import json
from pathlib import Path

import pytest

from vlm_jax.evals import readers, scoring
from vlm_jax.evals.task import LETTER, SHORT, Grade, Graded, Question
from vlm_jax.evals.tasks import TASKS, mathvista, mmbench, mmmu

PUBLISHED = Path(__file__).parent / "published"
EXAMPLES = PUBLISHED / "benchmarks"
AWKWARD = json.loads((PUBLISHED / "parsers.json").read_text())


def graded(task, protocol, text, **question):
    """The grade of one answer."""
    question = Question(id=0, text="", **question)
    return TASKS[task].protocols[protocol].grade(question, text)


def facts_of(task, row):
    """The question of a case of parsers.json, as its reader would make it."""
    options = tuple(row.get("options") or ())
    answer = row.get("answer")
    if task in ("ai2d", "scienceqa"):
        return dict(answers=("ABCDE"[answer],), facts={"options": options})
    if task == "mmbench":
        cells = dict(zip("ABCD", options, strict=False))
        return dict(answers=(answer,), facts={"options": options, "cells": cells})
    if task.startswith("mmmu"):
        facts = {"options": options, "gold": answer, "open": row["type"] == "open"}
        return dict(answers=tuple(mmmu.listed(answer)), facts=facts)
    if task == "mathvista":
        facts = {k: row[k] for k in ("kind", "precision")} | {"options": options}
        return dict(answers=(answer,), facts=facts)
    answers = row.get("answers", answer)
    answers = answers if isinstance(answers, list) else [answers]
    return dict(answers=tuple(answers), facts={"dataset": row.get("dataset"), "groups": ()})


@pytest.mark.parametrize("task", [task for task in AWKWARD if task != "_about"])
def test_awkward_answers_score_as_published(task):
    name = {"mmmu_open_official": "mmmu", "docvqa_official": "docvqa"}.get(task, task)
    for row, text, score, *judge in AWKWARD[task]:
        question = facts_of(task, row)
        if task == "mmmu_open_official":
            got = mmmu.holds(mmmu.readings(text), question["answers"])
            assert got == score, (row, text)
            continue
        protocol = "official" if task == "docvqa_official" else "lmms-eval"
        grade = graded(name, protocol, text, **question)
        assert grade.parsed == row.get("parsed", grade.parsed), (row, text)
        if judge:
            assert (grade.rule == mathvista.JUDGE) == judge[0], (row, text)
        if not any(judge):
            assert grade.value == pytest.approx(score, abs=1e-9), (row, text)


def test_open_questions_of_mmmu_are_right_by_the_data_sets_own_rule_alone():
    question = dict(
        answers=("42", "forty two"),
        facts={"options": (), "open": True, "gold": "['42', 'forty two']"},
    )
    for text in (
        "42",
        "The value is 42.",
        "x = 42",
        "so forty two",
        "４２",
        "42.004",
        "1,000 or 42",
    ):
        assert graded("mmmu", "official", text, **question).value == 1
        assert graded("mmmu", "lmms-eval", text, **question).value == 0
    for text in ("", "420", "41.99", "forty"):
        assert graded("mmmu", "official", text, **question).value == 0


@pytest.mark.parametrize("text, official, lmms_eval", [
    ("The answer is B because A is wrong", "B", "A"), ("DNA", "", "A"), ("b", "B", ""),
    ("hammock", "B", ""), ("I have no idea at all, sorry", "", ""), ("", "", ""),
    ("It shows a hammock, that is quite clear", "B", "B"), ("(A) or (B)", "B", "B"),
])  # fmt: skip
def test_mmmu_guesses_no_option(text, official, lmms_eval):
    options = ("scarf", "hammock", "tripod")
    question = dict(answers=("B",), facts={"options": options, "open": False, "gold": "B"})
    assert graded("mmmu", "official", text, **question).parsed == official
    grade = graded("mmmu", "lmms-eval", text, **question)
    assert (grade.parsed, grade.rule == "unparsed") == (lmms_eval, not lmms_eval)


@pytest.mark.parametrize("kind, answer, text, official, lmms_eval, offline", [
    ("integer", "1000", "1,000", 0, 0, 1), ("integer", "2", "two", 0, 0, 1),
    ("integer", "12", "１２", 1, 1, 1), ("integer", "4", "There are 3 cats and 1 dog: 4", 0, 0, 1),
    ("integer", "4", "The answer is 4, as 2 + 2 = 4", 0, 0, 1), ("integer", "4", "4.9", 0, 0, 0),
    ("float 1", "28.9", "28.94", 1, 0, 1), ("float 2", "0.10", "0.1", 1, 0, 1),
    ("float 2", "4.43", "about 4.430 kg", 0, 0, 1), ("list", "[1, 2]", "It is [1,2.0].", 0, 0, 1),
    ("list", "[1, 2]", "[2, 1]", 0, 0, 0), ("multi_choice", "tripod", "C", 1, 0, 1),
    ("multi_choice", "tripod", "tripod", 1, 1, 1), ("multi_choice", "scarf", "", 0, 1, 0),
    ("multi_choice", "tripod", "A scarf? No, the answer is (C).", 0, 0, 1),
    ("integer", "3", "", 0, 0, 0),
])  # fmt: skip
def test_mathvista_without_its_judge(kind, answer, text, official, lmms_eval, offline):
    kind, _, digits = kind.partition(" ")
    options = ("scarf", "hammock", "tripod") if kind == "multi_choice" else ()
    facts = {"kind": kind, "options": options, "precision": float(digits) if digits else None}
    for protocol, value in {
        "official": official,
        "lmms-eval": lmms_eval,
        "offline": offline,
    }.items():
        got = graded("mathvista", protocol, text, answers=(answer,), facts=facts)
        assert got.value == value, protocol


def written(path, rows):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_test_split_has_no_answers_and_is_refused(tmp_path):
    home = EXAMPLES
    docvqa_file = json.loads((home / "docvqa/annotations/val_v1.0_withQT.json").read_text())
    for row in docvqa_file["data"]:
        del row["answers"]
    (tmp_path / "test_v1.0.json").write_text(json.dumps(docvqa_file))
    table = (home / "mmbench/annotations/mmbench_dev_20230712.tsv").read_text().split("\n")
    cut = table[0].split("\t").index("answer")
    lines = ["\t".join(c for i, c in enumerate(line.split("\t")) if i != cut) for line in table]
    (tmp_path / "mmbench_test_20230712.tsv").write_text("\n".join(lines))
    for task, name in (("mmmu", "validation"), ("mathvista", "testmini"), ("ai2d", "test")):
        rows = (home / task / "annotations" / f"{name}.jsonl").read_text().splitlines()
        hidden = "?" if task == "mmmu" else ""
        written(tmp_path / f"{task}.jsonl", [json.loads(row) | {"answer": hidden} for row in rows])
    for task, name in (
        ("docvqa", "test_v1.0.json"),
        ("mmbench", "mmbench_test_20230712.tsv"),
        ("mmmu", "mmmu.jsonl"),
        ("mathvista", "mathvista.jsonl"),
        ("ai2d", "ai2d.jsonl"),
    ):
        given = TASKS[task].read(tmp_path / name)
        assert all(q.answers == () for q in given.questions)
        with pytest.raises(ValueError, match="no answer, as in a test split"):
            scoring.check_answers(TASKS[task], given)


def test_a_copy_of_mmbench_may_refer_to_the_row_with_its_image(tmp_path):
    source = EXAMPLES / "mmbench" / "annotations" / "mmbench_dev_20230712.tsv"
    rows = [line.split("\t") for line in source.read_text().strip("\n").split("\n")]
    at = rows[0].index("image")
    for row in rows[1:]:
        if int(row[0]) >= mmbench.ROTATION:
            row[at] = str(int(row[0]) % mmbench.ROTATION)
    path = tmp_path / "some.tsv"
    path.write_text("\n".join("\t".join(row) for row in rows))
    whole, referred = TASKS["mmbench"].read(source), TASKS["mmbench"].read(tmp_path)
    assert [q.images for q in whole.questions] == [q.images for q in referred.questions]
    assert [q.cluster for q in whole.questions] == [q.cluster for q in referred.questions]
    rows[-1][at] = "999"
    path.write_text("\n".join("\t".join(row) for row in rows))
    with pytest.raises(ValueError, match="999"):
        TASKS["mmbench"].read(path)


def test_a_group_of_mmbench_is_right_in_every_rotation_or_wrong():
    def row(index, value, category="c"):
        question = Question(
            id=index, text="", labels={"category": category}, facts={"group": str(index % 10**6)}
        )
        return Graded(question, "", Grade(value, "", ""))

    rows = [row(1, 1.0), row(2, 1.0, "d"), row(1_000_001, 0.0), row(1_000_002, 1.0)]
    whole = mmbench.circular(rows, vanilla=True)
    assert (whole.value, whole.n, whole.subscores["vanilla"]) == (50, 2, 100)
    assert whole.subscores["category.c"] == 0 and whole.subscores["category.d"] == 100


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ('"B"', ""), ("", ""), ("N/A", ""), ("=B", ""), ("The answer is **b**", "B"),
    ("A cat", "A"), ("A cat that is quite far away", ""), ("It is on the right", "B"),
    ("I can't process this file. B", "Z"), ("banana", ""),
])  # fmt: skip
def test_vlmevalkit_reads_what_the_xlsx_file_kept(text, letter):
    facts = {"cells": {"A": "left", "B": "right", "C": "", "D": "None"}}
    assert graded("mmbench", "llava", text, answers=("B",), facts=facts).parsed == letter


def test_the_json_of_mathvistas_repository_is_read_too(tmp_path):
    rows = (EXAMPLES / "mathvista/annotations/testmini.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    for row in rows:
        del row["query"]
    (tmp_path / "testmini.json").write_text(json.dumps({row["pid"]: row for row in rows}))
    given = TASKS["mathvista"].read(tmp_path)
    asked = TASKS["mathvista"].protocols["official"].prompt(given.questions[0])
    assert asked.startswith("Hint: Please answer the question and provide the correct option")
    assert "\nQuestion: How much" in asked and asked.endswith("(D) 29")
    format_of = TASKS["mathvista"].protocols["lmms-eval"].prompt
    assert format_of(given.questions[2]).endswith("number with one decimal place.")
    assert format_of(given.questions[3]).split("\n")[0].endswith("(Unit: kg)")


@pytest.mark.parametrize("task, protocol, ending", [
    ("mmmu", "official", "D. Violin\n" + LETTER),
    ("ai2d", "lmms-eval", "D. violin" + LETTER),
    ("mmbench", "llava", "D. lantern stand" + LETTER),
    ("mmbench", "lmms-eval", "D. lantern stand\n" + LETTER),
    ("mme", "official", "picture? Please answer yes or no."),
    ("mme", "llava", "picture?" + SHORT),
    ("scienceqa", "paper", "B. parrot" + LETTER),
    ("chartqa", "lmms-eval", "part 0?\nAnswer the question with a single word."),
])  # fmt: skip
def test_prompts_end_as_published(task, protocol, ending):
    home = EXAMPLES / task
    expected = json.loads((home / "expected.json").read_text())
    given = TASKS[task].read(home / expected["annotations"])
    assert TASKS[task].protocols[protocol].prompt(given.questions[0]).endswith(ending)
    missing = [
        i for q in given.questions for i in q.images if isinstance(i, Path) and not i.exists()
    ]
    assert not missing


def test_what_a_row_lacks_is_named(tmp_path):
    path = written(tmp_path / "test.jsonl", [{"question": "?", "image": "1.png"}])
    with pytest.raises(ValueError, match="row 0: it has no field 'options'"):
        TASKS["ai2d"].read(path)
    rows = tmp_path / "rows.parquet"
    rows.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="as JSON lines"):
        readers.hub_rows(rows, [], "ai2d")
