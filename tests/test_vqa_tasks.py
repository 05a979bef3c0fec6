# SPDX-License-Identifier: Apache-2.0
"""The official files of GQA, VQAv2, TextVQA, VizWiz and NLVR are read, asked and scored as their
sources do; what the small examples lack."""

import gc
import json
import random
import shutil
from pathlib import Path

import pytest

from vlm_jax.evals import predictions, question_files, scoring
from vlm_jax.evals.task import SHORT, Question
from vlm_jax.evals.tasks import TASKS, gqa, nlvr, textvqa, vizwiz, vqav2

EXAMPLES = Path(__file__).parent / "published" / "benchmarks"
OURS = ("gqa", "vqav2", "textvqa", "textvqa_ocr", "vizwiz", "pope", "nlvr")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def annotations_of(task):
    return EXAMPLES / task / json.loads((EXAMPLES / task / "expected.json").read_text())[
        "annotations"
    ]  # fmt: skip


def score(task, protocol, rows, annotations, folder, **options):
    return scoring.score(
        task, protocol, write(folder / "predictions.jsonl", rows), annotations, **options
    ).described


@pytest.mark.parametrize("task", OURS)
def test_questions_are_asked_as_llava_asks_them_and_their_images_exist(task):
    given = TASKS[task].read(annotations_of(task))
    asked = {
        TASKS[task].key_of(r): r["prompt"] for r in lines(EXAMPLES / task / "predictions.jsonl")
    }
    ask = TASKS[task].protocols["official" if task == "nlvr" else "llava"].prompt
    assert {q.key: ask(q) for q in given.questions} == asked
    assert all(path.is_file() for q in given.questions for path in q.images)


@pytest.mark.parametrize("task", OURS)
def test_a_score_does_not_depend_on_the_order_of_lines(task, tmp_path):
    rows = lines(EXAMPLES / task / "predictions.jsonl")
    mixed = random.Random(0).sample(rows, len(rows))
    for protocol in TASKS[task].protocols:
        one = score(task, protocol, rows, annotations_of(task), tmp_path)
        other = score(task, protocol, mixed, annotations_of(task), tmp_path)
        assert one.pop("predictions") != other.pop("predictions")
        assert one == other


@pytest.mark.parametrize("task", OURS)
def test_every_text_has_a_grade(task, tmp_path):
    odd = ["", " ", ".", "." * 40, "\n", "é", "日本", "１２", "İ", "a\0", "x" * 9000, "\u202e"]
    rows = lines(EXAMPLES / task / "predictions.jsonl")
    for number, row in enumerate(rows):
        row["text"] = odd[number % len(odd)]
    for protocol in TASKS[task].protocols:
        got = score(task, protocol, rows, annotations_of(task), tmp_path)
        assert 0 <= got["value"] <= 100 and sum(got["parser"].values()) == len(rows)


@pytest.mark.parametrize("task", OURS)
def test_a_failed_answer_is_counted_and_never_helps(task, tmp_path):
    rows = lines(EXAMPLES / task / "predictions.jsonl")
    for protocol in TASKS[task].protocols:
        whole = score(task, protocol, rows, annotations_of(task), tmp_path)
        failed = [{**rows[0], "error": "out of memory"}, *rows[1:]]
        got = score(task, protocol, failed, annotations_of(task), tmp_path)
        assert got["failed"] == 1 and got["n"] == whole["n"]
        assert got["value"] <= whole["value"] and got["parser"]["failed"] == 1


@pytest.mark.parametrize("task", OURS)
def test_another_file_is_refused_with_the_layout(task, tmp_path):
    with pytest.raises((OSError, ValueError), match="."):
        scoring.annotations_of(TASKS[task], tmp_path)
    other = tmp_path / "other.json"
    other.write_text('[{"surprise": 1}]' if task != "vizwiz" else '{"data": 1}')
    with pytest.raises(ValueError, match="other.json"):
        scoring.annotations_of(TASKS[task], other)
    assert gc.isenabled()


# GQA


def gqa_grade(protocol, text, gold="yes"):
    grade = TASKS["gqa"].protocols[protocol].grade(Question(id="1", text="", answers=(gold,)), text)
    return grade.value, grade.rule


def test_gqa_compares_whole_answers():
    near = "equal but for case, blanks or period"
    assert [gqa_grade("llava", t)[0] for t in ("Yes.", "Yes..", "yes, it is", "Yes!")] == [
        1,
        1,
        0,
        0,
    ]
    assert gqa_grade("official", "yes") == (1, "equal")
    assert gqa_grade("official", "Yes.") == (0, near) == gqa_grade("llava", "yes ")
    assert gqa_grade("official", "no")[1] == "different"
    assert gqa_grade("lmms-eval", "T-Shirt", "tshirt")[0] == 1
    assert (
        gqa_grade("lmms-eval", " yes! ")[0] == 1 and gqa_grade("llava", "t-shirt", "tshirt")[0] == 0
    )
    # numpy keeps the length of the text when it lower-cases.
    assert gqa_grade("lmms-eval", "İ", "i")[0] == 1


def gqa_file(path, **fields):
    row = {
        "imageId": "n1", "question": "Is it red?", "answer": "yes", "isBalanced": True,
        "types": {"structural": "verify", "semantic": "attr", "detailed": "x"},
        "groups": {"global": None, "local": "x"},
        "semantic": [
            {"operation": "select", "argument": "cup (1)"},
            {"operation": "exist", "argument": "?"},
        ],
    }  # fmt: skip
    path.write_text(json.dumps({str(i): {**row, **changes} for i, changes in fields.items()}))
    return path


def test_gqa_scores_balanced_questions_and_wants_all_of_them(tmp_path):
    path = gqa_file(tmp_path / "val_all_questions.json", a={}, b={"isBalanced": False}, c={})
    given = gqa.read(path)
    assert [q.id for q in given.questions] == ["a", "c"] and "1 questions are not" in given.notes[0]
    rows = [{"question_id": "a", "text": "yes"}]
    with pytest.raises(ValueError, match="1 missing ids .* 'c'"):
        score("gqa", "llava", rows, path, tmp_path)
    got = score("gqa", "official", rows, path, tmp_path, allow=["missing"])
    assert (got["value"], got["failed"]) == (50, 1)
    assert got["subscores"] == {
        "binary": 50, "structural.verify": 50, "semantic.attr": 50, "steps.1": 50, "words.3": 50
    }  # fmt: skip


def test_gqa_distribution_is_chi_square_over_groups(tmp_path):
    group = {"groups": {"global": "color"}}
    path = gqa_file(
        tmp_path / "q.json",
        a={**group, "answer": "red"}, b={**group, "answer": "red"}, c={**group, "answer": "blue"},
    )  # fmt: skip
    rows = [{"question_id": i, "text": "red"} for i in "abc"]
    got = score("gqa", "llava", rows, path, tmp_path)["subscores"]["distribution"]
    assert got == pytest.approx(((3 - 2) ** 2 / 2 + (0 - 1) ** 2 / 1) / 100)


# VQAv2


def test_a_test_split_can_be_asked_but_not_scored(tmp_path):
    (tmp_path / "test2015").mkdir()
    content = {
        "data_subtype": "test-dev2015",
        "questions": [{"image_id": 7, "question": "What is it?", "question_id": 70}],
    }
    (tmp_path / vqav2.ASKED.format("test-dev2015")).write_text(json.dumps(content))
    (question,) = vqav2.read(tmp_path).questions
    assert question.images == (tmp_path / "test2015" / "COCO_test2015_000000000007.jpg",)
    assert vqav2.prompt(question) == "What is it?" + SHORT and question.answers == ()
    with pytest.raises(ValueError, match="1 of 1 questions in .* no answer, as in a test split"):
        score("vqav2", "official", [{"question_id": 70, "text": "cup"}], tmp_path, tmp_path)


def test_the_file_of_questions_finds_its_annotations_and_they_do_without_it(tmp_path):
    home = EXAMPLES / "vqav2" / "annotations"
    whole = vqav2.read(home)
    assert vqav2.read(home / vqav2.ASKED.format("val2014")).questions == whole.questions
    shutil.copy(home / vqav2.ANSWERED.format("val2014"), tmp_path)
    alone = vqav2.read(tmp_path)
    assert [q.answers for q in alone.questions] == [q.answers for q in whole.questions]
    assert "which is missing" in alone.notes[0]
    with pytest.raises(ValueError, match="put it beside"):
        vqav2.prompt(alone.questions[0])


def test_llavas_file_of_questions_can_be_asked_alone(tmp_path):
    row = {"question_id": 3, "image": "a.jpg", "text": f"Why?{SHORT}", "category": "default"}
    path = write(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", [row])
    (question,) = vqav2.read(tmp_path).questions
    assert (question.id, question.text, vqav2.prompt(question)) == (3, "Why?", row["text"])
    assert question_files.read(path, ["test2015"]).notes[0].startswith("a file of questions alone")
    with pytest.raises(ValueError, match="line 1: no image"):
        question_files.rows(write(tmp_path / "b.jsonl", [{"question_id": 1, "text": ""}]), "image")


# TextVQA


@pytest.mark.parametrize(
    "prompt",
    [
        f"What is IT?{SHORT}",
        f"What is IT?\nReference OCR token: a, b{SHORT}",
        f"Reference OCR token: a, b\nWhat is IT?{SHORT}",
        "OCR tokens: a, b\nQuestion: What is IT? Short answer:",
    ],
)
def test_a_prediction_finds_its_question_by_image_and_prompt(prompt):
    assert textvqa.key_of({"question_id": "x", "prompt": prompt}) == textvqa.join(
        "x", "what is it?"
    )


def textvqa_file(folder, *questions):
    rows = [
        {"question": q, "image_id": "x", "question_id": i, "answers": [a] * 10}
        for i, (q, a) in enumerate(questions)
    ]
    path = folder / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"dataset_version": "0.5.1", "data": rows}))
    return path


def test_equal_questions_of_an_image_are_answered_in_their_order(tmp_path):
    path = textvqa_file(tmp_path, ("What?", "a b"), ("what?", "c d"), ("who?", "e"))
    rows = [
        {"question_id": "x", "prompt": f"{q}{SHORT}", "text": t}
        for q, t in (("what?", "a b"), ("who?", "no"), ("what?", "c d"))
    ]
    got = score("textvqa", "official", rows, path, tmp_path)
    assert got["value"] == pytest.approx(200 / 3)
    # LLaVA's script looks both up under one key, and finds the last.
    assert score("textvqa", "llava", rows, path, tmp_path)["value"] == pytest.approx(100 / 3)
    assert got["notes"] == ["1 questions repeat one about the same image; answers in their order"]
    with pytest.raises(ValueError, match="1 duplicate ids"):
        score("textvqa", "llava", [*rows, rows[0]], path, tmp_path)


def test_the_words_of_ocr_come_from_either_file_or_are_missed(tmp_path):
    path = textvqa_file(tmp_path, ("what IS it?", "a"))
    given = textvqa.read(path, ocr=True)
    assert given.notes[0].startswith("no words of OCR")
    with pytest.raises(ValueError, match="no words of OCR for image x: put TextVQA_Rosetta"):
        textvqa.prompt_ocr(given.questions[0])
    rosetta = {"data": [{"image_id": "x", "ocr_tokens": ["STOP", "7"]}]}
    (tmp_path / textvqa.ROSETTA.format("val")).write_text(json.dumps(rosetta))
    (question,) = textvqa.read(path, ocr=True).questions
    words = "\nReference OCR token: STOP, 7"
    assert textvqa.prompt_ocr(question) == f"What IS it?{words}{SHORT}"
    assert textvqa.prompt_lmms_eval_ocr(question) == f"What is it?{words}{SHORT}"
    assert textvqa.prompt(textvqa.read(path, ocr=False).questions[0]) == f"What IS it?{SHORT}"
    row = {"question_id": "x", "text": f"What IS it?\nReference OCR token: Stop{SHORT}"}
    write(tmp_path / textvqa.LLAVA_FILES[True], [row])
    given = textvqa.read(path, ocr=True)
    assert textvqa.prompt_ocr(given.questions[0]) == row["text"] and len(given.files) == 3
    # lmms-eval's words are Rosetta's, whatever LLaVA's file has.
    assert words in textvqa.prompt_lmms_eval_ocr(given.questions[0])


# VizWiz


def test_vizwiz_finds_unanswerable_questions_as_its_evaluator_does():
    home = EXAMPLES / "vizwiz"
    got = scoring.score("vizwiz", "llava", home / "predictions.jsonl", home / "annotations")
    also = json.loads((home / "expected.json").read_text())["also_run"]
    subscores = got.described["subscores"]
    found = [subscores["unanswerable.average_precision"], subscores["unanswerable.f1"]]
    assert found == pytest.approx(list(also.values()))


def test_unanswerability_by_two_thresholds(tmp_path):
    # Of 5 questions 2 are unanswerable; one of them and one other are called so.
    rows = [
        {"image": f"{i}.jpg", "question": "?", "answers": [{"answer": "x"}] * 10, "answerable": a,
         "answer_type": "other"}
        for i, a in enumerate((0, 0, 1, 1, 1))
    ]  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(rows))
    texts = ["unanswerable", "x", "Unanswerable.", "x", "x"]
    given = [{"question_id": i, "text": t} for i, t in enumerate(texts)]
    got = score("vizwiz", "official", given, tmp_path, tmp_path)["subscores"]
    assert got["unanswerable.f1"] == pytest.approx(50)
    assert got["unanswerable.average_precision"] == pytest.approx(100 * (0.5 * 0.5 + 0.5 * 2 / 5))


def test_vizwiz_test_split_has_no_answers(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([{"image": "a.jpg", "question": "what IS it"}]))
    (question,) = vizwiz.read(tmp_path).questions
    assert (question.id, question.answers) == (0, ())
    assert vizwiz.prompt_lmms_eval(question) == "What is it" + vizwiz.SUFFIX
    with pytest.raises(ValueError, match="as in a test split"):
        score("vizwiz", "official", [{"question_id": 0, "text": ""}], tmp_path, tmp_path)


def test_vizwiz_asks_llavas_file_alone_too(tmp_path):
    row = {"question_id": 0, "image": "a.jpg", "text": f"What is it{vizwiz.SUFFIX}"}
    write(tmp_path / "llava_test.jsonl", [row])
    (question,) = vizwiz.read(tmp_path).questions
    assert question.text == "What is it" and vizwiz.prompt(question) == row["text"]


# NLVR


def test_nlvr_gives_precision_and_consistency_of_the_official_script():
    home = EXAMPLES / "nlvr"
    also = list(json.loads((home / "expected.json").read_text())["also_run"].values())
    for annotations in (home / "annotations" / "dev" / "dev.json", home / "annotations" / "dev"):
        got = scoring.score("nlvr", "official", home / "predictions.jsonl", annotations).described
        assert [got["value"], got["subscores"]["consistency"], got["n"]] == pytest.approx(also)


def test_nlvr_reads_a_line_of_the_scripts_csv():
    question = Question(id="dev-1-0-0", text="", answers=("true",))
    texts = ("TRUE ", "true, it is", " true", "true.", "yes", "false")
    assert [nlvr.equal(question, text).value for text in texts] == [1, 1, 0, 0, 0, 0]


def test_a_sentence_is_consistent_if_all_its_pictures_are_right(tmp_path):
    rows = [
        {"identifier": i, "label": "true", "sentence": "s", "directory": "0"}
        for i in ("1-0", "1-1", "2-0")
    ]
    path = write(tmp_path / "dev.json", rows)
    given = [{"question_id": q.id, "text": "true"} for q in nlvr.read(path).questions]
    given[7]["text"] = "false"  # of 1-1
    got = score("nlvr", "official", given, path, tmp_path)
    assert (got["n"], got["subscores"]["consistency"]) == (18, 50)


def test_predictions_without_what_the_join_needs_say_so(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question_id": "x", "text": "a"}])
    annotations = TASKS["textvqa"].read(annotations_of("textvqa"))
    with pytest.raises(ValueError, match="needs question_id, text and, where ids repeat, prompt"):
        predictions.read(path, TASKS["textvqa"], annotations.questions)
