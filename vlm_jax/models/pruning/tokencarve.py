# SPDX-License-Identifier: Apache-2.0
"""TokenCarve: attention and information rank the visual tokens, and similar ones are merged."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.compressors.method import Number
from vlm_jax.models.pruning.description import Pruning, Read


@dataclass(frozen=True)
class TokenCarve(Pruning):
    """TokenCarve (arXiv 2503.10501): one cut by two ranks, then a merge of a third of what is left.

    Tokens are ranked by the last token's attention in the layer before the cut, and by their part
    in the singular values of all of them; `weight` is that of attention. Of the best 1.5 V, in that
    order, the first half stays; of the others the V / 2 that are most similar to one of them are
    merged into it. Tokens keep their positions, and the caches of the layers before the cut lose
    the same tokens.

    Source: ShawnTan86/TokenCarve at a57bd59a, where equal scores, which are certain at weight 0.5,
    fall in any order, and the image starts one token late. Here the lower index comes first.
    """

    kind: ClassVar[str] = "tokencarve"
    forgets: ClassVar[bool] = True

    weight: float = 0.5

    @classmethod
    def usual_layers(cls, depth: int) -> tuple[int, ...]:
        return (2,)

    @property
    def ranked(self) -> int:
        """Visual tokens of a row before the merge."""
        return int(self.tokens[0] / 2 * 3)

    @property
    def merged(self) -> int:
        """Of them, those that are merged into another."""
        return min(int(self.tokens[0] / 2), int(0.5 * self.ranked))

    def check(self, read: Read) -> None:
        super().check(read)
        if len(self.layers) != 1 or self.tokens[0] < 2 or self.ranked > read.visual:
            most = -(-2 * (read.visual + 1) // 3) - 1
            raise ValueError(
                f"pruning.layers={self.layers}, pruning.tokens={self.tokens}: tokencarve cuts once "
                f"and keeps from 2 to {most} of {read.visual} visual tokens, because half as many "
                "more are merged into them"
            )
        if not 0 <= self.weight <= 1:
            raise ValueError(f"pruning.weight={self.weight}: from 0 to 1")
        method = read.compressor
        if method.adaptive or method.serves_several:
            raise ValueError(
                f"pruning.kind='tokencarve' ranks a fixed number of visual tokens, and compressor "
                f"{method.kind!r} gives images different ones: choose fastv or pyramiddrop"
            )

    def cut(self) -> Callable[..., Any]:
        from vlm_jax.models.pruning.cuts import carve

        return functools.partial(carve, ranked=self.ranked, merged=self.merged, weight=self.weight)

    def flops(self, llm: Any, *, length: Number, cached: Number, visual: Number) -> Number:
        """Besides the attention: the decomposition, similarities and the merge."""
        kept = int(0.5 * self.ranked)
        pairs = 4 * kept * (self.ranked - kept) * llm.width
        asked = super().flops(llm, length=length, cached=cached, visual=visual)
        return asked + decomposition_flops(visual, llm.width) + pairs


def decomposition_flops(tokens: Number, width: Number) -> Number:
    """FLOPs of a thin singular value decomposition, by R-SVD (Golub and Van Loan, Matrix
    Computations, section 8.6)."""
    n, m = sorted((tokens, width))
    return 6 * m * n**2 + 20 * n**3
