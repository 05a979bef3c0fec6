# SPDX-License-Identifier: Apache-2.0
"""Random patches: the control that a selection has to beat."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.selection import Selection


@dataclass(frozen=True)
class RandomMethod(Selection):
    """V patches drawn from a seed and the image's pixels: the same image has the same tokens."""

    kind: ClassVar[str] = "random"
    reads: ClassVar[str] = "image_id"
    selection_seed: int = 0

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.random.module import RandomPatches

        return RandomPatches
