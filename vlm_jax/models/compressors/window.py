# SPDX-License-Identifier: Apache-2.0
"""Square windows of patches: the token counts that tile a grid, attention with one query each.

B batch  P patches, window-major  V visual tokens = windows  S patches of one window
E vit width  N heads  H head size
"""

import math

from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.kernels.window_attention import window_attention
from vlm_jax.models.layers import Initializer, Linear, uniform


def tilings(side: int) -> list[int]:
    """Ascending numbers of equal square windows that tile a `side` x `side` grid of patches."""
    return [n * n for n in range(1, side + 1) if side % n == 0]


def check_tokens(kind: str, tokens: int, side: int, supported: list[int]) -> None:
    """Raises, with the token counts that would do, unless `tokens` is among them."""
    if tokens not in supported:
        raise ValueError(
            f"compressor {kind!r} cannot make {tokens} visual tokens from a {side}x{side} patch "
            f"grid: choose one of {supported}"
        )


def window_side(tokens: int, side: int) -> int:
    """Side in patches of each of `tokens` windows on a `side` x `side` grid."""
    return side // math.isqrt(tokens)


def windows(x: Float[Array, "B P *rest"], tokens: int) -> Float[Array, "B V S *rest"]:
    """The patches of each window; patches are window-major, so this is a reshape."""
    return x.reshape(x.shape[0], tokens, x.shape[1] // tokens, *x.shape[2:])


class WindowAttention(nnx.Module):
    """Multi-head attention of one query per window to the patches of that window.

    Every projection is biased. Initialisation is that of torch's MultiheadAttention; `out_init`
    replaces it for the output projection. No residual, no norm, no positions.
    """

    def __init__(
        self, width: int, heads: int, *, rngs: nnx.Rngs, out_init: Initializer | None = None
    ):
        if heads < 1 or width % heads:
            raise ValueError(
                f"compressor.heads={heads} does not divide vit.width={width}: "
                f"choose one of {[n for n in range(1, width + 1) if width % n == 0]}"
            )
        size = width // heads
        # Xavier over the stacked [3 width, width] matrix of the three in-projections.
        inward = dict(
            dims=("embed", "heads", "head"),
            out=("batch", "len", "heads", "head"),
            init=uniform(math.sqrt(6 / (4 * width))),
            rngs=rngs,
        )
        self.query = Linear("BVE,ENH->BVNH", (width, heads, size), **inward)
        self.key = Linear("BPE,ENH->BPNH", (width, heads, size), **inward)
        self.value = Linear("BPE,ENH->BPNH", (width, heads, size), **inward)
        self.out = Linear(
            "BVNH,NHE->BVE",
            (heads, size, width),
            dims=("heads", "head", "embed"),
            out=("batch", "len", "feature"),
            rngs=rngs,
            init=out_init or uniform(width**-0.5),
        )

    def __call__(
        self,
        query: Float[Array, "B V E"],
        keys: Float[Array, "B P E"],
        values: Float[Array, "B P E"],
    ) -> Float[Array, "B V E"]:
        tokens = query.shape[1]
        keys = windows(self.key(keys), tokens)
        values = windows(self.value(values), tokens)
        return self.out(window_attention(self.query(query), keys, values))
