# SPDX-License-Identifier: Apache-2.0
"""Average pooling: the plainest compressor, the baseline that the others have to beat.

B batch  P patches, window-major (raster if it is elastic)  V visual tokens  Z = levels x E
E vit width  D llm width
"""

from jaxtyping import Array, Float

from vlm_jax.compressors.last_level import LastLevel
from vlm_jax.compressors.window import windows
from vlm_jax.compressors.windowed import Windowed


class AveragePool(LastLevel, Windowed):
    """The mean of each window of the last level, then a two-layer MLP.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from vlm_jax import mesh
    >>> from vlm_jax.compressors.method import Interface
    >>> from vlm_jax.compressors.pool import PoolMethod
    >>> PoolMethod.supported(side=12)
    [1, 4, 9, 16, 36, 144]
    >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
    >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
    ...     pool = PoolMethod(tokens=9).build(between, rngs=nnx.Rngs(0))
    ...     pool(jnp.ones((2, 144, 32))).shape
    (2, 9, 64)
    """

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """One visual token per window, windows in raster order; the question is not read."""
        del question
        patches = self.window_major(self.last(levels))
        return self.projector(windows(patches, self.tokens).mean(2))
