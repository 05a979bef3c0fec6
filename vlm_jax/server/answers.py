# SPDX-License-Identifier: Apache-2.0
"""Answers as OpenAI's clients read them: whole, or chunk after chunk.

Events come from the engine's thread into the event loop.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from vlm_jax.server import schema
from vlm_jax.server.images import HANDLE
from vlm_jax.server.refusals import Refusal
from vlm_jax.server.service import Prepared, Service, late, stopping
from vlm_jax.serving.tickets import Answer, Event, Failed, Piece, Score, Ticket

log = logging.getLogger(__name__)
T = TypeVar("T")
GRACE_SECONDS = 60.0  # after its deadline an engine that says nothing counts as stuck
# After each chunk of a stream: tokens that come sooner share the next one. A chunk takes time from
# all answers, so the pause grows with their number.
PAUSE_SECONDS, PAUSE_OF_EACH = 0.05, 0.01


class Events:
    """What the engine's thread says of one answer, for the event loop, which is woken once for all
    that has come since it looked."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Event] = deque()
        self.told = False  # that something waits
        self.come, self.ended = asyncio.Event(), asyncio.Event()

    def put(self, event: Event) -> None:
        """On the engine's thread. Raises RuntimeError if the loop is closed."""
        self.waiting.append(event)
        if not isinstance(event, Piece):
            self.loop.call_soon_threadsafe(self.ended.set)
        if not self.told:
            self.told = True
            self.loop.call_soon_threadsafe(self.come.set)

    async def get(self) -> Event:
        """The next event; pieces that wait together are one."""
        while not self.waiting:
            self.come.clear()
            self.told = False
            if not self.waiting:  # what was put before this line did not wake anybody
                await self.come.wait()
        pieces = []
        while self.waiting and isinstance(self.waiting[0], Piece):
            pieces.append(self.waiting.popleft())
        return joined(pieces) if pieces else self.waiting.popleft()


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces that follow one another as one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(id for piece in pieces for id in piece.ids),
        tuple(score for piece in pieces for score in piece.scores),
    )


@dataclass
class Reply:
    """One answer under way: an identity, a ticket, and the events that have come."""

    service: Service
    prepared: Prepared
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    events: Events = field(default_factory=Events)
    ticket: Ticket = field(init=False)

    def __post_init__(self) -> None:
        def listener(event: Event) -> None:
            try:
                self.events.put(event)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self.ticket.cancel()

        self.ticket = self.service.submit(self.prepared, listener)

    async def _in_time(self, work: Awaitable[T]) -> T:
        """What `work` gives. Raises Refusal if the engine is stuck."""
        try:
            async with asyncio.timeout((self.prepared.ask.deadline or 0.0) + GRACE_SECONDS):
                return await work
        except TimeoutError:
            raise Refusal(
                "the engine did not answer: ask the operator to restart it",
                status=500,
                code="engine_stuck",
            ) from None

    async def next(self) -> Piece | Answer:
        """The next event. Raises Refusal if the request failed, or the engine is stuck."""
        event = await self._in_time(self.events.get())
        if isinstance(event, Failed):
            log.error("%s failed: %s", self.id, event.reason)
            raise Refusal(
                f"the request could not be computed: {event.reason}", status=500, code="failed"
            )
        if isinstance(event, Answer):
            self._ended(event)
        return event

    def _ended(self, answer: Answer) -> None:
        """Counts an answer; raises Refusal for one that is none."""
        V = self.prepared.budget and self.prepared.budget.visual_tokens
        self.service.metrics.answered(answer, V)
        if answer.finish in ("stop", "length"):
            self.service.learn(self.prepared, answer)
        usage = answer.usage
        log.info(
            "%s %s: V=%s, tokens text=%d image=%d new=%d, %.3f s", self.id, answer.finish, V,
            usage.text_tokens, usage.image_tokens, usage.new_tokens, answer.seconds,
        )  # fmt: skip
        if answer.finish == "cancelled":
            raise stopping()
        if answer.finish == "deadline" and not answer.ids:
            raise late()

    async def whole(self) -> schema.ChatCompletion:
        """The answer, when it is finished. Raises Refusal as `next` does."""
        await self._in_time(self.events.ended.wait())  # pieces wake nobody
        while not isinstance(event := await self.next(), Answer):
            pass
        return schema.ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.service.name,
            choices=[
                schema.Choice(
                    message=schema.AssistantMessage(content=event.text),
                    logprobs=self._logprobs(event.scores),
                    finish_reason=finish(event),
                )
            ],
            usage=usage_of(event),
            vlm_jax=self._extension(event),
        )

    async def chunks(self, event: Piece | Answer) -> AsyncIterator[bytes]:
        """The stream from its first `event` on, "[DONE]" last; what is sent at once comes at once.

        A failure after that is an event {"error": ...}: the status is sent already.
        """
        waiting = [self._chunk({"role": "assistant", "content": ""})]
        try:
            while not isinstance(event, Answer):
                if event.text or event.scores:
                    waiting.append(self._chunk({"content": event.text}, scores=event.scores))
                if waiting:
                    yield sent(waiting)
                    waiting = []
                pause = max(PAUSE_SECONDS, PAUSE_OF_EACH * self.service.load().active)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self.events.ended.wait()
                event = await self.next()
            waiting.append(self._chunk({}, answer=event))
            if self.prepared.usage_asked:
                waiting.append(self._chunk(None, answer=event))
        except Refusal as refusal:
            waiting.append(schema.ErrorBody.model_validate(refusal.body()).model_dump_json())
        yield sent([*waiting, "[DONE]"])

    def _chunk(
        self,
        delta: dict[str, str] | None,
        *,
        scores: tuple[Score, ...] = (),
        answer: Answer | None = None,
    ) -> str:
        """One chunk as JSON; without a delta it is the last one, of the counts of tokens."""
        choices = [] if delta is None else [
            schema.ChunkChoice(
                index=0,
                delta=schema.Delta(**delta),
                logprobs=self._logprobs(scores) if scores else None,
                finish_reason=None if answer is None else finish(answer),
            )
        ]  # fmt: skip
        made = schema.Chunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.service.name,
            choices=choices,
        )
        if self.prepared.usage_asked:
            made.usage = usage_of(answer) if answer is not None and delta is None else None
        if answer is not None and delta is not None:
            made.vlm_jax = self._extension(answer)
        return made.model_dump_json(exclude_unset=True)

    def _logprobs(self, scores: tuple[Score, ...]) -> schema.Logprobs | None:
        """The probabilities of tokens, if they were asked for."""
        if self.prepared.ask.logprobs is None:
            return None
        return schema.Logprobs(content=[logprob_of(score) for score in scores], refusal=None)

    def _extension(self, answer: Answer) -> schema.Extension:
        """What is said besides OpenAI's fields."""
        return schema.Extension(
            budget=self.prepared.budget,
            finish_reason=answer.finish,
            seed=self.prepared.ask.seed,
            images=[HANDLE + handle for handle in answer.handles],
            flops=self.service.flops(self.prepared, answer),
            first_token_seconds=answer.first_token_seconds,
            seconds=answer.seconds,
            tokens_per_second=answer.tokens_per_second,
        )


def sent(events: Sequence[str]) -> bytes:
    """Events of a stream, one behind the other: each write costs as much as several chunks."""
    return "".join(f"data: {data}\n\n" for data in events).encode()


def finish(answer: Answer) -> str:
    """OpenAI's word for how an answer ended; the extension has the exact one."""
    return "length" if answer.finish == "deadline" else answer.finish


def usage_of(answer: Answer) -> schema.Usage:
    """The counts of tokens of an answer."""
    usage = answer.usage
    prompt = usage.text_tokens + usage.image_tokens
    return schema.Usage(
        prompt_tokens=prompt,
        completion_tokens=usage.new_tokens,
        total_tokens=prompt + usage.new_tokens,
        text_tokens=usage.text_tokens,
        image_tokens=usage.image_tokens,
        reused_image_tokens=usage.reused_image_tokens,
        prompt_tokens_details=schema.PromptDetails(
            text_tokens=usage.text_tokens,
            image_tokens=usage.image_tokens,
            cached_tokens=usage.cached_tokens,
        ),
    )


def logprob_of(score: Score) -> schema.TokenLogprob:
    """A token's probability; without bytes where the token is part of a character."""
    whole = "\ufffd" not in score.text
    return schema.TokenLogprob(
        token=score.text,
        logprob=score.logprob,
        bytes=list(score.text.encode()) if whole else None,
        top_logprobs=[
            dict(
                token=one.text,
                logprob=one.logprob,
                bytes=None if "\ufffd" in one.text else list(one.text.encode()),
            )
            for one in score.likeliest
        ],
    )
