# SPDX-License-Identifier: Apache-2.0
"""An engine answers requests from many threads with one model; one thread of it owns JAX.

engine = Engine(VLM.from_checkpoint("models/llava"), slots=8, queue=64, index_bytes=10**9)
engine.warm()
for event in engine.submit(Ask("What is this?", (engine.pixels("cat.jpg"),))):
    ...  # Piece, Piece, ..., Answer
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm_jax import arguments, errors
from vlm_jax.data.processor import Tokens
from vlm_jax.serving.model import VLM
from vlm_jax.serving.requests import Picture, Request, picture
from vlm_jax.serving.tickets import (
    MOST_LIKELIEST,
    Answer,
    Ask,
    Closed,
    Event,
    Failed,
    Full,
    Gone,
    IndexStats,
    Piece,
    Stats,
    Ticket,
    Usage,
)


@dataclass(frozen=True)
class Job:
    """A request that was taken: checked, tokenized, with the most new tokens that it may have."""

    ask: Ask
    ticket: Ticket
    request: Request
    room: int
    submitted: float


class Ended(Exception):
    """An answer ended while it was generated, with this `Finish`."""


class Engine:
    """Answers requests of one model, started by its first request.

    Args:
      model: used by no one else meanwhile.
      slots: most requests that are answered together.
      queue: most that wait.
      index_bytes: most bytes of the image index; 0 keeps none.
    """

    def __init__(self, model: VLM, *, slots: int, queue: int, index_bytes: int):
        self.model = model
        self.slots = arguments.whole_number("slots", slots)
        self.queue = arguments.whole_number("queue", queue)
        self.index_bytes = arguments.whole_number("index_bytes", index_bytes, least=0)
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.words = threading.Lock()  # a tokenizer of transformers is not for several threads
        self.closed = False
        self.running = self.answered = self.failed = self.new_tokens = self.read_tokens = 0
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def warm(self) -> None:
        """Compiles every program, so that no request waits for one."""

    def pixels(self, image: Picture, *, exif: str = "apply") -> np.ndarray:
        """An image as the encoder reads it, float32 [I, I, 3]; from any thread.

        Raises:
          ValueError, OSError: if it cannot be read.
        """
        return self.model.processor.pixels(picture(image, exif=exif))

    def tokens(self, prompt, *, images: int) -> Tokens:
        """The tokens of a prompt about this many images; from any thread.

        Raises:
          ValueError: for a prompt that the model cannot read.
        """
        with self.words:
            return self.model.tokens(prompt, images=images)

    def submit(self, ask: Ask, listener: Callable[[Event], None] | None = None) -> Ticket:
        """Takes a request; from any thread.

        Raises:
          ValueError: if it cannot be answered, with the numbers; `Gone` for an unknown handle.
          Full: if the queue is. Closed: after `drain`.
        """
        if ask.logprobs is not None:
            arguments.whole_number("logprobs", ask.logprobs, least=0, most=MOST_LIKELIEST)
        for image in ask.images:
            if isinstance(image, str):
                raise Gone(f"image {image} is not in the index: send the image")
        tokens = ask.prompt
        if not isinstance(tokens, Tokens):
            tokens = self.tokens(tokens, images=len(ask.images))
        request = Request(tokens.ids, tokens.places, tokens.questions, list(ask.images))
        room = self.model.room(
            request, new_tokens=ask.max_new_tokens, visual_tokens=ask.visual_tokens
        )
        ticket = Ticket(listener)
        with self.changed:
            if self.closed:
                raise Closed("this engine takes no more requests")
            if len(self.waiting) >= self.queue:
                raise Full(len(self.waiting))
            self.waiting.append(Job(ask, ticket, request, room, time.monotonic()))
            self.changed.notify_all()
        return ticket

    def drain(self, seconds: float | None = None) -> bool:
        """Refuses new requests and answers those that were taken, at most for `seconds`.

        Those that are not finished then are cancelled. Returns whether all were answered.
        """
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            return self.changed.wait_for(lambda: not self.waiting and not self.running, seconds)

    def stats(self) -> Stats:
        """What it does now; from any thread."""
        with self.changed:
            return Stats(
                queued=len(self.waiting),
                running=self.running,
                slots=self.slots,
                queue=self.queue,
                answered=self.answered,
                failed=self.failed,
                new_tokens=self.new_tokens,
                read_tokens=self.read_tokens,
                compiled=0,
                index=IndexStats(limit=self.index_bytes),
            )

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if not self.waiting:
                    return
                job, self.running = self.waiting.popleft(), 1
            try:
                event: Event = self._answer(job)
                with self.changed:
                    self.answered += 1
            except Exception as error:
                event = Failed(errors.sentence(error))
                with self.changed:
                    self.failed += 1
            job.ticket.tell(event)
            with self.changed:
                self.running = 0
                self.changed.notify_all()

    def _answer(self, job: Job) -> Answer:
        ask, text, finish = job.ask, "", None
        first: float | None = None

        def on_text(_: int, piece: str) -> None:
            nonlocal text, first, finish
            first = first or time.monotonic() - job.submitted
            late = ask.deadline is not None and time.monotonic() - job.submitted > ask.deadline
            if job.ticket.cancelled or late:
                finish = "cancelled" if job.ticket.cancelled else "deadline"
                raise Ended(finish)
            text += piece
            found = [text.index(stop) for stop in ask.stop if stop in text]
            if found:
                piece = piece[: max(len(piece) - len(text) + min(found), 0)]
                text, finish = text[: min(found)], "stop"
            job.ticket.tell(Piece(piece, ()))
            if found:
                raise Ended(finish)

        ids: list[int] = []
        try:
            (answer,) = self.model.answer(
                [job.request],
                max_new_tokens=job.room,
                temperature=ask.temperature,
                top_p=ask.top_p,
                seed=ask.seed,
                visual_tokens=ask.visual_tokens,
                on_text=on_text,
            )
            ids, text, finish = answer.ids, answer.text, "stop" if answer.stopped else "length"
        except Ended:
            pass
        V = self.model.compressor.tokens if ask.visual_tokens is None else ask.visual_tokens
        usage = Usage(
            text_tokens=len(job.request.ids),
            image_tokens=V * len(ask.images),
            reused_image_tokens=0,
            cached_tokens=0,
            new_tokens=len(ids),
        )
        with self.changed:
            self.new_tokens += len(ids)
            self.read_tokens += usage.text_tokens + usage.image_tokens
        return Answer(
            text, tuple(ids), finish, usage, (), (), first, time.monotonic() - job.submitted
        )
