# SPDX-License-Identifier: Apache-2.0
"""The base of modules whose only weights are LLaVA-1.5's projector.

B batch  P patches  Z = levels x E  E vit width
"""

from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.compressors.compressor import Compressor
from vlm_jax.compressors.method import Interface, Method
from vlm_jax.compressors.projector import MLP


class LastLevel(Compressor):
    """Reads the last level alone, through a two-layer MLP (arXiv 2310.03744).

    `kernels` is accepted because all compressors are built with it; it has no effect here.
    """

    def __init__(
        self, method: Method, interface: Interface, *, rngs: nnx.Rngs, kernels: str = "auto"
    ):
        del kernels
        super().__init__(method, interface)
        width = interface.llm_width
        self.projector = MLP(interface.width, width, width, rngs=rngs)

    def last(self, levels: Float[Array, "B P Z"]) -> Float[Array, "B P E"]:
        """The last level of the encoder."""
        return levels[..., -self.width :]
