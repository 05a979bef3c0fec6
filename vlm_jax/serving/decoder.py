# SPDX-License-Identifier: Apache-2.0
"""Batches to new tokens: prefill and decode as two compiled functions, caches donated.

Everything that generates goes through `Decoder`: evaluation, which answers greedily in batches of
one shape, and requests, whose shapes are rounded up to few (`bucket`).

B batch  W vocabulary
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from vlm_jax import cpu, hosts, mesh
from vlm_jax.models.cache import KV, Cache, Past
from vlm_jax.models.llm import LLM
from vlm_jax.models.vlm import VLM, Batch

SMALLEST = 16  # tokens of the smallest bucket


class Sampling(NamedTuple):
    """How each row's tokens are drawn; temperature 0 takes the likeliest.

    A draw depends on the row's seed and on the token's place in its row alone: a request gives the
    same text whatever else is in its batch.
    """

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]  # of the probability mass, from the likeliest down
    seed: UInt32[Array, "B"]


def bucket(length: int, smallest: int = SMALLEST) -> int:
    """The smallest of smallest, 2 smallest, 3, 4, 6, 8, 12, 16 ... that holds `length`.

    Powers of two and one size between each: of a bucket beyond the second no more than a third is
    padding, of the second less than half.
    """
    size = smallest
    while size < length:
        half = size * 3 // 2
        if size > smallest and half >= length:
            return half
        size *= 2
    return size


def choose(
    logits: Float[Array, "B W"], sampling: Sampling | None, place: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The next token of each row, which will stand at `place`; the likeliest without sampling."""
    logits = jax.sharding.reshard(logits, mesh.spec("batch", "none"))
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
    if sampling is None:
        return likeliest

    def draw(logits, temperature, top_p, seed, place):
        scores = logits / jnp.maximum(temperature, 1e-6)
        ranked = jnp.sort(scores, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ranked))
        # A token counts while those before it have less than top_p; the first always does.
        kept = jnp.maximum((mass - jax.nn.softmax(ranked) < top_p).sum(), 1)
        scores = jnp.where(scores >= ranked[kept - 1], scores, -jnp.inf)
        key = jax.random.fold_in(jax.random.key(seed), place)
        return jax.random.categorical(key, scores).astype(jnp.int32)

    drawn = jax.vmap(draw)(logits, *sampling, place)
    return jnp.where(sampling.temperature > 0, drawn, likeliest)


def first(
    model: VLM, batch: Batch, prefix: Past | None, sampling: Sampling | None, new_tokens: int
) -> tuple[Int[Array, "B"], list[KV | Cache], Int[Array, "B"]]:
    """Reads a batch: the first new tokens, caches with room for all of them, row lengths."""
    logits, caches, length = model.prefill(batch, new_tokens=new_tokens, prefix=prefix)
    return choose(logits, sampling, length), caches, length


def following(
    model: VLM,
    ids: Int[Array, "B"],
    caches: list[KV | Cache],
    position: Int[Array, "B"],
    sampling: Sampling | None,
) -> tuple[Int[Array, "B"], list[KV | Cache], Int[Array, "B"]]:
    """One more token of every row."""
    logits, caches = model.decode(ids, caches, position)
    return choose(logits, sampling, position + 1), caches, position + 1


def programs() -> tuple[Any, Any]:
    """`first` and `following` as they are compiled: caches are donated."""
    # New functions each time: what one decoder compiled is freed with it.
    return (
        jax.jit(functools.partial(first), static_argnames="new_tokens"),
        jax.jit(functools.partial(following), donate_argnums=(2, 3)),
    )


class Decoder:
    """Generates with one model.

    Args:
      model: of which the layers of the LLM are taken apart, and what does not depend on the image
        is computed now.
      stop_ids: tokens that end a row.
      consume: free the model's own layers on the way; the model is used up.
    """

    def __init__(self, model: VLM, *, stop_ids: Sequence[int], consume: bool = False):
        compressor, once = model.compressor, mesh.known(cpu.RUN_ONCE)
        if compressor.buckets:
            fold = jax.jit(lambda compressor: compressor.fold(), compiler_options=once)
            compressor = fold(compressor)
        if consume:
            llm = model.llm.unrolled(consume=True)
        else:
            llm = jax.jit(lambda llm: llm.unrolled(), compiler_options=once)(model.llm)
        self.model, self.stop_ids = VLM(model.vit, compressor, llm), np.array(stop_ids)
        self.first, self.following = programs()

    def read_prefix(self, ids: Sequence[int]) -> Past | None:
        """The pass over tokens with which every row of later batches begins; None of no token."""
        if not ids:
            return None

        def start(llm: LLM, ids):
            return llm.start(llm.embed(ids), jnp.full_like(ids[:, 0], ids.shape[1]))

        # As many rows as the mesh cuts a batch into; they are all the same.
        now = jax.sharding.get_mesh()
        rows = np.tile(np.array(ids, np.int32), (mesh.batch_shards(now), 1))
        placed = mesh.spread(rows, now, "batch")
        past = hosts.fetched(jax.jit(start)(self.model.llm, placed))
        one = Past(past.hidden[:1], past.keys[:, :1], past.values[:, :1], past.length[:1])
        return mesh.spread(one, now)

    def start(
        self,
        batch: Batch,
        *,
        new_tokens: int,
        tokens: int | None = None,
        prefix: Past | None = None,
        sampling: Sampling | None = None,
    ) -> "Started":
        """Reads a batch, and chooses the first token of every row.

        `tokens` asks a model that serves any number of visual tokens for so many, in the slots of
        the smallest bucket that holds them: no more programs are compiled than there are buckets.
        `prefix` is what `read_prefix` gave, `new_tokens` the most that will be asked for.
        """
        model = self.model
        if tokens is not None:
            model = model.at(model.compressor.slots(tokens) if model.compressor.buckets else tokens)
            batch = {**batch, "limit": jnp.full_like(batch["length"], tokens)}
        ids, caches, length = self.first(
            model, batch, prefix, sampling, new_tokens=bucket(new_tokens)
        )
        return Started(ids, caches, length, sampling)

    def stream(self, started: "Started", new_tokens: int) -> Iterator[np.ndarray]:
        """Token ids int32 [B] of every row, step after step, until all rows have ended.

        Uses up the caches of `started`. At most `new_tokens` steps, no more than it was told of.
        """
        ids, caches, place, sampling = started
        ended = np.zeros(len(ids), bool)
        for step in range(new_tokens):
            now = ids
            # One step ahead, so that the device does not wait for the host to look; but the first
            # token is waited for.
            if 0 < step < new_tokens - 1:
                ids, caches, place = self.following(self.model, ids, caches, place, sampling)
            tokens = hosts.fetched(now)
            yield tokens
            ended |= np.isin(tokens, self.stop_ids)
            if ended.all():
                return
            if step == 0 and new_tokens > 1:
                ids, caches, place = self.following(self.model, ids, caches, place, sampling)

    def __call__(self, batch: Batch, tokens: int | None = None, *, new_tokens: int) -> np.ndarray:
        """Greedy token ids int32 [B, n], n at most `new_tokens`."""
        started = self.start(batch, new_tokens=new_tokens, tokens=tokens)
        return np.stack(list(self.stream(started, new_tokens)), axis=1)


class Started(NamedTuple):
    """A batch that was read: its rows' first new tokens, and what the next ones come from."""

    ids: Int[Array, "B"]
    caches: list[KV | Cache]
    length: Int[Array, "B"]  # tokens read, visual ones and `prefix` included
    sampling: Sampling | None
