# SPDX-License-Identifier: Apache-2.0
"""VoCo-LLaMA: all patches, then summary tokens; what follows reads the summary alone.

V visual tokens (`tokens`), here those of the summary  P patches  D llm width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import (
    Interface,
    Method,
    Number,
    Products,
    projector_parameters,
    tilings,
)
from vlm_jax.compressors.tensors import LLAVA, Table, Tensor


@dataclass(frozen=True)
class VocoMethod(Method):
    """The LLM reads every patch and V summary tokens behind them (arXiv 2406.12275).

    Text behind the summary sees nothing that stands before it, so the keys and values of V tokens
    are what an image leaves. The patches cost a full prefill, once for each image.
    """

    kind: ClassVar[str] = "voco"
    summarizes: ClassVar[bool] = True

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.voco.module import Voco

        return Voco

    @staticmethod
    def supported(side: int) -> list[int]:
        """Any number up to that of the patches of a `side` x `side` grid."""
        return list(range(1, side**2 + 1))

    @classmethod
    def planned(cls, side: int) -> list[int]:
        """The V at which other methods can be compared with it."""
        return tilings(side)

    def visual_tokens(self, rows: int) -> Number:
        """What the LLM reads of an image: every patch, and the summary."""
        return rows + self.tokens

    def parameters(self, interface: Interface) -> int:
        return projector_parameters(interface) + interface.llm_width

    def products(self, interface: Interface, form: str) -> Products:
        rows = interface.rows
        return Products(reading=rows * interface.up, other=rows * interface.down)

    def published(self) -> Table:
        """LLaVA's projector, and the embedding of `<voco>`, which is a row of the LLM's table in
        Yxxxb/VoCo-LLaMA (3b6e14d9)."""
        return LLAVA | {"voco": Tensor((("summary",),))}
