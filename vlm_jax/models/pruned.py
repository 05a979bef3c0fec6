# SPDX-License-Identifier: Apache-2.0
"""Passes of an LLM whose later layers read fewer visual tokens: `pruning/` says which.

Both passes are those of `llm.py`, in runs of layers. Sizes are static: between two cuts all rows
have the same number of slots, and what a row lost is data.

An `llm` here is a `vlm_jax.models.llm.LLM`, which imports this file.

B batch  X tokens of a row, and Y after a cut  N heads  K kv heads  G = N/K  H head size
C runs of layers between two cuts
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import mesh
from vlm_jax.layers import layer, rows
from vlm_jax.models.attention import scores
from vlm_jax.models.cache import KV, Past, Pruned, cached, listed, positions_of, taken
from vlm_jax.models.pruning import Run
from vlm_jax.models.rope import Turns


class Images(NamedTuple):
    """Where the visual tokens of each row are: at most `slots` of them, then text up to `last`."""

    visual: Bool[Array, "B X"]
    last: Int[Array, "B"]
    slots: int


def prefill(
    llm: Any, x: Float[Array, "B X D"], images: Images, *, slots: int, past: Past | None
) -> tuple[Float[Array, "B Y D"], Pruned]:
    """`LLM.prefill` of a model that prunes: hidden states of what is left, and all caches."""
    pruning = llm.pruning
    visual, last, most = images
    start = jnp.zeros_like(last) if past is None else past.length
    turned = positions_of(*x.shape[:2]) + start[:, None]
    runs = pruning.runs(llm.depth, most)
    kvs: list[list[KV]] = []
    dropped = [jnp.zeros_like(last)]
    for run, after in zip(runs, [*runs[1:], runs[-1]], strict=True):
        if after.tokens == run.tokens:  # the last run, or there were never more
            x, kv = llm.through(x, (run.first, run.end), turned, past)
            kvs.append(listed(kv))
            dropped.append(dropped[-1])
            continue
        x, kv, attention = asked(llm, x, run, turned, last, past)
        kvs.append(kv)
        x, index = cut(llm, x, attention, visual, last, slots=run.tokens, tokens=after.tokens)
        left = rows(visual, index)
        lost = visual.sum(1) - left.sum(1)
        visual, last = left, last - lost
        dropped.append(dropped[-1] + lost)
        if pruning.packs:
            turned = positions_of(*index.shape) + start[:, None]
        else:
            turned = rows(turned, index)
        if pruning.forgets:
            kvs = [[taken(kv, index) for kv in of_run] for of_run in kvs]
            dropped = [dropped[-1]] * len(dropped)
    caches = []
    for run, of_run in zip(runs, kvs, strict=True):
        gone = most - (runs[-1] if pruning.forgets else run).tokens
        caches += cached(of_run, past, slots - gone, first=run.first)
    return llm.norm(x), Pruned(caches, jnp.stack(dropped[: len(runs)]))


def asked(
    llm: Any,
    x: Float[Array, "B X D"],
    run: Run,
    turned: Int[Array, "B X"],
    last: Int[Array, "B"],
    past: Past | None,
) -> tuple[Float[Array, "B X D"], list[KV], Float[Array, "B X"]]:
    """The layers of a run, their keys and values, and the attention by which the cut behind them
    chooses: that of the next layer, or of their last one."""
    turns = llm.rope.turns(turned, llm.size.head_size // 2)
    if llm.pruning.looks_ahead:
        x, kv = llm.through(x, (run.first, run.end), turned, past)
        return x, listed(kv), last_attention(llm, run.end, x, None, turns, last, past)
    kvs: list[KV] = []
    if run.first < run.end - 1:
        x, kv = llm.through(x, (run.first, run.end - 1), turned, past)
        kvs = listed(kv)
    y, kv = llm.through(x, (run.end - 1, run.end), turned, past)
    kvs += listed(kv)
    return y, kvs, last_attention(llm, run.end - 1, x, kvs[-1].keys, turns, last, past)


@jax.named_scope("pruning")
def cut(
    llm: Any,
    x: Float[Array, "B X D"],
    attention: Float[Array, "B X"],
    visual: Bool[Array, "B X"],
    last: Int[Array, "B"],
    *,
    slots: int,
    tokens: int,
) -> tuple[Float[Array, "B Y D"], Int[Array, "B Y"]]:
    """The rows after a cut, and the places that their tokens had before.

    The last token of a prompt stays, also where it is visual: the next one is read from it.
    """
    one = llm.pruning.cut()
    attention = jnp.where(positions_of(*visual.shape) == last[:, None], jnp.inf, attention)

    def each(*row):
        return tuple(jax.vmap(lambda *of: one(*of, slots=slots, tokens=tokens))(*row))

    # Rows are independent: each device cuts its own. JAX's decomposition on a TPU has loops whose
    # types do not pass the check of what varies over the mesh.
    batch = mesh.spec("batch")
    return jax.shard_map(each, in_specs=batch, out_specs=batch, check_vma=False)(
        *(jax.sharding.reshard(part, batch) for part in (x, attention, visual))
    )


@jax.named_scope("pruning")
def last_attention(
    llm: Any,
    index: int,
    x: Float[Array, "B X D"],
    keys: Float[Array, "B X K H"] | None,
    turns: Turns,
    last: Int[Array, "B"],
    past: Past | None,
) -> Float[Array, "B X"]:
    """How much the `last` token of each row attends to each of its tokens in layer `index`.

    The mean over heads of softmaxes that count the `past` too. `x` is what the layer reads, `keys`
    are its keys of x where they are known.
    """
    block = layer(llm.blocks, index)
    # Of a row whose text is all in the past nothing is pruned, and anything may come out.
    at = jnp.maximum(last, 0)[:, None]
    there = Turns(*(rows(part, at) for part in turns))
    query = block.attention.queries(block.norm1(rows(x, at)), there)
    if keys is None:
        keys = block.attention.keys(block.norm1(x), turns)
    seen = positions_of(*x.shape[:2]) <= at
    if past is not None:
        keys = jnp.concatenate([past.keys[index], keys], axis=1)
        before = positions_of(len(last), past.keys.shape[2]) < past.length[:, None]
        seen = jnp.concatenate([before, seen], axis=1)
    found = jnp.where(seen[:, None, None, None], scores(query, keys), -jnp.inf)
    return jax.nn.softmax(found, axis=-1).mean((1, 2, 3))[:, -x.shape[1] :]


def decode(
    llm: Any, x: Float[Array, "B 1 D"], caches: Pruned, position: Int[Array, "B"]
) -> tuple[Float[Array, "B 1 D"], Pruned]:
    """One more token per row, at `position` of its row before anything was left out; not normed."""
    pruning, grown = llm.pruning, []
    for run, dropped in zip(runs_of(llm), caches.dropped, strict=True):
        at = position - dropped
        x, some = llm.extend(
            x,
            run.first,
            caches.layers[run.first : run.end],
            at=at,
            turned=at if pruning is not None and pruning.packs else position,
        )
        grown += some
    return x, Pruned(grown, caches.dropped)


def runs_of(llm: Any) -> tuple[Run, ...]:
    """The layers whose caches lost the same tokens: all of them where a summary was kept."""
    if llm.pruning is None:
        return (Run(0, llm.depth, 0),)
    return llm.pruning.runs(llm.depth, 0)


def room(llm: Any, caches: Pruned) -> Int[Array, "B"]:
    """How many positions of each row have a slot in the caches of every layer."""
    each = zip(runs_of(llm), caches.dropped, strict=True)
    slots = [caches.layers[run.first].slots + dropped for run, dropped in each]
    return functools.reduce(jnp.minimum, slots)
