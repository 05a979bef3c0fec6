# SPDX-License-Identifier: Apache-2.0
"""MMMU: questions of college exams with up to seven images, most with options (Yue et al. 2024).

The published parsers guess an option at random where they find none. Nothing is guessed here: such
an answer is wrong, and counted by its rule "unparsed".
"""

import ast
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vlm_jax.evals.choices import LETTERS, UNSURE, choose, lettered
from vlm_jax.evals.groups import average_of_groups
from vlm_jax.evals.readers import hub_image, hub_rows, row_of, texts_of
from vlm_jax.evals.task import LETTER, SHORT, Annotations, Grade, Protocol, Question, Task, unique

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science "
    "Electronics Energy_and_Power Materials Mechanical_Engineering",
}
DOMAIN_OF = {subject: name for name, of in DOMAINS.items() for subject in of.split()}
IMAGE = re.compile(r"<image (\d+)>")
WORDS = 5  # only in longer answers is the text of an option looked for

# MMMU, eval/eval_utils.py: what stands before an answer, and the forms of a number.
BEFORE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

Form = tuple[str, Callable[[str], str]]  # rule, and letter -> what is looked for
BRACKETS: Form = ("letter in brackets", "({})".format)
BLANKS: Form = ("letter between blanks", " {} ".format)
LMMS_EVAL: tuple[Form, ...] = (
    ("letter before a blank", "{} ".format),
    ("letter before a full stop", "{}.".format),
)


def letter_of(text: str, options: Sequence[str], forms: Sequence[Form]) -> tuple[str, str]:
    """The option that a text names by the rule of MMMU's parse_multi_choice_response, or "".

    The first form that any letter has counts; of several letters the one whose bracketed or
    blank-surrounded form is last. In answers of more than five words the texts of options are
    looked for, if no letter is found.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for rule, form in (BRACKETS, *forms):
        there = [letter for letter in letters if form(letter) in text]
        if there:
            last = (BRACKETS if rule == BRACKETS[0] else BLANKS)[1]
            return max(there, key=lambda letter: text.rfind(last(letter))), rule
    if len(text.split()) > WORDS:
        low = text.lower()
        inside = [(low.rfind(o.lower()), -i) for i, o in enumerate(options) if o.lower() in low]
        if inside:
            return letters[-max(inside)[1]], "text with an option in it"
    return "", "unparsed"


def readings(text: str) -> set[str | float]:
    """What an open answer may mean, by MMMU's parse_open_response: ends of its sentences after
    words such as "is", and the numbers in them."""
    text = text.strip().strip(".").lower()
    parts = text.split("\n")
    ends = []
    for number, part in enumerate(parts, 1):
        before = (*BEFORE, "=") if number == len(parts) else BEFORE
        shortest = ""
        for words in before:
            if words in part:
                end = part.split(words)[-1].strip()
                shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in TRIVIAL:
            ends.append(shortest)
    ends = ends or [text]
    numbers = [number for end in ends for form in NUMBERS for number in form.findall(end)]
    return {value for end in (*ends, *numbers) for value in normal(end)}


def normal(text: str) -> list[str | float]:
    """A number to two decimals, or the lower-cased text; one letter with a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def holds(found: Sequence[str | float] | set[str | float], answers: Sequence[str]) -> bool:
    """Whether a number is an answer, or a text contains one."""
    accepted = [value for answer in answers for value in normal(answer)]
    return any(
        any(isinstance(a, str) and a in value for a in accepted)
        if isinstance(value, str)
        else value in accepted
        for value in found
    )


def grade(question: Question, text: str) -> Grade:
    """By the letter that the answer states, else by MMMU's rule without its guess."""
    text = unicodedata.normalize("NFKC", text)
    if question.facts["open"]:
        right = holds(readings(text), question.answers)
        return Grade(float(right), text.strip(), "open question")
    options = question.facts["options"]
    letter, rule = choose(text, options)
    if rule in UNSURE:
        letter, rule = letter_of(text, options, [BLANKS])
    return Grade(float(letter in question.answers), letter, rule)


def grade_lmms_eval(question: Question, text: str) -> Grade:
    """By lmms-eval's functions, with no option instead of a random one."""
    text = text.strip()
    gold = question.facts["gold"]
    if question.facts["open"]:
        # One reading is kept as a text, of which eval_open then looks at each character.
        right = gold == "" and any(readings(text) - {""})
        return Grade(float(right), text, "open question, read by characters")
    letter, rule = letter_of(text, question.facts["options"], LMMS_EVAL)
    return Grade(float(letter != "" and letter in question.answers), letter, rule)


def read(path: Path) -> Annotations:
    """The questions of validation.jsonl, of all subjects; the answers of a test file are "?"."""
    names = [
        f"{folder}{split}.jsonl" for split in ("validation", "test") for folder in ("", "data/")
    ]
    path, rows = hub_rows(path, names, "mmmu")
    questions = []
    for number, row in enumerate(rows):
        with row_of(path, number):
            questions.append(_question(path, row))
    version = f"{path.stem}, {len(questions)} questions"
    return Annotations(unique(questions, path), (path,), version)


def _question(path: Path, row: dict) -> Question:
    is_open = row["question_type"] != "multiple-choice"
    options = texts_of(listed(row["options"])) if not is_open else ()
    gold = row.get("answer")
    answers = texts_of(listed(gold)) if gold not in (None, "?") else ()
    if not is_open and (wrong := set(answers) - set(LETTERS[: len(options)])):
        raise ValueError(f"its answer is {min(wrong)!r:.60}, and it has {len(options)} options")
    shown = "\n".join([row["question"], *options])
    # In the order of their names, as they are given to the model.
    numbers = sorted(set(IMAGE.findall(shown)))
    images = [hub_image(path, row, f"image_{i}") for i in numbers]
    match = re.fullmatch(r"[^_]*_(.+?)_\d+", row["id"])
    if not match:
        raise ValueError(f"the id {row['id']!r} is not SPLIT_SUBJECT_NUMBER")
    subject = match.group(1)
    groups = [subject, "open" if is_open else "multiple-choice"]
    if subject in DOMAIN_OF:
        groups.append(f"domain.{DOMAIN_OF[subject]}")
    return Question(
        id=row["id"],
        text=row["question"],
        images=tuple(image for image in images if image),
        answers=answers,
        cluster=str(images[0]) if images and images[0] else row["id"],
        facts={"options": options, "gold": gold, "open": is_open, "groups": tuple(groups)},
    )


def listed(value: object) -> list:
    """A list, one that is written as text, or a list of the value alone."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            pass
    return value if isinstance(value, list) else [value]


def prompt(question: Question) -> str:
    """The question with its options, then the request for a letter or a short answer."""
    if question.facts["open"]:
        return f"{question.text}\n{SHORT}"
    return f"{question.text}\n{lettered(question.facts['options'])}\n{LETTER}"


protocol = partial(Protocol, prompt=prompt, max_new_tokens=128, aggregate=average_of_groups)
TASK = Task(
    name="mmmu",
    title="MMMU, validation, 900 questions",
    where="https://huggingface.co/datasets/MMMU/MMMU, rows of all subjects as JSON lines; "
    "Apache-2.0",
    layout="validation.jsonl (id, question, options, image_1 ..., answer, question_type), images/",
    read=read,
    protocols={
        "official": protocol(
            metric="accuracy",
            source="MMMU-Benchmark/MMMU@44b45b5 eval/eval_utils.py, without its random guess and "
            "after what an answer states by vlm_jax/evals/choices.py; prompt of lmms-eval",
            grade=grade,
        ),
        "lmms-eval": protocol(
            metric="mmmu_acc",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/mmmu/utils.py mmmu_process_results, "
            "mmmu_aggregate_results",
            grade=grade_lmms_eval,
            faults=(
                "every open question is wrong: its parsed answer becomes a text, of which single "
                "characters are compared",
                "it guesses an option at random where it finds none, which cannot be reproduced: "
                "such answers are wrong here, so that its own number is higher by chance",
                "a capital letter at the end of a word, as in DNA, is option A",
            ),
        ),
    },
)
