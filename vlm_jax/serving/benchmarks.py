# SPDX-License-Identifier: Apache-2.0
"""Answers the questions of public benchmarks with one model, and scores the answers.

For each task, V and view one file of answers (`answer_files.py`). The same command continues where
the last one ended.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path, PurePath
from typing import Any

import jax

from vlm_jax import errors, files, hosts, preemption, progress
from vlm_jax.evals import scoring
from vlm_jax.evals.metrics import mean
from vlm_jax.evals.task import Annotations, Protocol, Question, Task
from vlm_jax.models.vlm import parameters
from vlm_jax.serving import answer_files
from vlm_jax.serving.answer_cache import AnswerCache
from vlm_jax.serving.answer_files import AnswerFile
from vlm_jax.serving.asking import Asker, Row, Way, ahead
from vlm_jax.serving.greedy import Greedy, described
from vlm_jax.serving.model import VLM, placed
from vlm_jax.training import fingerprint, runs
from vlm_jax.training.workdir import lock
from vlm_jax.weights import folder
from vlm_jax.weights.processors import processor_of

COUNTED = 2000
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


def opened(
    path: str | PurePath,
    *,
    dtype: str | None,
    mesh: jax.sharding.Mesh,
    pruning: str | None = None,
) -> tuple[VLM, str]:
    """The model of a folder, and a hash of its weights, of what is computed with them and in which
    number format. Raises as `VLM.from_checkpoint` does."""
    stored: folder.Model = runs.read(path, "--workdir").pruned(pruning)
    with jax.set_mesh(mesh):
        processor = processor_of(stored)
        model = placed(stored, dtype)
        weights = fingerprint.of_weights(model)
    about = (weights, stored.size(), dtype or stored.dtype())
    identity = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return VLM(model, processor, max_length=stored.facts["max_length"], mesh=mesh), identity


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


def evaluate(
    model: VLM, identity: str, request: Request, tasks: Sequence[Asked], out: PurePath,
    *, model_id: str, cache: AnswerCache | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Answers and scores; yields what each file of answers has, once it is written.

    Args:
      tasks: as `read_tasks` gives them.
      out: the folder of the files; model_id: the name of the model in them.
    Raises:
      ValueError: for a V that the model does not support, answers of other settings in the folder,
        and a benchmark of which nothing could be answered.
      FileNotFoundError: for a missing image, unless request.on_missing_image is "record".
    """
    for V in request.visual_tokens:
        if V not in (None, model.compressor.tokens) or model.compressor.adaptive and V:
            model.decoder.model.at(V)
    hosts.check_same("questions", [digest(asked) for asked in tasks])
    with lock(out, "answers to benchmarks"):
        for asked, V, view in product(tasks, request.visual_tokens, request.views):
            most = request.max_new_tokens or asked.protocol.max_new_tokens
            way = Way(identity, V, view, most, request.exif)
            yield one_file(model, way, request, asked, out, model_id=model_id, cache=cache)


def digest(asked: Asked) -> str:
    """A hash of the questions that are asked, in their words."""
    pairs = zip(asked.questions, asked.prompts, strict=True)
    whole = [(q.key, prompt, len(q.images)) for q, prompt in pairs]
    return hashlib.sha256(repr(whole).encode(errors="surrogatepass")).hexdigest()[:16]


def one_file(
    model: VLM, way: Way, request: Request, asked: Asked, out: PurePath,
    *, model_id: str, cache: AnswerCache | None,
) -> dict[str, Any]:  # fmt: skip
    """Answers what one file does not have yet, and scores it; what it has then."""
    asker = Asker(model, way)
    if way.view == "downsampled" and asker.side == model.processor.images.size:
        raise ValueError(
            f"--downsample: {asker.V} visual tokens of {asker.V} patches need no smaller image; "
            "leave it out, or ask for fewer with --visual-tokens"
        )
    settings = dict(
        task=asked.task.name,
        protocol=request.protocol,
        questions=digest(asked),
        offset=request.offset,
        limit=request.limit,
        model=way.identity,
        visual_tokens=asker.V,
        view=way.view or "whole image",
        image_side=asker.side,
        max_new_tokens=way.max_new_tokens,
        exif=way.exif,
    )
    name = answer_files.name_of(
        asked.task.name,
        request.protocol,
        visual_tokens=way.visual_tokens,
        view=way.view,
        offset=request.offset,
        limit=request.limit,
    )
    keys = [q.key for q in asked.questions]
    file = AnswerFile(out, name, asked.task)
    file.open(settings, keys)
    before = len(file.lines)
    hits, damaged = (cache.hits, cache.damaged) if cache else (0, 0)
    then = time.perf_counter()
    with progress.doing(f"answers to {name}", len(keys)) as task:
        task.note(before)
        shortened = answer_all(asker, request, asked, file, task.note, model_id, cache)
    seconds = time.perf_counter() - then
    rows = [file.lines[key] for key in keys]
    failed = [row for row in rows if "error" in row]
    report: dict[str, Any] = dict(
        file=str(file.path),
        settings=settings,
        **columns(asker, asked, rows),
        label=model_id,
        questions=len(rows),
        failed=len(failed),
        errors=[row["error"] for row in failed[:3]],
        shortened=shortened,
        answered_before=before,
        cache_hits=(cache.hits - hits) if cache else 0,
        cache_damaged=(cache.damaged - damaged) if cache else 0,
        seconds=round(seconds, 3),
        questions_per_second=round((len(rows) - before) / seconds, 2),
    )
    finish(request, asked, file, rows, report)
    return report


def columns(asker: Asker, asked: Asked, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """N (billions of parameters of the LLM), V of an image and Q, the mean text tokens of a prompt,
    as `vlm-jax fit` reads them. Q is that of up to COUNTED questions, spread over the file."""
    V = float(asker.V)
    if asker.model.compressor.adaptive:  # what its images had, of so many slots
        pairs = zip(asked.questions, rows, strict=True)
        seen = [(q, r["metadata"]) for q, r in pairs if q.images and "error" not in r]
        used = [about["visual_tokens"] / len(q.images) for q, about in seen]
        V = mean(used) if used else V
    lengths = []
    step = -(-len(asked.questions) // COUNTED)
    for question, prompt in zip(asked.questions[::step], asked.prompts[::step], strict=True):
        with contextlib.suppress(ValueError):  # such a question has its error in its line
            tokens = asker.model.tokens(prompt, images=len(question.images))
            lengths.append(float(len(tokens.ids)))
    N = parameters(asker.model.decoder.model.llm) / 1e9
    return dict(N=N, V=V) | (dict(Q=mean(lengths)) if lengths else {})


def answer_all(
    asker: Asker, request: Request, asked: Asked, file: AnswerFile,
    note: Callable[[int], None], model_id: str, cache: AnswerCache | None,
) -> int:  # fmt: skip
    """Answers the questions without a line; how many have less room for it than the task allows."""
    greedy = Greedy(asker, batch=request.batch, cache=cache)
    todo = [i for i, q in enumerate(asked.questions) if q.key not in file.lines]
    shortened = 0

    def work(number: int) -> Row:
        mine = greedy.shares.owns(number)
        return asker.row(number, asked.questions[number], asked.prompts[number], mine=mine)

    def check(row: Row) -> None:
        if row.missing and request.on_missing_image == "fail":
            raise FileNotFoundError(
                f"{asked.task.name}, question {asked.questions[row.number].key}: {row.error}: put "
                "it there, or count the answer as failed with --on-missing-image=record"
            )

    if request.on_missing_image == "fail" and asker.way.view != "blind":
        check_images([asked.questions[i] for i in todo if greedy.shares.owns(i)], asked.task.name)
    kept = f"{file.path} has the answers so far, the same command continues"
    with file.adding() as lines, preemption.keeping(kept, lines.save):
        for some in greedy.answers(ahead(work, todo, 2 * greedy.batch), check):
            for row, said in some:
                question = asked.questions[row.number]
                shortened += row.shortened and said is not None
                line = answer_files.answer_line(
                    question,
                    asked.prompts[row.number],
                    task=asked.task,
                    answer_id=row.key[:22] or answer_files.sha(question.key)[:22],
                    model_id=model_id,
                    metadata={} if said is None else described(said),
                    text=None if said is None else greedy.text(said),
                    error=row.error,
                )
                lines.add(question.key, line)
            note(len(file.lines))
            preemption.point(kept)
    return shortened


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


def finish(
    request: Request, asked: Asked, file: AnswerFile, rows: list[dict[str, Any]],
    report: dict[str, Any],
) -> None:  # fmt: skip
    """Scores the answers, and writes what is known of them; the writer does it for all."""
    if count := report["cache_damaged"]:
        progress.say(
            f"{file.name}: {count} entries of --cache were damaged, and their questions answered"
        )
    if failed := report["failed"]:
        progress.say(
            f"{file.name}: {failed} of {len(rows)} questions were not answered, the first: "
            f"{report['errors'][0]}"
        )
    report |= hosts.from_writer(lambda: written(request, asked, file, report))
    if why := report.get("not_scored"):
        progress.say(f"{file.name} has no score: {why}")
    if failed == len(rows):
        raise ValueError(
            f"{file.path}: none of {len(rows)} questions was answered, the first because "
            f"{report['errors'][0]}"
        )


def written(
    request: Request, asked: Asked, file: AnswerFile, report: dict[str, Any]
) -> dict[str, Any]:
    """Puts the lines in order, scores them, and writes the other files; what the score says."""
    file.finish([q.key for q in asked.questions])
    found: dict[str, Any] = {}
    scored = None
    if request.score:
        scored, why = score_of(request, asked, file)
        found["score"] = None if scored is None else scored.described
        found |= {"not_scored": why} if why else {}
    if scored is not None:
        for note in scoring.old_files(scored.described["files"]):
            progress.say(f"{file.name}: {note}")
    if request.samples and scored is not None:
        target = file.folder / f"{file.name}_samples_{asked.task.name}.jsonl"
        logged = answer_files.samples(scored, request.offset)
        files.write_text(target, "".join(line + "\n" for line in logged))
    files.write_json(file.about, report | found)
    return found


def score_of(request: Request, asked: Asked, file: AnswerFile) -> tuple[scoring.Scored | None, str]:
    """The score of a file, or why it has none."""
    if any(not q.answers for q in asked.questions):
        return None, "some questions have no answer in the annotations, as in a test split"
    try:
        given = (asked.task, request.protocol, files.on_disk(file.path), asked.given)
        return scoring.score_given(*given), ""
    except (ValueError, ArithmeticError, LookupError) as error:
        # Some of the questions may miss a group that the number is made of.
        if len(asked.questions) == asked.total:
            raise
        some = f"{len(asked.questions)} of {asked.total} questions"
        return None, f"{some} have none: {errors.sentence(error)}"


def shown(report: dict[str, Any]) -> str:
    """A report in one line of JSON."""
    return json.dumps(report)
