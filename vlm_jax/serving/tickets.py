# SPDX-License-Identifier: Apache-2.0
"""What is asked of an engine, and what comes back while it answers.

I pixels of the encoder's side
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from vlm_jax.data.processor import Tokens
from vlm_jax.serving.requests import Prompt

MOST_LIKELIEST = 20  # alternatives of a token; what OpenAI's API allows

# How an answer ended: a stop token or a stop string, its length, its deadline, or `Ticket.cancel`.
Finish = Literal["stop", "length", "deadline", "cancelled"]


class Full(Exception):
    """The queue is full: ask again later. `waiting` requests stand in it."""

    def __init__(self, waiting: int):
        super().__init__(f"{waiting} requests wait already, as many as may: ask later")
        self.waiting = waiting


class Closed(Exception):
    """The engine takes no more requests: it is draining, or has failed."""


class Gone(ValueError):
    """An image was named by its handle and is not in the index: send the image."""


class Shown(NamedTuple):
    """An image as `Engine.pixels` gives it: what the encoder reads, float32 [I, I, 3], and its
    width and height before that, to a common factor."""

    pixels: np.ndarray
    size: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
      prompt: a question, a conversation [question, answer, ..., question] in which each "<image>"
        stands for the next image, or its `Tokens`.
      images: each the result of `Engine.pixels`, or the handle of one that was sent before. Pixels
        alone, float32 [I, I, 3], are a square image.
      max_new_tokens: None: what fits into the model's length and the engine's rows, at most 256.
      temperature: 0 takes the likeliest token; top_p: of the probability mass, when drawing.
      seed: of the draws: the same request gets the same answer in any company.
      stop: texts that end the answer, and are not part of it.
      visual_tokens: V of each image, if the compressor serves any number; None as trained.
      logprobs: None: no scores. Else each token's, with this many of the likeliest, at most 20.
      deadline: seconds from `Engine.submit` after which the answer ends where it is.
    """

    prompt: Prompt | Tokens
    images: tuple[Shown | np.ndarray | str, ...] = ()
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    visual_tokens: int | None = None
    logprobs: int | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Score:
    """A token with its natural log probability, before temperature and top_p, and the likeliest
    tokens at its place."""

    id: int
    text: str
    logprob: float
    likeliest: tuple["Score", ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text of an answer and the tokens that came with it; `scores` only if asked for.

    Pieces end where characters do, and never inside what may become a stop string: a token may come
    with the text of a later piece. All texts together are the text of the answer.
    """

    text: str
    ids: tuple[int, ...]
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
      text_tokens, image_tokens: read.
      reused_image_tokens: of the image tokens, those of images that were not encoded again.
      cached_tokens: of all tokens read, those whose keys and values were not computed again.
      new_tokens: generated, the one that ended the answer included.
    """

    text_tokens: int
    image_tokens: int
    reused_image_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Answer:
    """A finished answer, the last event of its ticket.

    Attributes:
      text: without the stop string or stop token that ended it.
      ids: all generated, a stop token included.
      handles: of the images, in their order, for later requests.
      first_token_seconds, seconds: from `Engine.submit`; None without a token.
    """

    text: str
    ids: tuple[int, ...]
    finish: Finish
    usage: Usage
    handles: tuple[str, ...]
    scores: tuple[Score, ...]
    first_token_seconds: float | None
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """The rate after the first token; None without another."""
        if self.first_token_seconds is None or self.usage.new_tokens < 2:
            return None
        after = self.seconds - self.first_token_seconds
        return (self.usage.new_tokens - 1) / after if after > 0 else None


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be computed: why, in one sentence."""

    reason: str


Event = Piece | Answer | Failed


class Ticket:
    """A request that an engine has taken.

    Events are iterated from any one thread: pieces, then the `Answer`. With a `listener` they go
    there instead, on the engine's thread, which it must not hold up.
    """

    def __init__(self, listener: Callable[[Event], None] | None = None):
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener = listener or self._events.put
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[Piece | Answer]:
        """Events as they come, the `Answer` last. Raises RuntimeError if the request failed."""
        while True:
            event = self._events.get()
            if isinstance(event, Failed):
                raise RuntimeError(event.reason)
            yield event
            if isinstance(event, Answer):
                return

    def answer(self) -> Answer:
        """Waits for the answer. Raises as iteration does."""
        *_, last = self
        return last

    def cancel(self) -> None:
        """Ends the answer where it is; its slot is free before the next token. From any thread."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def tell(self, event: Event) -> None:
        """For the engine: the next event."""
        self._listener(event)


@dataclass(frozen=True)
class IndexStats:
    """What an image index holds, in entries and bytes, and how often it was asked with success.

    `images` are embeddings, `blocks` keys and values of parts of rows.
    """

    images: int = 0
    blocks: int = 0
    bytes: int = 0
    limit: int = 0
    image_hits: int = 0
    image_misses: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True)
class Stats:
    """What an engine does now and has done since its start.

    Attributes:
      queued, running: requests that wait, and that are being read or answered.
      slots: most that run together. queue: most that wait for a slot.
      answered, failed: finished requests. new_tokens, read_tokens: generated, and read (without
        those whose keys and values were reused).
      compiled: programs compiled so far; after `Engine.warm` it stays.
    """

    queued: int
    running: int
    slots: int
    queue: int
    answered: int
    failed: int
    new_tokens: int
    read_tokens: int
    compiled: int
    index: IndexStats
