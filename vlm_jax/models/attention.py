# SPDX-License-Identifier: Apache-2.0
"""Attention of queries to keys: which they may see, how well they match, and what they read.

B batch  T tokens  S keys  N heads  K kv heads  G = N/K  H head size
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import mesh
from vlm_jax.kernels.causal_attention import UNSEEN, Groups
from vlm_jax.models.cache import KV, Cache, Past, positions_of
from vlm_jax.models.segments import same


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


def scores(
    query: Float[Array, "B T N H"], keys: Float[Array, "B _ _ H"], order: str = "BSKH"
) -> Float[Array, "B K G T S"]:
    """How well each query matches each key, in float32; `order` are the dimensions of the keys."""
    batch, length, _, size = query.shape
    # Explicit, because JAX would put the sharding of a single kv head on its group of queries.
    groups = jnp.reshape(
        query,
        (batch, length, keys.shape[order.index("K")], -1, size),
        out_sharding=mesh.spec("batch", "len", "kv_heads", "none", "head"),
    )
    found = jnp.einsum(f"BTKGH,{order}->BKGTS", groups, keys, preferred_element_type=jnp.float32)
    return found * size**-0.5


def mix(
    query: Float[Array, "B T N H"], seen: KV | Cache, mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    """The values that each query admits, weighted by the softmax of their keys' scores."""
    order = "BKSH" if isinstance(seen, Cache) else "BSKH"
    found = jnp.where(mask[:, None, None], scores(query, seen.keys, order), -jnp.inf)
    # The softmax divides after the mixing: its backward pass then sums over H instead of S.
    weights = jnp.exp(found - lax.stop_gradient(found.max(-1, keepdims=True)))
    mixed = jnp.einsum(
        f"BKGTS,{order}->BTKGH",
        weights.astype(query.dtype),
        seen.values,
        preferred_element_type=jnp.float32,
    )
    mixed /= jnp.einsum("BKGTS->BTKG", weights)[..., None]
    return jnp.reshape(
        mixed.astype(query.dtype),
        query.shape,
        out_sharding=mesh.spec("batch", "len", "heads", "head"),
    )
