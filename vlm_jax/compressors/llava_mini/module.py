# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Mini's compressor: a grid of learned queries attends to all patches.

B batch  P patches, raster order  V visual tokens  Z = levels x E  E vit width  N heads  H head size
D llm width
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vlm_jax import mesh
from vlm_jax.compressors import positions
from vlm_jax.compressors.last_level import LastLevel
from vlm_jax.compressors.llava_mini import LlavaMiniMethod
from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.mqt.module import ConstantAttention
from vlm_jax.layers import LayerNorm, normal, uniform, weight

EPS = 1e-5  # of both LayerNorms, as published
STD = 0.02  # of queries


class LlavaMini(LastLevel):
    """V = c x c learned queries read all patches of the last level (arXiv 2501.03895).

    The keys are the normed patches plus the queries' position table, resampled from c x c to the
    grid of the patches; the values are the normed patches. No residual, no norm behind it. The
    result goes through LLaVA's projector, and so do, for the layers that fuse image and question
    before the LLM, the patches.

    Source: `compressor` of ictnlp/LLaVA-Mini at 47da1137.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.llava_mini import LlavaMiniMethod
        >>> from vlm_jax.compressors.method import Interface
        >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     mini = LlavaMiniMethod(tokens=4, heads=4).build(between, rngs=nnx.Rngs(0))
        ...     jax.jit(lambda m, x: m(x))(mini, jnp.ones((2, 144, 32))).shape
        (2, 4, 64)
    """

    def __init__(
        self,
        method: LlavaMiniMethod,
        interface: Interface,
        *,
        rngs: nnx.Rngs,
        kernels: str = "auto",
        fusion: nnx.Module | None = None,
    ):
        super().__init__(method, interface, rngs=rngs, kernels=kernels)
        width = self.width
        self.grid, self.fusion = math.isqrt(self.tokens), fusion
        table = positions.sines(self.grid, width)
        self.position = weight(rngs, table.shape, ("none", "none"), lambda _, __: jnp.array(table))
        self.query = weight(rngs, table.shape, ("none", "none"), normal(STD))
        self.query_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.patch_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.attention = LearnedQueries(
            width, method.heads, out_init=uniform(width**-0.5), rngs=rngs
        )

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """One visual token per query; the question is not read."""
        del question
        return self.projector(self.compress(self.last(levels)))

    def fuse(
        self,
        levels: Float[Array, "B P Z"],
        text: Float[Array, "B T D"],
        visible: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B V D"], Float[Array, "B T D"]]:
        """The visual tokens and the text behind the layers in which the text reads all patches.

        Text that is not `visible` (padding, answers) stays as it is, and is not read.
        """
        patches = self.projector(self.last(levels))
        return self.fusion(patches, self(levels), text, visible)

    def compress(self, features: Float[Array, "B P E"]) -> Float[Array, "B V E"]:
        """The tokens before the projector."""
        position = jax.lax.stop_gradient(self.position[...])  # as published, never trained
        queries = self.query_norm(self.query[...]) + position
        resampling = jnp.array(positions.cubic(self.grid, self.side), jnp.float32)
        table = position.reshape(self.grid, self.grid, self.width)
        of_patches = jnp.einsum("ra,cb,abe->rce", resampling, resampling, table)
        values = self.patch_norm(features)
        keys = values + of_patches.reshape(-1, self.width).astype(values.dtype)
        return self.attention(queries, keys, values)


class LearnedQueries(ConstantAttention):
    """Multi-head attention of queries that are the same for every image.

    Keys and values are not projected: with few queries that saves most of the products. The bias of
    the keys adds the same to all scores of a query, so that nothing depends on it.
    """

    def __call__(
        self,
        queries: Float[Array, "V E"],
        keys: Float[Array, "B P E"],
        values: Float[Array, "B P E"],
    ) -> Float[Array, "B V E"]:
        dtype = values.dtype
        query = self.query(queries) * self.query.kernel.shape[-1] ** -0.5
        asked = jnp.einsum(
            "VNH,ENH->VNE",
            query,
            self.key.kernel[...],
            out_sharding=mesh.spec("len", "heads", "feature"),
        )
        scores = jnp.einsum(
            "VNE,BPE->BVNP",
            asked.astype(dtype),
            keys,
            out_sharding=mesh.spec("batch", "len", "heads", "len"),
            preferred_element_type=jnp.float32,
        )
        mixed = jnp.einsum(
            "BVNP,BPE->BVNE",
            jax.nn.softmax(scores).astype(dtype),
            values,
            out_sharding=mesh.spec("batch", "len", "heads", "feature"),
        )
        read = jnp.einsum(
            "BVNE,ENH->BVNH",
            mixed,
            self.value.kernel[...].astype(dtype),
            out_sharding=mesh.spec("batch", "len", "heads", "head"),
        )
        return self.out(read + self.value.bias[...].astype(dtype))
