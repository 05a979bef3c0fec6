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
from vlm_jax.compressors.compressor import Question, Visual
from vlm_jax.layers import rows
from vlm_jax.models import cache as caching
from vlm_jax.models import pruned
from vlm_jax.models.cache import KV, Caches, Pruned
from vlm_jax.models.llm import LLM
from vlm_jax.models.question import QUESTIONS
from vlm_jax.models.vlm import VLM, Batch
from vlm_jax.serving.decoder import Sampling, choose
from vlm_jax.serving.layout import Layout
from vlm_jax.serving.tickets import MOST_LIKELIEST


class Slots(NamedTuple):
    """Rows that are answered together: their caches, the last token of each, which is not in its
    cache yet, where it comes there, and how the next one is drawn."""

    caches: Caches
    ids: Int[Array, "B"]
    position: Int[Array, "B"]  # visual tokens that were left out count
    sampling: Sampling


class Chunk(NamedTuple):
    """What reading a part of one row gave: the token after it, and what that was chosen from."""

    caches: list[KV]
    ids: Int[Array, "1"]
    hidden: Float[Array, "1 D"]
    logits: Float[Array, "1 W"]


class Read(NamedTuple):
    """What reading a whole row gave: as `Chunk`, in caches that are laid out for a pool."""

    caches: Caches
    ids: Int[Array, "1"]
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


def whole(model: VLM, batch: Batch, sampling: Sampling, *, layout: Layout, length: int) -> Read:
    """Reads one row at once; its caches have room for `length` tokens, as `layout` says.

    The images of the batch are `visual`, or `levels` for a model whose text reads them.
    """
    batch, sampling = placed((batch, sampling))
    logits, caches, place = model.prefill(batch, new_tokens=0)
    dtype = jnp.dtype(model.llm.dtype)
    pairs = zip(caching.layers_of(caches), layout.more, strict=True)
    layers: list = [caching.resized(cache, length + more, dtype) for cache, more in pairs]
    if layout.runs:
        # Of a row without an image nothing was left out.
        lost = caches.dropped if isinstance(caches, Pruned) else nothing_left_out(layout.runs)
        where = meshes.spec("none", "batch")
        caches = Pruned(layers, jax.sharding.reshard(lost.astype(jnp.int32), where))
    else:
        caches = layers
    return Read(caches, chosen(logits, sampling, place), logits)


def nothing_left_out(runs: int) -> Int[Array, "C 1"]:
    """`Pruned.dropped` of one row of which every layer has all tokens."""
    where = meshes.spec("none", "batch")
    return jnp.broadcast_to(jnp.zeros((), jnp.int32), (runs, 1), out_sharding=where)


def step(llm: LLM, slots: Slots) -> tuple[Slots, Float[Array, "B W"]]:
    """One more token of every row, and the scores from which each was chosen.

    A row that nobody reads goes on in its last slot.
    """
    caches, ids, position, sampling = slots
    hidden, caches = llm.decode(llm.embed(ids[:, None]), caches, position)
    logits = llm.logits(hidden)[:, 0]
    ids = chosen(logits, sampling, position + 1)
    room = pruned.room(llm, caches) if isinstance(caches, Pruned) else caches[0].slots
    position = jnp.minimum(position + 1, room - 1)
    return Slots(caches, ids, position, sampling), logits


def insert(
    slots: Slots,
    caches: Caches,
    at: Int[Array, ""],
    ids: Int[Array, "1"],
    position: Int[Array, "1"],
    sampling: Sampling,
) -> Slots:
    """The rows with row `at` replaced by one that was read, whose first new token is `ids`."""
    grown = caching.with_row(slots.caches, caches, at)
    others = jax.tree.map(
        lambda old, new: lax.dynamic_update_slice_in_dim(old, new, at, 0),
        slots[1:],
        placed((ids, position, sampling)),
    )
    return Slots(grown, *others)


def of_rows(slots: Slots, index: Int[Array, "R"], dtype: jnp.dtype) -> Slots:
    """These rows, in this order."""
    caches = caching.of_all_rows(slots.caches, index, dtype)
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
      layout: of the caches in which rows are answered.
    """

    def __init__(self, model: VLM, mesh: Mesh, layout: Layout):
        self.model, self.mesh, self.llm, self.layout = model, mesh, model.llm, layout
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
            rooms = [length + more for more in self.layout.more]
            caches: Caches = [caching.kept(empty(self.llm, room), room) for room in rooms]
            if self.layout.runs:
                caches = Pruned(caches, nothing_left_out(self.layout.runs))
            where = meshes.spec("batch")
            one = jnp.broadcast_to(jnp.zeros((), jnp.int32), (1,), out_sharding=where)
            real = one.astype(jnp.float32)
            return Slots(caches, one, one, Sampling(real, real, one.astype(jnp.uint32)))

        return self.run(("opened", length), make)

    def chunk(self, caches: list[KV], ids: np.ndarray, *more: Any) -> Chunk:
        """`chunk`; the caches are donated."""
        key = ("chunk", caches[0].slots, ids.shape[1])
        return self.run(key, chunk, caches, ids, *more, part="llm", donate=(1,))

    def whole(self, batch: dict[str, Any], sampling: Sampling, length: int) -> Read:
        """`whole`."""

        def f(model: VLM, batch: Batch, sampling: Sampling) -> Read:
            return whole(model, batch, sampling, layout=self.layout, length=length)

        key = ("whole", length, *(x.shape for x in jax.tree.leaves(batch)))
        return self.run(key, f, batch, sampling, part="model")

    def step(self, slots: Slots) -> tuple[Slots, Array]:
        """`step`; the caches and positions are donated, the ids are not: they may be read yet."""

        def f(llm: LLM, caches, position, ids, sampling):
            return step(llm, Slots(caches, ids, position, sampling))

        key = ("step", room_of(slots), len(slots.ids))
        given = slots.caches, slots.position, slots.ids, slots.sampling
        return self.run(key, f, *given, part="llm", donate=(1, 2))

    def insert(self, slots: Slots, caches: Caches, at: int, first: Array, position: int,
               sampling: Sampling) -> Slots:  # fmt: skip
        """`insert`; `slots` is donated but its ids and sampling."""

        def f(kept: tuple, ids: Array, sampling: Sampling, *more: Any) -> Slots:
            return insert(Slots(kept[0], ids, kept[1], sampling), *more)

        key = ("insert", room_of(slots), len(slots.ids))
        given = np.int32(at), first, np.array([position], np.int32), sampling
        kept = slots.caches, slots.position
        return self.run(key, f, kept, slots.ids, slots.sampling, caches, *given, donate=(0,))

    def of_rows(self, slots: Slots, index: list[int]) -> Slots:
        """`of_rows`."""
        key = ("of_rows", room_of(slots), len(slots.ids), len(index))
        f = lambda slots, index: of_rows(slots, index, self.dtype)  # noqa: E731
        return self.run(key, f, slots, np.array(index, np.int32))

    def load(self, caches: list[KV], block: list[KV], start: int) -> list[KV]:
        """The caches of a row that is read with a block written from `start` on; donated."""

        def f(caches: list[KV], block: list[KV], start: Array) -> list[KV]:
            at = placed(start)
            return [caching.write(*both, at) for both in zip(caches, block, strict=True)]

        key = ("load", caches[0].slots, block[0].slots)
        return self.run(key, f, caches, block, np.array([start], np.int32), donate=(0,))

    def block(self, caches: Caches, row: int, start: int, length: int) -> list[KV]:
        """The keys and values of `length` tokens of one row, of which every layer has all."""

        def f(caches: list, row: Array, start: Array) -> list[KV]:
            return [caching.part(x, row, start, length, self.dtype) for x in caches]

        first = caching.layers_of(caches)[0]
        key = ("block", first.slots, len(first.keys), length)
        return self.run(key, f, caches, np.int32(row), np.int32(start))

    def likeliest(self, logits: Array, ids: Array) -> Likeliest:
        """`likeliest`."""
        return self.run(("likeliest", len(ids)), likeliest, logits, ids)

    def levels(self, pixels: np.ndarray, size: tuple[int, int]) -> Array:
        """What the encoder gives of one image; `size` is read if the compressor reads it."""
        sizes = np.array([size], np.int32) if self.model.compressor.reads == "image_size" else None
        f = lambda model, x, sizes: model.encode(x, sizes)  # noqa: E731
        return self.run(("levels",), f, pixels[None], sizes, part="model")

    def visual(self, slots: int, levels: Array, question: Array | Question | None) -> Visual:
        """The visual tokens of one image in this many slots, in the LLM's type.

        `question` is the feature of the image's question, or its ids, from which what the
        compressor reads is made.
        """

        def f(model: VLM, levels: Array, question: Array | Question | None) -> Visual:
            model = model.at(slots) if model.compressor.buckets else model
            reader = model.compressor
            if isinstance(question, Question):
                question = QUESTIONS[reader.method.query](model.llm, *placed(question))
            output = model.compress(levels, question)
            tokens, count = output if reader.adaptive else (output, jnp.full(1, output.shape[1]))
            return Visual(tokens.astype(self.dtype), count)

        asked = question.tokens.shape[1] if isinstance(question, Question) else 0
        return self.run(("visual", slots, asked), f, levels, question, part="model")


def room_of(slots: Slots) -> int:
    """Tokens for which these rows have room in the layers that hold fewest."""
    return min(cache.slots for cache in caching.layers_of(slots.caches))
