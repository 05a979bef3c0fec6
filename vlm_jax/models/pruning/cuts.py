# SPDX-License-Identifier: Apache-2.0
"""What a cut does to one row: which of its tokens the later layers read, and as what.

X tokens of a row  Y tokens after the cut  V visual tokens of a row  D llm width
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Cut(NamedTuple):
    """A row after a cut: its hidden states, and where each token was before; ascending."""

    hidden: Float[Array, "Y D"]
    index: Int[Array, " Y"]


def by_attention(
    hidden: Float[Array, "X D"],
    attention: Float[Array, " X"],
    visual: Bool[Array, " X"],
    *,
    slots: int,
    tokens: int,
) -> Cut:
    """All text, and the `tokens` visual tokens of largest attention; at ties the first.

    Rows have at most `slots` visual tokens, and as much padding at their end as they have less.

    Args:
      attention: of the last token of the prompt, mean over heads; infinite for what has to stay.
    """
    _, best = lax.top_k(jnp.where(visual, attention, -jnp.inf), tokens)
    index = ascending((~visual).at[best].set(True), len(visual) - slots + tokens)
    return Cut(hidden[index], index)


def ascending(kept: Bool[Array, " X"], length: int) -> Int[Array, " Y"]:
    """The first `length` places that are kept, of at least as many."""
    places = jnp.arange(len(kept), dtype=jnp.int32)
    return jnp.sort(jnp.where(kept, places, len(kept)))[:length]


def carve(
    hidden: Float[Array, "X D"],
    attention: Float[Array, " X"],
    visual: Bool[Array, " X"],
    *,
    slots: int,
    tokens: int,
    ranked: int,
    merged: int,
    weight: float,
) -> Cut:
    """All text, and `tokens` = `ranked` - `merged` visual tokens, into which others were merged.

    Rows have `slots` visual tokens or none.

    Args:
      attention: of the last token of the prompt, mean over heads; infinite for what has to stay.
      ranked: visual tokens that are chosen, by `weight` times the rank by attention plus the rest
        times the rank by singular values; at ties the first.
      merged: of the worse half of them, those that are merged into the most similar of the better
        half. A token becomes the mean of itself and all that are merged into it.
    """
    # Of a row without an image all places are behind its end, and nothing is written there.
    places = ascending(visual, slots)
    images = hidden.at[places].get(mode="fill", fill_value=0).astype(jnp.float32)
    u, s, _ = jnp.linalg.svd(images, full_matrices=False)
    asked = attention.at[places].get(mode="fill", fill_value=0)
    score = weight * ranks(asked) + (1 - weight) * ranks(jnp.abs(u) @ s)
    score = jnp.where(jnp.isinf(asked), asked, score)
    order = jnp.argsort(score, descending=True, stable=True)[:ranked]
    half = ranked // 2
    kept, others = order[:half], order[half:]
    unit = images / jnp.maximum(jnp.linalg.norm(images, axis=1, keepdims=True), 1e-30)
    similar = jnp.matmul(unit[others], unit[kept].T, precision=lax.Precision.HIGHEST)
    _, gone = lax.top_k(similar.max(1), merged)
    into = jnp.zeros(similar.shape).at[gone, similar.argmax(1)[gone]].set(1)
    total = images[kept] + jnp.matmul(into.T, images[others], precision=lax.Precision.HIGHEST)
    mean = total / (1 + into.sum(0))[:, None]
    stays = jnp.ones(len(others), bool).at[gone].set(False)
    remaining = (~visual).at[places[kept]].set(True, mode="drop")
    remaining = remaining.at[places[others]].set(stays, mode="drop")
    index = ascending(remaining, len(visual) - slots + tokens)
    hidden = hidden.at[places[kept]].set(mean.astype(hidden.dtype), mode="drop")
    return Cut(hidden[index], index)


def ranks(values: Float[Array, " V"]) -> Float[Array, " V"]:
    """V for the largest value, 1 for the smallest; of equal ones the first is the larger."""
    order = jnp.argsort(values, descending=True, stable=True)
    place = jnp.arange(len(values), 0, -1, dtype=jnp.float32)
    return jnp.zeros(len(values)).at[order].set(place)
