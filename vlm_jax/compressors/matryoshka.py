# SPDX-License-Identifier: Apache-2.0
"""What the matryoshka methods share: one set of weights, any of several numbers of visual tokens.

V visual tokens
"""

import jax

from vlm_jax.compressors.compressor import Compressor


class Matryoshka(Compressor):
    """A compressor whose weights, and their shapes, are the same for every number of tokens.

    `tokens` is static: a function compiled for one value is compiled anew for another. Requests
    therefore run in the slots of a bucket, and say as data how many of them count.
    """

    def check(self, tokens: int) -> None:
        """Raises ValueError, with the numbers that would do, for one that it cannot give."""
        self.method.at(tokens).check(self.interface)

    def at(self, tokens: int) -> "Matryoshka":
        """The same weights giving `tokens` visual tokens.

        ValueError, with the numbers that would do, for one that the method cannot give.
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
        """The same function for inference, what does not depend on the image already computed."""
        return self
