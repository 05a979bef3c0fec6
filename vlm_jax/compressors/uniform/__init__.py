# SPDX-License-Identifier: Apache-2.0
"""Patches at equal distances: the control that reads neither image nor question."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.selection import Selection


@dataclass(frozen=True)
class UniformMethod(Selection):
    """V patches spread evenly over the grid."""

    kind: ClassVar[str] = "uniform"
    in_place: ClassVar[bool] = True

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.uniform.module import UniformPatches

        return UniformPatches
