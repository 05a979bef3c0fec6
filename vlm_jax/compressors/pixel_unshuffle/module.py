# SPDX-License-Identifier: Apache-2.0
"""Pixel unshuffle: the patches of a window side by side in one token, then an MLP.

B batch  P patches, window-major  V visual tokens  Z = levels x E  E vit width  D llm width
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax import mesh
from vlm_jax.compressors.compressor import Compressor
from vlm_jax.compressors.method import Interface, window_side
from vlm_jax.compressors.pixel_unshuffle import PixelUnshuffleMethod
from vlm_jax.compressors.projector import MLP
from vlm_jax.layers import LayerNorm

EPS = 1e-5  # torch's default, as published


class PixelUnshuffle(Compressor):
    """The patches of each window side by side in one token, then LayerNorm and a two-layer MLP.

    Only the last level is read, and no question. Window-major patches make it a reshape.

    Source: `pixel_shuffle` and `mlp1` of OpenGVLab/InternVL at 2410d1db (arXiv 2404.16821).

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.pixel_unshuffle import PixelUnshuffleMethod
        >>> between = Interface(side=4, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     quarter = PixelUnshuffleMethod(tokens=4).build(between, rngs=nnx.Rngs(0))
        ...     quarter.window, quarter(jnp.ones((2, 16, 32))).shape
        (2, (2, 4, 64))
    """

    def __init__(
        self,
        method: PixelUnshuffleMethod,
        interface: Interface,
        *,
        rngs: nnx.Rngs,
        kernels: str = "auto",
    ):
        del kernels
        super().__init__(method, interface)
        self.window = window_side(self.tokens, self.side)
        width, llm_width = self.window**2 * self.width, interface.llm_width
        self.norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.projector = MLP(width, llm_width, llm_width, rngs=rngs)

    def __call__(
        self, levels: Float[Array, "B P Z"], question: Any = None
    ) -> Float[Array, "B V D"]:
        """One visual token per window, windows in raster order; in version 1 transposed."""
        del question
        x = levels[..., -self.width :]
        x = jnp.reshape(
            x, (len(x), self.tokens, -1), out_sharding=mesh.spec("batch", "len", "feature")
        )
        if self.method.ps_version == "v1":
            n = math.isqrt(self.tokens)
            x = x[:, jnp.arange(self.tokens).reshape(n, n).T.reshape(-1)]
        return self.projector(self.norm(x))
