# SPDX-License-Identifier: Apache-2.0
"""Downsampling: a smaller image has fewer patches, and the encoder itself becomes cheaper.

B batch  V visual tokens  Z = levels x E  E vit width  D llm width
"""

from jaxtyping import Array, Float

from vlm_jax.compressors.last_level import LastLevel


class Downsample(LastLevel):
    """The image is shrunk to V patches before it is encoded; then a two-layer MLP.

    The baseline that beats many compressors (arXiv 2510.07143), and the only one whose encoder
    costs less with fewer tokens. `shrink` tells the encoder what to do (`ViT`): each pixel becomes
    the mean of a square, and the position table is interpolated to the smaller grid. The encoder
    is the one that was trained on whole images.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.downsample import DownsampleMethod
        >>> from vlm_jax.compressors.method import Interface
        >>> DownsampleMethod.supported(side=12)
        [1, 4, 9, 16, 36, 144]
        >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     small = DownsampleMethod(tokens=9).build(between, rngs=nnx.Rngs(0))
        ...     small.shrink, small(jnp.ones((2, 9, 32))).shape
        (4, (2, 9, 64))
    """

    def __call__(
        self,
        levels: Float[Array, "B V Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """One visual token per patch of the shrunk image; the question is not read."""
        del question
        if levels.shape[1] != self.tokens:
            raise ValueError(
                f"features of {levels.shape[1]} patches, and downsample with "
                f"compressor.tokens={self.tokens} reads those of an image that was shrunk to as "
                f"many: encode with ViT's shrink={self.shrink}"
            )
        return self.projector(self.last(levels))
