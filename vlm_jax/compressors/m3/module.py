# SPDX-License-Identifier: Apache-2.0
"""M3: the projected patches, averaged over windows of any side that tiles the grid.

B batch  P patches, raster order  V visual tokens  Z = levels x E  E vit width  F = D  D llm width
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax import mesh
from vlm_jax.compressors.last_level import LastLevel
from vlm_jax.compressors.matryoshka import Matryoshka
from vlm_jax.compressors.method import Interface, Method


class M3(LastLevel, Matryoshka):
    """LLaVA-1.5's projector, its outputs averaged over windows of patches (arXiv 2405.17430).

    Averages are taken before the projector's last layer, which is linear: the same result from V
    rows instead of all patches. There are no new weights: a trained LLaVA-1.5 is an M3 to train on.
    `scales` are the numbers of tokens that every training step uses; () stands for `nested`.

    Source: mu-cai/matryoshka-mm at ec30cd37. There other numbers of tokens are possible too, by
    cropping the image or rounded to another number; here they are refused.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.m3 import M3Method
        >>> from vlm_jax.compressors.method import Interface
        >>> M3Method.supported(side=12), M3Method.nested(side=12)
        ([1, 4, 9, 16, 36, 144], (1, 9, 36, 144))
        >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     m3 = M3Method(tokens=9).build(between, rngs=nnx.Rngs(0))
        ...     m3(jnp.ones((2, 144, 32))).shape, m3.at(36)(jnp.ones((2, 144, 32))).shape
        ((2, 9, 64), (2, 36, 64))
    """

    def __init__(self, method: Method, interface: Interface, **options: Any):
        super().__init__(method, interface, **options)
        self.buckets, self.scales = method.buckets(self.side), method.trained_tokens(self.side)

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """One visual token per window, windows in raster order; the question is not read."""
        del question
        return self.projector.down(pool(self.hidden(levels), self.tokens))

    def hidden(self, levels: Float[Array, "B P Z"]) -> Float[Array, "B P F"]:
        """The input of the projector's last layer for every patch, which is averaged."""
        return self.projector.hidden(self.last(levels))

    def every_scale(self, levels: Float[Array, "B P Z"]) -> list[Float[Array, "B V D"]]:
        """The visual tokens of each of `scales`: one pass through each layer for all of them."""
        pooled = pyramid(self.hidden(levels), self.scales)
        rows = self.projector.down(jnp.concatenate(pooled, axis=1))
        stops = [sum(self.scales[: i + 1]) for i in range(len(self.scales) - 1)]
        return jnp.split(rows, stops, axis=1)


def pyramid(x: Float[Array, "B P F"], scales: Sequence[int]) -> list[Float[Array, "B V F"]]:
    """The averages of each scale, from the smallest scale that it divides, else from x."""
    averages = {x.shape[1]: x}
    for tokens in sorted(set(scales), reverse=True):
        n = math.isqrt(tokens)
        finer = min(count for count in averages if math.isqrt(count) % n == 0)
        averages[tokens] = pool(averages[finer], tokens)
    return [averages[tokens] for tokens in scales]


def pool(x: Float[Array, "B P F"], tokens: int) -> Float[Array, "B V F"]:
    """The mean of each of `tokens` square windows of a raster grid, windows in raster order."""
    batch, patches, width = x.shape
    if tokens == patches:
        return x
    n, side = math.isqrt(tokens), math.isqrt(patches)
    cut = mesh.spec("batch", "len", "len", "len", "len", "mlp")
    grid = jnp.reshape(x, (batch, n, side // n, n, side // n, width), out_sharding=cut)
    whole = mesh.spec("batch", "len", "mlp")
    return jnp.reshape(grid.mean((2, 4)), (batch, tokens, width), out_sharding=whole)
