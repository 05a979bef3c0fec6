# SPDX-License-Identifier: Apache-2.0
"""MMBench: multiple-choice questions that count only if right in every rotation of their options
(Liu et al. 2023).

The file has a row for each rotation, with its own answer: index + k * 1,000,000. A question is a
row; a unit is a group of rotations.
"""

import base64
import binascii
import csv
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from vlm_jax.evals.choices import choose, lettered
from vlm_jax.evals.metrics import clustered_stderr, mean
from vlm_jax.evals.readers import row_of
from vlm_jax.evals.task import (
    LETTER,
    Aggregate,
    Annotations,
    Grade,
    Graded,
    Protocol,
    Question,
    Task,
    Unit,
    found,
    unique,
)

ROTATION = 1_000_000
REFERENCE = 64  # an image cell shorter than this is the index of the row that has the image
FILES = (
    "mmbench_dev_20230712.tsv",
    "mmbench_dev_en_20231003.tsv",
    "MMBench_DEV_EN.tsv",
    "MMBench_DEV_EN_V11.tsv",
    "mmbench_dev_cn_20231003.tsv",
    "MMBench_DEV_CN.tsv",
    "mmbench_test_20230712.tsv",
    "MMBench_TEST_EN.tsv",
)
# SHA-256 as stated at https://huggingface.co/ambivalent02/openencompass_tsv, a copy of the files
# that VLMEvalKit downloads; LLaVA's mmbench_dev_20230712.tsv is another file.
KNOWN = {
    "64baa14c5ec650302f428212a0b3efc5c88fbf9236d0d6fdea45c555f0b02d7a": "DEV_EN",
    "27a54ae2e8f54502361cc5a41ed5fc35f4253af74734b5593d7b1de545eb5656": "DEV_EN_V11",
    "cbf1e24febf215e719bf50f19834ccd97f80ba325b6b469c849db73c2559d959": "DEV_CN",
    "71a76a9cf8867c1e91afe3f50c36072714cff7cd6791eff02fe37a89e9c794b4": "TEST_EN",
    "5dda740dda364d0062ef6f8d3195a32febe3ba5be4dd742dc1e9c30a83334501": "TEST_EN_V11",
}
LETTER_CN = {
    "llava": "\n请直接回答选项字母。",
    "lmms-eval": "\n请直接使用所提供的选项字母作为答案回答。",
}
HAN = re.compile("[\u4e00-\u9fff]")
# What pandas reads as a missing value, by its documentation of `na_values`.
NA = frozenset(
    "-1.#IND|1.#QNAN|1.#IND|-1.#QNAN|#N/A N/A|#N/A|N/A|n/a|NA|<NA>|#NA|NULL|null|NaN|-NaN|nan|-nan|"
    "None|".split("|")
)
EXCEL_ERRORS = frozenset(["#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A"])

# VLMEvalKit, vlmeval/utils/matching_util.py.
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
STATED = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")

Parse = Callable[[Question, str], tuple[str, str]]


def matched(text: str, options: Mapping[str, str]) -> tuple[str, str]:
    """VLMEvalKit's exact matching: the letter that a text names, or "", and the rule.

    Args:
      options: letter -> text of the option.
    """
    if "Failed to obtain answer via API" not in text:
        if any(refusal in text for refusal in REFUSALS):
            return "Z", "refusal"
        words = text.translate(MARKS).split()
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
            return letters[0], "one letter, near the end"
        if not letters and "Z" in words:
            return "Z", "the letter Z"
        stated = STATED.search(text)
        if stated and stated.group(1).upper() in options:
            return stated.group(1).upper(), "letter after `answer is`"
    if len(text.lower()) > 2 * sum(map(len, options.values())):
        return "", "unparsed"
    return _contained(text, options)


def _contained(text: str, options: Mapping[str, str]) -> tuple[str, str]:
    inside = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return (inside[0], "text with one option in it") if len(inside) == 1 else ("", "unparsed")


def _official(question: Question, text: str) -> tuple[str, str]:
    return choose(text, question.facts["options"])


def _llava(question: Question, text: str) -> tuple[str, str]:
    # LLaVA's converter writes an xlsx file and VLMEvalKit reads it: cells that pandas takes for
    # missing, formulas (which have no value) and errors come back as "nan".
    lost = text in NA or text in EXCEL_ERRORS or (text.startswith("=") and len(text) > 1)
    cells = question.facts["cells"]
    return matched("nan" if lost else text, {k: v for k, v in cells.items() if v not in NA})


def _lmms_eval(question: Question, text: str) -> tuple[str, str]:
    text, cells = text.strip(), question.facts["cells"]
    # The rows that it reads have the text "nan" for an absent option.
    options = {k: "nan" if cells.get(k, "") in NA else cells[k] for k in "ABCD"}
    letter, rule = _prefetched(text, options)
    return (letter, rule) if letter else _ranked(text)


FRAMES = (
    *(("", end) for end in (".", ",", ":", ")", ").")),
    *(("(", end) for end in (")", ").")),
    *((":", end) for end in ("", ",", ".", ")", ").")),
)


def _prefetched(text: str, options: Mapping[str, str]) -> tuple[str, str]:
    """lmms-eval's MMBench_Evaluator.can_infer."""
    if "Failed to obtain answer via API" not in text:
        words = text.split()
        alone = [letter for letter in "ABCDE" if letter in words]
        article = "A" in words and len(words) > 3
        if len(alone) == 1 and not article:
            return alone[0], "one letter"
        for start, end in FRAMES:
            framed = [letter for letter in "ABCDE" if start + letter + end in words]
            if len(framed) == 1:
                return framed[0], "one letter with marks"
    return _contained(text, options)


PHRASES = (
    "answer is", "the answer is", "correct answer is", "the correct answer is", "best answer is",
    "the best answer is", "correct option is", "the correct option is", "best option is",
    "the best option is", "choice is", "the choice is", "correct choice is",
    "the correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def _ranked(text: str) -> tuple[str, str]:
    """lmms-eval's extract_mcq_answer: the surest place of a letter, the last of several."""
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    places: list[tuple[int, int, str]] = []
    for letter in "ABCD":
        for surety, place in ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"),
                              (3, f"{letter})"), (2, f"{letter} ")):  # fmt: skip
            if place in text:
                places.append((surety, text.rfind(place), letter))
        for phrase in PHRASES:
            start = text.lower().find(phrase)
            if start >= 0 and (at := text.find(letter, start + len(phrase))) >= 0:
                places.append((7, at, letter))
        if bare.startswith(letter) and not bare[1:2].isalpha():
            places.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            places.append((9, len(text) - 1, letter))
    if not places:
        places = [(0, text.rfind(letter), letter) for letter in "ABCD" if letter in text]
    if not places:
        return "", "unparsed"
    # Of equal places the first letter counts.
    surety, _, letter = max(places, key=lambda place: place[:2])
    return letter, "letter in a surer place than others" if surety else "letter inside a word"


def grade(question: Question, text: str, *, parse: Parse) -> Grade:
    """1 if a row's answer is right; a group needs it in all its rows."""
    letter, rule = parse(question, text)
    return Grade(float(letter == question.answers[0]), letter, rule)


def circular(graded: Sequence[Graded], *, vanilla: bool) -> Aggregate:
    """The share of groups that are right in every rotation, by category too; with `vanilla` also
    the accuracy over the unrotated questions alone."""
    groups: dict[str, list[Graded]] = {}
    for g in graded:
        groups.setdefault(g.question.facts["group"], []).append(g)
    units, names = [], {}
    first = []
    for key, rows in groups.items():
        originals = [g for g in rows if g.question.key == key]
        if not originals:
            continue
        first.append(originals[0].grade.value)
        value = min(g.grade.value for g in rows)
        units.append(Unit(key, originals[0].question.cluster, value))
        for label, name in originals[0].question.labels.items():
            names.setdefault(f"{label}.{name}", []).append(value)
    values = [u.value for u in units]
    subscores = {name: 100 * mean(of) for name, of in names.items()}
    return Aggregate(
        value=100 * mean(values),
        stderr=100 * clustered_stderr(values, [u.cluster for u in units]),
        units=tuple(units),
        subscores=subscores | ({"vanilla": 100 * mean(first)} if vanilla else {}),
    )


def read(path: Path) -> Annotations:
    """The rows of a TSV file. A test file has no answers; a copy may have the index of the row
    with its image in place of the image."""
    if path.is_dir():
        others = sorted(p.name for p in path.glob("*.tsv"))
        path = found(path, [*FILES, *others], "mmbench")
    with _long_fields(), path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    images = {row.get("index", ""): row.get("image") or "" for row in rows}
    decoded: dict[str, bytes] = {}
    questions = [_question(path, number, row, images, decoded) for number, row in enumerate(rows)]
    unrotated = sum(q.key == q.facts["group"] for q in questions)
    version = f"{path.stem}, {unrotated} questions in {len(questions)} rows"
    there = {q.key for q in questions}
    alone = sum(q.facts["group"] not in there for q in questions)
    notes = [f"{alone} rows are rotations of questions that are not here: they do not count"]
    return Annotations(unique(questions, path), (path,), version, tuple(notes if alone else ()))


def _question(
    path: Path, number: int, row: dict, images: Mapping[str, str], decoded: dict[str, bytes]
) -> Question:
    with row_of(path, number):
        index = int(row["index"])
        if index < 0 or None in row:
            raise ValueError(f"its index is {index}" if index < 0 else "it has too many fields")
        cells = {k: v or "" for k, v in row.items() if k and len(k) == 1 and "A" <= k <= "Z"}
        image = row["image"] or ""
        if image and len(image) < REFERENCE:
            image = images.get(image, "")
            if len(image) < REFERENCE:
                raise ValueError(
                    f"{path}, index {index}: its image is {row['image']!r}, which is no row with "
                    "an image"
                )
        if image not in decoded:
            try:
                decoded[image] = base64.b64decode(image)
            except binascii.Error as error:
                raise ValueError(f"{path}, index {index}: its image is no base64") from error
        hint = row.get("hint") or ""
        group = row.get("g_index") or str(index % ROTATION)
        labels = {k: row.get(k) for k in ("category", "l2-category")}
        answer = (row.get("answer") or "").strip()
        answer = "" if answer in NA else answer
        if answer and not cells.get(answer):
            raise ValueError(f"its answer is {answer!r:.60}, which is none of its options")
        return Question(
            id=index,
            text=row["question"],
            images=(decoded[image],) if image else (),
            answers=(answer,) if answer else (),
            cluster=hashlib.sha1(decoded[image]).hexdigest()[:16] if image else group,
            labels={k: v for k, v in labels.items() if v},
            facts={
                "group": group,
                "cells": cells,
                "hint": hint,
                "options": _until_absent(cells, ("", "nan")),
                "chinese": bool(HAN.search(row["question"])),
            },
        )


def _until_absent(cells: Mapping[str, str], absent: Sequence[str]) -> tuple[str, ...]:
    options = []
    for letter in "ABCDEFGH":
        if cells.get(letter, "").lower() in absent:
            break
        options.append(cells[letter])
    return tuple(options)


@contextmanager
def _long_fields() -> Iterator[None]:
    limit = csv.field_size_limit(1 << 30)  # an image is one field
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def prompt(question: Question) -> str:
    """Hint, question, options and the request for a letter, as in LLaVA's model_vqa_mmbench.py."""
    hint = question.facts["hint"]
    before = "" if hint.lower() in ("", "nan", "none") else f"{hint}\n"
    options = _until_absent(question.facts["cells"], ("", "nan", "none"))
    after = LETTER_CN["llava"] if question.facts["chinese"] else LETTER
    return f"{before}{question.text}\n{lettered(options)}{after}"


def prompt_lmms_eval(question: Question) -> str:
    """Hint, question and options in one paragraph, with lmms-eval's header of the options."""
    facts = question.facts
    hint = "" if facts["hint"] in NA else f"{facts['hint']} "
    options = "".join(
        f"\n{letter}. {facts['cells'][letter]}"
        for letter in "ABCDE"
        if facts["cells"].get(letter, "") not in NA
    )
    header = "有如下几个选项：" if facts["chinese"] else "There are several options:"
    after = LETTER_CN["lmms-eval"] if facts["chinese"] else LETTER
    return f"{hint}{question.text} {header}{options}\n{after}"


protocol = partial(Protocol, metric="circular_accuracy", max_new_tokens=1024)
TASK = Task(
    name="mmbench",
    title="MMBench, dev, English of 2023-07-12, 1,164 questions in all rotations",
    where="https://github.com/open-compass/MMBench, TSV files; Apache-2.0",
    layout="mmbench_dev_20230712.tsv",
    read=read,
    known={digest: f"MMBench_{name}.tsv of VLMEvalKit" for digest, name in KNOWN.items()},
    protocols={
        "official": protocol(
            source="arXiv 2307.06281, CircularEval, without a judge; letters by "
            "vlm_jax/evals/choices.py; prompt of LLaVA",
            prompt=prompt,
            grade=partial(grade, parse=_official),
            aggregate=partial(circular, vanilla=True),
        ),
        "llava": protocol(
            source="open-compass/VLMEvalKit@e8e78f0 vlmeval/dataset/utils/multiple_choice.py "
            "mcq_circular_eval without a judge, on the file of haotian-liu/LLaVA@c121f04 "
            "scripts/convert_mmbench_for_submission.py",
            prompt=prompt,
            grade=partial(grade, parse=_llava),
            aggregate=partial(circular, vanilla=True),
            faults=(
                "an empty answer, None, N/A or one that begins with = comes back from the xlsx "
                "file as the text nan",
                'a lower-case letter, "B" in quotes and a letter far from the end are not read',
                "in a short answer the article A is option A",
            ),
        ),
        "lmms-eval": protocol(
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/mmbench/mmbench_evals.py "
            "MMBench_Evaluator.eval_result, static (task mmbench_en_dev_static)",
            prompt=prompt_lmms_eval,
            grade=partial(grade, parse=_lmms_eval),
            aggregate=partial(circular, vanilla=False),
            faults=(
                "an absent option is the text nan, which banana contains",
                "any capital A, B, C or D inside a word can be taken for the answer",
            ),
        ),
    },
)
