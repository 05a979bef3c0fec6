# SPDX-License-Identifier: Apache-2.0
"""Questions of a benchmark become rows for a model, some batches ahead of it, in threads.

I pixels of the encoder's side  V visual tokens  P patches
"""

import hashlib
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from PIL import Image

from vlm_jax import __version__, errors, hosts
from vlm_jax.data import loader
from vlm_jax.data.example import BadExample
from vlm_jax.data.pictures import Unusable, decode, one_line, read_image
from vlm_jax.evals.task import Question
from vlm_jax.serving.decoder import bucket
from vlm_jax.serving.model import VLM
from vlm_jax.serving.requests import Request, bucket_of_images

T, U = TypeVar("T"), TypeVar("U")
VIEWS = ("", "blind", "downsampled")  # what the model sees of an image: all, nothing, V patches


@dataclass(frozen=True)
class Way:
    """How a model is asked, apart from the question.

    Attributes:
      identity: hash of the weights, of what is computed with them and in which number format.
      visual_tokens: V; None as trained.
      view: one of VIEWS.
      max_new_tokens: of an answer, where the model's length has room for as many.
      exif: "apply" or "ignore" an image's EXIF orientation.
    """

    identity: str
    visual_tokens: int | None
    view: str
    max_new_tokens: int
    exif: str = "apply"


@dataclass
class Row:
    """A question as it is asked, or why it cannot be.

    Attributes:
      number: of the question, in the order of the annotations.
      request: None with an error, and its pixels without meaning in a process that does not own it.
      room: most new tokens; shortened if that is less than the benchmark allows.
      key: hash of all that the answer depends on.
      missing: whether the error is an image that is not there.
      visual_tokens: V, as that of a `Way`.
    """

    number: int
    request: Request | None = None
    room: int = 0
    shortened: bool = False
    key: str = ""
    error: str = ""
    missing: bool = False
    visual_tokens: int | None = None


class Asker:
    """Makes rows for one model; safe to use from several threads."""

    def __init__(self, model: VLM, way: Way):
        self.model, self.way = model, way
        self.images, self.lock = model.processor.images, threading.Lock()
        self.V = model.compressor.tokens if way.visual_tokens is None else way.visual_tokens
        blank = np.zeros((self.images.size,) * 2 + (3,), np.float32)
        self.unread = blank  # of another process
        self.blank = self.images.normalized(self.images.blank())
        self.side = self.images.size
        if way.view == "downsampled":
            self.side = reduced(self.images.size, self.V, model.compressor.side**2)

    def row(self, number: int, question: Question, prompt: str, *, mine: bool = True) -> Row:
        """The row of a question; images are read only if it is `mine`. Errors are in the row."""
        (row,) = rows_of([self], number, question, prompt, mine=mine)
        return row

    def request(self, question: Question, prompt: str) -> Request:
        """The tokens of a question, no image yet. Raises ValueError for what cannot be read."""
        # A tokenizer of transformers is not safe to share between threads.
        with self.lock:
            tokens = self.model.tokens(prompt, images=len(question.images))
        return Request(tokens.ids, tokens.places, tokens.questions, [], [])

    def fit(self, row: Row, request: Request) -> None:
        """Sets the room that a row has for its answer. Raises TooLong where it has none."""
        images = len(request.places)
        room = self.model.max_length - len(request.ids) - self.V * images
        row.room = min(self.way.max_new_tokens, room)
        row.shortened = row.room < self.way.max_new_tokens
        if row.room < 1:
            seen = replace(request, pixels=[self.unread] * images)
            self.model.room(seen, visual_tokens=self.way.visual_tokens)

    def see(self, request: Request, question: Question, *, mine: bool) -> None:
        """Puts the images of a question into its request. Raises as `pixels`."""
        for image in question.images:
            pixels, size = self.pixels(image) if mine else (self.unread, (1, 1))
            request.pixels.append(pixels)
            request.sizes.append(size)

    def pixels(self, image: Path | bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """An image as the encoder sees it, float32 [I, I, 3], and its width and height before that
        (`Processor.shown_size`).

        Raises:
          FileNotFoundError: if it is not there; BadExample if it cannot be decoded.
        """
        if self.way.view == "blind":
            return self.blank, (1, 1)
        picture = read(image, exif=self.way.exif)
        square = self.model.processor.square(picture)
        if self.side != self.images.size:
            small = Image.fromarray(square).resize((self.side,) * 2, Image.Resampling.BOX)
            square = np.asarray(small.resize((self.images.size,) * 2, Image.Resampling.BICUBIC))
        return self.images.normalized(square), self.model.processor.shown_size(picture)

    def key(self, request: Request, room: int) -> str:
        """The hash of all that the greedy answer to a request depends on."""
        way = self.way
        described = (
            __version__,
            jax.default_backend(),
            way.identity,
            self.V,
            room,
            tuple(map(int, self.model.processor.stop_ids)),
            request.ids,
            request.places,
            request.questions,
            len(request.pixels),
        )
        if self.model.compressor.reads == "image_size":
            described += (request.sizes,)
        found = hashlib.sha256(repr(described).encode())
        for pixels in request.pixels:
            found.update(np.ascontiguousarray(pixels))
        return found.hexdigest()

    def kept(self, request: Request) -> bool:
        """Whether a row begins with an image whose summary is kept for other questions about it.

        Processes that share a batch read their own images alone, and so read them with their rows.
        """
        return not hosts.joined() and self.model.kept(request)

    def shape(self, request: Request) -> tuple[int, ...]:
        """What the shapes of a row's computation depend on, as `batch_of` rounds them.

        Rows that are answered together share it, so that a row's company changes nothing.
        """
        if self.kept(request):
            return (bucket(len(request.ids) - len(self.model.summaries.before)),)
        reader, begins = self.model.compressor, self.model.begins(request)
        skip = len(self.model.prefix) if begins else 0
        length = len(request.ids) - skip
        images = bucket_of_images(len(request.pixels))
        if reader.reads_prefix:
            at = request.places[0] - skip if request.places else length
            return int(begins), images, bucket(at), bucket(length - at)
        last = request.places[-1] - skip + 1 if request.places else 0
        room = bucket(max(map(len, request.questions))) if reader.reads_question else 0
        return int(begins), images, bucket(max(length, last)), room


def rows_of(
    askers: Sequence[Asker], number: int, question: Question, prompt: str, *, mine: bool = True
) -> list[Row]:
    """The row of a question for each of these askers, which differ in V alone.

    They share one request: its tokens and images are read once. Errors are in the rows.
    """
    one = askers[0]
    rows = [Row(number, visual_tokens=asker.way.visual_tokens) for asker in askers]
    with told(rows):
        request = one.request(question, prompt)
        for asker, row in zip(askers, rows, strict=True):
            with told([row]):
                asker.fit(row, request)
        fit = [(asker, row) for asker, row in zip(askers, rows, strict=True) if not row.error]
        if fit:
            with told([row for _, row in fit]):
                one.see(request, question, mine=mine)
                for asker, row in fit:
                    row.request = request
                    if mine:
                        row.key = asker.key(request, row.room)
    return rows


@contextmanager
def told(rows: Sequence[Row]) -> Iterator[None]:
    """An error of the body, if it is one of a question, becomes that of these rows."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        for row in rows:
            row.request, row.error = None, errors.sentence(error)
            row.missing = isinstance(error, FileNotFoundError)


def reduced(side: int, tokens: int, patches: int) -> int:
    """The side in pixels of an image that has as many pixels as `tokens` of `patches` patches.

    The same ratio as that of `compressors/downsample`, and of VTC-Bench (arXiv 2510.07143).
    """
    return max(round(side * (tokens / patches) ** 0.5), 1)


def read(image: Path | bytes, *, exif: str) -> np.ndarray:
    """An image uint8 [H, W, 3], RGB. Raises FileNotFoundError or BadExample."""
    if isinstance(image, bytes):
        try:
            return decode(io.BytesIO(image), exif=exif)
        except Unusable as error:
            reason = str(error)
        except Exception as error:  # each decoder has its own
            reason = f"cannot be decoded: {one_line(error)}"
        raise BadExample(f"the image in the annotations {reason}")
    if not os.path.lexists(image):
        raise FileNotFoundError(f"there is no image {image}")
    return read_image(str(image), "", "replace the file", exif=exif)


def ahead(work: Callable[[U], T], items: Iterable[U], depth: int) -> Iterator[T]:
    """`work` of each item in order, up to `depth` items ahead of what is taken."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Shares:
    """Which rows of a batch, and so which questions, a process reads images for.

    Processes whose devices hold the same rows are one share. `rows` has the rows of each share.
    """

    def __init__(self, mesh: jax.sharding.Mesh, batch: int):
        every = hosts.collected([int(i) for i in loader.local_rows(mesh, batch)])
        kinds = sorted({tuple(rows) for rows in every})
        # Where rows are divided in another way, every process reads everything.
        divided = sorted(i for rows in kinds for i in rows) == list(range(batch))
        self.rows = kinds if divided else [tuple(range(batch))]
        self.mine = kinds.index(tuple(every[jax.process_index()])) if divided else 0
        self.speakers = [
            every.index(list(rows)) if divided else 0 for rows in self.rows
        ]  # of each share its first process

    def owns(self, number: int) -> bool:
        """Whether this process reads the images of a question."""
        return number % len(self.rows) == self.mine

    def agreed(self, rows: list[Row]) -> None:
        """Completes rows by what the processes that own them found out."""
        if not hosts.joined():
            return
        said = hosts.collected([[row.key, row.error, row.missing] for row in rows])
        for k, row in enumerate(rows):
            row.key, row.error, row.missing = said[self.speakers[row.number % len(self.rows)]][k]
