# SPDX-License-Identifier: Apache-2.0
"""DivPrune: the patches that are farthest from each other."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number
from vlm_jax.compressors.selection import Selection, pairs_flops


@dataclass(frozen=True)
class DivPruneMethod(Selection):
    """Each next patch has the largest distance to its nearest chosen one (arXiv 2503.02175)."""

    kind: ClassVar[str] = "divprune"
    projects_all: ClassVar[bool] = True

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.divprune.module import DivPrune

        return DivPrune

    def choice(self, interface: Interface) -> Number:
        """The distance of every pair."""
        return pairs_flops(interface.patches, interface.llm_width)
