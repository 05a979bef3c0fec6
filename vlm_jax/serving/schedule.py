# SPDX-License-Identifier: Apache-2.0
"""Who is read and who is answered in each turn of an engine, and how every request ends."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_jax import errors
from vlm_jax.serving.answering import Answering
from vlm_jax.serving.index import BLOCK
from vlm_jax.serving.reading import Reader
from vlm_jax.serving.row import Row
from vlm_jax.serving.slots import Pool, Result
from vlm_jax.serving.tickets import Answer, Ask, Event, Failed, Finish, Score, Ticket, Usage
from vlm_jax.serving.words import Words


@dataclass(eq=False)
class Job:
    """A request that was taken.

    Attributes:
      longest: tokens that its row may have in the end, in the layers that hold fewest.
      submitted, first_token: times of `time.monotonic`.
      pool: where it is answered, once it is read.
      ended: whether its last event was told.
    """

    ask: Ask
    ticket: Ticket
    row: Row
    answering: Answering
    longest: int
    submitted: float
    first_token: float | None = None
    pool: Pool | None = None
    ended: bool = False

    def early(self, now: float) -> Finish | None:
        """Why it ends now, whatever is answered so far."""
        if self.ticket.cancelled:
            return "cancelled"
        late = self.ask.deadline is not None and now - self.submitted > self.ask.deadline
        return "deadline" if late else None


class Schedule:
    """The requests of an engine, turn by turn.

    A turn is one unit of reading, of one request, and one token of every row that is read: a long
    prompt delays the others by a chunk at a time, or by all of it where it is read whole. The
    tokens of a turn are looked at in the next one, while the device is busy; a row that has ended
    runs one token longer.

    Args:
      pools: by ascending length, each for as many rows as run together.
    """

    def __init__(self, reader: Reader, pools: Sequence[Pool], words: Words):
        self.reader, self.pools, self.words = reader, pools, words
        self.slots = pools[0].rungs[-1]
        self.waiting: deque[Job] = deque()
        self.reading: tuple[Job, Pool, Iterator[None]] | None = None
        self.results: list[Result] = []  # of the last turn
        self.stopping = False  # cancels all
        self.answered = self.failed = self.new_tokens = 0

    @property
    def running(self) -> int:
        """Requests that are read or answered now."""
        return sum(len(pool.members) for pool in self.pools) + (self.reading is not None)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting) or self.running > 0

    def jobs(self) -> list[Job]:
        """All that are not finished."""
        answered = [job for pool in self.pools for job in pool.members.values()]
        return [*self.waiting, *([self.reading[0]] if self.reading else []), *answered]

    def turn(self) -> None:
        """One turn."""
        self.end_early()
        if self.reading is None and self.waiting and self.running < self.slots:
            job = self.waiting.popleft()
            pool = next(pool for pool in self.pools if pool.length >= job.longest)
            self.reading = job, pool, self.reader.read(job.row, pool.length)
        older, self.results = [*self.results, *self.read_on()], []
        for pool in self.pools:
            if pool.members:
                try:
                    self.results.append(pool.step())
                except Exception as error:
                    self.fail_pool(pool, error)
        for result in older:
            try:
                self.look(result)
            except Exception as error:
                for pool in {job.pool for job in result.members.values() if job.pool}:
                    self.fail_pool(pool, error)

    def end_early(self) -> None:
        """Ends what was cancelled and what is late."""
        now = time.monotonic()
        for job in self.jobs():
            if finish := "cancelled" if self.stopping else job.early(now):
                self.finish(job, finish)

    def read_on(self) -> list[Result]:
        """The next unit of reading; the first token of a row that is complete."""
        if self.reading is None:
            return []
        job, pool, work = self.reading
        try:
            next(work)
            return []
        except StopIteration as done:
            first = done.value
        except Exception as error:
            self.unread(job, error)
            return []
        try:
            row = job.row
            pool.join(job, first, len(row.ids), row.sampling)
        except Exception as error:
            self.unread(job, error)
            if pool.lost:
                self.fail_pool(pool, error)
            return []
        self.reading, job.pool = None, pool
        return [Result({0: job}, first.ids, first.logits)]

    def look(self, result: Result) -> None:
        """Gives new tokens to those who wait for them."""
        members = {k: job for k, job in result.members.items() if not job.ended}
        if not members:
            return
        ids, now = np.asarray(result.ids), time.monotonic()
        scores = self.scores(result, members)
        for k, job in members.items():
            self.new_tokens += 1
            job.first_token = job.first_token or now
            piece = job.answering.take(int(ids[k]), scores.get(k))
            if piece is not None:
                self.tell(job, piece)
            if job.answering.finish:
                self.finish(job, job.answering.finish)

    def scores(self, result: Result, members: dict[int, Job]) -> dict[int, Score]:
        """The scores of the tokens for which they were asked."""
        asked = {k: job.ask.logprobs for k, job in members.items() if job.ask.logprobs is not None}
        if not asked:
            return {}
        found = self.reader.programs.likeliest(result.logits, result.ids)
        chosen, tokens, logprobs = (np.asarray(x).tolist() for x in found)
        ids = np.asarray(result.ids).tolist()

        def score(token: int, logprob: float, others: tuple[Score, ...] = ()) -> Score:
            return Score(token, self.words.decode([token]), logprob, others)

        return {
            k: score(ids[k], chosen[k], tuple(map(score, tokens[k][:most], logprobs[k][:most])))
            for k, most in asked.items()
        }

    def finish(self, job: Job, finish: Finish) -> None:
        """Ends a request with its answer, frees its row, and keeps what was computed."""
        if not job.answering.finish and (piece := job.answering.end(finish)):
            self.tell(job, piece)
        ids, row = job.answering.ids, job.row
        if job.pool is not None:
            at = job.pool.row_of(job)
            # The last token is not in the cache.
            pool = job.pool
            self.reader.keep(row, ids[:-1], lambda start: pool.block(at, start, BLOCK))
            job.pool.leave(at)
        self.forget(job)
        self.answered += 1
        read = len(row.ids) or row.most
        usage = Usage(
            text_tokens=len(row.text),
            image_tokens=read - len(row.text),
            reused_image_tokens=sum(x.end - x.start for x in row.images if not x.encoded),
            cached_tokens=row.cached,
            new_tokens=len(ids),
        )
        first = None if job.first_token is None else job.first_token - job.submitted
        handles = tuple(x.handle for x in row.images) if self.reader.index.limit else ()
        answer = Answer(
            text=job.answering.text,
            ids=tuple(ids),
            finish=finish,
            usage=usage,
            handles=handles,
            scores=tuple(job.answering.scores),
            first_token_seconds=first,
            seconds=time.monotonic() - job.submitted,
        )
        self.tell(job, answer)

    def forget(self, job: Job) -> None:
        """Removes a request that waits or is read, before its last event."""
        job.ended = True
        if self.reading is not None and self.reading[0] is job:
            self.reading = None
        elif job in self.waiting:
            self.waiting.remove(job)

    def unread(self, job: Job, error: Exception) -> None:
        """Ends a request whose reading failed."""
        self.reader.reset()
        self.end(job, error)

    def fail_pool(self, pool: Pool, error: Exception) -> None:
        """Ends all requests of a pool."""
        jobs = list(pool.members.values())
        pool.reset()
        for job in jobs:
            self.end(job, error)

    def fail(self, error: Exception) -> None:
        """Ends all requests."""
        for job in self.jobs():
            self.end(job, error)
        for pool in self.pools:
            pool.reset()

    def end(self, job: Job, error: Exception) -> None:
        """Ends a request without an answer."""
        self.forget(job)
        self.failed += 1
        self.tell(job, Failed(errors.sentence(error)))

    def tell(self, job: Job, event: Event) -> None:
        """Tells the ticket; one whose listener raises has nobody left who listens."""
        try:
            job.ticket.tell(event)
        except Exception:
            job.ticket.cancel()
