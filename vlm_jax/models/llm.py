# SPDX-License-Identifier: Apache-2.0
"""A Llama/Qwen decoder: embeddings to hidden states, with a key-value cache for generation.

B batch  T tokens  S keys  L layers  D llm width  F mlp width
N heads  K kv heads  G = N/K  H head size  W vocabulary
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import cpu, mesh, sharded
from vlm_jax.kernels.causal_attention import SHORTEST, UNSEEN, Groups, causal_attention
from vlm_jax.kernels.window_attention import form
from vlm_jax.layers import (
    Linear,
    RMSNorm,
    layer,
    normal,
    remat,
    stack,
    swiglu,
    unstacked,
    weight,
)
from vlm_jax.models.cache import KV, Cache, Past, kept, positions_of, write
from vlm_jax.models.rope import Rope, Turns, rotate
from vlm_jax.models.segments import same, starts
from vlm_jax.models.sizes import LLMSize

HIDDEN = ("batch", "len", "feature")
# How many queries attend at a time: keys after the last of them are left out of the product.
QUERIES = 128


def out_std(size: LLMSize) -> float:
    """Standard deviation of weights that write to the residual stream, 2 x depth times."""
    return size.width**-0.5 * (2 * size.depth) ** -0.5


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; keys and values are returned for a cache."""

    def __init__(self, size: LLMSize, *, rngs: nnx.Rngs):
        width, heads, kv_heads = size.width, size.heads, size.kv_heads
        head_size, qkv_bias, eps = size.head_size, size.qkv_bias, size.norm_eps
        std = normal(width**-0.5)
        q = dict(dims=("embed", "heads", "head"), out=("batch", "len", "heads", "head"))
        kv = dict(dims=("embed", "kv_heads", "head"), out=("batch", "len", "kv_heads", "head"))
        self.query = Linear(
            "BTD,DNH->BTNH", (width, heads, head_size), bias=qkv_bias, init=std, rngs=rngs, **q
        )
        self.key = Linear(
            "BTD,DKH->BTKH", (width, kv_heads, head_size), bias=qkv_bias, init=std, rngs=rngs, **kv
        )
        self.value = Linear(
            "BTD,DKH->BTKH", (width, kv_heads, head_size), bias=qkv_bias, init=std, rngs=rngs, **kv
        )
        self.out = Linear(
            "BTNH,NHD->BTD",
            (heads, head_size, width),
            bias=False,
            init=normal(out_std(size)),
            dims=("heads", "head", "embed"),
            out=HIDDEN,
            rngs=rngs,
        )
        self.query_norm = RMSNorm(head_size, eps=eps, rngs=rngs) if size.qk_norm else None
        self.key_norm = RMSNorm(head_size, eps=eps, rngs=rngs) if size.qk_norm else None

    @jax.named_scope("attention")
    def project(
        self,
        x: Float[Array, "B T D"],
        turns: Turns,
    ) -> tuple[Float[Array, "B T N H"], KV]:
        """Rotated queries, and the keys and values of the same tokens."""
        query, key = self.query(x), self.key(x)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, turns), KV(rotate(key, turns), self.value(x))

    @jax.named_scope("attention")
    def attend(
        self,
        query: Float[Array, "B T N H"],
        seen: KV,
        mask: Bool[Array, "B T S"] | Groups,
    ) -> Float[Array, "B T D"]:
        """Attention of each query to the keys that its mask admits; by `Groups` in Pallas.

        Several queries are causal: the last keys are their own, in order.
        """
        if isinstance(mask, Groups):
            return self.out(causal_attention(query, *seen, mask))
        length, slots = mask.shape[1:]
        mixed = []
        for first in range(0, length, QUERIES):
            last = min(first + QUERIES, length)
            end = slots - length + last
            mixed.append(
                mix(
                    query[:, first:last],
                    KV(seen.keys[:, :end], seen.values[:, :end]),
                    mask[:, first:last, :end],
                )
            )
        return self.out(jnp.concatenate(mixed, axis=1))


def mix(
    query: Float[Array, "B T N H"], seen: KV | Cache, mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    """The values that each query admits, weighted by the softmax of their keys' scores."""
    batch, length, heads, size = query.shape
    order = "BKSH" if isinstance(seen, Cache) else "BSKH"
    # Explicit, because JAX would put the sharding of a single kv head on its group of queries.
    groups = jnp.reshape(
        query,
        (batch, length, seen.keys.shape[order.index("K")], -1, size),
        out_sharding=mesh.spec("batch", "len", "kv_heads", "none", "head"),
    )
    scores = jnp.einsum(
        f"BTKGH,{order}->BKGTS", groups, seen.keys, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores * size**-0.5, -jnp.inf)
    # The softmax divides after the mixing: its backward pass then sums over H instead of S.
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = jnp.einsum(
        f"BKGTS,{order}->BTKGH",
        weights.astype(query.dtype),
        seen.values,
        preferred_element_type=jnp.float32,
    )
    mixed /= jnp.einsum("BKGTS->BTKG", weights)[..., None]
    return jnp.reshape(
        mixed.astype(query.dtype),
        (batch, length, heads, size),
        out_sharding=mesh.spec("batch", "len", "heads", "head"),
    )


class Block(nnx.Module):
    """One pre-norm block: grouped-query attention, then SwiGLU."""

    def __init__(self, size: LLMSize, *, rngs: nnx.Rngs):
        width, mlp = size.width, size.mlp
        self.norm1 = RMSNorm(width, eps=size.norm_eps, rngs=rngs)
        self.attention = Attention(size, rngs=rngs)
        self.norm2 = RMSNorm(width, eps=size.norm_eps, rngs=rngs)
        inward = dict(
            dims=("embed", "mlp"), out=("batch", "len", "mlp"), bias=False, init=normal(width**-0.5)
        )
        self.gate = Linear("BTD,DF->BTF", (width, mlp), rngs=rngs, **inward)
        self.up = Linear("BTD,DF->BTF", (width, mlp), rngs=rngs, **inward)
        self.down = Linear(
            "BTF,FD->BTD",
            (mlp, width),
            dims=("mlp", "embed"),
            out=HIDDEN,
            bias=False,
            init=normal(out_std(size)),
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turns: Turns,
        mask: Bool[Array, "B T S"] | Groups,
        past: KV | None = None,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """The result, and the tokens' keys and values. Tokens attend to `past`, which comes first
        in the mask, and to each other."""
        query, kv = self.attention.project(self.norm1(x), turns)
        seen = kv
        if past is not None:
            seen = KV(*(jnp.concatenate(both, axis=1) for both in zip(past, kv, strict=True)))
        return self.feed(x + self.attention.attend(query, seen, mask)), kv

    def extend(
        self,
        x: Float[Array, "B 1 D"],
        position: Int[Array, "B"],
        turns: Turns,
        cache: KV | Cache,
        mask: Bool[Array, "B 1 S"],
    ) -> tuple[Float[Array, "B 1 D"], KV | Cache]:
        """One more token per row, written into the cache at that row's position."""
        query, new = self.attention.project(self.norm1(x), turns)
        with jax.named_scope("attention"):
            cache = write(cache, new, position)
            x = x + self.attention.out(mix(query, cache, mask))
        return self.feed(x), cache

    @jax.named_scope("mlp")
    def feed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The SwiGLU half of the block."""
        y = self.norm2(x)
        return x + self.down(swiglu(self.gate(y), self.up(y)))


def mask_of(
    positions: Int[Array, "B T"], past: Past | None, segments: Int[Array, "B T"] | None
) -> Bool[Array, "B T S"]:
    """The keys that each token may attend to: those of `past`, earlier ones, and its own."""
    batch, length = positions.shape
    mask = positions[:, :, None] >= positions[:, None, :]
    if past is not None:
        read = positions_of(batch, past.keys.shape[2]) < past.length[:, None]
        read = jnp.broadcast_to(read[:, None], (batch, length, read.shape[1]))
        mask = jnp.concatenate([read, mask], axis=2)
    return mask if segments is None else mask & same(segments)


def groups_of(
    positions: Int[Array, "B T"], past: Past | None, segments: Int[Array, "B T"] | None
) -> Groups:
    """`mask_of` as groups of tokens, for attention that is causal by itself."""
    if past is None:
        return Groups(segments, segments)
    own = jnp.zeros_like(positions)
    slots = positions_of(len(own), past.keys.shape[2])
    read = jnp.where(slots < past.length[:, None], 0, UNSEEN)
    return Groups(own, jnp.concatenate([read, own], axis=1))


class LLM(nnx.Module):
    """Llama (arXiv 2307.09288, 2407.21783), Qwen1.5 to 2.5 (q, k, v biased), Qwen3 (q, k normed).

    Hidden states are those after the final norm: what the output layer reads.
    """

    def __init__(
        self,
        size: LLMSize,
        *,
        rngs: nnx.Rngs,
        remat_policy: str = "none",
        dtype: str = "float32",
        kernels: str = "auto",
    ):
        self.size, self.remat_policy, self.dtype = size, remat_policy, dtype
        self.form = form(kernels)  # of attention in long rows
        self.rope = Rope.of(size)
        std = size.width**-0.5
        table = (size.vocab, size.width)
        self.embedding = weight(rngs, table, ("vocab", "embed"), normal(std))
        self.blocks = stack(lambda r: Block(size, rngs=r), size.depth, rngs)
        self.norm = RMSNorm(size.width, eps=size.norm_eps, rngs=rngs)
        self.head = (
            None if size.tied_embeddings else weight(rngs, table, ("vocab", "embed"), normal(std))
        )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.size.depth

    @property
    def table(self) -> Float[Array, "W D"]:
        """The weights of the output layer; the embedding if they are tied."""
        return (self.embedding if self.head is None else self.head)[...]

    def unrolled(self, *, consume: bool = False) -> "LLM":
        """The same model with separate weights for each layer, for generation.

        Slicing a layer out of the stack would copy its weights in every decoding step. `consume`
        frees this model's layers one weight at a time; it cannot be used afterwards.
        """
        other = jax.tree.map(lambda x: x, self)
        other.blocks = unstacked(self.blocks, self.depth, consume=consume)
        return other

    @jax.named_scope("embedding")
    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The embedding of each token, in the compute type."""
        return sharded.lookup(self.embedding[...], ids, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        past: Past | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of a causal pass over whole rows, or over the tokens after their `past`.

        With `segments` a row holds several examples, each a run of tokens with one number: no token
        attends to another example, and positions restart in each. ValueError for segments with a
        `past`.
        """
        if past is not None and segments is not None:
            raise ValueError("rows of several examples (segments) cannot continue from a past")
        return self.run(x, past, remat(self.remat_policy), keep=False, segments=segments)[0]

    def start(self, x: Float[Array, "B T D"], length: Int[Array, "B"]) -> Past:
        """The pass over the first `length` tokens of each row, from which a second one continues.

        Both passes together are one causal pass over the rows, in values and in gradients.
        """
        hidden, kv = self.run(x, None, remat(self.remat_policy), keep=True)
        if isinstance(kv, list):
            kv = jax.tree.map(lambda *layers: jnp.stack(layers), *kv)
        return Past(hidden, kv.keys, kv.values, length)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        *,
        slots: int,
        past: Past | None = None,
    ) -> tuple[Float[Array, "B T D"], list[KV | Cache]]:
        """Hidden states, and one cache per layer with room for `slots` positions.

        The cache of a row starts with its `past`, whose padding is overwritten: no gaps.
        """
        hidden, new = self.run(x, past, lambda f: f, keep=True)
        if not isinstance(new, list):
            new = [layer(new, i) for i in range(self.depth)]
        if past is None:
            return hidden, [kept(kv, slots) for kv in new]
        caches = [kept(KV(*kv), slots) for kv in zip(past.keys, past.values, strict=True)]
        caches = [write(*both, past.length) for both in zip(caches, new, strict=True)]
        return hidden, caches

    @jax.named_scope("llm")
    def run(self, x, past, rematerialize, *, keep: bool, segments=None):
        """All blocks in order; their keys and values with `keep`.

        Stacked weights are scanned, which gives stacked keys and values; a list of blocks is
        unrolled and gives a list.
        """
        batch, length = x.shape[:2]
        positions = positions_of(batch, length)
        before, turned = None, jnp.arange(length)[None]
        if past is not None:
            turned = positions + past.length[:, None]
            before = KV(past.keys, past.values)
        if segments is not None:
            turned = positions - starts(segments)
        by_groups = self.form == "pallas" and length >= SHORTEST
        mask = (groups_of if by_groups else mask_of)(positions, past, segments)
        turns = self.rope.turns(turned, self.size.head_size // 2)

        def step(x, layer):
            block, before = layer
            x, kv = block(x, turns, mask, before)
            return x, kv if keep else None

        if isinstance(self.blocks, nnx.List):
            kvs = []
            for i, block in enumerate(self.blocks):
                x, kv = step(x, (block, before and layer(before, i)))
                kvs.append(kv)
        else:
            x, kvs = lax.scan(rematerialize(step), x, (self.blocks, before))
        return self.norm(x), kvs

    @jax.named_scope("llm")
    def decode(
        self,
        x: Float[Array, "B 1 D"],
        caches: list[KV | Cache],
        position: Int[Array, "B"],
    ) -> tuple[Float[Array, "B 1 D"], list[KV | Cache]]:
        """Hidden state of one more token per row at `position`; later slots are masked.

        Layers are unrolled: a cache carried through a scan would be copied at every step.
        """
        slots = positions_of(x.shape[0], caches[0].slots)
        mask = (slots <= position[:, None])[:, None]
        turns = self.rope.turns(position[:, None], self.size.head_size // 2)
        grown = []
        for i, cache in enumerate(caches):
            x, cache = layer(self.blocks, i).extend(x, position, turns, cache, mask)
            grown.append(cache)
        return self.norm(x), grown

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """Float32 scores of the next token."""

        def product(hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
            table, out = self.table.astype(hidden.dtype), mesh.spec("batch", "len", "vocab")
            if sharded.scatters(hidden, table):
                return sharded.product(hidden, table.T, 1, out, jnp.float32)
            return jnp.einsum(
                "BTD,WD->BTW", hidden, table, out_sharding=out, preferred_element_type=jnp.float32
            )

        return cpu.two_rows(product, hidden, 1)
