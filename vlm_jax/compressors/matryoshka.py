# SPDX-License-Identifier: Apache-2.0
"""The base of matryoshka methods: one set of weights for several numbers of visual tokens.

V visual tokens
"""

import jax

from vlm_jax.compressors.compressor import Compressor


class Matryoshka(Compressor):
    """A compressor whose weights, and their shapes, are the same for every number of tokens.

    `tokens` is static: each value needs its own compilation. Requests therefore run in the slots of
    a bucket, and the number of slots that count is data.
    """

    def check(self, tokens: int) -> None:
        """Raises ValueError, with the supported numbers, if `tokens` is not one of them."""
        self.method.at(tokens).check(self.interface)

    def at(self, tokens: int) -> "Matryoshka":
        """The same weights with `tokens` visual tokens.

        Raises ValueError, with the supported numbers, if `tokens` is not one of them.
        """
        self.check(tokens)
        other = jax.tree.map(lambda x: x, self)
        other.tokens, other.method = tokens, self.method.at(tokens)
        return other

    def slots(self, tokens: int) -> int:
        """The smallest bucket that holds `tokens` visual tokens; ValueError as for `at`."""
        self.check(tokens)
        return next(bucket for bucket in self.buckets if bucket >= tokens)

    def fold(self) -> "Matryoshka":
        """The same function for inference, with the parts that no image enters precomputed."""
        return self
