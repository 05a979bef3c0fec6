# SPDX-License-Identifier: Apache-2.0
"""PruMerge and PruMerge+: keep the patches the class token attends to, merge similar ones.

V visual tokens (`tokens`)  P patches  E vit width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number, Products, Projected, tilings

NEIGHBORS = 32  # merged into each selected patch, as published (arXiv 2403.15388 and its code)


@dataclass(frozen=True)
class PruMergeMethod(Projected):
    """The patches that the class token attends to most, each merged with similar ones (2403.15388).

    `tokens=V` selects V - 1 patches of every image. `tokens=0` is adaptive: V is then the slots,
    all of which are computed. An outlier lies above the third quartile.
    """

    kind: ClassVar[str] = "prumerge"
    in_place: ClassVar[bool] = False
    reads: ClassVar[str] = "keys"

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.prumerge.module import PruMerge

        return PruMerge

    @staticmethod
    def supported(side: int) -> list[int]:
        """Ascending numbers of visual tokens on a `side` x `side` patch grid; 0 is adaptive."""
        return list(range(side**2 + 1))

    @classmethod
    def planned(cls, side: int) -> list[int]:
        """The V at which other methods can be compared with it."""
        return tilings(side)

    @classmethod
    def supports(cls, side: int, tokens: Number) -> bool:
        """Any number; a number that rounding leaves out has a neighbor of the same cost."""
        return True

    @property
    def adaptive(self) -> bool:
        return self.tokens == 0

    def check(self, interface: Interface) -> None:
        self.check_rows(interface)
        if self.tokens not in (numbers := self.supported(interface.side)):
            raise self.impossible(
                interface, f"0 (as many as each image needs) or one of {numbers[1:]}"
            )

    def visual_tokens(self, rows: int) -> Number:
        return self.tokens or self.most(rows)

    @staticmethod
    def selected(tokens: int) -> int:
        """The number of patches selected by attention, for `tokens` visual tokens."""
        return tokens - 1

    @staticmethod
    def most(patches: int) -> int:
        """The most tokens of an image of `patches` patches in the adaptive form."""
        return most_outliers(patches) + 1

    def products(self, interface: Interface, form: str) -> Products:
        """Each kept token adds its most similar patches; the last token adds all others.

        Adding is a product with a matrix that is zero for all others. The published code scores
        every pair of tokens. The scores count for the compressor, although the encoder computes
        them.
        """
        published = form == "published"
        V, P, width = self.visual_tokens(interface.rows), interface.patches, interface.width
        scores = 2 * (P + 1) * (P + 1 if published else 1) * width
        alike = 2 * (V - 1) * P * width
        added = 2 * (V - 1) * (NEIGHBORS if published else P) * width
        fixed = scores + alike + added + 2 * P * width
        return Products(fixed=fixed, reading=V * interface.up, other=V * interface.down)


@dataclass(frozen=True)
class PruMergePlusMethod(PruMergeMethod):
    """PruMerge that also keeps every n-th patch in raster order; `tokens=0` may keep them all."""

    kind: ClassVar[str] = "prumerge_plus"

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.prumerge.module import PruMergePlus

        return PruMergePlus

    @staticmethod
    def supported(side: int) -> list[int]:
        """Ascending numbers of visual tokens on a `side` x `side` patch grid; 0 is adaptive."""
        patches = side**2
        every = (k for k in range(1, patches // 2 + 1) if len(evenly(patches, k)) == k)
        return [0, *(2 * k + 1 for k in every)]

    @staticmethod
    def selected(tokens: int) -> int:
        """The number of patches selected by attention, for `tokens` visual tokens."""
        return (tokens - 1) // 2

    @staticmethod
    def most(patches: int) -> int:
        """The most tokens of an image of `patches` patches in the adaptive form."""
        return patches + 1


def evenly(patches: int, count: int) -> range:
    """About `count` patches at equal distances, never the last patch, as published."""
    step = patches // count
    return range(step // 2, patches - 1, step)


def most_outliers(patches: int) -> int:
    """The largest number of `patches` values that can lie above their third quartile."""
    return patches - 1 - 3 * (patches - 1) // 4
