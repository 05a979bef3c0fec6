# SPDX-License-Identifier: Apache-2.0
"""No compression: every patch becomes a visual token, as in LLaVA-1.5.

B batch  P patches  V visual tokens  Z = levels x E  E vit width  D llm width
"""

from jaxtyping import Array, Float

from vlm_jax.compressors.last_level import LastLevel


class Projector(LastLevel):
    """All patches of the last level, in raster order, through a two-layer MLP (arXiv 2310.03744).

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from vlm_jax import mesh
    >>> from vlm_jax.compressors.method import Interface
    >>> from vlm_jax.compressors.none import NoneMethod
    >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
    >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
    ...     keep = NoneMethod(tokens=144).build(between, rngs=nnx.Rngs(0))
    ...     keep(jnp.ones((2, 144, 32))).shape
    (2, 144, 64)
    """

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """One visual token per patch; the question is not read."""
        del question
        return self.projector(self.last(levels))
