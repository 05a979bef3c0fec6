# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention of many queries by JAX's splash attention: scores are not written to HBM.

B batch  T queries  S keys, the last T of them the queries' own  N heads  K kv heads  H head size
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jaxtyping import Array, Float, Int

from vlm_jax import mesh

# Fewer queries would be padded to this number, and XLA's form is then as good.
SHORTEST = 128
BLOCKS = (512, 256, 128)  # sides of the blocks, the fastest first
PADDED = 1.13  # times its length, to which a row may be padded for a larger block
UNSEEN = -1  # the group of keys that no query may see


class Groups(NamedTuple):
    """The group of each token: a token sees the tokens of its group that do not come after it.

    None if every token of a row sees all before it.
    """

    queries: Int[Array, "B T"] | None
    keys: Int[Array, "B S"] | None


def block_of(length: int) -> int:
    """The side of the blocks for rows of `length` tokens: the largest within PADDED."""
    for side in BLOCKS[:-1]:
        if math.ceil(length / side) * side <= PADDED * length:
            return side
    return BLOCKS[-1]


def causal_attention(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    groups: Groups,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Softmax attention of each query to the keys of its group up to its own, scaled by H^-1/2.

    Rows are padded inside to whole blocks. Each device handles its own rows and heads: nothing is
    sent. `interpret` runs the kernel on a CPU, slowly.
    """
    of_query = mesh.spec("batch", "len", "heads", "head")
    of_keys = mesh.spec("batch", "len", "kv_heads", "head")
    rows = mesh.spec("batch", "len")
    run = functools.partial(on_device, interpret=interpret)
    if groups.queries is None:
        f = jax.shard_map(
            lambda *given: run(*given, Groups(None, None)),
            in_specs=(of_query, of_keys, of_keys),
            out_specs=of_query,
            check_vma=False,
        )
        return f(query, keys, values)
    f = jax.shard_map(
        lambda q, k, v, own, seen: run(q, k, v, Groups(own, seen)),
        in_specs=(of_query, of_keys, of_keys, rows, rows),
        out_specs=of_query,
        check_vma=False,
    )
    return f(query, keys, values, *groups)


def on_device(query, keys, values, groups: Groups, *, interpret: bool):
    """`causal_attention` for the rows and heads of one device."""
    length, heads, size = query.shape[1:]
    before = keys.shape[1] - length
    side = block_of(length)
    own, first = (math.ceil(n / side) * side - n for n in (length, before))
    # Padding comes before the first key and after the last.
    query = fill(query * jnp.asarray(size**-0.5, query.dtype), 0, own)
    keys, values = (fill(x, first, own) for x in (keys, values))
    ids = None
    if groups.queries is not None:
        at = [fill(groups.queries, 0, own, UNSEEN), fill(groups.keys, first, own, UNSEEN)]
        ids = splash.SegmentIds(*at)
    blocks = splash.BlockSizes(
        **{f"block_{name}": side for name in (
            "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
        )}
    )  # fmt: skip
    mask = masks.CausalMask((query.shape[1], keys.shape[1]), offset=before + first)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=blocks,
        interpret=interpret,
    )
    by_head = (x.transpose(0, 2, 1, 3) for x in (query, keys, values))
    mixed = jax.vmap(kernel)(*by_head, segment_ids=ids)
    return mixed.transpose(0, 2, 1, 3)[:, :length]


def fill(x: Array, first: int, last: int, value: int = 0) -> Array:
    """`x` padded with `first` rows of `value` before it and `last` after it."""
    return jnp.pad(x, [(0, 0), (first, last), *[(0, 0)] * (x.ndim - 2)], constant_values=value)
