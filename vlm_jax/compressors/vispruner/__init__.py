# SPDX-License-Identifier: Apache-2.0
"""VisPruner: the patches that the class token attends to, and others that differ.

V visual tokens (`tokens`)  P patches  E vit width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number
from vlm_jax.compressors.selection import Selection, pairs_flops


@dataclass(frozen=True)
class VisPrunerMethod(Selection):
    """Important patches by the class token's attention, diverse ones of the rest (2412.01818).

    `important_ratio=1` is FasterVLM: important ones alone.
    """

    kind: ClassVar[str] = "vispruner"
    reads: ClassVar[str] = "own_attention"
    important_ratio: float = 0.5

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.vispruner.module import VisPruner

        return VisPruner

    def check(self, interface: Interface) -> None:
        super().check(interface)
        if not 0 <= self.important_ratio <= 1:
            raise ValueError(
                f"compressor.important_ratio={self.important_ratio}: the share of tokens chosen "
                "by attention is 0 to 1"
            )

    @property
    def variant(self) -> str:
        return "" if self.important_ratio == 0.5 else f"{self.important_ratio:g} important"

    @staticmethod
    def important(tokens: Number, ratio: float) -> int:
        """How many of V tokens are chosen by attention: rounded down as published, where 100 x .29
        is 28."""
        return int(tokens * ratio)

    def choice(self, interface: Interface) -> Number:
        """The similarity of every pair of patches that are not important."""
        important = self.important(self.tokens, self.important_ratio)
        if important >= self.tokens:
            return 0
        return pairs_flops(interface.patches - important, interface.width)
