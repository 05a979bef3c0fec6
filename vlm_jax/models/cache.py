# SPDX-License-Identifier: Apache-2.0
"""Keys and values that were computed, and how tokens are added to them.

B batch  T tokens  S keys  L layers  D llm width  K kv heads  H head size
C runs of layers between two cuts
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax import cpu, mesh
from vlm_jax.kernels.cache_tpu import write_token
from vlm_jax.kernels.tiles import ROWS
from vlm_jax.layers import layer, rows


class KV(NamedTuple):
    """Keys and values of one layer, token by token, as they are computed; keys are rotated."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]

    @property
    def slots(self) -> int:
        """Positions of a row."""
        return self.keys.shape[1]


class Cache(NamedTuple):
    """Keys and values of one layer as they are read, the slots of a head side by side.

    In the other order XLA's CPU backend transposes all of them in every step of decoding.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]

    @property
    def slots(self) -> int:
        """Positions of a row."""
        return self.keys.shape[2]


class Past(NamedTuple):
    """The first `length` tokens of each row, read by a pass that another goes on from.

    What stands behind `length` is padding. Keys and values are stacked over the layers. `skipped`
    tokens stood before them and are not there, as those that a summary stands for.
    """

    hidden: Float[Array, "B S D"]
    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    length: Int[Array, "B"]
    skipped: Int[Array, "B"] | None = None

    @property
    def position(self) -> Int[Array, "B"]:
        """The position of the next token of each row."""
        return self.length if self.skipped is None else self.length + self.skipped


class Pruned(NamedTuple):
    """Caches after a prefill that left visual tokens out: later layers have fewer slots.

    `dropped` are the tokens that each row lost in the caches of the layers between two cuts.
    """

    layers: list[KV | Cache]
    dropped: Int[Array, "C B"]


Caches = list[KV | Cache] | Pruned


def repeated(past: Past, batch: int) -> Past:
    """One row's past as that of every row of a batch; of as many rows as they are."""

    def many(x, at, *dims):
        shape = (*x.shape[:at], batch, *x.shape[at + 1 :])
        return jnp.broadcast_to(x, shape, out_sharding=mesh.spec(*dims))

    kv = ("layers", "batch", "len", "kv_heads", "head")
    return Past(
        many(past.hidden, 0, "batch", "len", "feature"),
        many(past.keys, 1, *kv),
        many(past.values, 1, *kv),
        many(past.length, 0, "batch"),
        None if past.skipped is None else many(past.skipped, 0, "batch"),
    )


def positions_of(batch: int, length: int) -> Int[Array, "B T"]:
    """0, 1, ... length - 1 in every row, sharded like a batch."""
    return jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32), (batch, length), out_sharding=mesh.spec("batch", "len")
    )


def kept(kv: KV, slots: int) -> KV | Cache:
    """A cache with room for `slots` positions that begins with these.

    A single row stays as it is: without its first dimension, which XLA's CPU backend drops, a cache
    by heads is copied when it is written. Where products of bfloat16 are made by casts, a cache
    is float32: cast once, not in every step.
    """
    slots = math.ceil(slots / ROWS) * ROWS if tpu() else slots
    room = [(0, 0), (0, slots - kv.slots), (0, 0), (0, 0)]
    padded = KV(*(jnp.pad(x, room) for x in kv))
    if len(kv.keys) == 1 and not tpu():
        return padded
    dtype = jnp.float32 if cpu.emulates(kv.keys.dtype) else kv.keys.dtype
    return Cache(*(x.astype(dtype).transpose(0, 2, 1, 3) for x in padded))


def cached(
    new: KV | list[KV], past: Past | None, slots: int, *, first: int = 0
) -> list[KV | Cache]:
    """One cache per layer with room for `slots` positions: of `past`, then the new ones.

    `new` are stacked over the layers or a list, of which `first` is the first layer of `past`.
    """
    new = listed(new)
    if past is None:
        return [kept(kv, slots) for kv in new]
    layers = range(first, first + len(new))
    before = [kept(layer(KV(past.keys, past.values), i), slots) for i in layers]
    return [write(*both, past.length) for both in zip(before, new, strict=True)]


def listed(kv: KV | list[KV]) -> list[KV]:
    """Keys and values layer by layer."""
    return kv if isinstance(kv, list) else [layer(kv, i) for i in range(len(kv.keys))]


def taken(kv: KV, index: Int[Array, "B Y"]) -> KV:
    """`rows` of keys and values, whose heads may be cut over devices."""
    where, places = mesh.spec("batch", "len", "kv_heads", "head"), mesh.spec("batch", "len")
    local = jax.shard_map(rows, in_specs=(where, places), out_specs=where)
    return KV(*(local(part, index) for part in kv))


def by_token(cache: KV | Cache, dtype: jnp.dtype) -> KV:
    """The same keys and values token by token, in the type in which they are computed."""
    if isinstance(cache, KV):
        return cache
    return KV(*(x.transpose(0, 2, 1, 3).astype(dtype) for x in cache))


def of_rows(cache: KV | Cache, index: Int[Array, "R"], dtype: jnp.dtype) -> KV | Cache:
    """A cache of these rows of another, in this order; `dtype` is that of `KV`."""
    where = mesh.spec("batch", "len", "kv_heads", "head")
    kv = by_token(cache, dtype)
    return kept(KV(*(x.at[index].get(out_sharding=where) for x in kv)), cache.slots)


def put_row(cache: KV | Cache, row: KV | Cache, at: Int[Array, ""]) -> KV | Cache:
    """The cache with all slots of row `at` replaced by the first ones of a single row."""
    row = KV(*(x[:, : cache.slots] for x in by_token(row, row.keys.dtype)))
    if isinstance(cache, Cache):
        row = Cache(*(x.transpose(0, 2, 1, 3) for x in row))
    pairs = zip(cache, row, strict=True)
    return type(cache)(
        *(lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), at, 0) for old, x in pairs)
    )


def layers_of(caches: Caches) -> list[KV | Cache]:
    """The caches of the layers, in order."""
    return caches.layers if isinstance(caches, Pruned) else caches


def with_row(caches: Caches, row: Caches, at: Int[Array, ""]) -> Caches:
    """All layers' caches with row `at` replaced by a single row, as `put_row` does."""
    pairs = zip(layers_of(caches), layers_of(row), strict=True)
    layers = [put_row(cache, one, at) for cache, one in pairs]
    if not (isinstance(caches, Pruned) and isinstance(row, Pruned)):
        return layers
    return Pruned(layers, lax.dynamic_update_slice_in_dim(caches.dropped, row.dropped, at, 1))


def of_all_rows(caches: Caches, index: Int[Array, "R"], dtype: jnp.dtype) -> Caches:
    """All layers' caches of these rows, as `of_rows` does."""
    layers = [of_rows(cache, index, dtype) for cache in layers_of(caches)]
    if not isinstance(caches, Pruned):
        return layers
    return Pruned(layers, caches.dropped.at[:, index].get(out_sharding=mesh.spec("none", "batch")))


def resized(cache: KV | Cache, slots: int, dtype: jnp.dtype) -> KV:
    """The first `slots` positions token by token, zeros behind those that there are."""
    kv = by_token(cache, dtype)
    room = [(0, 0), (0, max(slots - kv.slots, 0)), (0, 0), (0, 0)]
    where = mesh.spec("batch", "len", "kv_heads", "head")
    return KV(*(jax.sharding.reshard(jnp.pad(x[:, :slots], room), where) for x in kv))


def part(
    cache: KV | Cache, row: Int[Array, ""], start: Int[Array, ""], length: int, dtype: jnp.dtype
) -> KV:
    """`length` tokens of one row from `start` on, as they were computed in `dtype`."""
    one = type(cache)(*(lax.dynamic_slice_in_dim(x, row, 1, 0) for x in cache))
    axis = 2 if isinstance(one, Cache) else 1
    cut = (lax.dynamic_slice_in_dim(x, start, length, axis) for x in one)
    return by_token(type(one)(*cut), dtype)


def tpu() -> bool:
    """Whether the current mesh is one of TPUs, where a kernel writes into caches by head."""
    return mesh.platform() == "tpu"


def write(cache: KV | Cache, new: KV, at: Int[Array, "B"]) -> KV | Cache:
    """The cache with `new` written from each row's own position on."""
    if by_head := isinstance(cache, Cache):
        new = Cache(*(x.transpose(0, 2, 1, 3).astype(cache.keys.dtype) for x in new))
        if tpu() and new.slots == 1:
            return Cache(*write_token(*cache, *new, at))
    # vmap keeps the write inside the shard that holds the row: no collective.
    put = jax.vmap(lambda row, x, i: lax.dynamic_update_slice_in_dim(row, x, i, int(by_head)))
    pairs = zip(cache, new, strict=True)
    return type(cache)(*(put(old, x.astype(old.dtype), at) for old, x in pairs))
