# SPDX-License-Identifier: Apache-2.0
"""What an engine computes: a few functions of static shapes, each compiled before it runs.

A call with other shapes than those of its program is an error, not a compilation.

B rows that are answered together  T tokens of a chunk  D llm width  W vocabulary
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import mesh as meshes
from vlm_jax.compressors.compressor import Visual
from vlm_jax.layers import rows
from vlm_jax.models import cache as caching
from vlm_jax.models.cache import KV, Cache
from vlm_jax.models.llm import LLM
from vlm_jax.models.vlm import VLM
from vlm_jax.serving.decoder import Sampling, choose
from vlm_jax.serving.tickets import MOST_LIKELIEST


class Slots(NamedTuple):
    """Rows that are answered together: their caches, the last token of each, which is not in its
    cache yet, where it comes there, and how the next one is drawn."""

    caches: list[KV | Cache]
    ids: Int[Array, "B"]
    position: Int[Array, "B"]
    sampling: Sampling


class Chunk(NamedTuple):
    """What reading a part of one row gave: the token after it, and what that was chosen from."""

    caches: list[KV]
    ids: Int[Array, "1"]
    hidden: Float[Array, "1 D"]
    logits: Float[Array, "1 W"]


class Likeliest(NamedTuple):
    """Natural log probabilities of the chosen tokens, and of the likeliest ones, descending."""

    chosen: Float[Array, "B"]
    ids: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]


def chosen(
    logits: Float[Array, "B W"], sampling: Sampling, place: Int[Array, "B"]
) -> Int[Array, "B"]:
    """`choose`, without sorting the vocabulary while no row draws."""
    return lax.cond(
        (sampling.temperature > 0).any(),
        lambda: choose(logits, sampling, place),
        lambda: choose(logits, None, place),
    )


def placed(given: Any) -> Any:
    """Arrays that came from the host, as those of a batch."""
    return jax.sharding.reshard(given, meshes.spec("batch"))


def empty(llm: LLM, length: int) -> KV:
    """Keys and values of one row of one layer, all zero."""
    size = llm.size
    shape = (1, length, size.kv_heads, size.head_size)
    where = meshes.spec("batch", "len", "kv_heads", "head")
    zeros = jnp.broadcast_to(jnp.zeros((), llm.dtype), shape, out_sharding=where)
    return KV(zeros, zeros)


def chunk(
    llm: LLM,
    caches: list[KV],
    ids: Int[Array, "1 T"],
    visual: Float[Array, "1 T D"],
    seen: Bool[Array, "1 T"],
    position: Int[Array, "1"],
    last: Int[Array, "1"],
    sampling: Sampling,
) -> Chunk:
    """Reads tokens of one row from `position` on; those behind index `last` are padding.

    A token is `visual` where `seen`, else that of its id.
    """
    ids, visual, seen, position, last, sampling = placed(
        (ids, visual, seen, position, last, sampling)
    )
    x = jnp.where(seen[..., None], visual, llm.embed(ids))
    hidden, caches = llm.decode(x, caches, position)
    hidden = rows(hidden, last[:, None])
    logits = llm.logits(hidden)[:, 0]
    token = chosen(logits, sampling, position + last + 1)
    return Chunk(caches, token, hidden[:, 0], logits)


def step(llm: LLM, slots: Slots) -> tuple[Slots, Float[Array, "B W"]]:
    """One more token of every row, and the scores from which each was chosen.

    A row that nobody reads goes on in its last slot.
    """
    caches, ids, position, sampling = slots
    hidden, caches = llm.decode(llm.embed(ids[:, None]), caches, position)
    logits = llm.logits(hidden)[:, 0]
    ids = chosen(logits, sampling, position + 1)
    position = jnp.minimum(position + 1, caches[0].slots - 1)
    return Slots(caches, ids, position, sampling), logits


def insert(
    slots: Slots,
    caches: list[KV],
    at: Int[Array, ""],
    ids: Int[Array, "1"],
    position: Int[Array, "1"],
    sampling: Sampling,
) -> Slots:
    """The rows with row `at` replaced by one that was read, whose first new token is `ids`."""
    grown = [caching.put_row(both, row, at) for both, row in zip(slots.caches, caches, strict=True)]
    others = jax.tree.map(
        lambda old, new: lax.dynamic_update_slice_in_dim(old, new, at, 0),
        slots[1:],
        placed((ids, position, sampling)),
    )
    return Slots(grown, *others)


def of_rows(slots: Slots, index: Int[Array, "R"], dtype: jnp.dtype) -> Slots:
    """These rows, in this order."""
    caches = [caching.of_rows(x, index, dtype) for x in slots.caches]
    where = meshes.spec("batch")
    others = jax.tree.map(lambda x: x.at[index].get(out_sharding=where), slots[1:])
    return Slots(caches, *others)


def likeliest(logits: Float[Array, "B W"], ids: Int[Array, "B"]) -> Likeliest:
    """The log probabilities of `ids`, and the likeliest tokens."""
    logits = jax.sharding.reshard(logits, meshes.spec("batch", "none"))

    def of_row(row, token):
        logprobs = jax.nn.log_softmax(row)
        top, at = lax.top_k(logprobs, min(MOST_LIKELIEST, len(row)))
        return logprobs[token], at, top

    return Likeliest(*jax.vmap(of_row)(logits, ids))


class Programs:
    """The programs of one model on one mesh, compiled at their first call.

    Args:
      model: its LLM unstacked, as that of a `Decoder`.
    """

    def __init__(self, model: VLM, mesh: Mesh):
        self.model, self.mesh, self.llm = model, mesh, model.llm
        self.dtype = jnp.dtype(model.llm.dtype)
        self.made: dict[tuple, Callable] = {}
        # Flat: to flatten the modules of a small model takes longer than a step of it.
        self.parts = {"llm": jax.tree.flatten(model.llm), "model": jax.tree.flatten(model)}

    @property
    def compiled(self) -> int:
        """How many programs were compiled."""
        return len(self.made)

    def run(self, key: tuple, f: Callable, *given: Any, part: str = "", donate: tuple = ()) -> Any:
        """`f` of these, of a part of the model first if one is named; `key` names f and shapes."""
        if part:
            leaves, tree = self.parts[part]
            given = (leaves, *given)
        made = self.made.get(key)
        if made is None:
            g = (lambda leaves, *rest: f(jax.tree.unflatten(tree, leaves), *rest)) if part else f
            with jax.set_mesh(self.mesh):
                made = jax.jit(g, donate_argnums=donate).lower(*given).compile()
            self.made[key] = made
        return made(*given)

    def blank(self, length: int) -> list[KV]:
        """Caches of one row that is read, with room for `length` tokens."""
        make = lambda: [empty(self.llm, length) for _ in range(self.llm.depth)]  # noqa: E731
        return self.run(("blank", length), make)

    def opened(self, length: int) -> Slots:
        """One row that nobody reads, with room for `length` tokens."""

        def make() -> Slots:
            kv = [caching.kept(empty(self.llm, length), length) for _ in range(self.llm.depth)]
            where = meshes.spec("batch")
            one = jnp.broadcast_to(jnp.zeros((), jnp.int32), (1,), out_sharding=where)
            real = one.astype(jnp.float32)
            return Slots(kv, one, one, Sampling(real, real, one.astype(jnp.uint32)))

        return self.run(("opened", length), make)

    def chunk(self, caches: list[KV], ids: np.ndarray, *more: Any) -> Chunk:
        """`chunk`; the caches are donated."""
        key = ("chunk", caches[0].slots, ids.shape[1])
        return self.run(key, chunk, caches, ids, *more, part="llm", donate=(1,))

    def step(self, slots: Slots) -> tuple[Slots, Array]:
        """`step`; the caches and positions are donated, the ids are not: they may be read yet."""

        def f(llm: LLM, caches, position, ids, sampling):
            return step(llm, Slots(caches, ids, position, sampling))

        key = ("step", slots.caches[0].slots, len(slots.ids))
        given = slots.caches, slots.position, slots.ids, slots.sampling
        return self.run(key, f, *given, part="llm", donate=(1, 2))

    def insert(self, slots: Slots, caches: list[KV], at: int, first: Array, position: int,
               sampling: Sampling) -> Slots:  # fmt: skip
        """`insert`; `slots` is donated but its ids and sampling."""

        def f(kept: tuple, ids: Array, sampling: Sampling, *more: Any) -> Slots:
            return insert(Slots(kept[0], ids, kept[1], sampling), *more)

        key = ("insert", slots.caches[0].slots, len(slots.ids))
        given = np.int32(at), first, np.array([position], np.int32), sampling
        kept = slots.caches, slots.position
        return self.run(key, f, kept, slots.ids, slots.sampling, caches, *given, donate=(0,))

    def of_rows(self, slots: Slots, index: list[int]) -> Slots:
        """`of_rows`."""
        key = ("of_rows", slots.caches[0].slots, len(slots.ids), len(index))
        f = lambda slots, index: of_rows(slots, index, self.dtype)  # noqa: E731
        return self.run(key, f, slots, np.array(index, np.int32))

    def load(self, caches: list[KV], block: list[KV], start: int) -> list[KV]:
        """The caches of a row that is read with a block written from `start` on; donated."""

        def f(caches: list[KV], block: list[KV], start: Array) -> list[KV]:
            at = placed(start)
            return [caching.write(*both, at) for both in zip(caches, block, strict=True)]

        key = ("load", caches[0].slots, block[0].slots)
        return self.run(key, f, caches, block, np.array([start], np.int32), donate=(0,))

    def block(self, caches: list[KV | Cache], row: int, start: int, length: int) -> list[KV]:
        """The keys and values of `length` tokens of one row."""

        def f(caches: list, row: Array, start: Array) -> list[KV]:
            return [caching.part(x, row, start, length, self.dtype) for x in caches]

        key = ("block", caches[0].slots, len(caches[0].keys), length)
        return self.run(key, f, caches, np.int32(row), np.int32(start))

    def likeliest(self, logits: Array, ids: Array) -> Likeliest:
        """`likeliest`."""
        return self.run(("likeliest", len(ids)), likeliest, logits, ids)

    def levels(self, pixels: np.ndarray) -> Array:
        """What the encoder gives of one image."""
        return self.run(("levels",), lambda model, x: model.encode(x), pixels[None], part="model")

    def visual(self, slots: int, levels: Array, question: Array | None) -> Visual:
        """The visual tokens of one image in this many slots, in the LLM's type."""

        def f(model: VLM, levels: Array, question: Array | None) -> Visual:
            reader = model.compressor
            reader = reader.at(slots) if reader.buckets else reader
            output = reader(levels, question)
            tokens, count = output if reader.adaptive else (output, jnp.full(1, output.shape[1]))
            return Visual(tokens.astype(self.dtype), count)

        return self.run(("visual", slots), f, levels, question, part="model")
