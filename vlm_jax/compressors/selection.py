# SPDX-License-Identifier: Apache-2.0
"""The base of descriptions of methods that keep V of an image's patches, without training.

V visual tokens (`tokens`)  P patches  D llm width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number, Products, Projected, UpToPatches

STRIPS = 4  # of rows, in which products of all pairs are made


@dataclass(frozen=True)
class Selection(UpToPatches, Projected):
    """Any V up to the patches from one model, whose only weights are those of its projector.

    A step of training shows all patches, so that a trained selection is the model without
    compression, and V is chosen when it answers. Selections of different V need not be nested:
    each V that is asked for is compiled once.
    """

    any_tokens: ClassVar[bool] = True
    inelastic: ClassVar[str] = "serves several V as it is"
    selects: ClassVar[bool] = True
    in_place: ClassVar[bool] = False
    # Whether the choice reads the projected patches: all of them are projected then, not V.
    projects_all: ClassVar[bool] = False

    @classmethod
    def supports(cls, side: int, tokens: Number) -> bool:
        return 1 <= tokens <= side**2

    def check(self, interface: Interface) -> None:
        self.check_rows(interface)
        if not 1 <= self.tokens <= interface.patches:
            raise self.impossible(interface, f"any of 1 to {interface.patches}")

    def buckets(self, side: int) -> tuple[int, ...]:
        return tuple(self.supported(side))

    def products(self, interface: Interface, form: str) -> Products:
        """Products of the choice, which have no gradient, and the projector's.

        Where all patches are kept there is no choice.
        """
        rows = interface.patches if self.projects_all else self.tokens
        chooses = self.tokens < interface.patches
        return Products(
            fixed=self.choice(interface) if chooses else 0,
            reading=rows * interface.up,
            other=rows * interface.down,
        )

    def choice(self, interface: Interface) -> Number:
        """FLOPs of the choice of one image's patches."""
        return 0


def strips(rows: int) -> list[tuple[int, int]]:
    """The first row of each strip, and the one after its last."""
    ends = [rows * k // STRIPS for k in range(STRIPS + 1)]
    return [(a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b]


def pairs_flops(rows: int, width: Number) -> Number:
    """FLOPs of the products of all pairs of `rows` rows (`selector.pairs`): each strip with itself
    and those after it, five eighths of all."""
    return sum(2 * (b - a) * (rows - a) * width for a, b in strips(rows))
