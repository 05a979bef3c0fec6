# SPDX-License-Identifier: Apache-2.0
"""Fwd2Bot's input of the first pass, and what its output becomes in the second.

B batch  P patches  V visual tokens  X = P + V  Z = levels x E  E vit width  D llm width
"""

from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.compressors.fwd2bot import Fwd2BotMethod
from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.summary_tokens import STD, SummaryTokens
from vlm_jax.layers import constant, normal, weight


class Fwd2Bot(SummaryTokens):
    """All patches of the last level, in raster order, and V learned tokens; not V tokens yet.

    A `VLM` runs its LLM over them and takes what `handed` makes of the result. Source: arXiv
    2503.21757, as far as it says.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from vlm_jax import mesh
    >>> from vlm_jax.compressors.fwd2bot import Fwd2BotMethod
    >>> from vlm_jax.compressors.method import Interface
    >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
    >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
    ...     module = Fwd2BotMethod(tokens=2).build(between, rngs=nnx.Rngs(0))
    ...     x = module(jnp.ones((1, 144, 32)))
    ...     x.shape, module.handed(x).shape
    ((1, 146, 64), (1, 2, 64))
    """

    def __init__(
        self, method: Fwd2BotMethod, interface: Interface, *, rngs: nnx.Rngs, kernels: str = "auto"
    ):
        super().__init__(method, interface, rngs=rngs, kernels=kernels)
        width = interface.llm_width
        self.summary = weight(rngs, (method.tokens, width), ("none", "none"), normal(STD))
        # Hidden states behind the final norm are of order one; words are that much smaller.
        self.scale = weight(rngs, (1,), ("none",), constant(width**-0.5))

    def handed(self, hidden: Float[Array, "B X D"]) -> Float[Array, "B V D"]:
        """The visual tokens: the normed hidden states of the summary tokens, scaled."""
        return self.scale[...].astype(hidden.dtype) * hidden[:, -self.tokens :]
