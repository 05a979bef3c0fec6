# SPDX-License-Identifier: Apache-2.0
"""A checked request becomes an `Ask` of the engine: images decoded, text tokenized, V taken.

What takes long runs in a few threads, so that the event loop only moves bytes.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlm_jax.data.templates import Template
from vlm_jax.server import fields, images, messages
from vlm_jax.server.auto import Load
from vlm_jax.server.budget import Chooser
from vlm_jax.server.metrics import Metrics
from vlm_jax.server.options import Limits
from vlm_jax.server.refusals import Refusal
from vlm_jax.server.schema import MOST_SEED, Budget, ChatRequest
from vlm_jax.serving.engine import Engine
from vlm_jax.serving.requests import TooLong
from vlm_jax.serving.tickets import Answer, Ask, Closed, Event, Full, Gone, Shown, Ticket

THREADS = 4  # that decode images; each holds at most a few times Limits.pixels * 3 bytes
LETTERS_PER_TOKEN = 32  # more than texts have; English has 4 to 5
SLOW = 0.9  # weight of the past in running means


@dataclass
class Pace:
    """Running means over answers; None before the first.

    `measured` is the geometric mean of their seconds over those that the cost model predicts.
    """

    new_tokens: float | None = None
    seconds: float | None = None
    measured: float | None = None

    def note(self, answer: Answer, predicted_ms: float | None) -> None:
        """One more answer."""
        self.new_tokens = _mean(self.new_tokens, float(answer.usage.new_tokens))
        self.seconds = _mean(self.seconds, answer.seconds)
        if predicted_ms:
            ratio = math.log(max(answer.seconds, 1e-6) * 1e3 / predicted_ms)
            past = None if self.measured is None else math.log(self.measured)
            self.measured = math.exp(_mean(past, ratio))


def _mean(past: float | None, value: float) -> float:
    """A running mean with one more value."""
    return value if past is None else SLOW * past + (1 - SLOW) * value


@dataclass(frozen=True)
class Prepared:
    """A request as the engine takes it, and what the response says about it."""

    ask: Ask
    budget: Budget | None
    load: Load
    images: int
    stream: bool
    usage_asked: bool


@dataclass
class Service:
    """Prepares requests for one engine, and hands them over.

    Attributes:
      name: of the model, as clients ask for it.
      template: of the model's processor.
      fetch: gets pictures from allowed hosts; None if there are none.
    """

    engine: Engine
    chooser: Chooser
    name: str
    template: Template
    limits: Limits
    fetch: images.Fetch | None = None
    draining: bool = False
    pace: Pace = field(default_factory=Pace)
    pool: ThreadPoolExecutor = field(init=False)
    metrics: Metrics = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        before, mark, after = self.template.user.partition("{image}")
        if "{question}" not in before + after:
            raise ValueError(
                "this model's template has no place for a question, so every answer would be to "
                "the image alone: serve a model of the second stage"
            )
        self.images_first = "{question}" in after
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
        self.metrics = Metrics(self.engine.stats)
        self.created = int(time.time())

    @property
    def failed(self) -> bool:
        """Whether the engine has ended by itself: it answers nothing any more."""
        return bool(self.engine.closed) and not self.draining

    def load(self) -> Load:
        """What the engine does now."""
        now = self.engine.stats()
        return Load(now.running, now.queued, now.slots, self.pace.measured)

    def retry_after(self) -> int:
        """Seconds after which a place in the queue is likely to be free: 1 to 60."""
        now = self.engine.stats()
        rounds = math.ceil((now.queued + 1) / now.slots)
        return int(min(max(math.ceil((self.pace.seconds or 1.0) * rounds), 1), 60))

    async def prepare(self, asked: ChatRequest, arrived: float) -> Prepared:
        """The request as the engine takes it; `arrived` is when its first byte did (monotonic).

        Raises:
          Refusal: if it cannot be answered.
        """
        self._check(asked)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, self._prepared, asked, arrived)

    def _check(self, asked: ChatRequest) -> None:
        """Raises Refusal for what contradicts itself, or cannot be."""
        fields.check((asked.model_extra or {}) | {"n": asked.n}, fields.UNSUPPORTED)
        if asked.model not in (None, self.name):
            raise Refusal(
                f"model={asked.model!r:.80} is not served here: ask for {self.name}",
                status=404,
                param="model",
                code="model_not_found",
            )
        lengths = {asked.max_tokens, asked.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise Refusal(
                f"max_tokens={asked.max_tokens} and max_completion_tokens="
                f"{asked.max_completion_tokens}: give one of them",
                param="max_completion_tokens",
            )
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refusal("top_logprobs needs logprobs=true", param="top_logprobs")
        if asked.stream_options is not None and not asked.stream:
            raise Refusal("stream_options needs stream=true", param="stream_options")

    def _prepared(self, asked: ChatRequest, arrived: float) -> Prepared:
        """In a thread: decodes, tokenizes and takes V."""
        talk = messages.conversation(
            asked, image=self.template.image, images_first=self.images_first
        )
        images.check_count(len(talk.images), self.limits)
        self._check_length(talk)
        try:
            tokens = self.engine.tokens(
                list(talk.turns), images=len(talk.images), system=talk.system
            )
        except ValueError as error:
            raise Refusal(str(error), param="messages") from None
        pixels = tuple(self._image(placed) for placed in talk.images)
        most = asked.max_completion_tokens or asked.max_tokens
        load = self.load()
        expected = most or 256
        if self.pace.new_tokens is not None:
            expected = min(expected, max(round(self.pace.new_tokens), 1))
        budget = self.chooser.take(
            asked, talk.images, text=len(tokens.ids), new=expected, load=load
        )
        left = min(asked.deadline_seconds or math.inf, self.limits.deadline_seconds)
        left -= time.monotonic() - arrived
        if left <= 0:
            raise late()
        stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        seed = asked.seed if asked.seed is not None else secrets.randbelow(MOST_SEED + 1)
        ask = Ask(
            tokens,
            pixels,
            max_new_tokens=most,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=seed,
            stop=stops,
            visual_tokens=None
            if budget is None or self.chooser.choices.one
            else budget.visual_tokens,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            deadline=left,
        )
        usage_asked = bool(asked.stream_options and asked.stream_options.include_usage)
        return Prepared(ask, budget, load, len(talk.images), bool(asked.stream), usage_asked)

    def _check_length(self, talk: messages.Conversation) -> None:
        """Raises Refusal for more text than any tokens of the model's length can hold.

        The engine cannot decode an answer while a prompt is tokenized, which takes a minute for a
        body of the largest size.
        """
        letters = sum(map(len, (*talk.turns, talk.system or "")))
        length = self.engine.model.max_length
        if letters > LETTERS_PER_TOKEN * length:
            raise Refusal(
                f"{letters:,} characters of text, and at most {LETTERS_PER_TOKEN * length:,} are "
                f"read by this model of {length} tokens: shorten the prompt",
                param="messages",
                code="context_length_exceeded",
            )

    def _image(self, placed: messages.Placed) -> Shown | np.ndarray | str:
        """An image as the engine reads it, or its handle."""
        url = placed.image.url
        if images.is_handle(url):
            return url.removeprefix(images.HANDLE)
        picture = images.pixels_of(url, f"{placed.where}.image_url.url", self.limits, self.fetch)
        return self.engine.pixels(picture)

    def submit(self, prepared: Prepared, listener: Callable[[Event], None]) -> Ticket:
        """Hands a request to the engine, whose events go to `listener` on its thread.

        Raises:
          Refusal: if the queue is full, the server stops, or the request does not fit.
        """
        try:
            return self.engine.submit(prepared.ask, listener)
        except Full as error:
            raise Refusal(
                f"{error.waiting} requests wait already: ask again later",
                status=429,
                code="queue_full",
                retry_after=self.retry_after(),
            ) from None
        except Closed:
            raise (broken() if self.failed else stopping()) from None
        except Gone as error:
            raise Refusal(str(error), code="image_not_found", param="messages") from None
        except TooLong as error:
            # By the name that a request has for it.
            reason = str(error).replace("max_new_tokens", "max_tokens")
            raise Refusal(reason, code="context_length_exceeded", param="messages") from None
        except ValueError as error:
            raise Refusal(str(error), param="messages") from None

    def learn(self, prepared: Prepared, answer: Answer) -> None:
        """Notes how long an answer was and took, beside what was to be expected at its load.

        Requests without an image are not predicted: `auto` has nothing to choose for them.
        """
        usage = answer.usage
        if not prepared.images:
            self.pace.note(answer, None)
            return
        predicted = self.chooser.auto.milliseconds(
            self.tokens_of_each(prepared, answer),
            prepared.images,
            usage.text_tokens,
            usage.new_tokens,
            replace(prepared.load, measured=None),
        )
        self.pace.note(answer, predicted)

    def flops(self, prepared: Prepared, answer: Answer) -> dict[str, Any]:
        """FLOPs of what was computed for an answer, by phase."""
        usage = answer.usage
        return self.chooser.auto.flops(
            self.tokens_of_each(prepared, answer),
            images=prepared.images,
            text=usage.text_tokens,
            new=usage.new_tokens,
            encoded=1 - usage.reused_image_tokens / max(usage.image_tokens, 1),
            cached=usage.cached_tokens,
        )

    def tokens_of_each(self, prepared: Prepared, answer: Answer) -> int:
        """V of each image of an answer, in the mean; the default without an image."""
        if not prepared.images:
            return self.chooser.choices.default
        return max(answer.usage.image_tokens // prepared.images, 1)

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def late() -> Refusal:
    """The refusal of a request whose time is over before its first token."""
    return Refusal(
        "the deadline passed before the first token: give the request more time, fewer visual "
        "tokens, or ask later",
        status=408,
        code="deadline_exceeded",
    )


def broken() -> Refusal:
    """The refusal of a request to a server whose engine has failed."""
    return Refusal(
        "the engine has failed and answers nothing any more: ask the operator to restart the "
        "server",
        status=503,
        code="engine_failed",
    )


def stopping() -> Refusal:
    """The refusal of a request to a server that takes no more."""
    return Refusal(
        "the server is stopping and takes no more requests: ask again",
        status=503,
        code="server_stopping",
        retry_after=5,
    )
