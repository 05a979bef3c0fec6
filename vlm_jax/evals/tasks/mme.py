# SPDX-License-Identifier: Apache-2.0
"""MME: two yes-or-no questions about each picture in 14 subtasks (Fu et al. 2023).

A subtask gives 100 points for right answers and 100 for pictures with both answers right; the
reported number is the sum over the ten subtasks of perception, 2,000 at most. Both questions of a
picture have the same id in LLaVA's files: a prediction is found by its id and its question, that
is the prompt without suffixes.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm_jax.evals.metrics import jackknife_stderr, mean
from vlm_jax.evals.task import (
    SHORT,
    Aggregate,
    Annotations,
    Grade,
    Graded,
    Protocol,
    Question,
    Task,
    Unit,
    numbered,
    unique,
)

PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
FOLDER = "MME_Benchmark_release_version"
REQUEST = "Please answer yes or no."  # ends every question of the official files
PICTURES = (".jpg", ".png", ".jpeg")


def prefix(text: str) -> tuple[str, str]:
    """ "yes", "no" or "other" and the rule: the first four characters, lower-cased, decide."""
    start = text.lower()[:4]
    for word in ("yes", "no"):
        if word in start:
            return word, "yes or no in the first four characters"
    return "other", "neither yes nor no"


def prefix_lmms_eval(text: str) -> tuple[str, str]:
    """The same without outer blanks and full stops; y and n alone count too."""
    text = text.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text], "the letter y or n"
    return prefix(text)


def score(rows: Iterable[Mapping[str, Any]], *, parse: Any = prefix_lmms_eval) -> dict[str, float]:
    """Points of every subtask and their sums "perception" and "cognition".

    Args:
      rows: fields question_id (shared by the two questions of a picture), category, answer and
        prediction.
    """
    pictures: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        right = parse(row["prediction"])[0] == row["answer"].strip().lower().replace(".", "")
        pictures.setdefault(row["category"], {}).setdefault(row["question_id"], []).append(
            float(right)
        )
    return _sums({c: [_picture(v) for v in of.values()] for c, of in pictures.items()})


def _picture(right: Sequence[float]) -> float:
    """Points of one picture in the mean of its subtask."""
    return 100 * mean(right) + 100 * all(right)


def _sums(points: Mapping[str, Sequence[float]]) -> dict[str, float]:
    subtasks = {name: mean(points[name]) for name in (*PERCEPTION, *COGNITION) if name in points}
    return subtasks | {
        "perception": sum(v for name, v in subtasks.items() if name in PERCEPTION),
        "cognition": sum(v for name, v in subtasks.items() if name in COGNITION),
    }


def grade(question: Question, text: str, *, parse: Any) -> Grade:
    """1 if the parsed answer is that of the file."""
    word, rule = parse(text)
    return Grade(float(word == question.answers[0].strip().lower()), word, rule)


def aggregate(graded: Sequence[Graded]) -> Aggregate:
    """Perception with its standard error, and the points of every subtask.

    The standard error is a jackknife that leaves out one picture at a time; NaN if a subtask has
    a single picture. A unit is a question of perception.
    """
    pictures: dict[str, dict[str, list[float]]] = {}
    for g in graded:
        of = pictures.setdefault(g.question.labels[""], {})
        of.setdefault(g.question.cluster, []).append(g.grade.value)
    points = {name: {k: _picture(v) for k, v in of.items()} for name, of in pictures.items()}
    subscores = _sums({name: list(of.values()) for name, of in points.items()})
    value = subscores["perception"]
    perception = [points[name] for name in PERCEPTION if name in points]
    single = any(len(of) < 2 for of in perception)
    replicates = {
        key: value - (of[key] - mean(list(of.values()))) / (len(of) - 1)
        for of in ([] if single else perception)
        for key in of
    }
    return Aggregate(
        value=value,
        stderr=jackknife_stderr(list(replicates.values())),
        units=tuple(
            Unit(g.question.key, g.question.cluster, g.grade.value)
            for g in graded
            if g.question.labels[""] in PERCEPTION
        ),
        subscores=subscores,
        replicates=replicates,
    )


def read(path: Path) -> Annotations:
    """The questions of all subtasks below a folder; each has lines `question<TAB>Yes|No` in a
    text file per picture, beside it or in `questions_answers_YN`."""
    home = path / FOLDER if (path / FOLDER).is_dir() else path
    subtasks = [name for name in (*PERCEPTION, *COGNITION) if (home / name).is_dir()]
    if not subtasks:
        what = "has none of the folders" if home.is_dir() else "is no folder; expected one with"
        raise FileNotFoundError(f"mme: {home} {what} {', '.join((*PERCEPTION, *COGNITION))}")
    questions: list[Question] = []
    for name in subtasks:
        apart = (home / name / "images").is_dir()
        texts = home / name / "questions_answers_YN" if apart else home / name
        folder = f"{name}/images" if apart else name
        for file in sorted(texts.glob("*.txt")):
            questions += _pair(home, folder, name, file)
    absent = [n for n in (*PERCEPTION, *COGNITION) if n not in subtasks]
    notes = (f"without {', '.join(absent)}: the sums are lower than those reported",)
    version = f"{len(subtasks)} subtasks, {len(questions)} questions"
    return Annotations(unique(numbered(questions), home), (home,), version, notes if absent else ())


def _pair(home: Path, folder: str, subtask: str, file: Path) -> list[Question]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) != 2:
        raise ValueError(f"{file}: {len(lines)} questions; every picture of MME has two")
    images = [home / folder / (file.stem + end) for end in PICTURES]
    image = next((p for p in images if p.is_file()), images[0])
    identifier = f"{folder}/{image.name}"
    questions = []
    for number, line in enumerate(lines, 1):
        text, _, answer = line.strip().partition("\t")
        if answer.strip().lower() not in ("yes", "no", ""):
            raise ValueError(f"{file}, line {number}: the answer is {answer!r:.40}, not Yes or No")
        questions.append(
            Question(
                id=identifier,
                text=text,
                images=(image,),
                answers=(answer.strip(),) if answer.strip() else (),
                key=_key(identifier, text),
                cluster=f"{subtask}/{file.stem}",
                labels={"": subtask},
            )
        )
    return questions


def _key(identifier: str, prompt: str) -> str:
    # As LLaVA's convert_answer_to_mme.py: subtask and file without its end, question without
    # what asks for the form of the answer.
    parts = identifier.split("/")
    asked = prompt.replace(SHORT.strip(), "").replace(REQUEST, "")
    return f"{parts[0]}/{parts[-1].split('.')[0]}: {' '.join(asked.split())}"


def key_of(row: Mapping[str, Any]) -> str:
    """The picture and the question of a prediction."""
    return _key(row["question_id"], row["prompt"])


def short(question: Question) -> str:
    """LLaVA's prompt: the short suffix in place of the request for yes or no."""
    return question.text.replace(REQUEST, "").strip() + SHORT


OFFICIAL = (
    "BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation, tools/eval_tool.zip "
    "calculation.py"
)
ANYWHERE = "the word decides wherever it begins: Not sure, None and Nope are no, Yesterday is yes"
TASK = Task(
    name="mme",
    title="MME, 2,374 questions in 14 subtasks",
    where="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation; "
    "on request",
    layout=f"{FOLDER}/SUBTASK/*.txt, pictures beside them or in SUBTASK/images",
    read=read,
    unit="points",
    key_of=key_of,
    protocols={
        "official": Protocol(
            metric="perception",
            source=f"{OFFICIAL}; pictures are paired by name",
            prompt=lambda question: question.text,
            max_new_tokens=16,
            grade=partial(grade, parse=prefix),
            aggregate=aggregate,
            faults=(ANYWHERE,),
        ),
        "llava": Protocol(
            metric="perception",
            source=f"{OFFICIAL}, after convert_answer_to_mme.py of LLaVA's eval.zip",
            prompt=short,
            max_new_tokens=128,
            grade=partial(grade, parse=prefix),
            aggregate=aggregate,
            faults=(
                ANYWHERE,
                "it pairs answers by the order of lines; here by picture, which is the same for "
                "files in the order of the questions",
            ),
        ),
        "lmms-eval": Protocol(
            metric="mme_perception_score",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/mme/utils.py mme_process_results, "
            "mme_aggregate_results",
            prompt=short,
            max_new_tokens=16,
            grade=partial(grade, parse=prefix_lmms_eval),
            aggregate=aggregate,
            faults=(ANYWHERE,),
        ),
    },
)
