# SPDX-License-Identifier: Apache-2.0
"""POPE: is this object in the image? Three ways to choose absent objects (Li et al. 2023).

Ids are those of LLaVA's llava_pope_test.jsonl, because the official files each count from 1. The
random file exists with 2,910 lines (LLaVA's, AoiDragon/POPE@e3e3926) and with 3,000.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_jax.evals import question_files
from vlm_jax.evals.metrics import clustered_stderr, jackknife_stderr, mean
from vlm_jax.evals.readers import row_of
from vlm_jax.evals.task import (
    Aggregate,
    Annotations,
    Grade,
    Graded,
    Protocol,
    Question,
    Task,
    Unit,
    image_folder,
    json_lines,
    question_alone,
    short,
    unique,
)

# The first id of each category in LLaVA's file, minus one.
CATEGORIES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
RANDOM_FILES = {2910: "the old one, LLaVA's", 3000: "the new one"}
PREFIX = "coco_pope_"
OBJECT = re.compile(r"Is there an? (.+) in the \w+\?")
ASKED = "llava_pope_test.jsonl"


def read(path: Path) -> Annotations:
    """The questions of coco_pope_CATEGORY.json, with the ids of LLaVA's question file.

    Where that file is beside or above them, questions are matched by image and object, and those
    that it does not ask are left out. Otherwise ids are made as it makes them, from positions: the
    official ones have gaps in some releases.
    """
    files = _label_files(path)
    home = image_folder(files[0], ("val2014", "coco/val2014", "images/val2014"))
    folder = files[0].parent
    places = (folder, folder.parent, folder.parent.parent, path)
    asked = next((p / ASKED for p in places if (p / ASKED).is_file()), None)
    ids = _ids(asked) if asked else None
    questions, versions, notes = [], [], []
    if ids is None:
        notes.append(f"{ASKED} is not here: ids are positions, from 1, 10000001 and 20000001")
    for file in files:
        category = file.stem.removeprefix(PREFIX)
        rows = [row for _, row in json_lines(file)]
        if ids is not None and category not in ids:
            notes.append(f"{file.name} is left out: {ASKED} does not ask {category}")
            continue
        own = None if ids is None else ids[category]
        count = 0
        for position, row in enumerate(rows, 1):
            with row_of(file, position - 1):
                place = (row["image"], asked_object(row["text"]))
                if own is None:
                    number = CATEGORIES.get(category, 0) + position
                elif own[place]:
                    number = own[place].pop(0)
                else:
                    continue
                count += 1
                questions.append(_question(number, category, row, home))
        left = [number for numbers in (own or {}).values() for number in numbers]
        if left:
            raise ValueError(
                f"{asked} asks {len(left)} {category} questions that {file} does not have, such as "
                f"{left[0]}: they are of different releases; LLaVA's has 2,910 random questions "
                "(AoiDragon/POPE@e3e3926), newer ones have 3,000"
            )
        if count < len(rows):
            notes.append(f"{len(rows) - count} lines of {file.name} are not asked by {ASKED}")
        known = (
            f" ({RANDOM_FILES[count]})" if category == "random" and count in RANDOM_FILES else ""
        )
        versions.append(f"{category} {count}{known}")
    if absent := sorted(CATEGORIES.keys() - {q.labels["category"] for q in questions}):
        notes.append(f"no questions of {', '.join(absent)}: values are of the others")
    read_from = (*files, asked) if asked else tuple(files)
    return Annotations(unique(questions, path), read_from, ", ".join(versions), tuple(notes))


def asked_object(text: str) -> str:
    """What a question asks for; the question itself if it has another form.

    The words around differ between releases: "an umbrella in the imange" in LLaVA's.
    """
    found = OBJECT.fullmatch(text.strip())
    return found.group(1) if found else text


def _label_files(path: Path) -> list[Path]:
    if path.is_file() and path.name != ASKED:
        return [path]
    folder = path.parent if path.is_file() else path
    for place in (folder, folder / "coco", folder / "output" / "coco"):
        if files := sorted(place.glob(f"{PREFIX}*.json")):
            return files
    what = "holds" if folder.is_dir() else "does not exist; expected"
    raise FileNotFoundError(f"pope: {folder} {what} no coco/{PREFIX}CATEGORY.json")


def _ids(asked: Path) -> dict[str, dict[tuple[str, str], list[int]]]:
    """Category -> (image, object) -> the ids of LLaVA's file, in its order."""
    ids: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for row in question_files.rows(asked, "image", "category"):
        place = (row["image"], asked_object(question_files.bare(row["text"])))
        ids[row["category"]][place].append(row["question_id"])
    return ids


def _question(number: int, category: str, row: Mapping[str, Any], home: Path) -> Question:
    if row.get("label", "no") not in ("yes", "no"):
        raise ValueError(f"its label is {row['label']!r:.60}, not yes or no")
    return Question(
        id=number,
        text=row["text"],
        images=(home / row["image"],),
        answers=(row["label"],) if "label" in row else (),
        cluster=row["image"],
        labels={"category": category},
    )


def says_no(question: Question, text: str) -> Grade:
    """POPE's parser: no if one of the words No, not, no is in the first sentence, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    if {"No", "not", "no"} & set(words):
        answer, rule = "no", "says no"
    elif any(word.lower() == "yes" for word in words):
        answer, rule = "yes", "says yes"
    else:
        answer, rule = "yes", "neither: counted as yes"
    label = "no" if question.answers[0] == "no" else "yes"
    return Grade(float(answer == label), answer, rule)


def exactly(question: Question, text: str) -> Grade:
    """lmms-eval's: right if the answer is the label, without case and blanks around."""
    answer = text.strip().lower().strip()
    rule = "yes or no" if answer in ("yes", "no") else "neither: in accuracy alone"
    return Grade(float(answer == question.answers[0].lower().strip()), answer, rule)


@dataclass(frozen=True)
class Counts:
    """Answers by label: right and wrong yes, right and wrong no, neither, and yes among labels."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0
    neither: int = 0
    labels: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(a - b for a, b in zip(self._all(), other._all(), strict=True)))

    def _all(self) -> tuple[int, ...]:
        return self.tp, self.fp, self.tn, self.fn, self.neither, self.labels

    @property
    def n(self) -> int:
        """Questions."""
        return self.tp + self.fp + self.tn + self.fn + self.neither

    @property
    def f1(self) -> float:
        """F1 of yes; 0 where it is undefined."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    @property
    def precision(self) -> float:
        """Of yes; 0 where no answer is yes."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else 0.0

    @property
    def recall(self) -> float:
        """Of yes; 0 where no label is yes."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else 0.0

    def scores(self, *, of_labels: bool) -> dict[str, float]:
        """The five reported numbers in percent; yes_ratio of the answers or of the labels."""
        yes = self.labels if of_labels else self.tp + self.fp
        return {
            "accuracy": 100 * (self.tp + self.tn) / self.n,
            "precision": 100 * self.precision,
            "recall": 100 * self.recall,
            "f1": 100 * self.f1,
            "yes_ratio": 100 * yes / self.n,
        }


def counted(graded: Graded) -> Counts:
    """One answer. A failed one is the wrong one of yes and no."""
    label = graded.question.answers[0].lower().strip() != "no"
    answer = graded.grade.parsed
    if graded.failed:
        answer = "no" if label else "yes"
    if answer == "yes":
        return Counts(tp=label, fp=not label, labels=label)
    if answer == "no":
        return Counts(tn=not label, fn=label, labels=label)
    return Counts(neither=1, labels=label)


Table = Mapping[str, Counts]  # category -> its answers


def mean_f1(table: Table) -> float:
    """Mean of the categories' F1, in percent."""
    return 100 * mean([counts.f1 for counts in table.values() if counts.n])


def pooled_f1(table: Table) -> float:
    """F1 of all answers together, in percent."""
    return 100 * sum(table.values(), Counts()).f1


def by_f1(
    graded: Sequence[Graded], *, value: Callable[[Table], float], of_labels: bool
) -> Aggregate:
    """`value` of the categories' counts with the jackknife's error over images.

    Subscores are the five numbers of each category and, where yes is counted among the labels (as
    lmms-eval does), those of all answers together.
    """
    table: dict[str, Counts] = defaultdict(Counts)
    clusters: dict[str, dict[str, Counts]] = defaultdict(lambda: defaultdict(Counts))
    for g in graded:
        category, counts = g.question.labels["category"], counted(g)
        table[category] += counts
        clusters[g.question.cluster][category] += counts
    replicates = {
        cluster: value({name: c - parts[name] for name, c in table.items()})
        for cluster, parts in clusters.items()
    }
    subscores = sum(table.values(), Counts()).scores(of_labels=True) if of_labels else {}
    for category, counts in table.items():
        scores = counts.scores(of_labels=of_labels)
        subscores |= {f"{category}.{name}": score for name, score in scores.items()}
    units = tuple(Unit(g.question.key, g.question.cluster, g.grade.value) for g in graded)
    return Aggregate(
        value=value(table),
        stderr=jackknife_stderr(list(replicates.values())),
        units=units,
        subscores=subscores,
        replicates=replicates if len(replicates) > 1 else {},
    )


def random_accuracy(graded: Sequence[Graded]) -> Aggregate:
    """Accuracy in percent on the random category alone. Raises ValueError without it."""
    units = tuple(
        Unit(g.question.key, g.question.cluster, g.grade.value)
        for g in graded
        if g.question.labels["category"] == "random"
    )
    if not units:
        raise ValueError("pope: this protocol scores the category random, which is not here")
    values = [u.value for u in units]
    return Aggregate(
        value=100 * mean(values),
        stderr=100 * clustered_stderr(values, [u.cluster for u in units]),
        units=units,
        subscores={"random.accuracy": 100 * mean(values)},
    )


FAULTS = (
    "an answer that is neither yes nor no counts as yes, and so do 'NO', 'No!' and 'nope'",
    "'not' anywhere in the first sentence is no, a full stop before the answer makes it yes",
    "the script stops where no answer is yes; here precision and F1 are 0 then",
)
LLAVA = Protocol(
    metric="mean_f1",
    source="haotian-liu/LLaVA@c121f04 llava/eval/eval_pope.py, the mean of the three F1",
    prompt=short,
    max_new_tokens=128,
    grade=says_no,
    aggregate=partial(by_f1, value=mean_f1, of_labels=False),
    faults=(*FAULTS, "pairs answers with labels by their order; here by id"),
)
TASK = Task(
    name="pope",
    title="POPE on COCO val2014, 3 x 3,000 questions (8,910 in LLaVA's release)",
    where="https://github.com/AoiDragon/POPE, folder output/coco; MIT",
    layout="coco/coco_pope_{adversarial,popular,random}.json, llava_pope_test.jsonl, val2014/",
    read=read,
    protocols={
        "official": replace(
            LLAVA,
            source="AoiDragon/POPE@08d957b evaluate.py on each of the three files; the mean of the "
            "three F1, which each is a subscore; it gives no max_new_tokens, which is LLaVA's",
            prompt=question_alone,
            faults=FAULTS,
        ),
        "llava": LLAVA,
        "lmms-eval": Protocol(
            metric="pope_f1_score",
            source="EvolvingLMMs-Lab/lmms-eval@75571cf tasks/pope/utils.py pope_process_results, "
            "pope_aggregate_*",
            prompt=short,
            max_new_tokens=128,
            grade=exactly,
            aggregate=partial(by_f1, value=pooled_f1, of_labels=True),
            faults=(
                "an answer that is neither yes nor no, such as 'Yes.', is wrong in accuracy but "
                "left out of precision, recall and F1",
                "yes_ratio is that of the labels",
            ),
        ),
        "paper": replace(
            LLAVA,
            metric="accuracy_random",
            source="locuslab/llava-token-compression@bdedebd llava/eval/eval_pope.py, which scores "
            "the random category alone",
            aggregate=random_accuracy,
        ),
    },
)
