# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is: its questions as the official files have them, and its scoring protocols.

Each task has a file in `tasks/`, with a reader and a table of protocols. A protocol turns a
question into a prompt, an answer into a grade, and all grades into the reported number. Plain
Python: scoring needs no model.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_jax.evals.metrics import clustered_stderr, mean

SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA, docs/Evaluation.md
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
      id: `question_id` in files of predictions, with its type.
      text: the question alone, without any suffix.
      images: paths, or the bytes of image files; () for a question of text alone.
      answers: accepted answers in their order; () if the file has none (a test split).
      key: unique within the task; by default the id as text.
      cluster: shared by questions with correlated errors, mostly their image.
      labels: subscore name -> value of this question, such as {"answer_type": "number"}.
      facts: what the task's own protocols read besides, such as options or a hint.

    Raises:
      ValueError: for an id or a text of another type, which a row of a file may have.
    """

    id: str | int
    text: str
    images: tuple[Path | bytes, ...] = ()
    answers: tuple[str, ...] = ()
    key: str = ""
    cluster: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields = {"question": self.text, "cluster": self.cluster, **self.labels}
        wrong = [(name, value) for name, value in fields.items() if not isinstance(value, str)]
        wrong += [("answer", a) for a in self.answers if not isinstance(a, str)]
        if not isinstance(self.id, str) and type(self.id) is not int:
            wrong.insert(0, ("id", self.id))
        for name, value in wrong:
            raise ValueError(
                f"question {self.key or str(self.id)!r:.80}: its {name or 'type'} is "
                f"{value!r:.60}, not a text"
            )
        if not self.key:
            object.__setattr__(self, "key", str(self.id))
        if not self.cluster:
            object.__setattr__(self, "cluster", self.key)


@dataclass(frozen=True)
class Annotations:
    """The questions of the official files, in their order.

    Attributes:
      files: the files that were read; the result names their hashes.
      version: which release or variant these are, as far as the content tells.
      notes: sentences about what the reader saw and did.
    """

    questions: tuple[Question, ...]
    files: tuple[Path, ...]
    version: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grade:
    """How right one answer is.

    Attributes:
      value: from 0 (wrong) to 1.
      parsed: what the parser took from the answer; "" if nothing.
      rule: the parser's rule that applied, for the counts in the result.
    """

    value: float
    parsed: str
    rule: str


@dataclass(frozen=True)
class Graded:
    """A question with the text that answers it and its grade; `failed` if there is no answer."""

    question: Question
    text: str
    grade: Grade
    failed: bool = False


@dataclass(frozen=True)
class Unit:
    """What the reported value counts: one question, or a group that is right as a whole."""

    key: str
    cluster: str
    value: float


@dataclass(frozen=True)
class Aggregate:
    """The reported numbers in the unit of the task.

    Attributes:
      units: the questions or groups that enter `value`; `n` is their number unless given.
      stderr: standard error of `value`; NaN if unknown.
      replicates: cluster -> `value` without that cluster, where `value` is not the mean (or sum) of
        the units, such as an F1; else empty. Differences of two systems have the jackknife's error
        of the differences of their replicates.
    """

    value: float
    stderr: float
    units: tuple[Unit, ...]
    subscores: Mapping[str, float] = field(default_factory=dict)
    n: int = -1
    replicates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n < 0:
            object.__setattr__(self, "n", len(self.units))


@dataclass(frozen=True)
class Protocol:
    """One way to ask and to score.

    Attributes:
      metric: name of the reported number in its source.
      source: repository @ commit, file and function, or the paper with the rule.
      prompt: question -> the text that the model is asked, without image marks.
      max_new_tokens: of an answer, in the source.
      grade: question, answer -> Grade.
      aggregate: all graded questions, in the order of the annotations -> the numbers.
      faults: sentences about what the source mis-scores; a named protocol keeps its faults.
    """

    metric: str
    source: str
    prompt: Callable[[Question], str]
    max_new_tokens: int
    grade: Callable[[Question, str], Grade]
    aggregate: Callable[[Sequence[Graded]], Aggregate]
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      title: its name, split and size.
      where: where its official files are, and their license as far as it is stated.
      layout: which files the reader expects below the path that it is given.
      unit: of value and stderr: "percent" or "points".
      read: path of the official file or folder -> Annotations; raises OSError or ValueError.
      protocols: name -> Protocol; "official" is the data set's own rule and the default.
      key_of: a row of predictions -> the key of its question.
      known: sha256 of an official file -> what it is.
    """

    name: str
    title: str
    where: str
    layout: str
    read: Callable[[Path], Annotations]
    protocols: Mapping[str, Protocol]
    unit: str = "percent"
    key_of: Callable[[Mapping[str, Any]], str] = lambda row: str(row["question_id"])
    known: Mapping[str, str] = field(default_factory=dict)


def question_alone(question: Question) -> str:
    """The prompt that is the question without a suffix."""
    return question.text


def short(question: Question) -> str:
    """The question with LLaVA's request for a short answer."""
    return question.text + SHORT


def average(
    graded: Sequence[Graded],
    *,
    labels: Sequence[str] | None = None,
    points: bool = False,
) -> Aggregate:
    """The mean grade in percent, and that of each value of the labels (of all labels where None).

    Subscores of label "" have the plain name of the value, others "LABEL.VALUE". The standard
    error is clustered by `Question.cluster`. With `points`, sums of grades instead of percent.
    """
    units = tuple(Unit(g.question.key, g.question.cluster, g.grade.value) for g in graded)
    groups: dict[str, list[float]] = {}
    for g in graded:
        for label, value in g.question.labels.items():
            if labels is None or label in labels:
                name = f"{label}.{value}" if label else value
                groups.setdefault(name, []).append(g.grade.value)

    def shown(values: Sequence[float]) -> float:
        return sum(values) if points else 100 * mean(values)

    stderr = clustered_stderr([u.value for u in units], [u.cluster for u in units])
    return Aggregate(
        value=shown([u.value for u in units]),
        stderr=(len(units) if points else 100) * stderr,
        units=units,
        subscores={name: shown(values) for name, values in groups.items()},
    )


def found(path: Path, names: Sequence[str], task: str) -> Path:
    """`path` itself if it is a file, else the first of the relative `names` below it that exists.

    Raises:
      FileNotFoundError: naming what was looked for.
    """
    if path.is_file():
        return path
    for name in names:
        if (path / name).exists():
            return path / name
    what = "holds none of" if path.is_dir() else "does not exist; expected a folder with one of"
    raise FileNotFoundError(f"{task}: {path} {what} {', '.join(names)}")


def image_folder(path: Path, folders: Sequence[str]) -> Path:
    """The first of `folders`, relative to `path`'s folder or one of the two above it, that exists;
    if none does, where the first should be."""
    for home in (path.parent, *list(path.parent.parents)[:2]):
        for folder in folders:
            if (home / folder).is_dir():
                return home / folder
    return path.parent / (folders[0] if folders else "")


def beside(path: Path, name: str, folders: Sequence[str]) -> Path:
    """The path of an image `name` in `image_folder`; it is not checked that the image exists."""
    return image_folder(path, folders) / name


def read_json(path: Path, kind: type = object) -> Any:
    """The content of a JSON file.

    Raises:
      ValueError: if it is no JSON or its top level is not a `kind`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file, or cut short: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected a {kind.__name__}, found a {type(value).__name__}")
    return value


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not empty.

    Raises:
      ValueError: for a line that is not a JSON object, with its number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    # Not splitlines(), which also splits at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON, or cut short: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a {type(row).__name__}, not an object")
        yield number, row


def unique(questions: Sequence[Question], path: Path) -> tuple[Question, ...]:
    """The questions, whose keys must differ. Raises ValueError for the first that does not."""
    for key, count in Counter(q.key for q in questions).items():
        if count > 1:
            raise ValueError(f"{path}: {count} questions with the id {key!r}")
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return tuple(questions)


def numbered(questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions with "#2", "#3", ... after a key that an earlier one has.

    For benchmarks in which a prediction cannot tell such questions apart; predictions with the
    same key then answer them in their order.
    """
    seen: Counter[str] = Counter()
    own = []
    for question in questions:
        seen[question.key] += 1
        again = repeated(question.key, seen[question.key])
        own.append(question if again == question.key else replace(question, key=again))
    return tuple(own)


def repeated(key: str, time: int) -> str:
    """The key of the question that has `key` for the `time`-th time."""
    return key if time == 1 else f"{key}#{time}"
