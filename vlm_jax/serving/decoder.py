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

from vlm_jax import arguments, cpu, hosts, mesh
from vlm_jax.layers import store_output_first
from vlm_jax.models.cache import Caches, Past
from vlm_jax.models.llm import LLM
from vlm_jax.models.vlm import VLM, Batch, each

SMALLEST = 16  # tokens of the smallest bucket


class Sampling(NamedTuple):
    """How each row's tokens are drawn; temperature 0 takes the likeliest.

    A draw depends only on the row's seed and on the token's position in its row: a request gives
    the same text in any batch.
    """

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]  # of the probability mass, from the likeliest down
    seed: UInt32[Array, "B"]


def check_drawing(max_new_tokens: int | None, temperature: float, top_p: float, seed: int) -> None:
    """Raises ValueError for numbers by which no answer can be drawn."""
    if max_new_tokens is not None:
        arguments.whole_number("max_new_tokens", max_new_tokens)
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1):
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: temperature is 0 (the likeliest) or more, "
            "top_p above 0 and at most 1"
        )
    arguments.seed_of("seed", seed)


def bucket(length: int, smallest: int = SMALLEST) -> int:
    """The first of 1, 2, 3, 4, 6, 8, 12, 16 ... times `smallest` that holds `length`.

    Powers of two with one size between them: at most a third of a bucket after the second is
    padding, and less than half of the second.
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
    """The next token of each row, for position `place`; the likeliest without sampling."""
    logits = jax.sharding.reshard(logits, mesh.spec("batch", "none"))
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
    if sampling is None:
        return likeliest

    def draw(logits, temperature, top_p, seed, place):
        scores = logits / jnp.maximum(temperature, 1e-6)
        ranked = jnp.sort(scores, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ranked))
        # A token is kept while likelier ones have less than top_p; the first is always kept.
        kept = jnp.maximum((mass - jax.nn.softmax(ranked) < top_p).sum(), 1)
        scores = jnp.where(scores >= ranked[kept - 1], scores, -jnp.inf)
        key = jax.random.fold_in(jax.random.key(seed), place)
        return jax.random.categorical(key, scores).astype(jnp.int32)

    drawn = jax.vmap(draw)(logits, *sampling, place)
    return jnp.where(sampling.temperature > 0, drawn, likeliest)


def first(
    model: VLM, batch: Batch, prefix: Past | None, sampling: Sampling | None, new_tokens: int
) -> tuple[Int[Array, "B"], Caches, Int[Array, "B"]]:
    """Reads a batch: the first new tokens, caches with room for all of them, row lengths."""
    logits, caches, length = model.prefill(batch, new_tokens=new_tokens, prefix=prefix)
    return choose(logits, sampling, length), caches, length


def following(
    model: VLM,
    ids: Int[Array, "B"],
    caches: Caches,
    position: Int[Array, "B"],
    sampling: Sampling | None,
) -> tuple[Int[Array, "B"], Caches, Int[Array, "B"]]:
    """One more token of every row."""
    logits, caches = model.decode(ids, caches, position)
    return choose(logits, sampling, position + 1), caches, position + 1


def levels(model: VLM, batch: Batch) -> Float[Array, "B *M P Y"]:
    """What the encoder gives of each image of a batch for the compressor, in raster order."""
    reader, at = model.compressor, batch["image_at"]
    sizes = each(batch, "image_size") if reader.reads == "image_size" else None
    found = model.vit(each(batch, "pixels"), shrink=reader.shrink, reads=reader.reads, sizes=sizes)
    if at.ndim == 1:
        return found
    shape = (*at.shape, *found.shape[1:])
    return jnp.reshape(found, shape, out_sharding=mesh.spec("batch", "none", "none", "none"))


def programs(*, brief: bool = False) -> tuple[Any, Any]:
    """`first` and `following`, jitted, with donated caches; `brief` as of `Decoder`."""
    options = mesh.known(cpu.step_options() if brief else {})
    # New functions each time, so that compiled programs are freed with their decoder.
    return (
        jax.jit(functools.partial(first), static_argnames="new_tokens", compiler_options=options),
        jax.jit(functools.partial(following), donate_argnums=(2, 3)),
    )


class Decoder:
    """Generates with one model.

    Args:
      model: the LLM's layers are unstacked, and what does not depend on the image is computed
        once.
      stop_ids: tokens that end a row.
      consume: free the model's own layers meanwhile; the model cannot be used afterwards.
      brief: one split is answered, and no more: on a CPU, reading a batch is compiled in half of
        the time and a tenth slower.
    """

    def __init__(
        self,
        model: VLM,
        *,
        stop_ids: Sequence[int],
        consume: bool = False,
        brief: bool = False,
    ):
        compressor, once = model.compressor, mesh.known(cpu.RUN_ONCE)
        if compressor.buckets:
            fold = jax.jit(lambda compressor: compressor.fold(), compiler_options=once)
            compressor = fold(compressor)
        if consume:
            llm = model.llm.unrolled(consume=True)
        else:
            llm = jax.jit(lambda llm: llm.unrolled(), compiler_options=once)(model.llm)
        for block in llm.blocks:
            store_output_first(block, llm.dtype)
        self.model, self.stop_ids = VLM(model.vit, compressor, llm), np.array(stop_ids)
        self.first, self.following = programs(brief=brief)
        self.levels = jax.jit(functools.partial(levels))

    def read_prefix(self, ids: Sequence[int]) -> Past | None:
        """The pass over the tokens that start every row of later batches; None for no tokens."""
        if not ids:
            return None

        def start(llm: LLM, ids):
            return llm.start(llm.embed(ids), jnp.full_like(ids[:, 0], ids.shape[1]))

        # One equal row for each part into which the mesh divides a batch.
        now = jax.sharding.get_mesh()
        rows = np.tile(np.array(ids, np.int32), (mesh.batch_shards(now), 1))
        placed = mesh.spread(rows, now, "batch")
        past = hosts.fetched(jax.jit(start)(self.model.llm, placed))
        one = Past(past.hidden[:1], past.keys[:, :1], past.values[:, :1], past.length[:1])
        return mesh.spread(one, now)

    def seen(self, batch: Batch) -> Batch:
        """A batch with what the encoder gives of its images in place of their pixels: it may be
        started at several V, and is encoded once."""
        others = {k: x for k, x in batch.items() if k not in ("pixels", "image_size")}
        return others | {"levels": self.levels(self.model, batch)}

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

        `tokens` is V for a model that serves any number, in the slots of the smallest bucket that
        holds them: there are no more programs than buckets. `prefix` is the result of
        `read_prefix`, `new_tokens` the most that will be generated.
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

        Donates the caches of `started`. At most `new_tokens` steps, no more than `start` reserved.
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
    """A batch that was read: the first new token of each row, and the state for the next ones."""

    ids: Int[Array, "B"]
    caches: Caches
    length: Int[Array, "B"]  # tokens read, visual ones and `prefix` included
    sampling: Sampling | None
