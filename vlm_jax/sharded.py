# SPDX-License-Identifier: Apache-2.0
"""Products and lookups of weights whose width is cut over the mesh axis "fsdp".

A weight is gathered in the type of the product, before it, and its gradient is scattered to the
shards over fsdp, then reduced over "data": fewer bytes than the reverse. Both are explicit, because
the partitioner may reduce a gradient whole and cut it afterwards, which sends twice as much
(docs/pods.md, "Collectives"). Both are along a leading dimension: the TPU compiler turns a scatter
along the last one into an all-reduce.

B batch  T tokens  D llm width  W vocabulary
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax import mesh


def scatters(rows: Float[Array, "..."], kernel: Float[Array, "..."]) -> bool:
    """Whether `product` is for these two: rows and weight are both cut over fsdp."""
    first = jax.typeof(rows).sharding.spec[0]
    parts = first if isinstance(first, tuple) else (first,)
    now = jax.sharding.get_abstract_mesh().shape
    return now.get("fsdp", 1) > 1 and "fsdp" in parts and "fsdp" in jax.typeof(kernel).sharding.spec


def product(
    rows: Float[Array, "B ..."],
    kernel: Float[Array, "..."],
    read: int,
    out: jax.P,
    preferred: Any = None,
) -> Float[Array, "B ..."]:
    """`jnp.tensordot(rows, kernel, read)` with the collectives of the module's docstring.

    Args:
      rows: cut over data and fsdp. kernel: of the same type, one dimension cut over fsdp.
      read: dimensions that are contracted. out: where the result lives.
      preferred: the type of the result, if it is not that of the rows.
    """
    place = jax.typeof(kernel).sharding.spec
    axis, first = place.index("fsdp"), rows.ndim - read
    kept = axis >= read  # the product keeps the gathered dimension
    contracted = tuple(range(first, rows.ndim)), tuple(range(kept, read + kept))

    def local(rows, kernel):
        kernel = lax.pcast(kernel, "data", to="varying")
        if kept:
            kernel = lax.all_gather(kernel, "fsdp", axis=0)
        else:
            kernel = lax.all_gather(jnp.moveaxis(kernel, axis, 0), "fsdp", axis=0, tiled=True)
            kernel = jnp.moveaxis(kernel, 0, axis)
        y = jnp.tensordot(rows, kernel, axes=contracted, preferred_element_type=preferred)
        if kept:  # the shards stand beside each other, before the rest of the result
            at = first + axis - read
            y = jnp.moveaxis(y, first, at)
            y = y.reshape(*y.shape[:at], -1, *y.shape[at + 2 :])
        return lax.psum(y, "tensor") if "tensor" in place[:read] else y

    of_rows = jax.typeof(rows).sharding.spec
    return jax.shard_map(local, in_specs=(of_rows, place), out_specs=out)(rows, kernel)


def lookup(table: Float[Array, "W D"], ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """The entries of a table that is cut by `mesh.spec("vocab", "embed")`, as `dtype`.

    Every device reads its part of the width for the rows of all devices of fsdp, and what it read
    is exchanged: the table is neither gathered nor is its gradient reduced as a whole. Gradients
    add up in the table's type.
    """
    out = mesh.spec("batch", "len", "feature")
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:  # nothing to exchange
        whole = jax.sharding.reshard(table, mesh.spec("vocab", "feature"))
        return whole.at[ids].get(out_sharding=out).astype(dtype)

    def local(table, ids):
        ids = lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        # Of the vocabulary too a device may hold a part only.
        at = ids - lax.axis_index("tensor") * table.shape[0]
        own = (at >= 0) & (at < table.shape[0])
        found = table.at[jnp.where(own, at, 0)].get(mode="promise_in_bounds")
        found = lax.psum(jnp.where(own[..., None], found, 0).astype(dtype), "tensor")
        return lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        local,
        in_specs=(mesh.spec("vocab", "embed"), mesh.spec("batch", "len")),
        out_specs=out,
    )(table, ids)
