# SPDX-License-Identifier: Apache-2.0
"""Checks a data set before it is trained on: every row, every image, the length of every text."""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vlm_jax import progress
from vlm_jax.data.clip_facts import clip_facts
from vlm_jax.data.clips import Frame
from vlm_jax.data.example import Example
from vlm_jax.data.findings import FINDINGS, NOTES, Report
from vlm_jax.data.image_facts import ImageFacts, image_facts
from vlm_jax.data.images import Preparation
from vlm_jax.data.pictures import Place
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.skips import Skip, Skips
from vlm_jax.data.tokenizer import load_tokenizer

IMAGES_AT_ONCE, TEXTS_AT_ONCE = 64, 256  # of a task for a worker


@runtime_checkable
class Checked(Protocol):
    """A source whose images have places: `Llava` and `Tars`."""

    left_out: Skips
    images: Any
    sha256: str
    repeated_ids: int
    missing_ids: int
    leading_answers: int
    clips: int
    short_clips: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def place(self, image: int) -> Place | Frame: ...

    def describe(self) -> dict[str, Any]: ...


class EverySkip(Skips):
    """Skips that keeps all of them, in order, with their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[int, str, Skip]] = []

    def add(self, number: int, kind: str, skip: Skip) -> None:
        self.all.append((number, kind, skip))
        super().add(number, kind, skip)


@dataclass(frozen=True)
class TextFormat:
    """What texts are measured in: tokens of a tokenizer's folder, or characters where it is "".

    `text_length` is the tokens of text that a row keeps (data.text_length), `most_images` the
    images of the largest row.
    """

    tokenizer: str = ""
    template: str = "vicuna_v1"
    text_length: int = 2048
    most_images: int = 1

    @property
    def unit(self) -> str:
        return "tokens" if self.tokenizer else "characters"

    def processor(self) -> Processor:
        """The processor of training rows. Raises OSError, ValueError for no such tokenizer."""
        rows = RowFormat(
            self.template,
            text_length=self.text_length,
            question_length=self.text_length,
            images_per_row=self.most_images,
            blind=False,
            images=Preparation(336),
        )
        return Processor(load_tokenizer(self.tokenizer), rows)


class Measured(NamedTuple):
    """The length of a text, whether a token of an answer is kept, and what is wrong with it."""

    length: int
    target: bool = True
    problem: str = ""


def check(source: Checked, texts: TextFormat, *, jobs: int = 1, whole: bool = True) -> Report:
    """What is wrong with a source, and what is worth knowing.

    Args:
      source: opened with an `EverySkip`, so that bad rows are counted, not raised.
      texts: how lengths are measured.
      jobs: processes; 1 works in this one.
      whole: read images to their end. Otherwise headers only: a damaged image may be missed, and
        `set_hash` is None.
    Raises:
      OSError, ValueError: for a tokenizer or template that does not exist.
      RuntimeError: if a worker process died.
    """
    report = Report(unit=texts.unit)
    skips = source.left_out
    every = skips.all if isinstance(skips, EverySkip) else []
    for _, kind, skip in every:
        report.add(kind, skip.image or skip.id, str(skip))
    examples = [source[i] for i in range(len(source))]
    most = max([len(e.images) // e.frames for e in examples], default=0)
    texts = replace(texts, most_images=max([len(e.images) for e in examples], default=1) or 1)
    if texts.tokenizer:
        texts.processor()  # a wrong tokenizer is an error before any image is read
    _rows(source, examples, report)
    with _Pool(jobs, texts) as run:
        places = [source.place(i) for i in range(len(source.images))]
        _images(places, report, run, whole=whole)
        _texts(examples, texts, report, run)
    missing = {skip.image for _, kind, skip in every if kind == "missing_image"}
    report.about |= {
        "rows": len(source) + len(skips),
        "usable_rows": len(source),
        "text_only_rows": sum(not e.images for e in examples),
        "turns": sum(len(e.turns) for e in examples),
        "most_images_per_row": most,
        "clips": source.clips,
        "image_files": len(places),
        "image_bytes": sum(f.size for f in report.images),
        "missing_files": len(missing),
        "rows_sha256": source.sha256,
        "set_hash": _set_hash(source, report.images) if whole else None,
        "images_read": "whole" if whole else "headers",
        "text_length": texts.text_length if texts.tokenizer else None,
    }
    return report


def _rows(source: Checked, examples: Sequence[Example], report: Report) -> None:
    """Finds repeated rows, and counts what the reader changed."""
    seen: dict[Any, str] = {}
    for example in examples:
        content = (example.image, example.turns)
        if content in seen:
            name = example.given or example.id
            report.add(
                "duplicate_row",
                name,
                f"row of id {name!r:.80} has the images and texts of that of id "
                f"{seen[content]!r:.80}",
            )
        else:
            seen[content] = example.given or example.id
        if not all(question for question, _ in example.turns):
            report.counts["empty_question"] += 1
    report.counts["repeated_id"] = source.repeated_ids
    report.counts["missing_id"] = source.missing_ids
    report.counts["leading_answer"] = source.leading_answers
    report.counts["short_clip"] = source.short_clips
    report.counts["renamed_image"] = source.describe().get("renamed_images", 0)


def _images(places: list[Place | Frame], report: Report, run: "Runner", *, whole: bool) -> None:
    tasks = _parts([(place, whole) for place in places], IMAGES_AT_ONCE)
    seen: dict[str, str] = {}
    with progress.doing("reading the images", len(places)) as task:
        task.note(0)
        for facts in run(_facts_of, tasks):
            for found in facts:
                place = places[len(report.images)]
                name = place.name or place.path
                what = "clip" if isinstance(place, Frame) else "image"
                report.images.append(found)
                for kind in found.kinds:
                    report.add(kind, name, f"{what} {name} {found.problem or _about(kind, found)}")
                if found.sha256 and seen.setdefault(found.sha256, name) != name:
                    report.add(
                        "duplicate_image",
                        name,
                        f"image {name} has the bytes of {seen[found.sha256]}",
                    )
            task.note(len(report.images))


def _about(kind: str, facts: ImageFacts) -> str:
    if kind == "wrongly_named":
        return f"is {facts.format}"
    return (
        f"is {facts.format} of {facts.width} x {facts.height}, mode {facts.mode}: "
        + (FINDINGS | NOTES)[kind]
    )


def _texts(examples: list[Example], texts: TextFormat, report: Report, run: "Runner") -> None:
    lengths: list[int] = []
    done = 0
    with progress.doing("measuring the texts", len(examples)) as task:
        task.note(0)
        for measured in run(_lengths_of, _parts(examples, TEXTS_AT_ONCE)):
            for one in measured:
                example = examples[done]
                done += 1
                name = example.given or example.id
                if one.problem:
                    report.add("untokenizable", name, one.problem)
                    continue
                lengths.append(one.length)
                if texts.tokenizer and one.length > texts.text_length:
                    report.add(
                        "over_long",
                        name,
                        f"row of id {name!r:.80} has {one.length} tokens of text, and "
                        f"--text-length={texts.text_length} are kept",
                    )
                if not one.target:
                    report.add(
                        "without_target",
                        name,
                        f"row of id {name!r:.80} has no token of an answer among its first "
                        f"{texts.text_length}",
                    )
            task.note(done)
    report.lengths = np.array(lengths, np.int64)


# Runs a function on every task, in order.
Runner = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
_worker: dict[str, Any] = {}  # what a worker process keeps between its tasks


class _Pool:
    """A Runner in `jobs` processes, or in this one."""

    def __init__(self, jobs: int, texts: TextFormat):
        self.jobs, self.texts = jobs, texts
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Runner:
        if self.jobs == 1:
            _begin(self.texts)
            return lambda function, tasks: map(function, tasks)
        self.executor = ProcessPoolExecutor(
            self.jobs,
            # A forked process could wait forever for a lock of a thread that it does not have.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self.texts,),
        )
        return self._run

    def _run(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        assert self.executor is not None
        try:
            yield from self.executor.map(function, tasks)
        except BrokenProcessPool:
            raise RuntimeError(
                f"one of {self.jobs} worker processes died, probably for want of memory: use fewer "
                "(--jobs)"
            ) from None

    def __exit__(self, *_: Any) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)
        _worker.clear()


def _begin(texts: TextFormat) -> None:
    _worker["texts"] = texts


def _facts_of(task: Sequence[tuple[Place | Frame, bool]]) -> list[ImageFacts]:
    return [
        clip_facts(place, whole=whole)
        if isinstance(place, Frame)
        else image_facts(place, whole=whole)
        for place, whole in task
    ]


def _lengths_of(examples: Sequence[Example]) -> list[Measured]:
    texts: TextFormat = _worker["texts"]
    if not texts.tokenizer:
        return [Measured(sum(len(text) for turn in e.turns for text in turn)) for e in examples]
    if "processor" not in _worker:
        _worker["processor"] = texts.processor()
    processor: Processor = _worker["processor"]
    measured = []
    for example in examples:
        try:
            tokens = processor.tokens(example, answer=True)
        except ValueError as error:
            measured.append(Measured(0, True, str(error)))
        else:
            kept = any(tokens.mask[: texts.text_length])
            measured.append(Measured(len(tokens.ids), kept))
    return measured


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _set_hash(source: Checked, images: Sequence[ImageFacts]) -> str:
    """A sha256 over the rows and the bytes of all images, in the order of the rows."""
    of_set = hashlib.sha256(source.sha256.encode())
    for facts in images:
        of_set.update(b" " + facts.sha256.encode())
    return of_set.hexdigest()
