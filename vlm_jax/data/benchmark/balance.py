# SPDX-License-Identifier: Apache-2.0
"""What makes the benchmark fair: splits that share no content, and answers equally frequent."""

import collections
import zlib

from vlm_jax.data.benchmark.questions import Question

SPLITS = ("train", "val", "test")
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
