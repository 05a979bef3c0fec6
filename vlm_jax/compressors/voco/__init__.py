# SPDX-License-Identifier: Apache-2.0
"""VoCo-LLaMA: all patches, then summary tokens; what follows reads the summary alone.

V visual tokens (`tokens`), here those of the summary  P patches  D llm width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number, projector_parameters
from vlm_jax.compressors.summary import Summary
from vlm_jax.compressors.tensors import LLAVA, Table, Tensor


@dataclass(frozen=True)
class VocoMethod(Summary):
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

    def visual_tokens(self, rows: int) -> Number:
        """What the LLM reads of an image: every patch, and the summary."""
        return rows + self.tokens

    def parameters(self, interface: Interface) -> int:
        return projector_parameters(interface) + interface.llm_width

    def published(self) -> Table:
        """LLaVA's projector, and the embedding of `<voco>`, which is a row of the LLM's table in
        Yxxxb/VoCo-LLaMA (3b6e14d9)."""
        return LLAVA | {"voco": Tensor((("summary",),))}
