# SPDX-License-Identifier: Apache-2.0
"""VisionZip: the patches that the class token attends to, and a few sums of all others.

B batch  P patches, raster order  S = P + 1, class token first  V visual tokens  C dominant tokens
E vit width  H head size  D llm width
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.selector import AnyTokens, each_image, products, unit


class VisionZip(AnyTokens):
    """Dominant tokens by the class token's attention, contextual ones of the rest; the question is
    not read.

    Dominant are the class token and the patches that it attends to most in the block whose output
    is the last level. Of the rest, rows at equal distances become contextual tokens: each is its
    own features plus the mean of those rows that are most similar to it, by the mean of their keys
    over the heads. `VisionZipMethod.split` says how many of each V has. The projector follows; it
    reads a class token although it was trained on patches. `levels` are those of ViT's
    `reads="own_keys"`.

    Source: arXiv 2412.04467; dvlab-research/VisionZip at 3151f6df. There V = 1 divides by zero;
    here it is the class token.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.visionzip import VisionZipMethod
        >>> between = Interface(side=4, width=32, levels=1, llm_width=64, heads=4)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     zips = VisionZipMethod(tokens=5).build(between, rngs=nnx.Rngs(0))
        ...     jax.jit(lambda m, x: m(x))(zips, jnp.ones((2, 17, 32 + 8 + 1))).shape
        (2, 5, 64)
    """

    def __call__(
        self, levels: Float[Array, "B S Y"], question: Any = None
    ) -> Float[Array, "B V D"]:
        """Dominant tokens in raster order, the class token first, then contextual ones."""
        del question
        size = self.interface.head
        features = levels[..., -self.width - size - 1 : -size - 1]
        if self.keeps_all:
            return self.projector(features[:, 1:])
        dominant, contextual = self.method.split(self.tokens)

        def one(features, keys, attention):
            return zipped(features, keys, attention[1:], dominant, contextual)[0]

        tokens = each_image(one, features, levels[..., -size - 1 : -1], levels[..., -1])
        return self.projector(tokens.astype(levels.dtype))


def zipped(
    features: Float[Array, "S E"],
    keys: Float[Array, "S H"],
    attention: Float[Array, " P"],
    dominant: int,
    contextual: int,
) -> tuple[Float[Array, "V E"], Int[Array, " C"]]:
    """The tokens of one image before the projector, and which rows are dominant.

    Args:
      features: the last level, class token first.
      keys: of the block that made it, their mean over the heads.
      attention: of the class token to the patches in that block, all heads together.
      dominant, contextual: how many tokens of each kind; the class token is a dominant one.
    """
    _, best = lax.top_k(attention, dominant - 1)
    chosen = jnp.zeros(len(features), bool).at[0].set(True).at[best + 1].set(True)
    order = jnp.argsort(~chosen, stable=True)
    first, rest = order[:dominant], order[dominant:]
    if not contextual:
        return features[first], first
    step = max(1, len(rest) // contextual)
    middle = jnp.arange(contextual) * step
    is_target = jnp.zeros(len(rest), bool).at[middle].set(True)
    targets, others = rest[middle], rest[jnp.argsort(is_target, stable=True)[:-contextual]]
    keys = unit(keys)
    nearest = jnp.argmax(products(keys[others], keys[targets]), axis=1)
    joins = (nearest == jnp.arange(contextual)[:, None]).astype(features.dtype)
    sums = products(joins, features[others].T)
    means = sums / jnp.maximum(joins.sum(1, keepdims=True), 1)
    return jnp.concatenate([features[first], features[targets] + means]), first
