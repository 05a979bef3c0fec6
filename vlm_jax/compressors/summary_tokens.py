# SPDX-License-Identifier: Apache-2.0
"""The base of modules that give all patches and V summary tokens behind them.

B batch  P patches  V summary tokens  X = P + V  Z = levels x E  E vit width  D llm width
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax import mesh
from vlm_jax.compressors.last_level import LastLevel

STD = 0.02  # of the summary tokens, as of new words of a Llama


class SummaryTokens(LastLevel):
    """All patches of the last level, in raster order, and V tokens; a module draws `summary`."""

    summary: nnx.Param  # [D], the same for all V, or [V D]

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B X D"]:
        """One token per patch, then the summary tokens; the question is not read."""
        del question
        patches = self.projector(self.last(levels))
        summary = jnp.broadcast_to(
            self.summary[...].astype(patches.dtype),
            (len(patches), self.method.tokens, patches.shape[2]),
            out_sharding=mesh.spec("batch", "len", "feature"),
        )
        return jnp.concatenate([patches, summary], axis=1)
