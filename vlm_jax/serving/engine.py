# SPDX-License-Identifier: Apache-2.0
"""An engine answers requests from many threads with one model; one thread of its own owns JAX.

    engine = Engine(VLM.from_checkpoint("models/llava"), slots=8, queue=64, index_bytes=10**9)
    engine.warm()
    for event in engine.submit(Ask("What is this?", (engine.pixels("cat.jpg"),))):
        ...  # Piece, Piece, ..., Answer

Requests join and leave between two tokens. docs/engine.md says how, and what can be relied on.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from vlm_jax import arguments, errors, hosts
from vlm_jax import mesh as meshes
from vlm_jax.data.processor import Tokens
from vlm_jax.serving.answering import Answering
from vlm_jax.serving.decoder import Sampling, check_drawing
from vlm_jax.serving.index import BLOCK, Index, handle_of
from vlm_jax.serving.layout import Layout
from vlm_jax.serving.model import VLM
from vlm_jax.serving.programs import Programs
from vlm_jax.serving.reading import CHUNKS, InParts, Reader, slots_of
from vlm_jax.serving.requests import Picture, Prompt, Request, TooLong, picture
from vlm_jax.serving.row import GREEDY, Image, Row
from vlm_jax.serving.schedule import Job, Schedule
from vlm_jax.serving.slots import Pool, ladder
from vlm_jax.serving.tickets import MOST_LIKELIEST, Ask, Closed, Event, Full, Shown, Stats, Ticket
from vlm_jax.serving.whole import Whole
from vlm_jax.serving.words import Words
from vlm_jax.training import fingerprint

SHORTEST = 256  # tokens of the shortest rows, if the model's are longer
SHORTEST_TEXT = 64  # for which a model that reads a prompt whole has a program


def lengths_of(longest: int) -> tuple[int, ...]:
    """Lengths of rows for a model of this length: each four times the one before."""
    return ladder(SHORTEST, longest)


def refusal(model: VLM) -> str:
    """Why no engine can answer with a model; "" if one can."""
    if hosts.joined() or meshes.batch_shards(model.mesh) > 1:
        return (
            "an engine is one process with the devices on the mesh's tensor axis (--mesh=tensor=N),"
            " or one device: start one for each replica"
        )
    if model.compressor.reads_prefix and not model.decoder.model.reads_in_parts:
        return (
            "compressor.query='prefix' compresses an image by the text before it, in a pass that "
            "pruning.kind would prune: an engine does one of them; set pruning.kind='none', train "
            "with compressor.query='separate', or use VLM.generate"
        )
    return ""


def reader_of(
    model: VLM, programs: Programs, index: Index, *, slots: Sequence[int], length: int,
    chunks: Sequence[int] | None,
) -> Reader:  # fmt: skip
    """What reads the rows of a model, at most `length` tokens each; arguments as of `Engine`."""
    processor, reader = model.processor, model.decoder.model.compressor
    of_clip = reader.method.query == "clip"
    shared: dict[str, Any] = dict(
        slots=slots,
        width=model.width,
        questions=processor.text_places if of_clip else model.max_length,
    )
    if model.decoder.model.reads_in_parts:
        return InParts(programs, index, reader, chunks=sorted(chunks or CHUNKS), **shared)
    sizes = chunks or ladder(SHORTEST_TEXT, length)
    sizes = sorted({*(size for size in sizes if size < length), length})
    return Whole(programs, index, reader, sizes=sizes, length=length, **shared)


class Engine:
    """Answers requests of one model.

    Args:
      model: one without a `refusal`; nobody else uses it meanwhile.
      slots: most requests that are answered together.
      queue: most that wait for a slot.
      index_bytes: most bytes of the image index; 0 keeps nothing.
      lengths: of the rows in which requests are answered, in tokens read and new: each is answered
        in the shortest that holds it. Default: 256, 1024 ... and the model's.
      chunks: tokens of a row that are read between two steps of the others: the largest, then those
        in which the rest is read soonest. Default: 16, 64 and 128. Where a model reads prompts
        whole, the sizes to which their text is padded. Default: 64, 256 ... and the longest rows'.
      visual_tokens: V that may be asked for of a compressor that has a program for every V, besides
        those that a plan searches. Of others all their V may be.
    Raises:
      ValueError: for a model that no engine can answer with, and a V that it does not serve.
    """

    def __init__(
        self,
        model: VLM,
        *,
        slots: int,
        queue: int,
        index_bytes: int,
        lengths: Sequence[int] | None = None,
        chunks: Sequence[int] | None = None,
        visual_tokens: Sequence[int] = (),
    ):
        if why := refusal(model):
            raise ValueError(why)
        slots = arguments.whole_number("slots", slots)
        self.model = model
        self.queue = arguments.whole_number("queue", queue)
        self.index = Index(arguments.whole_number("index_bytes", index_bytes, least=0))
        read = model.decoder.model
        about = fingerprint.of_weights(read), read.compressor.method, read.llm.dtype
        self.identity = hashlib.sha256(repr(about).encode()).hexdigest()
        if chunks is not None:
            chunks = [arguments.whole_number("chunks", size) for size in chunks]
        compiled = slots_of(read.compressor, visual_tokens)
        self.layout = Layout.of(read, max(compiled))
        self.programs = Programs(read, model.mesh, self.layout)
        longest = model.max_length
        # Longer than the model's rows only where those are shorter than a block.
        held = {
            max(min(arguments.whole_number("lengths", length), longest), BLOCK)
            for length in lengths or lengths_of(longest)
        }
        self.reader = reader_of(
            model, self.programs, self.index, slots=compiled, length=max(held), chunks=chunks
        )
        pools = [Pool(self.programs, length=length, slots=slots) for length in sorted(held)]
        self.words = Words(model.processor.tokenizer)
        self.schedule = Schedule(self.reader, pools, self.words)
        self.arrived: list[Job] = []
        self.warming: list[Future] = []
        self.changed = threading.Condition()
        self.idle = True  # nothing was taken that is not answered
        self.closed = ""  # why nothing more is taken
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    # --- From any thread --------------------------------------------------------------------------

    def warm(self) -> None:
        """Compiles every program, so that no request waits for one; first answers who is running.

        Raises:
          Closed: after `drain`.
        """
        done: Future = Future()
        with self.changed:
            if self.closed:
                raise Closed(self.closed)
            self.warming.append(done)
            self.changed.notify_all()
        done.result()

    def pixels(self, image: Picture, *, exif: str = "apply") -> Shown:
        """An image as the encoder reads it.

        Raises:
          ValueError, OSError: if it cannot be read.
        """
        seen, processor = picture(image, exif=exif), self.model.processor
        return Shown(processor.pixels(seen), processor.shown_size(seen))

    def tokens(self, prompt: Prompt, *, images: int, system: str | None = None) -> Tokens:
        """The tokens of a prompt about this many images, after the text of a `system` message.

        Raises:
          ValueError: for a prompt that the model cannot read.
        """
        with self.words.lock:
            return self.model.tokens(prompt, images=images, system=system)

    def submit(self, ask: Ask, listener: Callable[[Event], None] | None = None) -> Ticket:
        """Takes a request.

        Raises:
          ValueError: if it cannot be answered, with the numbers; `TooLong` for one that does not
            fit, `Gone` for an unknown handle.
          Full: if the queue is. Closed: after `drain`.
        """
        with self.changed:
            self._check_open()  # before the work that a refusal should not cost
        job = self.job(ask, Ticket(listener))
        with self.changed:
            self._check_open()
            self.arrived.append(job)
            self.idle = False
            self.changed.notify_all()
        return job.ticket

    def _check_open(self) -> None:
        if self.closed:
            raise Closed(self.closed)
        waiting = len(self.arrived) + len(self.schedule.waiting)
        # Those for whom a slot is free wait for their turn to be read, not in the queue.
        if waiting + self.schedule.running >= self.schedule.slots + self.queue:
            raise Full(waiting)

    def job(self, ask: Ask, ticket: Ticket) -> Job:
        """A request with its tokens and images. Raises as `submit` does."""
        now, model = time.monotonic(), self.model
        if ask.logprobs is not None:
            arguments.whole_number("logprobs", ask.logprobs, least=0, most=MOST_LIKELIEST)
        if "" in ask.stop:
            raise ValueError("stop='': a stop string has at least one character")
        check_drawing(ask.max_new_tokens, ask.temperature, ask.top_p, ask.seed)
        model.check_tokens(ask.visual_tokens)
        tokens, V = ask.prompt, ask.visual_tokens
        if not isinstance(tokens, Tokens):
            tokens = self.tokens(tokens, images=len(ask.images))
        if len(tokens.places) != len(ask.images):
            raise ValueError(f"{len(ask.images)} images and {len(tokens.places)} places for them")
        if self.reader.one_image and len(ask.images) > 1:
            raise ValueError(
                f"{len(ask.images)} images, and a row of this model has one: ask about one image "
                "at a time"
            )
        unread = [np.zeros(0, np.float32)] * len(ask.images)
        request = Request(tokens.ids, tokens.places, tokens.questions, unread)
        room = model.room(request, new_tokens=ask.max_new_tokens, visual_tokens=V)
        V = model.compressor.tokens if V is None else V
        self._check_compiled(V)
        images = [
            self.image(one, question, V)
            for one, question in zip(ask.images, tokens.questions, strict=False)
        ]
        sampling = Sampling(
            np.full(1, ask.temperature, np.float32),
            np.full(1, ask.top_p, np.float32),
            np.full(1, ask.seed, np.uint32),
        )
        row = Row(tokens.ids, tokens.places, images, sampling)
        asked = [len(image.question) for image in images if image.question is not None]
        if not self.reader.asks_in_rows:
            self._check_questions(asked)
            asked = []
        held = self.schedule.pools[-1].length
        read = len(row.text) + sum(self.layout.held(image.limit) for image in images)
        if ask.max_new_tokens is None:
            room = max(min(room, held - read), 1)
        longest = max([read + room, *asked])
        if longest > held:
            raise TooLong(
                f"{len(row.text)} tokens of text, {read - len(row.text)} of images and up to "
                f"{room} of the answer: this engine's rows have {held} at most; lower "
                "max_new_tokens, or shorten the prompt"
            )
        answering = Answering(
            self.words, stop_ids=model.processor.stop_ids, stop=ask.stop, room=room
        )
        return Job(ask, ticket, row, answering, longest, now)

    def _check_questions(self, lengths: Sequence[int]) -> None:
        most = self.reader.questions[-1]
        if max(lengths, default=0) > most:
            raise TooLong(
                f"a question of {max(lengths)} tokens, and the compressor reads {most} of them: "
                "shorten the question"
            )

    def _check_compiled(self, visual_tokens: int) -> None:
        reader, compiled = self.reader.compressor, self.reader.slots
        if reader.buckets and reader.slots(visual_tokens) not in compiled:
            raise ValueError(
                f"visual_tokens={visual_tokens}: this engine is compiled for "
                f"{', '.join(map(str, compiled))}; ask for one of these, or start it with others"
            )

    def image(
        self, image: Shown | np.ndarray | str, question: list[int], visual_tokens: int
    ) -> Image:
        """An image of a request, of its pixels or its handle."""
        shown = image if isinstance(image, (Shown, str)) else Shown(image)
        if isinstance(shown, Shown):
            self._check_pixels(shown.pixels)
        if shown is not image and self.reads_size:
            raise ValueError(
                "this model's compressor reads the size that an image had before it was padded: "
                "take it from Engine.pixels"
            )
        handle = shown if isinstance(shown, str) else ""
        if isinstance(shown, Shown):
            by = f"{self.identity} {shown.size}" if self.reads_size else self.identity
            handle = handle_of(by, shown.pixels)
        return Image.of(
            handle,
            None if isinstance(shown, str) else shown,
            question,
            compressor=self.reader.compressor,
            visual_tokens=visual_tokens,
            index=self.index,
        )

    @property
    def reads_size(self) -> bool:
        """Whether the tokens of an image depend on its width and height before it was padded."""
        return self.reader.compressor.reads == "image_size"

    def _check_pixels(self, pixels: np.ndarray) -> None:
        side = self.model.processor.images.size
        if (pixels.shape, pixels.dtype) != ((side, side, 3), np.float32):
            raise ValueError(
                f"an image is float32 [{side}, {side}, 3], not {pixels.dtype}{list(pixels.shape)}: "
                "take it from Engine.pixels"
            )

    def drain(self, seconds: float | None = None) -> bool:
        """Refuses new requests and answers those that were taken, at most for `seconds`.

        Those that are not finished then are cancelled. Returns whether all were answered.
        """
        with self.changed:
            self.closed = self.closed or "this engine is draining: it takes no more requests"
            self.changed.notify_all()
            if self.changed.wait_for(lambda: self.idle, seconds):
                return True
            self.schedule.stopping = True
            self.changed.wait_for(lambda: self.idle)
            return False

    def stats(self) -> Stats:
        """What it does now, and has done."""
        now = self.schedule
        with self.changed:
            return Stats(
                queued=len(self.arrived) + len(now.waiting),
                running=now.running,
                slots=now.slots,
                queue=self.queue,
                answered=now.answered,
                failed=now.failed,
                new_tokens=now.new_tokens,
                read_tokens=self.reader.read_tokens,
                compiled=self.programs.compiled,
                index=self.index.stats(),
            )

    # --- On the thread that owns JAX --------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self.changed:
                self.idle = not (self.arrived or self.schedule.busy)
                self.changed.notify_all()
                self.changed.wait_for(lambda: not self.idle or self.warming or self.closed)
                if self.idle and not self.warming:
                    return
                self.schedule.waiting.extend(self.arrived)
                self.arrived.clear()
            if self.warming and not self.schedule.running:
                done = self.warming.pop()
                try:
                    done.set_result(self._warm())
                except Exception as error:
                    done.set_exception(error)
            try:
                self.schedule.turn()
            except Exception as error:  # nobody may wait for a thread that has ended
                with self.changed:
                    self.closed = f"this engine has failed: {errors.sentence(error)}"
                    self.schedule.waiting.extend(self.arrived)
                    self.arrived.clear()
                self.schedule.fail(error)

    def _warm(self) -> None:
        reader, blank = self.reader, self.model.processor.images.blank()
        shown = Shown(self.model.processor.images.normalized(blank))
        for pool in self.schedule.pools:
            read = reader.warm(pool.length, shown)
            pool.warm(lambda: pool.join(object(), read, 1, GREEDY), reader.block)  # noqa: B023
        reader.reset()
