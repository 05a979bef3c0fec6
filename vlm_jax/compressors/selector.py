# SPDX-License-Identifier: Apache-2.0
"""The base of modules that keep V of an image's patches, and what their choices share.

B batch  P patches, raster order  V visual tokens  E channels  Z = levels x E  D llm width
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from vlm_jax import mesh
from vlm_jax.compressors.last_level import LastLevel
from vlm_jax.compressors.matryoshka import Matryoshka
from vlm_jax.compressors.method import Interface, Method
from vlm_jax.compressors.selection import strips
from vlm_jax.layers import rows


class AnyTokens(LastLevel, Matryoshka):
    """Some patches of each image before LLaVA-1.5's projector, the only part with weights."""

    def __init__(self, method: Method, interface: Interface, **options: Any):
        super().__init__(method, interface, **options)
        self.patches, self.buckets = interface.patches, method.buckets(self.side)

    @property
    def keeps_all(self) -> bool:
        """Whether there is nothing to choose."""
        return self.tokens == self.patches


class Selector(AnyTokens):
    """The chosen patches of each image in raster order, projected.

    The choice has no gradient and is made in float32. A method says how to `choose`.
    """

    def __call__(
        self, levels: Float[Array, "B R Y"], question: Any = None
    ) -> Float[Array, "B V D"]:
        """One visual token per chosen patch; `levels` and `question` as the method reads them."""
        features = self.features(levels)
        if self.method.projects_all:
            tokens = self.projector(features)
            return tokens if self.keeps_all else kept(tokens, self.choose(levels, tokens, question))
        if not self.keeps_all:
            features = kept(features, self.choose(levels, features, question))
        return self.projector(features)

    def features(self, levels: Float[Array, "B R Y"]) -> Float[Array, "B P E"]:
        """The last level of the patches."""
        return self.last(levels)

    @abstractmethod
    def choose(
        self, levels: Float[Array, "B R Y"], tokens: Float[Array, "B P D"], question: Any
    ) -> Int[Array, "B V"]:
        """The chosen patches of each image, in any order.

        `tokens` are the projected patches if the method projects all of them, else the features.
        """


def selecting(trained: LastLevel, method: Method) -> LastLevel:
    """`trained`, which shows all patches, with a selection of them before the same projector."""
    module: LastLevel = method.build(trained.interface, rngs=nnx.Rngs(0))
    module.projector = trained.projector
    return module


def each_image(one: Callable, *arrays: Shaped[Array, "B ..."]) -> Any:
    """`one` of each image, on the device that holds it: images are independent.

    Floats enter in float32 and without a gradient.
    """
    batch = mesh.spec("batch")
    # Loops begin with constants, which the check asks to be marked as different on each device.
    batched = jax.shard_map(jax.vmap(one), in_specs=batch, out_specs=batch, check_vma=False)
    return batched(*(jax.sharding.reshard(exact(x), batch) for x in arrays))


def exact(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`x` without a gradient; floats in float32."""
    x = lax.stop_gradient(x)
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def kept(x: Shaped[Array, "B P E"], index: Int[Array, "B V"]) -> Shaped[Array, "B V E"]:
    """The rows of each image at these places, in raster order."""
    index = jax.sharding.reshard(jnp.sort(index, axis=1), jax.P(jax.typeof(x).sharding.spec[0]))
    return rows(x, index)


def unit(x: Float[Array, "*rows E"], least: float = 0.0) -> Float[Array, "*rows E"]:
    """Rows of length one; a row shorter than `least` is divided by that."""
    norm = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
    return x / (jnp.maximum(norm, least) if least else norm)


def products(x: Float[Array, "M E"], y: Float[Array, "N E"]) -> Float[Array, "M N"]:
    """The product of every row of x with every row of y: choices need all of float32's digits."""
    return jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)


def pairs(x: Float[Array, "N E"]) -> Float[Array, "N N"]:
    """The product of every pair of rows, each of most pairs once: the result is symmetric."""
    rows = len(x)
    upper = [jnp.pad(products(x[a:b], x[a:]), ((0, 0), (a, 0))) for a, b in strips(rows)]
    whole = jnp.concatenate(upper)
    strip = jnp.array([k for k, (a, b) in enumerate(strips(rows)) for _ in range(a, b)])
    return jnp.where(strip[:, None] <= strip, whole, whole.T)
