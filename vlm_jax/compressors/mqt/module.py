# SPDX-License-Identifier: Apache-2.0
"""MQT: the first V of a list of learned queries, whose attention is the same for every image.

B batch  P patches, raster order  V visual tokens  Z = levels x E  E vit width  N heads  H head size
D llm width  Q learned queries
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax import cpu, mesh
from vlm_jax.compressors import positions
from vlm_jax.compressors.matryoshka import Matryoshka
from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.mqt import MQTMethod
from vlm_jax.layers import (
    Initializer,
    LayerNorm,
    Linear,
    normal,
    standardize,
    uniform,
    weight,
)

EPS = 1e-6  # of every LayerNorm here, as published
STD = 0.02  # of queries, and of the attention's out-projection at encoder width 1024


class MQT(Matryoshka):
    """Cross-attention of learned queries to all patches of the last level (arXiv 2405.19315).

    Keys are the queries' position table, resampled to the patch grid: they do not depend on the
    image. The attention [V P] of each head is therefore computed from the weights alone, once for a
    batch and not for every image. Queries do not see each other: V tokens are exactly the first V
    of any larger number. Published: 256 queries for 24 x 24 patches, 16 heads; a smaller patch grid
    has one query per patch unless `queries` is given. Only the last level is read, and no question.

    Source: `query_abstractor` of gordonhu608/MQT-LLaVA at 92c35d06. There the resampled table is
    rounded to the checkpoint's type; here it stays float32.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.mqt import MQTMethod
        >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     mqt = MQTMethod(tokens=9, heads=4).build(between, rngs=nnx.Rngs(0))
        ...     run, levels = jax.jit(lambda m, x: m(x)), jnp.ones((2, 144, 32))
        ...     run(mqt, levels).shape, run(mqt.at(100), levels).shape
        ((2, 9, 64), (2, 100, 64))
    """

    def __init__(
        self, method: MQTMethod, interface: Interface, *, rngs: nnx.Rngs, kernels: str = "auto"
    ):
        del kernels
        super().__init__(method, interface)
        width, llm_width = interface.width, interface.llm_width
        self.queries, self.buckets = method.learned(self.side), method.buckets(self.side)
        self.prefixes = method.prefixes(self.side)
        table = sines(math.isqrt(self.queries), width)
        # Trained in the first stage, as published; frozen after it.
        self.position = weight(rngs, table.shape, ("none", "none"), lambda _, __: jnp.array(table))
        self.query = weight(rngs, (self.queries, width), ("none", "none"), normal(STD))
        self.query_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.key_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.value_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        # The published gain at any width: narrow demonstration encoders would start at almost zero.
        out_init = normal(STD * (1024 / width) ** 0.5)
        self.attention = ConstantAttention(width, method.heads, out_init=out_init, rngs=rngs)
        self.projector = Linear(
            "BVE,ED->BVD",
            (width, llm_width),
            dims=("embed", "none"),
            out=("batch", "len", "feature"),
            bias=False,
            init=normal(llm_width**-0.5),
            rngs=rngs,
        )

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """The tokens of the first V queries; the question is not read."""
        del question
        values = self.value_norm(levels[..., -self.width :])
        return self.projector(self.attention(self.scores(), values))

    def scores(self) -> Float[Array, "N V P"]:
        """The attention of the first V queries to each patch; no image is needed."""
        position = self.position[...]
        queries = self.query_norm((self.query[...] + position)[: self.tokens])
        resampling = jnp.array(positions.cubic(math.isqrt(self.queries), self.side), jnp.float32)
        grid = position.reshape(resampling.shape[1], resampling.shape[1], self.width)
        keys = jnp.einsum("ra,cb,abe->rce", resampling, resampling, grid).reshape(-1, self.width)
        return self.attention.scores(queries, self.key_norm(keys))

    def fold(self) -> "FoldedMQT":
        """The same function for inference, with the parts that no image enters precomputed."""
        return FoldedMQT(self)


class ConstantAttention(nnx.Module):
    """Multi-head attention whose queries and keys do not depend on the image; only values do.

    Initialized as torch's MultiheadAttention, except for the out-projection.
    """

    def __init__(self, width: int, heads: int, *, out_init: Initializer, rngs: nnx.Rngs):
        if heads < 1 or width % heads:
            raise ValueError(
                f"compressor.heads={heads} does not divide vit.width={width}: "
                f"choose one of {[n for n in range(1, width + 1) if width % n == 0]}"
            )
        shape = (width, heads, width // heads)
        # Xavier over the stacked [3 width, width] matrix of the three in-projections, no biases.
        inward = dict(
            dims=("embed", "heads", "head"), init=uniform(math.sqrt(6 / (4 * width))), rngs=rngs
        )
        self.query = Linear("VE,ENH->VNH", shape, out=("len", "heads", "head"), **inward)
        self.key = Linear("PE,ENH->PNH", shape, out=("len", "heads", "head"), **inward)
        self.value = Linear("BPE,ENH->BPNH", shape, out=("batch", "len", "heads", "head"), **inward)
        self.out = Linear(
            "BVNH,NHE->BVE",
            (*shape[1:], width),
            dims=("heads", "head", "embed"),
            out=("batch", "len", "feature"),
            init=out_init,
            rngs=rngs,
        )

    def scores(
        self, queries: Float[Array, "V E"], keys: Float[Array, "P E"]
    ) -> Float[Array, "N V P"]:
        """The softmax of each head, over the patches."""
        query = self.query(queries) * self.query.kernel.shape[-1] ** -0.5
        return jax.nn.softmax(jnp.einsum("VNH,PNH->NVP", query, self.key(keys)))

    def __call__(
        self, scores: Float[Array, "N V P"], values: Float[Array, "B P E"]
    ) -> Float[Array, "B V E"]:
        mixed = mix(scores, values, self.value.kernel[...])
        # A row of scores sums to one: the bias of the values is added once.
        return self.out(mixed + self.value.bias[...].astype(mixed.dtype))


def mix(
    scores: Float[Array, "N V P"], values: Float[Array, "B P E"], kernel: Float[Array, "E N H"]
) -> Float[Array, "B V N H"]:
    """Each head's weighted sums of the projected values, in the cheaper of two equal orders."""
    heads, tokens, patches = scores.shape
    scores, kernel = scores.astype(values.dtype), kernel.astype(values.dtype)
    if mixing_first_pays(tokens, patches, values.shape[-1], heads):
        mixed = jnp.einsum(
            "BVNP,BPE->BVNE",
            cpu.for_every_image(scores, len(values)),
            values,
            out_sharding=mesh.spec("batch", "len", "heads", "feature"),
        )
        equation = "BVNE,ENH->BVNH"
    else:
        mixed = jnp.einsum(
            "BPE,ENH->BPNH",
            values,
            kernel,
            out_sharding=mesh.spec("batch", "len", "heads", "head"),
        )
        equation, kernel = "BPNH,NVP->BVNH", scores
    return jnp.einsum(
        equation, mixed, kernel, out_sharding=mesh.spec("batch", "len", "heads", "head")
    )


def mixing_first_pays(tokens: int, patches: int, width: int, heads: int) -> bool:
    """Whether weighing the patches at full width before the projection saves multiplications.

    The only place of this choice. Mixing first costs tokens x heads x patches x width, then tokens
    x width^2; projecting first patches x width^2, then tokens x patches x width. At the published
    sizes mixing first pays up to 61 tokens.
    """
    return tokens * (heads * patches + width) < patches * (tokens + width)


class FoldedMQT(Matryoshka):
    """An MQT for inference: scores computed, norm and projections that meet multiplied together.

    Equal to the module that it was made from, in exact arithmetic, at every number of tokens.
    """

    def __init__(self, whole: MQT):
        attention, norm = whole.attention, whole.value_norm
        super().__init__(whole.method, whole.interface)
        self.queries, self.buckets = whole.queries, whole.buckets
        self.scores = nnx.Param(whole.at(whole.queries).scores())
        value, out = attention.value.kernel[...], attention.out.kernel[...]
        replicated = mesh.spec("none", "none")
        last = jax.sharding.reshard(whole.projector.kernel[...], replicated)
        self.value = nnx.Param(value * norm.scale[...][:, None, None])
        product = jnp.einsum(
            "NHE,ED->NHD", out, last, out_sharding=mesh.spec("heads", "head", "feature")
        )
        self.out = nnx.Param(product)
        shift = attention.value.bias[...] + jnp.einsum(
            "E,ENH->NH", norm.bias[...], value, out_sharding=mesh.spec("heads", "head")
        )
        self.bias = nnx.Param(
            jnp.einsum("NH,NHD->D", shift, product, out_sharding=mesh.spec("feature"))
            + attention.out.bias[...] @ last
        )

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """The tokens of the first V queries; the question is not read."""
        del question
        values = standardize(levels[..., -self.width :], EPS).astype(levels.dtype)
        mixed = mix(self.scores[...][:, : self.tokens], values, self.value[...])
        out = cpu.project(mixed, self.out[...], 2, ("batch", "len", "feature"))
        return out + self.bias[...].astype(out.dtype)


def sines(grid: int, width: int) -> np.ndarray:
    """The table of `positions.sines`, rounded to float16, as published."""
    return positions.sines(grid, width).astype(np.float16).astype(np.float32)
