# SPDX-License-Identifier: Apache-2.0
"""The base of descriptions of windowed methods that one training can make for several V.

V visual tokens (`tokens`)
"""

import math
from dataclasses import dataclass, field, replace

from vlm_jax.compressors.method import Interface, Method, Number


def rectangles(side: int) -> dict[int, tuple[int, int]]:
    """Ascending V -> rows and columns in patches of each of V equal windows on a square grid.

    Of the windows that give V those that are most nearly square, and of two that are alike the
    taller: lines of text run across.
    """
    parts = [n for n in range(1, side + 1) if side % n == 0]
    found: dict[int, tuple[int, int]] = {}
    for rows, columns in sorted(
        ((r, c) for r in parts for c in parts), key=lambda w: (abs(math.log(w[0] / w[1])), -w[0])
    ):
        found.setdefault(side**2 // (rows * columns), (rows, columns))
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Elastic(Method):
    """A windowed method with a form in which no weight depends on V.

    `elastic` names the V of which each step of align and finetune runs one, so that one model
    serves them all (as TokenFLEX draws V, arXiv 2504.03154); (): the model has the one V. Its
    windows may be rectangles, those of one V are squares.
    """

    elastic: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def serves_several(self) -> bool:
        return bool(self.elastic)

    @property
    def variant(self) -> str:
        return "elastic" if self.elastic else ""

    def check(self, interface: Interface) -> None:
        if not self.elastic:
            super().check(interface)
            return
        self.check_rows(interface)
        supported = list(rectangles(interface.side))
        if wrong := [V for V in self.elastic if V not in supported]:
            side = interface.side
            raise ValueError(
                f"compressor.elastic={self.elastic}: {self.kind} cannot make {wrong[0]} visual "
                f"tokens from a {side}x{side} patch grid: choose of {supported}"
            )
        if any(b <= a for a, b in zip(self.elastic, self.elastic[1:], strict=False)):
            raise ValueError(f"compressor.elastic={self.elastic}: give V in ascending order")
        if self.tokens not in self.elastic:
            raise ValueError(
                f"this {self.kind} gives the V of compressor.elastic={self.elastic}, not "
                f"{self.tokens}: choose one of them"
            )

    def fixed(self, tokens: Number) -> "Elastic":
        return replace(self, tokens=tokens, elastic=(tokens,))

    def given(self, side: int) -> list[int]:
        return list(self.elastic) or super().given(side)

    def buckets(self, side: int) -> tuple[int, ...]:
        return self.elastic

    def drawn_tokens(self, side: int) -> tuple[int, ...]:
        return self.elastic
