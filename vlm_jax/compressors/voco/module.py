# SPDX-License-Identifier: Apache-2.0
"""VoCo-LLaMA's input: every patch through the projector, then the summary tokens.

B batch  P patches  V summary tokens  X = P + V  Z = levels x E  E vit width  D llm width
"""

from flax import nnx

from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.summary_tokens import STD, SummaryTokens
from vlm_jax.compressors.voco import VocoMethod
from vlm_jax.layers import normal, weight


class Voco(SummaryTokens):
    """All patches of the last level, in raster order, and V times one learned token.

    The tokens differ by their positions in the LLM, whose mask makes them a summary. Source: arXiv
    2406.12275 and Yxxxb/VoCo-LLaMA at 3b6e14d9, where the token is a word that is added to the
    vocabulary.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from vlm_jax import mesh
    >>> from vlm_jax.compressors.method import Interface
    >>> from vlm_jax.compressors.voco import VocoMethod
    >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
    >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
    ...     voco = VocoMethod(tokens=2).build(between, rngs=nnx.Rngs(0))
    ...     voco(jnp.ones((2, 144, 32))).shape
    (2, 146, 64)
    """

    def __init__(
        self, method: VocoMethod, interface: Interface, *, rngs: nnx.Rngs, kernels: str = "auto"
    ):
        super().__init__(method, interface, rngs=rngs, kernels=kernels)
        self.summary = weight(rngs, (interface.llm_width,), ("none",), normal(STD))
