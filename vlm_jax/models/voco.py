# SPDX-License-Identifier: Apache-2.0
"""VoCo-LLaMA's mask: what follows the summary of an image reads the summary, not the image.

B batch  X tokens of a row
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers import rows
from vlm_jax.models.cache import KV, Past, Pruned, cached, listed, positions_of, taken


class Summary(NamedTuple):
    """The summary tokens of each row, behind the `patches` tokens of its image if it has one."""

    tokens: Bool[Array, "B X"]
    patches: int


def voco_mask(valid: Bool[Array, "B X"], summary: Bool[Array, "B X"]) -> Bool[Array, "B X X"]:
    """Which columns each row of a causal pass may attend to (arXiv 2406.12275).

    Tokens up to the last summary token see all before them; later ones see nothing before the
    first summary token. Positions are not changed by it. A row without summary tokens is causal.
    Source: Yxxxb/VoCo-LLaMA at 3b6e14d9, where the mask exists on one of three attention paths, and
    rows of a batch may take each other's places.

    Args:
      valid: False for padding, which sees nothing and is seen by nothing.
      summary: the summary tokens.
    """
    place = positions_of(*valid.shape)
    causal = place[:, :, None] >= place[:, None, :]
    return causal & admitted(summary) & valid[:, :, None] & valid[:, None, :]


def admitted(summary: Bool[Array, "B X"]) -> Bool[Array, "B X X"]:
    """The columns that the summary of a row leaves to each of its tokens."""
    place = positions_of(*summary.shape)
    last = jnp.where(summary, place, -1).max(1)[:, None, None]
    before = place[:, None, :] < dropped(summary)[:, None, None]
    return ~(before & (place[:, :, None] > last))


def dropped(summary: Bool[Array, "B X"]) -> Int[Array, "B"]:
    """How many tokens stand before the summary of each row; 0 without one."""
    place = positions_of(*summary.shape)
    first = jnp.where(summary, place, summary.shape[1]).min(1)
    return jnp.where(summary.any(1), first, 0)


def forget(
    hidden: Float[Array, "B X D"], kv: KV | list[KV], summary: Summary, slots: int
) -> tuple[Float[Array, "B Y D"], Pruned]:
    """Hidden states and caches of a pass without what stands before the summary of each row.

    `slots` positions have room in the caches of a row that has no image.
    """
    gone = dropped(summary.tokens)
    length = hidden.shape[1] - summary.patches
    index = positions_of(len(gone), length) + gone[:, None]
    index = jnp.minimum(index, hidden.shape[1] - 1)  # of padding
    kept = [taken(of_layer, index) for of_layer in listed(kv)]
    return rows(hidden, index), Pruned(cached(kept, None, slots - summary.patches), gone[None])


def remembered(llm: Any, x: Float[Array, "B X D"], tokens: int) -> Past:
    """What rows leave that end with a summary of so many `tokens`: those alone, at their positions.

    A pass that goes on from it is the one pass under the mask. `llm` is an `LLM`.
    """
    there = jnp.full_like(positions_of(len(x), 1)[:, 0], tokens)
    past = llm.start(x, there)
    return Past(
        past.hidden[:, -tokens:],
        past.keys[:, :, -tokens:],
        past.values[:, :, -tokens:],
        there,
        jnp.full_like(there, x.shape[1] - tokens),
    )
