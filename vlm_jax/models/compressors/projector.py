# SPDX-License-Identifier: Apache-2.0
"""The two-layer MLP with exact GELU of every published projector.

B batch  V visual tokens (or patches)  E width in  F width between  D width out
"""

from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.models.layers import Initializer, Linear, gelu


class MLP(nnx.Module):
    """Linear, exact GELU, Linear, both biased (LLaVA-1.5's `mlp2x_gelu`, arXiv 2310.03744).

    `init` draws the two kernels and zeroes the biases; without it both follow torch's default.
    """

    def __init__(
        self, width: int, between: int, out: int, *, rngs: nnx.Rngs, init: Initializer | None = None
    ):
        self.up = Linear(
            "BVE,EF->BVF",
            (width, between),
            dims=("embed", "mlp"),
            out=("batch", "len", "mlp"),
            init=init,
            rngs=rngs,
        )
        self.down = Linear(
            "BVF,FD->BVD",
            (between, out),
            dims=("mlp", "embed"),
            out=("batch", "len", "feature"),
            init=init,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B V E"]) -> Float[Array, "B V D"]:
        return self.down(self.hidden(x))

    def hidden(self, x: Float[Array, "B V E"]) -> Float[Array, "B V F"]:
        """What the last layer reads."""
        return gelu(self.up(x))
