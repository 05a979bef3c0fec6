# SPDX-License-Identifier: Apache-2.0
"""Random patches: the control that a selection has to beat.

B batch  P patches, raster order  V visual tokens  Z = levels x E  E vit width
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from vlm_jax.compressors.hashing import fmix, joined
from vlm_jax.compressors.selector import Selector, each_image

GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio, and its neighbor, both odd
INDEX = 0x9E3779B9


class RandomPatches(Selector):
    """V patches drawn from a seed and the image's pixels; the question is not read.

    The same image has the same tokens in any batch, and those of V are among those of any larger
    number. `levels` are those of ViT's `reads="image_id"`.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.random import RandomMethod
        >>> between = Interface(side=4, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     draw = RandomMethod(tokens=5).build(between, rngs=nnx.Rngs(0))
        ...     jax.jit(lambda m, x: m(x))(draw, jnp.ones((2, 16, 32 + 2))).shape
        (2, 5, 64)
    """

    def features(self, levels: Float[Array, "B P Y"]) -> Float[Array, "B P E"]:
        return levels[..., -self.width - 2 : -2]

    def choose(
        self, levels: Float[Array, "B P Y"], tokens: Float[Array, "B P E"], question: Any
    ) -> Int[Array, "B V"]:
        del tokens, question
        one = functools.partial(
            select, seed=self.method.selection_seed, patches=self.patches, count=self.tokens
        )
        return each_image(one, joined(levels[:, 0, -2:]))


def select(image: UInt32[Array, ""], *, seed: int, patches: int, count: int) -> Int[Array, " V"]:
    """`count` of an image's patches, in the order in which they are drawn.

    Each patch has a rank from its index, the seed and the image; all ranks differ, because every
    step is a bijection of 32 bits.
    """
    key = jnp.uint32(seed) * jnp.uint32(GOLDEN) + fmix(image)
    ranks = fmix(jnp.arange(patches, dtype=jnp.uint32) * jnp.uint32(INDEX) + key)
    return jnp.argsort(ranks)[:count].astype(jnp.int32)
