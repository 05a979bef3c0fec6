# SPDX-License-Identifier: Apache-2.0
"""Rows are answered greedily in full batches of equal shapes; what is known already is not asked.

The computation of a row has the same shapes in any batch, and on any number of devices. A question
may be asked at several V: its images are encoded once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import jax

from vlm_jax import hosts
from vlm_jax import mesh as meshes
from vlm_jax.models.cache import Past
from vlm_jax.models.vlm import Batch
from vlm_jax.serving.answer_cache import AnswerCache
from vlm_jax.serving.asking import Asker, Row, Shares
from vlm_jax.serving.requests import batch_of, bucket_of_rows
from vlm_jax.serving.words import Words


@dataclass(frozen=True)
class Said:
    """An answer: its ids with the token that ended it, if one did, and V of all its images."""

    ids: list[int]
    stopped: bool
    visual_tokens: int

    @staticmethod
    def fits(fields: dict[str, Any]) -> bool:
        """Whether an answer can be made of these fields, which were read from a file."""

        def count(x: Any) -> bool:
            return type(x) is int and x >= 0

        return (
            fields.keys() == Said.__annotations__.keys()
            and isinstance(fields["ids"], list)
            and all(map(count, fields["ids"]))
            and isinstance(fields["stopped"], bool)
            and count(fields["visual_tokens"])
        )


class Greedy:
    """Answers the rows of questions with one model.

    Args:
      askers: that make the rows; they differ in V alone.
      batch: rows that are answered together, rounded up to a power of two for each part of the
        mesh.

    Attributes:
      hits, damaged: what the cache had, and had damaged, by V.
    """

    def __init__(self, askers: Sequence[Asker], *, batch: int, cache: AnswerCache | None):
        self.asker, self.model, self.cache = askers[0], askers[0].model, cache
        self.several = len(askers) > 1
        self.batch = bucket_of_rows(batch, meshes.batch_shards(self.model.mesh))
        self.shares = Shares(self.model.mesh, self.batch)
        self.most = min(self.asker.way.max_new_tokens, self.model.max_length)
        self.hits: Counter[int | None] = Counter()
        self.damaged: Counter[int | None] = Counter()

    def answers(
        self, questions: Iterable[list[Row]], check: Callable[[Row], None]
    ) -> Iterator[list[tuple[Row, Said | None]]]:
        """Every row with its answer, None if it has an error, some at a time and in any order.

        A question comes as its rows, one for each V that it is asked at. `check` may raise for a
        row with an error.
        """
        waiting: dict[tuple[int, ...], list[list[list[Row]]]] = {}
        questions = iter(questions)
        while some := list(islice(questions, self.batch)):
            rows = [row for question in some for row in question]
            self.shares.agreed(rows)
            known = self.known([row for row in rows if not row.error])
            finished: list[tuple[Row, Said | None]] = []
            for question in some:
                left = []
                for row in question:
                    if row.error:
                        check(row)
                        finished.append((row, None))
                    elif row.key in known:
                        finished.append((row, known[row.key]))
                    else:
                        left.append(row)
                if left:
                    shape = self.asker.shape(left[0].request)
                    of_shares = waiting.setdefault(shape, [[] for _ in self.shares.rows])
                    of_shares[left[0].number % len(of_shares)].append(left)
            if finished:
                yield finished
            for of_shares in waiting.values():
                while max(map(len, of_shares)) >= len(self.shares.rows[0]):
                    yield self.together(of_shares)
        for of_shares in waiting.values():
            while any(of_shares):
                yield self.together(of_shares)

    def known(self, rows: list[Row]) -> dict[str, Said]:
        """The answers to rows that the cache has."""
        if self.cache is None:
            return {}
        cache = self.cache

        def found(row: Row) -> dict[str, Any] | None:
            before = cache.hits, cache.damaged
            said = cache.get(row.key)
            self.hits[row.visual_tokens] += cache.hits - before[0]
            self.damaged[row.visual_tokens] += cache.damaged - before[1]
            return said

        answers = hosts.from_writer(lambda: {row.key: found(row) for row in rows})
        return {key: Said(**said) for key, said in answers.items() if said is not None}

    def together(self, of_shares: list[list[list[Row]]]) -> list[tuple[Row, Said | None]]:
        """Takes a batch of each share's questions, and answers it."""
        each = len(self.shares.rows[0])
        if len(of_shares) == 1:
            questions: list[list[Row]] = [*of_shares[0][:each]]
        else:
            questions = [[] for _ in range(self.batch)]
            for places, own in zip(self.shares.rows, of_shares, strict=True):
                for place, question in zip(places, own, strict=False):
                    questions[place] = question
        for own in of_shares:
            del own[:each]
        answers = self.decoded(questions)
        if self.cache is not None and hosts.is_writer():
            for row, said in answers:
                self.cache.put(row.key, asdict(said))
        return list(answers)

    def decoded(self, questions: list[list[Row]]) -> list[tuple[Row, Said]]:
        """The answers to the rows of a batch of questions; one without rows is asked by nobody."""
        model = self.model
        some = next(question[0].request for question in questions if question)
        requests = [question[0].request if question else some for question in questions]
        begins = model.begins(some)
        with jax.set_mesh(model.mesh):
            prefix = model.prefix_pass if begins else None
            if self.asker.kept(some):
                requests, prefix, _ = model.summaries.of(requests)
            batch = batch_of(
                requests,
                model.compressor,
                skip=len(model.prefix) if begins else 0,
                shards=meshes.batch_shards(model.mesh),
                width=model.width,
                pad=model.processor.pad_id,
            )
            batch = meshes.spread(batch, model.mesh, "batch")
            if self.several and some.pixels:
                batch = model.decoder.seen(batch)
            # In the order of their first row, which is the same in every process.
            asked: dict[int | None, dict[int, Row]] = {}
            for place, question in enumerate(questions):
                for row in question:
                    asked.setdefault(row.visual_tokens, {})[place] = row
            return [
                answer
                for V, rows in asked.items()
                for answer in self.answered(
                    batch, rows, prefix, model.requested_tokens(V) if some.pixels else None
                )
            ]

    def answered(
        self, batch: Batch, asked: dict[int, Row], prefix: Past | None, tokens: int | None
    ) -> list[tuple[Row, Said]]:
        """The answers to the rows at these places of a batch, all at one V, behind a `prefix`."""
        model = self.model
        started = model.decoder.start(batch, new_tokens=self.most, tokens=tokens, prefix=prefix)
        length = hosts.fetched(started.length)
        ids: dict[int, list[int]] = {k: [] for k in asked}
        stopped: dict[int, bool] = {}  # of the rows that have ended
        stops = set(map(int, model.processor.stop_ids))
        for tokens in model.decoder.stream(started, self.most):
            for k, row in asked.items():
                if k in stopped:
                    continue
                ids[k].append(int(tokens[k]))
                if ids[k][-1] in stops or len(ids[k]) == row.room:
                    stopped[k] = ids[k][-1] in stops
            if len(stopped) == len(asked):
                break
        return [
            (row, Said(ids[k], stopped[k], int(length[k]) - len(row.request.ids)))
            for k, row in asked.items()
        ]

    def text(self, said: Said) -> str:
        """The text of an answer, without blanks at its ends, as LLaVA writes it."""
        words = Words(self.model.processor.tokenizer)
        return words.answer(said.ids, stop=said.stopped).strip()


def described(said: Said) -> dict[str, Any]:
    """What a line of answers says of one besides its text."""
    return dict(visual_tokens=said.visual_tokens, new_tokens=len(said.ids), stopped=said.stopped)
