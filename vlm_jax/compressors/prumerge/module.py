# SPDX-License-Identifier: Apache-2.0
"""PruMerge and PruMerge+: keep the patches the class token attends to, merge similar ones.

B batch  P patches, raster order  M slots  S selected patches at most  V visual tokens
Z = levels x E  E vit width  D llm width
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax import mesh
from vlm_jax.compressors.compressor import Compressor, Visual
from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.projector import MLP
from vlm_jax.compressors.prumerge import NEIGHBORS, PruMergeMethod, evenly


class PruMerge(Compressor):
    """The patches that the class token attends to most, each merged with similar ones.

    One more token holds all other patches; a two-layer MLP follows, the only part with weights.

    `tokens=V` selects V - 1 patches of every image. `tokens=0` is adaptive: each image keeps its
    outliers, the patches whose attention lies more than 1.5 interquartile ranges above the third
    quartile, so that an image fills from 1 to P / 4 + 1 slots. (The published code pools the
    quartiles of a batch; one image at a time, as it is evaluated, the result is the same.)

    A selected patch becomes itself plus the attention-weighted sum of the 32 patches with the most
    similar keys, whether selected or not; the last token is the attention-weighted sum of what was
    not selected. Tokens stand in the order of attention. Everything is in float32, because the
    number of tokens depends on it.

    Source: arXiv 2403.15388; `token_prune_merge_advanced` of 42Shawn/LLaVA-PruMerge at 097c0411.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.prumerge import PruMergeMethod
        >>> between = Interface(side=12, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     fixed = PruMergeMethod(tokens=9).build(between, rngs=nnx.Rngs(0))
        ...     levels = jnp.ones((2, 144, 32 + 32 + 1))  # features, keys, attention
        ...     jax.jit(lambda m, x: m(x))(fixed, levels).shape
        ...     free = PruMergeMethod(tokens=0).build(between, rngs=nnx.Rngs(0))
        ...     made = jax.jit(lambda m, x: m(x))(free, levels)
        ...     made.tokens.shape, made.count.tolist()
        (2, 9, 64)
        ((2, 37, 64), [1, 1])
    """

    def __init__(
        self,
        method: PruMergeMethod,
        interface: Interface,
        *,
        rngs: nnx.Rngs,
        kernels: str = "auto",
        neighbors: int = NEIGHBORS,
    ):
        del kernels
        super().__init__(method, interface)
        width, llm_width = interface.width, interface.llm_width
        self.patches, self.neighbors = interface.patches, neighbors
        self.channels = (interface.levels + 1) * width + 1
        self.kept = method.selected(method.tokens)
        self.projector = MLP(width, llm_width, llm_width, rngs=rngs)

    def __call__(
        self,
        levels: Float[Array, "B P Y"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"] | Visual:
        """Visual tokens from levels with ViT's `reads="keys"`; `Visual` in the adaptive form.

        The question is not read.
        """
        del question
        width = self.width
        if levels.shape[-1] != self.channels:
            raise ValueError(
                f"{self.method.kind} reads {self.channels} channels (all levels, keys, attention), "
                f"not {levels.shape[-1]}: encode with ViT's reads='keys'"
            )
        features = levels[..., -2 * width - 1 : -width - 1]
        merged = self.compress(features, levels[..., -width - 1 : -1], levels[..., -1])
        tokens = self.projector(merged.tokens.astype(levels.dtype))
        return Visual(tokens, merged.count) if self.adaptive else tokens

    def compress(
        self,
        features: Float[Array, "B P E"],
        keys: Float[Array, "B P E"],
        attention: Float[Array, "B A"],
    ) -> Visual:
        """The tokens before the projector, [B M E], and the number of filled slots per image.

        Slots after the last token of an image hold arbitrary values.

        Args:
            features: the last level, class token dropped.
            keys: of the next block, class token dropped.
            attention: of the class token to each patch (`vit.class_attention`).
        """
        if attention.shape[1] != features.shape[1]:
            raise ValueError(
                f"{features.shape[1]} patches, but the class token's attention to "
                f"{attention.shape[1]}: {self.method.kind} ranks patches by the attention of a "
                "class token that stands first among the keys; an encoder without one cannot be "
                "used here"
            )

        def one(features, keys, attention):
            order, count = self.select(attention)
            return merge(
                features, keys, attention, order, count,
                slots=self.tokens, neighbors=self.neighbors,
            ), count + 1  # fmt: skip

        # Images are independent: each device processes its own.
        batch = mesh.spec("batch")
        batched = jax.shard_map(jax.vmap(one), in_specs=batch, out_specs=batch)
        inputs = (x.astype(jnp.float32) for x in (features, keys, attention))
        return Visual(*batched(*(jax.sharding.reshard(x, batch) for x in inputs)))

    def select(self, attention: Float[Array, " P"]) -> tuple[Int[Array, " P"], Int[Array, ""]]:
        """All patches of an image, selected ones first in final order; the number of selected."""
        count = outliers(attention) if self.adaptive else jnp.int32(self.kept)
        return jnp.argsort(attention, descending=True), count


class PruMergePlus(PruMerge):
    """PruMerge that also keeps every n-th patch in raster order.

    `tokens=V` selects (V - 1) / 2 patches by attention, and as many at equal distances, as the
    published code does for training; a patch that is selected twice fills two slots. `tokens=0`
    is adaptive: k outliers, and of every third of P / k patches the first that is not among them;
    an image fills from 1 to P + 1 slots. Rounding leaves some V out: `supported` lists the others.

    Source: arXiv 2403.15388; `token_prune_merge_advanced_plus` of 42Shawn/LLaVA-PruMerge at
    097c0411, where an image without outliers divides by zero: here it becomes one token.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.prumerge import PruMergePlusMethod
        >>> between = Interface(side=6, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     plus = PruMergePlusMethod(tokens=9).build(between, rngs=nnx.Rngs(0))
        ...     jax.jit(lambda m, x: m(x))(plus, jnp.ones((2, 36, 32 + 32 + 1))).shape
        (2, 9, 64)
        >>> PruMergePlusMethod.supported(side=6)
        [0, 3, 5, 7, 9, 11, 13, 15, 19, 25, 35]
    """

    def select(self, attention: Float[Array, " P"]) -> tuple[Int[Array, " P"], Int[Array, ""]]:
        """All patches of an image, selected ones first in final order; the number of selected.

        A patch that was selected twice occurs twice.
        """
        patch, ranked = jnp.arange(self.patches), jnp.argsort(attention, descending=True)
        if not self.adaptive:
            grid = evenly(self.patches, self.kept)
            first = jnp.concatenate([ranked[: self.kept], jnp.array(grid)])
            return selected_first(first, self.patches), jnp.int32(len(first))
        count = outliers(attention)
        rank = jnp.argsort(ranked)
        step = jnp.maximum(self.patches // jnp.maximum(count, 1) // 3, 1)
        # As published, the last patch is never among these.
        sampled = (patch % step == 0) & (patch < self.patches - 1) & (count > 0)
        others = patch + self.patches * jnp.where(sampled, 1, 2)
        order = jnp.argsort(jnp.where(rank < count, rank, others))
        return order, count + (sampled & (rank >= count)).sum()


def selected_first(first: Int[Array, " S"], patches: int) -> Int[Array, " P"]:
    """The selected patches, then the others in ascending order, `patches` in all.

    As published, for each patch that is selected twice the lowest other patch is left out.
    """
    others = jnp.argsort(jnp.arange(patches).at[first].set(-1))[len(first) :]
    return jnp.concatenate([first, others])


def outliers(x: Float[Array, " P"]) -> Int[Array, ""]:
    """How many values lie more than 1.5 interquartile ranges above the third quartile."""
    low, high = jnp.percentile(x, jnp.array([25.0, 75.0]))
    return (x > high + 1.5 * (high - low)).sum()


def merge(
    features: Float[Array, "P E"],
    keys: Float[Array, "P E"],
    attention: Float[Array, " P"],
    order: Int[Array, " P"],
    count: Int[Array, ""],
    *,
    slots: int,
    neighbors: int,
) -> Float[Array, "M E"]:
    """The tokens of one image: `count` merged patches, one token of all others, then noise.

    Patches are taken in `order`. Similarity does not depend on the selection, so all slots search
    at once.
    """
    features, keys, attention = features[order], keys[order], attention[order]
    keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    patch, rows = jnp.arange(len(order)), jnp.arange(slots - 1)
    similarity = jnp.matmul(keys[: slots - 1], keys.T, precision=lax.Precision.HIGHEST)
    similarity = jnp.where(rows[:, None] == patch, -jnp.inf, similarity)
    _, near = lax.top_k(similarity, min(neighbors, len(order) - 1))
    weights = jnp.zeros_like(similarity).at[rows[:, None], near].set(attention[near])
    merged = features[: slots - 1] + weights @ features
    others = jnp.where(patch >= count, attention, 0) @ features
    return jnp.pad(merged, ((0, 1), (0, 0))).at[count].set(others)
