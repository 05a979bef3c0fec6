# SPDX-License-Identifier: Apache-2.0
"""Rows are answered greedily in full batches of equal shapes; what is known already is not asked.

The computation of a row has the same shapes in any batch, and on any number of devices.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import jax

from vlm_jax import hosts
from vlm_jax import mesh as meshes
from vlm_jax.serving.answer_cache import AnswerCache
from vlm_jax.serving.asking import Asker, Row, Shares
from vlm_jax.serving.requests import Text, batch_of, bucket_of_rows


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
    """Answers rows with one model.

    Args:
      batch: rows that are answered together, rounded up to a power of two for each part of the
        mesh.
    """

    def __init__(self, asker: Asker, *, batch: int, cache: AnswerCache | None):
        self.asker, self.model, self.cache = asker, asker.model, cache
        self.batch = bucket_of_rows(batch, meshes.batch_shards(self.model.mesh))
        self.shares = Shares(self.model.mesh, self.batch)
        self.most = min(asker.way.max_new_tokens, self.model.max_length)

    def answers(
        self, rows: Iterable[Row], check: Callable[[Row], None]
    ) -> Iterator[list[tuple[Row, Said | None]]]:
        """Every row with its answer, None if it has an error, some at a time and in any order.

        `check` may raise for a row with an error.
        """
        waiting: dict[tuple[int, ...], list[list[Row]]] = {}
        rows = iter(rows)
        while some := list(islice(rows, self.batch)):
            self.shares.agreed(some)
            known = self.known([row for row in some if not row.error])
            finished: list[tuple[Row, Said | None]] = []
            for row in some:
                if row.error:
                    check(row)
                    finished.append((row, None))
                elif row.key in known:
                    finished.append((row, known[row.key]))
                else:
                    shape = self.asker.shape(row.request)
                    of_shares = waiting.setdefault(shape, [[] for _ in self.shares.rows])
                    of_shares[row.number % len(of_shares)].append(row)
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
        found = hosts.from_writer(lambda: {row.key: cache.get(row.key) for row in rows})
        return {key: Said(**said) for key, said in found.items() if said is not None}

    def together(self, of_shares: list[list[Row]]) -> list[tuple[Row, Said | None]]:
        """Takes a batch of each share's rows, and answers it."""
        each = len(self.shares.rows[0])
        if len(of_shares) == 1:
            rows: list[Row | None] = [*of_shares[0][:each]]
        else:
            rows = [None] * self.batch
            for places, own in zip(self.shares.rows, of_shares, strict=True):
                for place, row in zip(places, own, strict=False):
                    rows[place] = row
        for own in of_shares:
            del own[:each]
        answers = self.decoded(rows)
        if self.cache is not None and hosts.is_writer():
            for row, said in answers:
                self.cache.put(row.key, asdict(said))
        return list(answers)

    def decoded(self, rows: list[Row | None]) -> list[tuple[Row, Said]]:
        """The answers to the rows of a batch; None is a row that nobody asks."""
        model, way = self.model, self.asker.way
        asked = {k: row for k, row in enumerate(rows) if row is not None}
        some = next(iter(asked.values())).request
        requests = [some if row is None else row.request for row in rows]
        begins = model.begins(some)
        with jax.set_mesh(model.mesh):
            batch = batch_of(
                requests,
                model.compressor,
                skip=len(model.prefix) if begins else 0,
                shards=meshes.batch_shards(model.mesh),
                width=model.width,
                pad=model.processor.pad_id,
            )
            started = model.decoder.start(
                meshes.spread(batch, model.mesh, "batch"),
                new_tokens=self.most,
                tokens=model.requested_tokens(way.visual_tokens) if some.pixels else None,
                prefix=model.prefix_pass if begins else None,
            )
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
        text = Text(self.model.processor.tokenizer)
        text.ids = said.ids
        return text.read(stop=said.stopped).strip()


def described(said: Said) -> dict[str, Any]:
    """What a line of answers says of one besides its text."""
    return dict(visual_tokens=said.visual_tokens, new_tokens=len(said.ids), stopped=said.stopped)
