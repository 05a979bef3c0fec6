# SPDX-License-Identifier: Apache-2.0
"""POPE's parsers, its two random files, and errors of its F1."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest

from vlm_jax.evals import metrics, scoring
from vlm_jax.evals.task import SHORT, Graded, Question
from vlm_jax.evals.tasks import TASKS, pope

HOME = Path(__file__).parent / "published" / "benchmarks" / "pope"


def answered(rows, protocol="llava"):
    """Graded answers of (text, label) or (text, label, category, image)."""
    graded = []
    for number, (text, label, *more) in enumerate(rows):
        category, image = more or ("random", str(number))
        question = Question(
            id=number, text="", answers=(label,), cluster=image, labels={"category": category}
        )
        failed = text is None
        grade = (
            scoring.FAILED if failed else TASKS["pope"].protocols[protocol].grade(question, text)
        )
        graded.append(Graded(question, text or "", grade, failed))
    return graded


def aggregate(rows, protocol="llava"):
    return TASKS["pope"].protocols[protocol].aggregate(answered(rows, protocol))


@pytest.mark.parametrize("text, answer, rule", [
    ("No.", "no", "says no"), ("no", "no", "says no"), ("I do not see", "no", "says no"),
    ("Yes, no doubt", "no", "says no"), ("There is no dog, no.", "no", "says no"),
    ("Yes", "yes", "says yes"), ("yes, there is", "yes", "says yes"), ("YES", "yes", "says yes"),
    ("NO", "yes", "neither"), ("No!", "yes", "neither"), ("no\n", "yes", "neither"),
    ("nope", "yes", "neither"), ("", "yes", "neither"), (". No", "yes", "neither"),
    ("not sure", "no", "says no"), ("Not sure", "yes", "neither"), ("maybe", "yes", "neither"),
    ("no\tdog", "yes", "neither"), ("\u3000no", "yes", "neither"), ("ｎｏ", "yes", "neither"),
])  # fmt: skip
@pytest.mark.parametrize("protocol", ["official", "llava", "paper"])
def test_popes_parser_reads_words_of_the_first_sentence(protocol, text, answer, rule):
    (graded,) = answered([(text, "yes")], protocol)
    assert graded.grade.parsed == answer and graded.grade.rule.startswith(rule)
    assert graded.grade.value == float(answer == "yes")


@pytest.mark.parametrize("text, value", [
    ("yes", 1), (" Yes\n", 1), ("YES", 1), ("Yes.", 0), ("yes, there is", 0), ("", 0),
    ("ｙｅｓ", 0),
])  # fmt: skip
def test_lmms_eval_wants_the_label_alone(text, value):
    assert answered([(text, "yes")], "lmms-eval")[0].grade.value == value


def test_what_is_neither_yes_nor_no_under_each_protocol():
    rows = [("yes", "yes"), ("no", "no"), ("perhaps", "yes"), ("perhaps", "no")]
    llava, lmms = aggregate(rows), aggregate(rows, "lmms-eval")
    # LLaVA: both count as yes. lmms-eval: both wrong in accuracy, neither in precision and recall.
    assert llava.subscores["random.accuracy"] == 75 and llava.value == pytest.approx(80)
    assert lmms.subscores["accuracy"] == 50 and lmms.value == 100
    assert llava.subscores["random.yes_ratio"] == 75 and lmms.subscores["yes_ratio"] == 50


def test_no_yes_at_all_has_an_f1_of_0_and_an_error():
    got = aggregate([("no", "yes", "random", "a"), ("no", "no", "random", "b")])
    assert got.value == 0 == got.subscores["random.precision"] and got.stderr == 0


def test_a_failed_answer_is_the_wrong_one():
    for protocol in ("official", "llava", "lmms-eval"):
        for label in ("yes", "no"):
            rows = [("yes", "yes"), ("no", "no")]
            other = "no" if label == "yes" else "yes"
            assert (
                aggregate([*rows, (None, label)], protocol).subscores
                == aggregate([*rows, (other, label)], protocol).subscores
            )


def draw(images=24, seed=0):
    """Answers to 2 questions of each category about each image, right in three of four."""
    rng = random.Random(seed)
    return [
        (rng.choice([label, label, label, "yes"]), label, category, str(image))
        for image in range(images)
        for category in pope.CATEGORIES
        for label in ("yes", "no")
    ]


@pytest.mark.parametrize("protocol", ["llava", "lmms-eval"])
def test_the_error_of_f1_leaves_each_image_out(protocol):
    rows = draw()
    got = aggregate(rows, protocol)
    left_out = {
        image: aggregate([r for r in rows if r[3] != image], protocol).value
        for image in dict.fromkeys(r[3] for r in rows)
    }
    assert got.replicates == pytest.approx(left_out)
    assert got.stderr == pytest.approx(metrics.jackknife_stderr(list(left_out.values())))
    assert 0 < got.stderr < 10 and math.isnan(aggregate(rows[:6], protocol).stderr)


def test_the_error_of_f1_is_its_spread_over_data_sets():
    many = [aggregate(draw(seed=seed)) for seed in range(60)]
    mean = metrics.mean([a.value for a in many])
    spread = math.sqrt(sum((a.value - mean) ** 2 for a in many) / (len(many) - 1))
    assert metrics.mean([a.stderr for a in many]) == pytest.approx(spread, rel=0.3)


def test_the_paper_reads_random_alone():
    rows = draw()
    got = aggregate(rows, "paper")
    assert got.n == 48
    assert got.value == pytest.approx(aggregate(rows).subscores["random.accuracy"])
    with pytest.raises(ValueError, match="random, which is not here"):
        aggregate([r for r in rows if r[2] != "random"], "paper")


def folder(path, random_lines, asked=None):
    """POPE's files with so many random questions; `asked` of them are in LLaVA's question file."""
    (path / "coco").mkdir(parents=True)
    lines = []
    for category, start in pope.CATEGORIES.items():
        count = random_lines if category == "random" else 60
        rows = [
            {
                "question_id": 2 * i + 1,
                "image": f"{i // 6}.jpg",
                "text": f"Is there a {i}?",
                "label": "no",
            }
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "coco" / f"coco_pope_{category}.json").write_text(text)
        for i, row in enumerate(rows[: asked if category == "random" else None]):
            lines.append(
                {**row, "question_id": start + i + 1, "text": row["text"] + SHORT,
                 "category": category}
            )  # fmt: skip
    if asked is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / "llava_pope_test.jsonl").write_text(text)
    return path


def test_both_random_files_are_known(tmp_path):
    old = pope.read(folder(tmp_path / "old", 2910, asked=2910))
    new = pope.read(folder(tmp_path / "new", 3000))
    assert "random 2910 (the old one, LLaVA's)" in old.version and len(old.questions) == 3030
    assert "random 3000 (the new one)" in new.version and len(new.questions) == 3120
    # Without LLaVA's file ids are made as it makes them.
    assert pope.read(old.files[0].parent.parent).questions == old.questions
    (tmp_path / "old" / "llava_pope_test.jsonl").unlink()
    assert pope.read(tmp_path / "old").questions == old.questions


def test_llavas_questions_choose_among_the_new_random_file_and_not_the_reverse(tmp_path):
    given = pope.read(folder(tmp_path / "a", 3000, asked=2910))
    assert len(given.questions) == 3030 and "90 lines of coco_pope_random.json" in given.notes[0]
    whole = folder(tmp_path / "b", 3000, asked=3000)
    shutil.copy(folder(tmp_path / "c", 2910) / "coco" / "coco_pope_random.json", whole / "coco")
    with pytest.raises(ValueError, match="asks 90 random questions .* different releases"):
        pope.read(whole)


def test_releases_that_word_a_question_otherwise_are_matched(tmp_path):
    home = folder(tmp_path / "a", 12, asked=12)
    for file, old, new in (
        (
            home / "coco" / "coco_pope_random.json",
            "Is there a 3?",
            "Is there an umbrella in the image?",
        ),
        (home / "llava_pope_test.jsonl", "Is there a 3?", "Is there an umbrella in the imange?"),
    ):
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match="different releases"):
        pope.read(home)  # the two other categories still have the old question
    for category in ("adversarial", "popular"):
        file = home / "coco" / f"coco_pope_{category}.json"
        file.write_text(
            file.read_text().replace("Is there a 3?", "Is there a umbrella in the image?")
        )
    assert len(pope.read(home).questions) == 12 + 60 + 60
    assert pope.asked_object("Is there a tv in the image?") == "tv"


def test_one_category_can_be_scored_alone(tmp_path):
    given = pope.read(HOME / "annotations" / "coco" / "coco_pope_popular.json")
    assert {q.labels["category"] for q in given.questions} == {"popular"}
    assert given.notes == ("no questions of adversarial, random: values are of the others",)
    with pytest.raises(FileNotFoundError, match="holds no coco/coco_pope_CATEGORY.json"):
        pope.read(tmp_path)
