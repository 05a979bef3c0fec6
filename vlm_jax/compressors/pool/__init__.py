# SPDX-License-Identifier: Apache-2.0
"""Average pooling: the plainest compressor, the baseline that the others have to beat."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.elastic import Elastic
from vlm_jax.compressors.method import Projected


@dataclass(frozen=True)
class PoolMethod(Elastic, Projected):
    """The mean of each window of the last level, then a two-layer MLP."""

    kind: ClassVar[str] = "pool"

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.pool.module import AveragePool

        return AveragePool
