# SPDX-License-Identifier: Apache-2.0
"""VisPruner: the patches that the class token attends to, and others that differ.

B batch  P patches, raster order  V visual tokens  R = patches that are not important
Y channels of the encoder  E vit width
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.selector import Selector, each_image, pairs, unit
from vlm_jax.compressors.vispruner import VisPrunerMethod

DROPPED = 8  # of each round, as published


class VisPruner(Selector):
    """Important patches by the class token's attention, diverse ones of the rest; the question is
    not read.

    The attention is that of the block whose output is the last level. The rest loses the patches
    that are most similar to others, a few in each round, until as many are left as are needed.
    `levels` are those of ViT's `reads="own_attention"`.

    Source: arXiv 2412.01818; Theia-4869/VisPruner at aefa01ad. That stops with an error for many V
    (1 to 4, 6 to 8, 10, 11, 14, 15 of 576 patches), where a round has an odd number of patches;
    here every V works, and where both do the result is the same.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.vispruner import VisPrunerMethod
        >>> between = Interface(side=4, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     prune = VisPrunerMethod(tokens=5).build(between, rngs=nnx.Rngs(0))
        ...     jax.jit(lambda m, x: m(x))(prune, jnp.ones((2, 16, 32 + 1))).shape
        (2, 5, 64)
    """

    def features(self, levels: Float[Array, "B P Y"]) -> Float[Array, "B P E"]:
        return levels[..., -self.width - 1 : -1]

    def choose(
        self, levels: Float[Array, "B P Y"], tokens: Float[Array, "B P E"], question: Any
    ) -> Int[Array, "B V"]:
        del question
        one = functools.partial(select, count=self.tokens, ratio=self.method.important_ratio)
        return each_image(one, tokens, levels[..., -1])


def select(
    features: Float[Array, "P E"], attention: Float[Array, " P"], *, count: int, ratio: float
) -> Int[Array, " V"]:
    """`count` patches of one image: the important ones, then the diverse ones."""
    important = VisPrunerMethod.important(count, ratio)
    order = jnp.argsort(-attention, stable=True)
    if important == count:
        return order[:count]
    rest = order[important:]
    rows = unit(features[rest])
    diverse = thinned(pairs(rows), count - important)
    return jnp.concatenate([order[:important], rest[diverse]])


def thinned(similarity: Float[Array, "R R"], count: int) -> Int[Array, " K"]:
    """Which `count` rows are left when each round drops some that are most similar to others.

    A round splits those left by their place: of the even ones the most similar to any odd one are
    dropped, and the others come first in the next round, the most similar first. The list keeps
    its length in memory; what is past its end counts for nothing.
    """
    rows = len(similarity)
    half = (rows + 1) // 2
    place = jnp.arange(rows)
    if rows == count:
        return place

    def drop(live, round):
        length, dropped = round
        even, odd = live[0::2], live[1::2]
        evens, odds = (length + 1) // 2, length // 2
        # Added, because the list past its end repeats rows.
        is_odd = jnp.zeros(rows, jnp.int32).at[odd].add(jnp.arange(rows // 2) < odds)
        most = jnp.where(is_odd > 0, similarity[even], -jnp.inf).max(1)
        most = jnp.where(jnp.arange(half) < evens, most, -jnp.inf)
        even = even[jnp.argsort(-most, stable=True)]
        first = evens - dropped
        live = jnp.where(
            place < first,
            even[jnp.minimum(place + dropped, half - 1)],
            odd[jnp.clip(place - first, 0, rows // 2 - 1)],
        )
        return live, None

    return lax.scan(drop, place, jnp.array(rounds(rows, count)))[0][:count]


def rounds(rows: int, count: int) -> list[tuple[int, int]]:
    """The number of rows before each round, and how many the round drops."""
    found = []
    while rows > count:
        dropped = min(DROPPED, rows - count, (rows + 1) // 2)
        found.append((rows, dropped))
        rows -= dropped
    return found
