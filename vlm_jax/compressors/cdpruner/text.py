# SPDX-License-Identifier: Apache-2.0
"""CLIP's text tower: a question as one vector of the space in which it is compared with images.

B batch  U tokens  E width of the tower  C width of the space
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax import mesh
from vlm_jax.compressors.cdpruner import MLP, CDPrunerMethod
from vlm_jax.layers import Block, LayerNorm, Linear, normal, rows, stack, weight

EPS = 1e-5  # of every norm of CLIP


class TextTower(nnx.Module):
    """CLIP's causal text tower (arXiv 2103.00020), whose last token is read as the whole text."""

    def __init__(self, method: CDPrunerMethod, *, rngs: nnx.Rngs):
        width = method.text_width
        self.words = weight(rngs, (method.text_vocab, width), ("none", "none"), normal(0.02))
        self.position = weight(rngs, (method.text_length, width), ("none", "none"), normal(0.01))
        self.blocks = stack(
            lambda r: Block(
                width, MLP * width, method.text_heads, eps=EPS, activation="quick_gelu", rngs=r
            ),
            method.text_depth,
            rngs,
        )
        self.norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.out = Linear(
            "BE,EC->BC",
            (width, method.clip_width),
            dims=("embed", "none"),
            out=("batch", "feature"),
            bias=False,
            rngs=rngs,
        )

    def __call__(self, ids: Int[Array, "B U"], length: Int[Array, "B"]) -> Float[Array, "B C"]:
        """The vector of each text, in float32; its first `length` ids begin with the start token
        and end with the end token. Ids past the tower's positions are not read."""
        ids = ids[:, : self.position.shape[0]]
        hidden = mesh.spec("batch", "len", "feature")
        x = self.words[...].astype(jnp.float32).at[ids].get(out_sharding=hidden)
        x = x + self.position[...].astype(jnp.float32)[: ids.shape[1]]
        place = jnp.arange(ids.shape[1])
        seen = place <= place[:, None]
        x, _ = lax.scan(lambda x, block: (block(x, seen), None), x, self.blocks)
        last = jax.sharding.reshard(jnp.minimum(length, ids.shape[1]) - 1, mesh.spec("batch"))
        return self.out(self.norm(rows(x, last[:, None])[:, 0]))
