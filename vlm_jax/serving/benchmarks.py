# SPDX-License-Identifier: Apache-2.0
"""Answers the questions of public benchmarks with one model, and scores the answers.

For each task, V and view one file of answers (`answer_files.py`); the images of a task are encoded
once for all V. The same command continues where the last one ended.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import PurePath
from typing import Any

import jax

from vlm_jax import errors, files, hosts, preemption, progress
from vlm_jax.evals import scoring
from vlm_jax.evals.metrics import mean
from vlm_jax.models.vlm import parameters
from vlm_jax.serving import answer_files
from vlm_jax.serving.answer_cache import AnswerCache
from vlm_jax.serving.answer_files import AnswerFile

# Callers of this file need what they ask.
from vlm_jax.serving.asked import Asked as Asked
from vlm_jax.serving.asked import Request as Request
from vlm_jax.serving.asked import check_images, digest
from vlm_jax.serving.asked import read_tasks as read_tasks
from vlm_jax.serving.asking import Asker, Row, Way, ahead, rows_of
from vlm_jax.serving.greedy import Greedy, described
from vlm_jax.serving.model import VLM, placed
from vlm_jax.training import fingerprint, runs
from vlm_jax.training.workdir import lock
from vlm_jax.weights import folder
from vlm_jax.weights.processors import processor_of

COUNTED = 2000


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


def evaluate(
    model: VLM, identity: str, request: Request, tasks: Sequence[Asked], out: PurePath,
    *, model_id: str, cache: AnswerCache | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Answers and scores; yields what each file of answers has, once it is written.

    All V of a task and view are answered in one pass, in which an image is encoded once for all.

    Args:
      tasks: as `read_tasks` gives them.
      out: the folder of the files; model_id: the name of the model in them.
    Raises:
      ValueError: for a V that the model does not support, answers of other settings in the folder,
        and a benchmark of which nothing could be answered.
      FileNotFoundError: for a missing image, unless request.on_missing_image is "record".
    """
    for V in request.visual_tokens:
        model.check_tokens(V)
    hosts.check_same("questions", [digest(asked) for asked in tasks])
    with lock(out, "answers to benchmarks"):
        for asked, view in product(tasks, request.views):
            most = request.max_new_tokens or asked.protocol.max_new_tokens
            ways = [Way(identity, V, view, most, request.exif) for V in request.visual_tokens]
            # An image that is reduced to V patches is another one at each V.
            passes = [[way] for way in ways] if view == "downsampled" else [ways]
            for some in passes:
                files_of_pass = [Answers(model, way, request, asked, out) for way in some]
                about = answer_all(files_of_pass, request, asked, model_id, cache)
                for one in files_of_pass:
                    yield one.reported(request, asked, about | {"label": model_id})


class Answers:
    """One file of answers that is made.

    Attributes:
      missing: the numbers of the questions without a line when it was opened. shortened: answers
        with less room than the task allows. hits, damaged: of the cache.

    Raises:
      ValueError: for answers of other settings in the folder, and a view that shows all.
    """

    def __init__(self, model: VLM, way: Way, request: Request, asked: Asked, out: PurePath):
        self.asker = asker = Asker(model, way)
        if way.view == "downsampled" and asker.side == model.processor.images.size:
            raise ValueError(
                f"--downsample: {asker.V} visual tokens of {asker.V} patches need no smaller "
                "image; leave it out, or ask for fewer with --visual-tokens"
            )
        self.settings = dict(
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
        self.file = AnswerFile(out, name, asked.task)
        self.file.open(self.settings, [q.key for q in asked.questions])
        lines = self.file.lines
        self.missing = {i for i, q in enumerate(asked.questions) if q.key not in lines}
        self.shortened = self.hits = self.damaged = 0

    def reported(self, request: Request, asked: Asked, about: dict[str, Any]) -> dict[str, Any]:
        """What the file has, all questions being in it: it is put in order, scored and written.

        `about` is said of the pass that made it.
        """
        rows = [self.file.lines[q.key] for q in asked.questions]
        failed = [row for row in rows if "error" in row]
        report: dict[str, Any] = dict(
            file=str(self.file.path),
            settings=self.settings,
            **columns(self.asker, asked, rows),
            questions=len(rows),
            failed=len(failed),
            errors=[row["error"] for row in failed[:3]],
            shortened=self.shortened,
            answered_before=len(rows) - len(self.missing),
            cache_hits=self.hits,
            cache_damaged=self.damaged,
            **about,
        )
        finish(request, asked, self.file, rows, report)
        return report


def answer_all(
    open_files: Sequence[Answers], request: Request, asked: Asked, model_id: str,
    cache: AnswerCache | None,
) -> dict[str, Any]:  # fmt: skip
    """Answers what these files do not have yet, which differ in V; what is said of the pass."""
    then = time.perf_counter()
    by_v = {one.asker.way.visual_tokens: one for one in open_files}
    unfinished = [one for one in open_files if one.missing] or [open_files[0]]
    greedy = Greedy([one.asker for one in unfinished], batch=request.batch, cache=cache)
    todo = sorted(set[int]().union(*(one.missing for one in open_files)))

    def work(number: int) -> list[Row]:
        askers = [one.asker for one in unfinished if number in one.missing]
        question, prompt = asked.questions[number], asked.prompts[number]
        return rows_of(askers, number, question, prompt, mine=greedy.shares.owns(number))

    def check(row: Row) -> None:
        if row.missing and request.on_missing_image == "fail":
            raise FileNotFoundError(
                f"{asked.task.name}, question {asked.questions[row.number].key}: {row.error}: put "
                "it there, or count the answer as failed with --on-missing-image=record"
            )

    if request.on_missing_image == "fail" and unfinished[0].asker.way.view != "blind":
        check_images([asked.questions[i] for i in todo if greedy.shares.owns(i)], asked.task.name)
    paths = " and ".join(str(one.file.path) for one in open_files)
    kept = f"{paths} {'has' if len(open_files) == 1 else 'have'} the answers so far, the same "
    kept += "command continues"
    names = ", ".join(one.file.name for one in open_files)
    with ExitStack() as stack:
        task = stack.enter_context(
            progress.doing(f"answers to {names}", len(asked.questions) * len(open_files))
        )
        lines = {V: stack.enter_context(one.file.adding()) for V, one in by_v.items()}
        for some_lines in lines.values():
            stack.enter_context(preemption.keeping(kept, some_lines.save))
        task.note(sum(len(one.file.lines) for one in open_files))
        for some in greedy.answers(ahead(work, todo, 2 * greedy.batch), check):
            for row, said in some:
                one, question = by_v[row.visual_tokens], asked.questions[row.number]
                one.shortened += row.shortened and said is not None
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
                lines[row.visual_tokens].add(question.key, line)
            task.note(sum(len(one.file.lines) for one in open_files))
            preemption.point(kept)
    for V, one in by_v.items():
        one.hits, one.damaged = greedy.hits[V], greedy.damaged[V]
    seconds = time.perf_counter() - then
    made = sum(len(one.missing) for one in open_files)
    return dict(
        together=[one.asker.V for one in unfinished],
        seconds=round(seconds, 3),
        questions_per_second=round(made / seconds, 2),
    )


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
