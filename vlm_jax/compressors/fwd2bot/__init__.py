# SPDX-License-Identifier: Apache-2.0
"""Fwd2Bot: the LLM reads all patches once, and what it makes of summary tokens is the image.

V visual tokens (`tokens`)  P patches  D llm width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number, projector_parameters
from vlm_jax.compressors.summary import Summary
from vlm_jax.compressors.tensors import LLAVA, Table, Tensor


@dataclass(frozen=True)
class Fwd2BotMethod(Summary):
    """A first pass of the LLM reads every patch and V summary tokens behind them; its V outputs are
    the visual tokens of a second pass over the row (arXiv 2503.21757).

    They are V vectors of LLM width, whatever the depth: all that is stored of an image. The first
    pass is a prefill of P + V tokens, once for each image. No code is published; what the paper
    leaves open is chosen in docs/decisions/0028-two-passes.md.
    """

    kind: ClassVar[str] = "fwd2bot"
    condenses: ClassVar[bool] = True

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.fwd2bot.module import Fwd2Bot

        return Fwd2Bot

    def condensed(self, rows: int) -> Number:
        return rows + self.tokens

    def parameters(self, interface: Interface) -> int:
        return projector_parameters(interface) + round(self.tokens) * interface.llm_width + 1

    def published(self) -> Table:
        """LLaVA's projector; the other names are ours."""
        return LLAVA | {
            "summary": Tensor((("summary",),), unchanged=True),
            "scale": Tensor((("scale",),)),
        }
