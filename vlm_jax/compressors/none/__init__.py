# SPDX-License-Identifier: Apache-2.0
"""No compression: every patch becomes a visual token, as in LLaVA-1.5."""

from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.compressors.method import Interface, Method, Projected


@dataclass(frozen=True)
class NoneMethod(Projected):
    """All patches of the last level, and a class token that is kept (arXiv 2310.03744)."""

    kind: ClassVar[str] = "none"
    compresses: ClassVar[bool] = False
    selects: ClassVar[bool] = True

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.none.module import Projector

        return Projector

    @staticmethod
    def supported(side: int) -> list[int]:
        """The one number of visual tokens on a `side` x `side` patch grid: its patches."""
        return [side**2]

    @classmethod
    def usual(cls, side: int) -> int:
        return side**2

    @classmethod
    def of_published(cls, llava: Any) -> tuple[Method, tuple[int, ...]]:
        """LLaVA's own projector."""
        return cls(tokens=llava.rows), llava.levels

    def check(self, interface: Interface) -> None:
        if self.tokens != interface.rows:
            raise self.impossible(interface, f"one of {[interface.rows]}")

    def visual_tokens(self, rows: int) -> int:
        """Every row, whatever V a plan asks for."""
        return rows
