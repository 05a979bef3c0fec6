# SPDX-License-Identifier: Apache-2.0
"""The two-layer MLP with exact GELU of every published projector, and two of them on one input.

B batch  V visual tokens (or patches)  E input width  F hidden width  D output width  Y key or value
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax import mesh
from vlm_jax.layers import Initializer, Linear, gelu


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
        """The MLP of x, or of x + `shared`, one vector per row that is added at all positions."""
        return self.down(self.hidden(x, shared))

    def hidden(
        self, x: Float[Array, "B V E"], shared: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B V F"]:
        """The input of the last layer.

        The sum with `shared` is not formed: W (x + s) + b = W x + b + W s, where W s is one product
        per row, and the gradient of s is summed over the positions before the product with W.
        """
        y = self.up(x)
        if shared is not None:
            kernel = self.up.kernel[...].astype(x.dtype)
            per_row = jnp.einsum(
                "BE,EF->BF", shared, kernel, out_sharding=mesh.spec("batch", "mlp")
            )
            y += per_row[:, None]
        return gelu(y)


class KeysAndValues(nnx.Module):
    """Two MLPs of one input, as published for keys and values; their first layers are one product.

    The input, the widest tensor of a compressor, is read once. The two kernels are one parameter,
    because joining them at use would copy them.
    """

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs, init: Initializer | None = None):
        self.up = Linear(
            "BVE,EYF->BVYF",
            (width, 2, out),
            dims=("embed", "none", "mlp"),
            out=("batch", "len", "none", "mlp"),
            init=init,
            rngs=rngs,
        )
        self.key, self.value = (
            Linear(
                "BVF,FD->BVD",
                (out, out),
                dims=("mlp", "embed"),
                out=("batch", "len", "feature"),
                init=init,
                rngs=rngs,
            )
            for _ in range(2)
        )

    def __call__(
        self, x: Float[Array, "B V E"]
    ) -> tuple[Float[Array, "B V D"], Float[Array, "B V D"]]:
        """Keys and values, before their norms."""
        y = self.up(x)
        # Cut before the GELU, whose loops then write what the second layers read.
        return self.key(gelu(y[:, :, 0])), self.value(gelu(y[:, :, 1]))
