# SPDX-License-Identifier: Apache-2.0
"""MathVista: mathematics in pictures, with options, whole numbers, decimals and lists (Lu et al.
2024).

The published number lets GPT extract the answer from the text. No judge is asked here: `official`
and `lmms-eval` read what the published code reads without one and count the rest as wrong, and
`offline` extracts by rules. None of them may be compared with a judged number.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlm_jax.evals.choices import LETTERS, choose, lettered
from vlm_jax.evals.groups import average_of_groups
from vlm_jax.evals.metrics import edit_distance
from vlm_jax.evals.readers import hub_rows, row_of, text_of, texts_of
from vlm_jax.evals.task import (
    LETTER,
    Annotations,
    Grade,
    Protocol,
    Question,
    Task,
    found,
    image_folder,
    read_json,
    unique,
)

JUDGE = "needs the judge"  # the rule of answers that only a language model could extract
BRACKETED = re.compile(r"\(([a-zA-Z])\)")
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
STATED = re.compile(r"(?:answer|result|value|total)\s*(?:is|:|=)", re.IGNORECASE)
LIST = re.compile(r"\[[^\[\]]*\]")
WORDS = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}
HINTS = {
    "multi_choice": "Hint: Please answer the question and provide the correct option letter, "
    "e.g., A, B, C, D, at the end.",
    "integer": "Hint: Please answer the question requiring an integer answer and provide the final "
    "value, e.g., 1, 2, 3, at the end.",
    "float 1": "Hint: Please answer the question requiring a floating-point number with one "
    "decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float 2": "Hint: Please answer the question requiring a floating-point number with two "
    "decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "Hint: Please answer the question requiring a Python list as an answer and provide the "
    "final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}
FORMATS = {
    "multi_choice": LETTER.strip(),
    "integer": "Answer the question using a single integer number.",
    "float 1": "Answer the question using a single floating-point number with one decimal place.",
    "float 2": "Answer the question using a single floating-point number with two decimal places.",
    "list": "Answer the question using a Python list.",
}


def extracted(text: str, facts: Mapping) -> tuple[str | None, str]:
    """What extract_answer of MathVista takes from a text without its judge, and the rule; None
    where the judge would be asked."""
    if not text:
        return "", "empty"
    if facts["kind"] == "multi_choice" and text in facts["options"]:
        return text, "text of an option"
    number = dict(integer=int, float=float).get(facts["kind"])
    if number:
        try:
            return str(number(text)), "the whole text is a number"
        except ValueError:
            pass
    return None, JUDGE


def normalized(text: str, facts: Mapping) -> str | None:
    """MathVista's normalize_extracted_answer; None if a text is no number of the kind."""
    kind, options = facts["kind"], facts["options"]
    if kind == "multi_choice":
        text = text.strip()
        bracketed = BRACKETED.search(text)
        letter = bracketed.group(1).upper() if bracketed else text
        if letter and letter in LETTERS[: len(options)]:
            return options[LETTERS.index(letter)]
        return min(options, key=lambda option: edit_distance(letter, option))
    try:
        if kind == "integer":
            return str(int(float(text)))
        return str(round(float(text), facts["precision"])) if kind == "float" else text
    except (ValueError, TypeError, OverflowError):
        return None


def grade_lmms_eval(question: Question, text: str) -> Grade:
    """By lmms-eval's functions; wrong where they would ask the judge."""
    facts = question.facts
    taken, rule = extracted(text.strip(), facts)
    if taken is None:
        return Grade(0.0, "", rule)
    value = normalized(taken, facts)
    if rule == "empty" and facts["kind"] == "multi_choice":
        rule = "empty: the option nearest to it"
    right = str(value).strip() == question.answers[0].strip()
    return Grade(float(right), str(value), rule)


def grade(question: Question, text: str) -> Grade:
    """By MathVista's rule: options by their text or a letter alone, numbers by their value."""
    text, facts = text.strip(), dict(question.facts)
    if facts["kind"] == "multi_choice":
        letter, rule = choose(text, facts["options"])
        if rule not in ("letter alone", "text of an option"):
            return Grade(0.0, "", JUDGE if text else "empty")
        return _option(question, letter, rule)
    taken, rule = extracted(text, facts)
    if not taken:
        return Grade(0.0, "", rule)
    if facts["precision"] is not None:
        facts["precision"] = int(facts["precision"])
    value = normalized(taken, facts)
    right = value is not None and _number(value) == _number(question.answers[0])
    return Grade(float(right), str(value), rule)


def grade_offline(question: Question, text: str) -> Grade:
    """By rules that extract a letter, a number or a list from the text."""
    kind = question.facts["kind"]
    if kind == "multi_choice":
        return _option(question, *choose(text, question.facts["options"]))
    text = unicodedata.normalize("NFKC", text)
    if kind == "list":
        lists = LIST.findall(text)
        parsed = lists[-1] if lists else ""
        right = bool(lists) and _items(parsed) == _items(question.answers[0])
        return Grade(float(right), parsed, "last list" if lists else "unparsed")
    value, rule = _last_number(text)
    target = _number(question.answers[0])
    if value is None or target is None:
        return Grade(0.0, "", rule)
    if kind == "float":
        value = round(value, int(question.facts["precision"] or 0))
    return Grade(float(value == target), str(value), rule)


def _option(question: Question, letter: str, rule: str) -> Grade:
    chosen = question.facts["options"][LETTERS.index(letter)] if letter else ""
    return Grade(float(letter != "" and chosen == question.answers[0]), chosen, rule)


def _last_number(text: str) -> tuple[float | None, str]:
    stated = list(STATED.finditer(text))
    after = text[stated[-1].end() :] if stated else ""
    for part, rule in ((after, "first number that is stated as the answer"), (text, "last number")):
        numbers = _numbers(part)
        if numbers:
            return numbers[0 if part is after else -1], rule
    return None, "unparsed"


def _numbers(text: str) -> list[float]:
    spelled = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
    text = spelled.sub(lambda m: str(WORDS[m.group().lower()]), text)
    return [float(m.group().replace(",", "")) for m in NUMBER.finditer(text)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _items(text: str) -> list[float | str]:
    items = [item.strip().strip("'\"").lower() for item in text.strip().strip("[]").split(",")]
    return [item if (number := _number(item)) is None else number for item in items]


def read(path: Path) -> Annotations:
    """The questions of testmini.jsonl, rows of the hub, or of testmini.json of the repository,
    with its query.json if that is beside it. The test split has no answers."""
    names = [f"{folder}testmini.{end}" for end in ("jsonl", "json") for folder in ("", "data/")]
    path = found(path, [*names, "test.jsonl", "test.json"], "mathvista")
    files, queries = [path], {}
    if path.suffix == ".json":
        rows = [{"pid": pid} | row for pid, row in read_json(path, dict).items()]
        if (path.parent / "query.json").is_file():
            files.append(path.parent / "query.json")
            queries = read_json(files[-1], dict)
    else:
        rows = hub_rows(path, [], "mathvista")[1]
    folder = image_folder(path, ["images"])
    questions = []
    for number, row in enumerate(rows):
        with row_of(path, number):
            question = _question(row, folder)
            query = row.get("query") or queries.get(str(row["pid"])) or _query(question)
            questions.append(replace(question, facts={**question.facts, "query": query}))
    version = f"{path.stem}, {len(questions)} questions"
    return Annotations(unique(questions, path), tuple(files), version)


def _question(row: dict, folder: Path) -> Question:
    kind = row["question_type"] if row["question_type"] == "multi_choice" else row["answer_type"]
    groups, about = [kind], row.get("metadata") or {}
    for name in ("source", "category", "task", "context", "grade", "language"):
        if about.get(name):
            groups.append(f"{name}.{about[name]}")
    groups += [f"skills.{skill}" for skill in about.get("skills") or ()]
    answer, options = row.get("answer"), texts_of(row.get("choices") or ())
    if kind == "multi_choice" and not options:
        raise ValueError("its type is multi_choice, and it has no choices")
    return Question(
        id=str(row["pid"]),
        text=row["question"],
        images=(folder / Path(row["image"]).name,),
        answers=(text_of(answer),) if answer not in (None, "") else (),
        cluster=Path(row["image"]).name,
        facts={
            "kind": kind,
            "options": options,
            "precision": row.get("precision"),
            "unit": row.get("unit"),
            "groups": tuple(groups),
        },
    )


def _asked(question: Question) -> str:
    unit = question.facts["unit"]
    return f"{question.text} (Unit: {unit})" if unit else question.text


def _hint(question: Question, hints: Mapping[str, str]) -> str:
    kind, precision = question.facts["kind"], question.facts["precision"]
    return hints.get(f"float {int(precision or 0)}" if kind == "float" else kind, "")


def _query(question: Question) -> str:
    """The query of MathVista's query.json."""
    options = question.facts["options"]
    lines = [_hint(question, HINTS), f"Question: {_asked(question)}"]
    if options:
        lines += ["Choices:", *(f"({a}) {o}" for a, o in zip(LETTERS, options, strict=False))]
    return "\n".join(filter(None, lines))


def prompt(question: Question) -> str:
    """The query of the data set."""
    return question.facts["query"]


def prompt_lmms_eval(question: Question) -> str:
    """The question, its options and the form of the answer: task mathvista_testmini_format."""
    parts = [_asked(question), lettered(question.facts["options"]), _hint(question, FORMATS)]
    return "\n".join(filter(None, parts))


def protocols(**each: Sequence) -> dict[str, Protocol]:
    """The protocols of the table below, which differ in a few fields."""
    return {
        name.replace("_", "-"): Protocol(
            metric=metric,
            source=source,
            prompt=prompt_lmms_eval if name == "lmms_eval" else prompt,
            max_new_tokens=tokens,
            grade=grader,
            aggregate=average_of_groups,
            faults=tuple(faults),
        )
        for name, (metric, source, tokens, grader, faults) in each.items()
    }


TASK = Task(
    name="mathvista",
    title="MathVista, testmini, 1,000 questions",
    where="https://huggingface.co/datasets/AI4Math/MathVista, rows as JSON lines, or "
    "https://github.com/lupantech/MathVista, folder data; CC BY-SA 4.0",
    layout="testmini.jsonl or testmini.json, images/",
    read=read,
    protocols=protocols(
        official=(
            "accuracy_without_judge",
            "lupantech/MathVista evaluation/extract_answer.py and calculate_score.py, no judge",
            512,
            grade,
            (
                "without the published judge an answer must be the letter, the option or the "
                "number alone; others are wrong: a lower bound, not comparable with judged numbers",
                "a decimal is cut to a whole number where one is asked for: 4.9 is right for 4",
            ),
        ),
        offline=(
            "accuracy_by_rules",
            "vlm_jax/evals/tasks/mathvista.py: the stated or last letter, number or list",
            512,
            grade_offline,
            ("not comparable with a judged number, nor with those of other tools' rules",),
        ),
        lmms_eval=(
            "llm_as_judge_eval",
            "EvolvingLMMs-Lab/lmms-eval@75571cf tasks/mathvista/utils.py "
            "mathvista_process_results, mathvista_aggregate_results",
            16384,
            grade_lmms_eval,
            (
                "its judge is not asked: such answers are wrong here",
                "an empty answer to a question with options is the shortest option",
                "the precision of its rows is a float, with which rounding fails: every decimal is "
                "wrong",
            ),
        ),
    ),
)
