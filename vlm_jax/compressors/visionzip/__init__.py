# SPDX-License-Identifier: Apache-2.0
"""VisionZip: the patches that the class token attends to, and a few sums of all others.

V visual tokens (`tokens`)  P patches  E vit width
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number
from vlm_jax.compressors.selection import Selection


@dataclass(frozen=True)
class VisionZipMethod(Selection):
    """Dominant tokens by the class token's attention, contextual ones of the rest (2412.04467)."""

    kind: ClassVar[str] = "visionzip"
    reads: ClassVar[str] = "own_keys"

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.visionzip.module import VisionZip

        return VisionZip

    @staticmethod
    def split(tokens: Number) -> tuple[Number, Number]:
        """Dominant tokens, the class token among them, and contextual tokens, of V.

        As published for V = 64, 128 and 192 (54 + 10, 108 + 20, 162 + 30), in that ratio for
        others; V = 1 is the class token.
        """
        contextual = max(1, math.floor(5 * tokens / 32 + 0.5)) if tokens > 1 else 0
        return tokens - contextual, contextual

    def choice(self, interface: Interface) -> Number:
        """The similarity of all others to the contextual tokens, and the sums of their features."""
        dominant, contextual = self.split(self.tokens)
        others = interface.patches + 1 - dominant - contextual
        return 2 * others * contextual * (interface.head + interface.width)
