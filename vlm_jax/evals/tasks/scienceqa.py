# SPDX-License-Identifier: Apache-2.0
"""ScienceQA: multiple-choice questions of school science, half of them with a picture (Lu et al.
2022).

The community reports the accuracy over test questions with a picture ("img"); the data set's own
number is that over all test questions.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlm_jax.evals.choices import LETTERS, choose, lettered
from vlm_jax.evals.groups import average_of_groups
from vlm_jax.evals.metrics import mean
from vlm_jax.evals.readers import row_of, texts_of
from vlm_jax.evals.task import (
    LETTER,
    Aggregate,
    Annotations,
    Grade,
    Graded,
    Protocol,
    Question,
    Task,
    average,
    found,
    read_json,
    unique,
)

OPTIONS = "ABCDE"
PROBLEMS = "problems.json"
SPLITS = "pid_splits.json"
LLAVA = "llava_test_CQM-A.json"
STATED = re.compile(r"The answer is ([A-Z]).")  # one more character is needed, as published


def grade(prediction: str, choices: Sequence[str], answer: int) -> float:
    """1 if an answer is right by lmms-eval's rule, sqa_process_results."""
    return float(_lmms_eval(prediction, choices)[0] == LETTERS[answer])


def _lmms_eval(text: str, options: Sequence[str]) -> tuple[str, str]:
    text = text.strip()
    if len(text) == 1 and text.lower() in LETTERS.lower():
        return text.upper(), "letter alone, in either case"
    if len(text) >= 2 and text[0].isupper() and text[1] == ".":
        return text[0], "letter and full stop at the beginning"
    return "", "unparsed"


def _llava(text: str, options: Sequence[str]) -> tuple[str, str]:
    if len(text) == 1 and text in OPTIONS:
        letter, rule = text, "letter alone"
    elif len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        letter, rule = text[0], "letter, full stop and blank at the beginning"
    elif len(stated := STATED.findall(text)) == 1:
        letter, rule = stated[0], "The answer is, once"
    else:
        return "", "unparsed"
    return (letter, rule) if letter in OPTIONS[: len(options)] else ("", "no option has the letter")


def _grade(
    question: Question, text: str, *, parse: Callable[[str, Sequence[str]], tuple[str, str]]
) -> Grade:
    letter, rule = parse(text, question.facts["options"])
    return Grade(float(letter == question.answers[0]), letter, rule)


def _with_picture(graded: Sequence[Graded], *, everything: bool) -> Aggregate:
    """Accuracy over questions with a picture, "img", and over all, "all"."""
    pictured = average([g for g in graded if g.question.images], labels=())
    subscores = {"img": pictured.value}
    if everything:
        subscores["all"] = 100 * mean([g.grade.value for g in graded])
    return replace(pictured, subscores=subscores)


def _groups(problem: dict) -> Iterable[str]:
    """The groups of tools/evaluate_acc.py that a problem belongs to."""
    subjects = dict(natural="NAT", social="SOC", language="LAN")
    yield "all"
    yield subjects.get(problem["subject"].split()[0], problem["subject"])
    if problem["hint"]:
        yield "TXT"
    if problem["image"]:
        yield "img"
    if not problem["hint"] and not problem["image"]:
        yield "NO"
    grade_of = int(re.sub(r"\D", "", problem["grade"]) or 0)
    if 1 <= grade_of <= 12:
        yield "G1-6" if grade_of <= 6 else "G7-12"


def read(path: Path) -> Annotations:
    """The test questions of problems.json and pid_splits.json; their prompts are those of
    llava_test_CQM-A.json where it is there."""
    problems = found(
        path, [PROBLEMS, f"data/{PROBLEMS}", f"data/scienceqa/{PROBLEMS}"], "scienceqa"
    )
    home = problems.parent
    everything = read_json(problems, dict)
    splits = read_json(found(home, [SPLITS], "scienceqa"), dict)
    if "test" not in splits:
        raise ValueError(f"{home / SPLITS}: no split test; it has {', '.join(splits):.80}")
    files, texts = [problems, home / SPLITS], {}
    if (home / LLAVA).is_file():
        files.append(home / LLAVA)
        for row in read_json(home / LLAVA, list):
            text = row["conversations"][0]["value"].replace("<image>", "").strip()
            texts[str(row["id"])] = text
    questions = []
    for pid in splits["test"]:
        if pid not in everything:
            raise ValueError(f"{problems} does not have the problem {pid!r} of {SPLITS}")
        with row_of(problems, pid):
            questions.append(_question(home, pid, everything[pid], texts.get(pid, "")))
    version = f"test, {len(questions)} questions, {sum(bool(q.images) for q in questions)} with one"
    return Annotations(unique(questions, problems), tuple(files), f"{version} picture")


def _question(home: Path, pid: str, problem: dict, llava: str) -> Question:
    image, answer, options = problem["image"], problem.get("answer"), texts_of(problem["choices"])
    if answer is not None and not 0 <= answer < len(options):
        raise ValueError(f"its answer is {answer}, and it has {len(options)} choices")
    return Question(
        id=pid,
        text=problem["question"],
        images=(home / "images" / "test" / pid / image,) if image else (),
        answers=() if answer is None else (LETTERS[answer],),
        facts={
            "options": options,
            "hint": problem["hint"],
            "groups": tuple(_groups(problem)),
            "llava": llava,
        },
    )


def prompt(question: Question) -> str:
    """Context, question and options, then the request for a letter."""
    hint = question.facts["hint"]
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{question.text}\n{lettered(question.facts['options'])}{LETTER}"


def prompt_llava(question: Question) -> str:
    """The prompt of LLaVA's question file, or the same made from the problem."""
    text = question.facts["llava"]
    return text + LETTER if text else prompt(question)


LLAVA_FAULTS = (
    "B. and b are wrong, and so is `The answer is B` with nothing after it",
    "an answer that is not stripped is compared as it is",
)
TASK = Task(
    name="scienceqa",
    title="ScienceQA, test, 4,241 questions, 2,017 of them with a picture",
    where="https://github.com/lupantech/ScienceQA, folder data/scienceqa; CC BY-NC-SA 4.0",
    layout=f"{PROBLEMS}, {SPLITS}, images/test/PID/image.png, perhaps {LLAVA}",
    read=read,
    protocols={
        "official": Protocol(
            metric="accuracy",
            source="lupantech/ScienceQA@2cbf831 tools/evaluate_acc.py for the groups; it takes the "
            "number of an option, which is found here by vlm_jax/evals/choices.py",
            prompt=prompt,
            max_new_tokens=1024,
            grade=partial(_grade, parse=choose),
            aggregate=average_of_groups,
        ),
        "llava": Protocol(
            metric="img_accuracy",
            source="haotian-liu/LLaVA@c121f04 llava/eval/eval_science_qa.py",
            prompt=prompt_llava,
            max_new_tokens=1024,
            grade=partial(_grade, parse=_llava),
            aggregate=partial(_with_picture, everything=True),
            faults=LLAVA_FAULTS,
        ),
        "paper": Protocol(
            metric="img_accuracy",
            source="locuslab/llava-token-compression@bdedebd llava/eval/eval_science_qa.py, which "
            "prints the accuracy over questions with a picture alone",
            prompt=prompt_llava,
            max_new_tokens=1024,
            grade=partial(_grade, parse=_llava),
            aggregate=partial(_with_picture, everything=False),
            faults=LLAVA_FAULTS,
        ),
        "lmms-eval": Protocol(
            metric="exact_match",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/scienceqa/utils.py "
            "sqa_process_results, task scienceqa_img; subscore all is task scienceqa",
            prompt=prompt,
            max_new_tokens=16,
            grade=partial(_grade, parse=_lmms_eval),
            aggregate=partial(_with_picture, everything=True),
            faults=("`The answer is B.`, (B) and B) are wrong, a is right for A but a. is wrong",),
        ),
    },
)
