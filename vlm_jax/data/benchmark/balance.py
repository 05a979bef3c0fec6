# SPDX-License-Identifier: Apache-2.0
"""What makes the benchmark fair: splits that share no content, and answers equally frequent."""

import collections
import random
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from vlm_jax.data.benchmark.questions import Question

SPLITS = ("train", "val", "test")
DRAWS = 8  # tries of one form on one scene
SLACK = 2  # by how much one answer of a form may lead its rarest answer


def split_of(content: tuple) -> str:
    """The only split that may hold this content: 70 % of all train, 10 % val, 20 % test."""
    bucket = zlib.crc32(repr(content).encode()) % 10
    return "train" if bucket < 7 else "val" if bucket < 8 else "test"


class Balance:
    """Chooses among candidate questions so that every answer of a form is about as frequent."""

    def __init__(self):
        self.forms = collections.defaultdict(collections.Counter)
        self.keys = collections.defaultdict(collections.Counter)

    def choose(self, candidates: list[Question]) -> Question | None:
        """The question with the rarest answer in its form and key; None if none keeps balance."""

        def lead(q):
            form, key = self.forms[q.form], self.keys[q.key]
            return (form[q.label] - min(form.values(), default=0), key[q.label] - key.total() / 2)

        best = min(candidates, key=lead, default=None)
        if best is None or lead(best)[0] > SLACK:
            return None
        self.forms[best.form][best.label] += 1
        self.keys[best.key][best.label] += 1
        return best


def ask(
    view: Any,
    forms: Sequence[tuple[Callable[[Any], Question | None], int | float]],
    counts: tuple[int, int],
    balance: Balance,
    rng: random.Random,
    *,
    unbalanced: Collection[Callable] = (),
) -> list[Question]:
    """Questions about what a view shows, no form twice; fewer if balance allows no more.

    `forms` are functions that draw a question or None, each with how often it is tried; `counts`
    the fewest and the most questions. Of `unbalanced` forms the first question drawn is taken.
    """
    tried = sorted(forms, key=lambda f: rng.random() ** (1 / f[1]), reverse=True)
    number, chosen = rng.randint(*counts), []
    for form, _ in tried:
        if form in unbalanced:
            q = form(view)
        else:
            q = balance.choose([q for q in (form(view) for _ in range(DRAWS)) if q is not None])
        if q is not None:
            chosen.append(q)
        if len(chosen) == number:
            break
    return chosen
