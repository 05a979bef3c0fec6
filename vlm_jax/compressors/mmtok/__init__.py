# SPDX-License-Identifier: Apache-2.0
"""MMTok: the patches that together cover the words of the question and all other patches.

V visual tokens (`tokens`)  P patches  E vit width  D llm width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number
from vlm_jax.compressors.selection import Selection, pairs_flops

WORDS = 16  # tokens of a question's words that a cost assumes: the smallest shape of a request


@dataclass(frozen=True)
class MMTokMethod(Selection):
    """Each next patch adds most to what is covered of the question and the image (2508.18264)."""

    kind: ClassVar[str] = "mmtok"
    query = "words"
    reads: ClassVar[str] = "image_size"
    projects_all: ClassVar[bool] = True

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.mmtok.module import MMTok

        return MMTok

    def choice(self, interface: Interface) -> Number:
        """Similarities of words and patches, and V passes over them: a difference, a maximum and a
        sum of each number."""
        P, width, llm_width = interface.patches, interface.width, interface.llm_width
        alike = 2 * WORDS * P * llm_width + pairs_flops(P, width)
        return alike + 3 * self.tokens * (WORDS + P) * P
