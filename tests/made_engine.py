# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: known answers at a known pace, by the interface of the real one.

The answer to a conversation is the words `said` gives, one token each; what takes the real engine
seconds of compilation, and what it never does, is tested with this one.
"""

import hashlib
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np

from vlm_jax.data import templates
from vlm_jax.data.processor import Tokens
from vlm_jax.server.auto import Auto
from vlm_jax.server.budget import Chooser
from vlm_jax.server.choices import Choices
from vlm_jax.server.options import Limits
from vlm_jax.server.service import Service
from vlm_jax.serving.engine import Engine
from vlm_jax.serving.requests import TooLong
from vlm_jax.serving.tickets import (
    Answer,
    Closed,
    Failed,
    Full,
    Gone,
    IndexStats,
    Piece,
    Score,
    Stats,
    Ticket,
    Usage,
)  # fmt: skip

WORDS = "red blue green one two three small large left right dark light".split()
LENGTH = 512  # of the model: prompt, image and answer


def said(turns, images, seed=0, count=8):
    """The words of the answer to a conversation about images (their digests)."""
    digest = hashlib.sha256(repr((list(turns), list(images), seed)).encode()).digest()
    return [WORDS[byte % len(WORDS)] for byte in digest[:count]]


def digest(pixels):
    """The handle of an image."""
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:16]


class MadeEngine(Engine):
    """Answers in threads of its own, `seconds` for each token; `failing` fails every request."""

    def __init__(self, *, slots=4, queue=4, seconds=0.0, failing=False):
        self.slots, self.queue, self.seconds, self.failing = slots, queue, seconds, failing
        self.model = SimpleNamespace(max_length=LENGTH)
        self.free = threading.Semaphore(slots)
        self.changed = threading.Condition()
        self.waiting_count = self.running_count = self.done = 0
        self.closed = self.stopped = False
        self.prompts = {}  # by id of the tokens: the turns
        self.asks = []
        self.index = {}
        self.count = itertools.count()

    def warm(self):
        """Nothing to compile."""

    def pixels(self, image, *, exif="apply"):
        return np.asarray(image, np.float32)

    def tokens(self, prompt, *, images, system=None):
        turns = [*([f"<{system}>"] if system else []), *prompt]
        ids = [sum(map(ord, word)) % 1000 for turn in turns for word in turn.split()] or [0]
        number = next(self.count)
        self.prompts[number] = turns
        return Tokens([number, *ids], [False] * (len(ids) + 1), (0,) * images, [ids] * images)

    def submit(self, ask, listener=None):
        V = ask.visual_tokens or 4
        pixels = []
        for image in ask.images:
            if isinstance(image, str) and image not in self.index:
                raise Gone(f"image {image} is not in the index: send the image")
            pixels.append(image if isinstance(image, str) else digest(image))
        reused = sum(V for handle in pixels if handle in self.index)
        read = len(ask.prompt.ids) + V * len(pixels)
        most = min(LENGTH - read, 256) if ask.max_new_tokens is None else ask.max_new_tokens
        if read + most > LENGTH:
            raise TooLong(
                f"{read} tokens and {most} new ones; this model was made for {LENGTH}: "
                "lower max_new_tokens"
            )
        with self.changed:
            if self.closed:
                raise Closed("no more requests")
            if self.waiting_count + self.running_count >= self.slots + self.queue:
                raise Full(self.waiting_count)
            self.waiting_count += 1
            self.index |= dict.fromkeys(pixels, True)
            self.asks.append(ask)
        ticket = Ticket(listener)
        work = (ask, ticket, self.prompts[ask.prompt.ids[0]], pixels, V, reused, most)
        threading.Thread(target=self._work, args=work, daemon=True).start()
        return ticket

    def _work(self, ask, ticket, turns, handles, V, reused, most):
        began = time.monotonic()
        late = lambda: ask.deadline is not None and time.monotonic() - began > ask.deadline  # noqa: E731
        with self.free:
            with self.changed:
                self.waiting_count -= 1
                self.running_count += 1
            try:
                event = self._answer(ask, ticket, turns, handles, (V, reused, most), began, late)
            finally:
                with self.changed:
                    self.running_count -= 1
                    self.done += 1
                    self.changed.notify_all()
        ticket.tell(event)

    def _answer(self, ask, ticket, turns, handles, counts, began, late):
        if self.failing:
            return Failed("out of memory: make the batch smaller")
        V, reused, most = counts
        seed = ask.seed if ask.temperature else 0
        words, text, finish, first, scores = said(turns, handles, seed), "", "stop", None, []
        for number, word in enumerate(words):
            if number == most:
                finish = "length"
                break
            time.sleep(self.seconds)
            if ticket.cancelled or self.stopped or late():
                finish = "deadline" if late() else "cancelled"
                break
            first = first or time.monotonic() - began
            piece = word if not number else f" {word}"
            if any(stop in text + piece for stop in ask.stop):
                break
            text += piece
            score = ()
            if ask.logprobs is not None:
                other = tuple(Score(k, w, -2.0 - k) for k, w in enumerate(WORDS[: ask.logprobs]))
                score = (Score(number, piece, -0.5, other),)
                scores += score
            ticket.tell(Piece(piece, (number,), score))
        new = len(text.split())
        usage = Usage(len(ask.prompt.ids), V * len(handles), reused, 0, new)
        return Answer(
            text, tuple(range(new)), finish, usage, tuple(handles), tuple(scores), first,
            time.monotonic() - began,
        )  # fmt: skip

    def drain(self, seconds=None):
        with self.changed:
            self.closed = True
            done = self.changed.wait_for(
                lambda: not self.waiting_count and not self.running_count, seconds
            )
        self.stopped = True
        return done

    def stats(self):
        with self.changed:
            return Stats(
                self.waiting_count, self.running_count, self.slots, self.queue, self.done, 0, 0, 0,
                0, IndexStats(images=len(self.index)),
            )  # fmt: skip


def service(size, *, limits=None, fetch=None, law=None, chip=None, target=None, name="made",
            template="vicuna_v1", **of_engine):  # fmt: skip
    """A service of a made engine, for a model of this description."""
    engine = MadeEngine(**of_engine)
    chooser = Chooser(Choices.of(size), Auto(size, law, chip, target))
    limits = limits or Limits(requests=engine.slots + engine.queue)
    return Service(engine, chooser, name, templates.named(template), limits, fetch)
