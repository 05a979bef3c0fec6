# SPDX-License-Identifier: Apache-2.0
"""NLVR: is a sentence about three boxes of shapes true? (Suhr et al. 2017).

A question is a picture: each example comes with six orders of its boxes. Ids are the names of the
pictures without .png.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlm_jax.evals.metrics import consistency, mean
from vlm_jax.evals.readers import row_of
from vlm_jax.evals.task import (
    Aggregate,
    Annotations,
    Grade,
    Graded,
    Protocol,
    Question,
    Task,
    average,
    found,
    json_lines,
    numbered,
    question_alone,
)

ORDERS = 6
SPLITS = ("dev", "test", "train")
NAMES = (*(f"{s}/{s}.json" for s in SPLITS), *(f"{s}.json" for s in SPLITS))


def read(path: Path) -> Annotations:
    """The pictures of dev.json, test.json or train.json, six for each line."""
    path = found(path, NAMES, "nlvr")
    split, questions = path.stem, []
    for number, row in json_lines(path):
        with row_of(path, number - 1):
            folder = path.parent / "images" / str(row.get("directory", ""))
            for order in range(ORDERS):
                name = f"{split}-{row['identifier']}-{order}"
                questions.append(
                    Question(
                        id=name,
                        text=row["sentence"],
                        images=(folder / f"{name}.png",),
                        answers=(row["label"],) if "label" in row else (),
                        # The drawings of one sentence, in all orders, are not independent.
                        cluster=row["identifier"].split("-")[0],
                    )
                )
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return Annotations(numbered(questions), (path,), split)


def equal(question: Question, text: str) -> Grade:
    """1 if the answer, as the script finds it in a line `PICTURE.png,ANSWER`, is the label."""
    parsed = text.split("\n")[0].rstrip().split(",")[0].lower()
    rule = "true or false" if parsed in ("true", "false") else "neither: wrong"
    return Grade(float(parsed == question.answers[0].lower()), parsed, rule)


def aggregate(graded: Sequence[Graded]) -> Aggregate:
    """Pictures that are right (precision, as the script calls it); consistency is the share of
    sentences with all their pictures right. In percent."""
    whole = average(graded)
    sentences = consistency([u.value for u in whole.units], [u.cluster for u in whole.units])
    return replace(whole, subscores={"consistency": 100 * mean(sentences)})


TASK = Task(
    name="nlvr",
    title="NLVR, dev, 5,934 pictures of 989 examples",
    where="https://github.com/lil-lab/nlvr, folder nlvr; CC BY 4.0",
    layout="dev/dev.json, dev/images/DIRECTORY/dev-IDENTIFIER-ORDER.png",
    read=read,
    protocols={
        "official": Protocol(
            metric="precision",
            source="lil-lab/nlvr@56f4bc8 nlvr/metrics_images.py; it gives no prompt and no number "
            "of tokens",
            prompt=question_alone,
            max_new_tokens=16,
            grade=equal,
            aggregate=aggregate,
            faults=("'True.' and 'yes' are wrong; what follows a comma is not seen",),
        )
    },
    known={
        "0d312c3d7309393c0e36d286c70b884fb276819699e9f8f2bcea2854ad46537b": "NLVR dev, 989 lines",
        "9a337ac016455eebe8aef70a6e94977dbcd9e75aec56f0fb09477a9c1038528d": "NLVR test, 990 lines",
    },
)
