# SPDX-License-Identifier: Apache-2.0
"""What is asked of public benchmarks: which questions, at which V, in which view of the image."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_jax import hosts
from vlm_jax.evals import scoring
from vlm_jax.evals.task import Annotations, Protocol, Question, Task

MISSING_IMAGE = ("fail", "record")


@dataclass(frozen=True)
class Request:
    """What is evaluated: arguments of `evaluate`.

    Attributes:
      tasks: names of benchmarks; protocol: of all of them.
      annotations: the official file or folder of the one task, or a folder with a subfolder TASK
        for each.
      visual_tokens: every V that is asked for; None as trained.
      views: of asking.VIEWS.
      offset, limit: questions that are left out at the beginning, and how many follow; 0 is all.
      max_new_tokens: of an answer, if not as many as the protocol has.
      batch: rows that are answered together.
      on_missing_image: "fail" ends the command, "record" makes an error of that answer alone.
      samples: also write a log of samples as lmms-eval does.
      score: score the answers.
    """

    tasks: tuple[str, ...]
    protocol: str
    annotations: Path
    visual_tokens: tuple[int | None, ...] = (None,)
    views: tuple[str, ...] = ("",)
    offset: int = 0
    limit: int = 0
    max_new_tokens: int | None = None
    batch: int = 16
    exif: str = "apply"
    on_missing_image: str = "fail"
    samples: bool = False
    score: bool = True

    def __post_init__(self) -> None:
        for name in self.tasks:
            scoring.protocol_of(scoring.task_of(name), self.protocol)
        if self.samples and not self.score:
            raise ValueError(
                "--log-samples goes without --predict-only: a sample has the grade of its answer"
            )
        for what, values in (("--tasks", self.tasks), ("--visual-tokens", self.visual_tokens)):
            if len(set(values)) < len(values) or not values:
                raise ValueError(f"{what}={','.join(map(str, values))}: name each once")


@dataclass(frozen=True)
class Asked:
    """A task with the questions of it that are asked, and their prompts."""

    task: Task
    protocol: Protocol
    given: Annotations
    total: int  # questions in the annotations
    prompts: tuple[str, ...]

    @property
    def questions(self) -> Sequence[Question]:
        """The questions in the order of the annotations."""
        return self.given.questions


def read_tasks(request: Request) -> list[Asked]:
    """The questions of every task.

    Raises:
      OSError, ValueError: for annotations that cannot be read, and an offset beyond their end.
    """
    return [asked_of(request, name) for name in request.tasks]


def asked_of(request: Request, name: str) -> Asked:
    """The questions of one task."""
    task = scoring.task_of(name)
    protocol = scoring.protocol_of(task, request.protocol)
    given = scoring.annotations_of(task, annotations_of(request, name))
    total = len(given.questions)
    if request.offset >= total:
        raise ValueError(
            f"--offset={request.offset} is beyond the end: {name} has {total} questions in "
            f"{given.files[0]}"
        )
    end = request.offset + request.limit if request.limit else total
    some = given.questions[request.offset : end]
    if len(some) < total:
        note = f"{len(some)} of {total} questions, from position {request.offset}"
        given = replace(given, questions=some, notes=(*given.notes, note))
    return Asked(task, protocol, given, total, tuple(protocol.prompt(q) for q in some))


def annotations_of(request: Request, name: str) -> Path:
    """Where the files of a task are. Raises FileNotFoundError with the place that was tried."""
    path = request.annotations
    if (path / name).is_dir():
        return path / name
    if len(request.tasks) == 1:
        return path
    raise FileNotFoundError(
        f"--annotations={path} has no folder {name}: for several tasks give a folder with one "
        "subfolder for each, which may be links"
    )


def digest(asked: Asked) -> str:
    """A hash of the questions that are asked, in their words."""
    pairs = zip(asked.questions, asked.prompts, strict=True)
    whole = [(q.key, prompt, len(q.images)) for q, prompt in pairs]
    return hashlib.sha256(repr(whole).encode(errors="surrogatepass")).hexdigest()[:16]


def check_images(questions: Sequence[Question], task: str) -> None:
    """Raises FileNotFoundError for the first image that is not there, with their number."""
    names = {x for q in questions for x in q.images if not isinstance(x, bytes)}
    missing = sorted(str(path) for path in names if not path.exists())
    said = hosts.collected(missing[:1] and [missing[0], len(missing), len(names)])
    for found in filter(None, said):
        raise FileNotFoundError(
            f"{task}: {found[1]} of {found[2]} images are not there, the first is {found[0]}: put "
            "them there, or count their answers as failed with --on-missing-image=record"
        )
