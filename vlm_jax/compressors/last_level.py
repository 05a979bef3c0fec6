# SPDX-License-Identifier: Apache-2.0
"""What the methods have in common whose only weights are LLaVA-1.5's projector.

B batch  P patches  Z = levels x E  E vit width
"""

from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.compressors.compressor import Compressor
from vlm_jax.compressors.projector import MLP
from vlm_jax.compressors.window import check_tokens


class LastLevel(Compressor):
    """Reads the last level alone, through a two-layer MLP (arXiv 2310.03744).

    `levels`, `heads` and `query` are accepted so that every compressor is built alike; these have
    no use for them.
    """

    kind: str  # under which name a configuration asks for it

    def __init__(
        self,
        *,
        tokens: int,
        side: int,
        width: int,
        llm_width: int,
        rngs: nnx.Rngs,
        levels: int = 1,
        heads: int = 1,
        query: str = "none",
    ):
        del levels, heads, query
        check_tokens(self.kind, tokens, side, self.supported(side))
        self.tokens, self.side, self.width = tokens, side, width
        self.projector = MLP(width, llm_width, llm_width, rngs=rngs)

    def last(self, levels: Float[Array, "B P Z"]) -> Float[Array, "B P E"]:
        """The last level of what the encoder gives."""
        return levels[..., -self.width :]
