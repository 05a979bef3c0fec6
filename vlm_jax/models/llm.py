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
from vlm_jax.kernels.causal_attention import SHORTEST, Groups, causal_attention
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
from vlm_jax.models import pruned, voco
from vlm_jax.models.attention import groups_of, mask_of, mix
from vlm_jax.models.cache import KV, Cache, Caches, Past, Pruned, cached, positions_of, write
from vlm_jax.models.pruned import Images
from vlm_jax.models.pruning import Pruning
from vlm_jax.models.rope import Rope, Turns, rotate
from vlm_jax.models.segments import starts
from vlm_jax.models.sizes import LLMSize
from vlm_jax.models.voco import Summary

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
        return self.queries(x, turns), KV(self.keys(x, turns), self.value(x))

    def queries(self, x: Float[Array, "B T D"], turns: Turns) -> Float[Array, "B T N H"]:
        """Rotated queries."""
        query = self.query(x)
        return rotate(query if self.query_norm is None else self.query_norm(query), turns)

    def keys(self, x: Float[Array, "B T D"], turns: Turns) -> Float[Array, "B T K H"]:
        """Rotated keys."""
        key = self.key(x)
        return rotate(key if self.key_norm is None else self.key_norm(key), turns)

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
        x: Float[Array, "B T D"],
        position: Int[Array, "B"],
        turns: Turns,
        cache: KV | Cache,
        mask: Bool[Array, "B T S"],
    ) -> tuple[Float[Array, "B T D"], KV | Cache]:
        """More tokens of every row, written into the cache from that row's position on."""
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
        pruning: Pruning | None = None,
    ):
        self.size, self.remat_policy, self.dtype = size, remat_policy, dtype
        self.pruning = pruning  # of prefill alone: training reads all tokens
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
        summary: Summary | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of a causal pass over whole rows, or over the tokens after their `past`.

        With `segments` a row holds several examples, each a run of tokens with one number: no token
        attends to another example, and positions restart in each. What stands behind the `summary`
        of a row does not see what stands before it. ValueError for segments with a `past`.
        """
        if past is not None and segments is not None:
            raise ValueError("rows of several examples (segments) cannot continue from a past")
        again = remat(self.remat_policy)
        return self.run(x, past, again, keep=False, segments=segments, summary=summary)[0]

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
        images: Images | None = None,
        summary: Summary | None = None,
    ) -> tuple[Float[Array, "B Y D"], Caches]:
        """Hidden states, and one cache per layer with room for `slots` positions.

        The cache of a row starts with its `past`, whose padding is overwritten: no gaps. With
        `images`, a model that prunes leaves visual tokens out between its layers: there are fewer
        hidden states than tokens, and as many slots less in the caches of later layers. What stands
        before a `summary` is not cached.
        """
        if self.pruning is not None and images is not None:
            return pruned.prefill(self, x, images, slots=slots, past=past)
        hidden, new = self.run(x, past, lambda f: f, keep=True, summary=summary)
        if summary is not None:
            return voco.forget(hidden, new, summary, slots)
        caches = cached(new, past, slots)
        if past is not None and past.skipped is not None:
            return hidden, Pruned(caches, past.skipped[None])
        return hidden, caches

    @jax.named_scope("llm")
    def run(self, x, past, rematerialize, *, keep: bool, segments=None, summary=None):
        """All blocks in order, and the final norm; their keys and values with `keep`."""
        turned = jnp.arange(x.shape[1])[None]
        if past is not None:
            turned = positions_of(*x.shape[:2]) + past.position[:, None]
        if segments is not None:
            turned = positions_of(*x.shape[:2]) - starts(segments)
        how = dict(keep=keep, segments=segments, summary=summary)
        x, kvs = self.through(x, (0, self.depth), turned, past, rematerialize, **how)
        return self.norm(x), kvs

    def through(
        self,
        x,
        span: tuple[int, int],
        turned: Int[Array, "#B T"],
        past: Past | None,
        rematerialize=lambda f: f,
        *,
        keep: bool = True,
        segments=None,
        summary=None,
    ):
        """The blocks from the first of `span` to before the second; their keys and values.

        Stacked weights are scanned, which gives stacked keys and values; a list of blocks is
        unrolled and gives a list. `turned` are the rotary positions of x.
        """
        first, end = span
        batch, length = x.shape[:2]
        by_groups = self.form == "pallas" and length >= SHORTEST and summary is None
        mask = (groups_of if by_groups else mask_of)(positions_of(batch, length), past, segments)
        mask = mask if summary is None else mask & voco.admitted(summary.tokens)
        turns = self.rope.turns(turned, self.size.head_size // 2)
        before = None if past is None else KV(past.keys, past.values)

        def step(x, layer):
            block, before = layer
            x, kv = block(x, turns, mask, before)
            return x, kv if keep else None

        if isinstance(self.blocks, nnx.List):
            kvs = []
            for i in range(first, end):
                x, kv = step(x, (self.blocks[i], before and layer(before, i)))
                kvs.append(kv)
            return x, kvs
        some = (self.blocks, before)
        if span != (0, self.depth):
            some = jax.tree.map(lambda w: w[first:end], some)
        return lax.scan(rematerialize(step), x, some)

    @jax.named_scope("llm")
    def decode(
        self, x: Float[Array, "B T D"], caches: Caches, position: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """Hidden states of more tokens per row, the first at `position`; one where it prunes."""
        if isinstance(caches, Pruned):
            x, grown = pruned.decode(self, x, caches, position)
        else:
            x, grown = self.extend(x, 0, caches, at=position, turned=position)
        return self.norm(x), grown

    def extend(
        self,
        x: Float[Array, "B T D"],
        first: int,
        caches: list[KV | Cache],
        *,
        at: Int[Array, "B"],
        turned: Int[Array, "B"],
    ) -> tuple[Float[Array, "B T D"], list[KV | Cache]]:
        """More tokens per row through the layers of these caches, of which `first` is the first.

        They are written from slot `at` of their row on, and `turned` is the rotary position of the
        first. Slots behind a token are masked for it. Layers are unrolled: a cache carried through
        a scan would be copied at every step.
        """
        after = jnp.arange(x.shape[1])
        slots = positions_of(x.shape[0], caches[0].slots)
        mask = slots[:, None] <= (at[:, None] + after)[:, :, None]
        turns = self.rope.turns(turned[:, None] + after, self.size.head_size // 2)
        grown = []
        for i, cache in enumerate(caches, first):
            x, cache = layer(self.blocks, i).extend(x, at, turns, cache, mask)
            grown.append(cache)
        return x, grown

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """Float32 scores of the next token."""

        def product(hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
            table, dims = self.table.astype(hidden.dtype), ("batch", "len", "vocab")
            out = mesh.spec(*dims)
            if cpu.output_first(table.size, hidden.dtype):
                return cpu.project_output_first(hidden, table, table.shape[:1], dims)
            if sharded.scatters(hidden, table):
                return sharded.product(hidden, table.T, 1, out, jnp.float32)
            return jnp.einsum(
                "BTD,WD->BTW", hidden, table, out_sharding=out, preferred_element_type=jnp.float32
            )

        return cpu.two_rows(product, hidden, 1)
