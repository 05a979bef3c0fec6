# SPDX-License-Identifier: Apache-2.0
"""Keys and values that were computed, and how tokens are added to them.

B batch  T tokens  S keys  L layers  D llm width  K kv heads  H head size
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax import mesh


class KV(NamedTuple):
    """Keys and values of one layer, already rotated, one slot per position."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]


class Past(NamedTuple):
    """The first `length` tokens of each row, read by a pass that another goes on from.

    What stands behind `length` is padding. Keys and values are stacked over the layers.
    """

    hidden: Float[Array, "B S D"]
    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    length: Int[Array, "B"]


def repeated(past: Past, batch: int) -> Past:
    """One row's past as that of every row of a batch."""

    def many(x, at, *dims):
        shape = (*x.shape[:at], batch, *x.shape[at + 1 :])
        return jnp.broadcast_to(x, shape, out_sharding=mesh.spec(*dims))

    kv = ("layers", "batch", "len", "kv_heads", "head")
    return Past(
        many(past.hidden, 0, "batch", "len", "feature"),
        many(past.keys, 1, *kv),
        many(past.values, 1, *kv),
        many(past.length, 0, "batch"),
    )


def positions_of(batch: int, length: int) -> Int[Array, "B T"]:
    """0, 1, ... length - 1 in every row, sharded like a batch."""
    return jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32), (batch, length), out_sharding=mesh.spec("batch", "len")
    )


def write(
    cache: Float[Array, "B S K H"],
    new: Float[Array, "B T K H"],
    at: Int[Array, "B"],
) -> Float[Array, "B S K H"]:
    """The cache with `new` written from each row's own position on."""
    # vmap keeps the write inside the shard that holds the row: no collective.
    put = jax.vmap(lambda row, x, i: lax.dynamic_update_slice_in_dim(row, x, i, 0))
    return put(cache, new.astype(cache.dtype), at)
