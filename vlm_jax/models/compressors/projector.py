# SPDX-License-Identifier: Apache-2.0
"""The two-layer MLP with exact GELU of every published projector.

B batch  V visual tokens (or patches)  E width in  F width between  D width out
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax import mesh
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

    def __call__(
        self, x: Float[Array, "B V E"], shared: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B V D"]:
        """Of x, or of x + `shared`: one vector per row, added at all its positions."""
        return self.down(self.hidden(x, shared))

    def hidden(
        self, x: Float[Array, "B V E"], shared: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B V F"]:
        """What the last layer reads.

        The sum with `shared` is not formed: W (x + s) + b = W x + b + W s, where W s is one product
        per row, and s's gradient is summed over the positions before it goes through W, not after.
        """
        y = self.up(x)
        if shared is not None:
            kernel = self.up.kernel[...].astype(x.dtype)
            once = jnp.einsum("BE,EF->BF", shared, kernel, out_sharding=mesh.spec("batch", "mlp"))
            y += once[:, None]
        return gelu(y)
