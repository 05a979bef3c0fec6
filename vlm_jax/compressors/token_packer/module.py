# SPDX-License-Identifier: Apache-2.0
"""TokenPacker: the downsampled last level asks, every window of all levels answers.

B batch  P patches, window-major (raster if it is elastic)  V visual tokens  Z = levels x E
E vit width  D llm width
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax import mesh
from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.projector import MLP, KeysAndValues
from vlm_jax.compressors.token_packer import TokenPackerMethod
from vlm_jax.compressors.window import WindowAttention
from vlm_jax.compressors.windowed import Windowed
from vlm_jax.layers import LayerNorm, Linear, normal

EPS = 1e-6  # of every LayerNorm here, as published
STD = 0.02  # of every published kernel but the attention's in-projections, at encoder width 1024


class TokenPacker(Windowed):
    """Windowed cross-attention whose queries are the bilinear downsampling of the last level.

    No weight depends on the number of tokens; linear layers start with zero biases.

    Source: arXiv 2407.02392; `mm_projector` of CircleRadon/TokenPacker at 771a16e7.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.token_packer import TokenPackerMethod
        >>> between = Interface(side=12, width=32, levels=2, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     packer = TokenPackerMethod(tokens=4, heads=4).build(between, rngs=nnx.Rngs(0))
        ...     jax.jit(lambda m, x: m(x))(packer, jnp.ones((2, 144, 64))).shape
        (2, 4, 64)
        >>> packer.window
        6
    """

    def __init__(
        self,
        method: TokenPackerMethod,
        interface: Interface,
        *,
        rngs: nnx.Rngs,
        kernels: str = "auto",
    ):
        super().__init__(method, interface)
        width, llm_width, tokens = interface.width, interface.llm_width, self.tokens
        # The published gain at any width: narrow demonstration encoders would start at almost zero.
        init = normal(STD * (1024 / width) ** 0.5)
        self.query = Linear(
            "BVE,EF->BVF",
            (width, width),
            dims=("embed", "none"),
            bias=False,
            out=("batch", "len", "feature"),
            init=init,
            rngs=rngs,
        )
        self.query_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.keys_values = KeysAndValues(interface.levels * width, width, init=init, rngs=rngs)
        self.key_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.value_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.attention = WindowAttention(
            width,
            method.heads,
            tokens=tokens,
            patches=interface.patches,
            kernels=kernels,
            out_init=init,
            rngs=rngs,
        )
        self.projector = MLP(width, llm_width, llm_width, init=init, rngs=rngs)

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """One visual token per window, windows in raster order; the question is not read."""
        del question
        levels = self.window_major(levels)
        return self.projector(self.compress(levels[..., -self.width :], levels))

    def compress(
        self,
        feature: Float[Array, "B P E"],
        levels: Float[Array, "B P Z"],
    ) -> Float[Array, "B V E"]:
        """The visual tokens before the projector, from the query's feature and the keys' levels."""
        query = self.query_norm(self.query(self.downsample(feature)))
        keys, values = self.keys_values(levels)
        return self.attention(query, self.key_norm(keys), self.value_norm(values))

    def downsample(self, x: Float[Array, "B P E"]) -> Float[Array, "B V E"]:
        """Bilinear interpolation without antialias: the center of each window, in float32.

        One patch where a side of the window is odd, the mean of the middle two where it is even.
        """
        rows, columns = self.span
        grid = jnp.reshape(
            x,
            (x.shape[0], self.tokens, rows, columns, x.shape[2]),
            out_sharding=mesh.spec("batch", "len", "len", "len", "feature"),
        )
        middle, center = (slice((n - 1) // 2, n // 2 + 1) for n in (rows, columns))
        return grid[:, :, middle, center].astype(jnp.float32).mean((2, 3)).astype(x.dtype)
