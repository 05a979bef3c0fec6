# SPDX-License-Identifier: Apache-2.0
"""DivPrune: the patches that are farthest from each other.

B batch  P patches, raster order  V visual tokens  Y channels of the encoder  D llm width
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.selector import Selector, each_image, pairs, unit


class DivPrune(Selector):
    """Each next patch has the largest distance to its nearest chosen one; the question is not read.

    Distances are 1 - cosine of the projected patches. The first patch is the one whose nearest
    neighbor is farthest. A choice of V is the first V of any larger one.

    Source: arXiv 2503.02175; vbdi/divprune at 799e2d95. There the choice of a batch's first row is
    applied to all rows, and a patch that has exact copies may be chosen twice; here each image has
    its own choice of V different patches.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.divprune import DivPruneMethod
        >>> from vlm_jax.compressors.method import Interface
        >>> between = Interface(side=4, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     prune = DivPruneMethod(tokens=5).build(between, rngs=nnx.Rngs(0))
        ...     jax.jit(lambda m, x: m(x))(prune, jnp.ones((2, 16, 32))).shape
        (2, 5, 64)
    """

    def choose(
        self, levels: Float[Array, "B P Y"], tokens: Float[Array, "B P D"], question: Any
    ) -> Int[Array, "B V"]:
        del levels, question
        return each_image(functools.partial(select, count=self.tokens), tokens)


def select(tokens: Float[Array, "P D"], count: int) -> Int[Array, " V"]:
    """`count` patches of one image in the order in which they are chosen."""
    rows = unit(tokens)
    distance = 1 - pairs(rows)
    patch = jnp.arange(len(tokens))
    nearest = jnp.where(patch[:, None] == patch, jnp.inf, distance).min(1)
    first = jnp.argmax(nearest)

    def step(i, state):
        order, least = state
        order = order.at[i].set(jnp.argmax(least))
        # The least distance of a chosen patch stays -inf: it is never chosen again.
        least = jnp.minimum(least, distance[order[i]]).at[order[i]].set(-jnp.inf)
        return order, least

    order = jnp.zeros(count, jnp.int32).at[0].set(first)
    state = order, distance[first].at[first].set(-jnp.inf)
    return lax.fori_loop(1, count, step, state)[0]
