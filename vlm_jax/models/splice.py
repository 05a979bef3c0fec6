# SPDX-License-Identifier: Apache-2.0
"""Where the visual tokens of a row's images go: between its text, without gaps.

B batch  M images of a row  V visual tokens  T text tokens  X = T + M V  D llm width
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.compressors.compressor import Visual
from vlm_jax.layers import rows

Batch = Mapping[str, Array]


@jax.named_scope("splice")
def splice(
    text: Float[Array, "B T D"], visual: Visual, batch: Batch, *, packed: bool = False
) -> tuple[Float[Array, "B X D"], Bool[Array, "B X"], Int[Array, "B X"] | None]:
    """Each row's text with each image's tokens inserted at its position, without gaps; which
    tokens are visual; and, if rows hold several examples, the example of each, and X is T.

    The tokens of each image begin its share of the row's slots or, if they are `packed`, follow
    those of the image before. What comes after a row's last token is never seen: rows are causal.
    """
    length, slots = text.shape[1], visual.tokens.shape[1]
    several = "segment" in batch
    place = jnp.arange(length if several else length + slots)[:, None]
    at, count = by_image(batch["image_at"])[:, None], by_image(visual.count)[:, None]
    images = at.shape[2]
    # An image comes after the tokens of earlier images.
    before = jnp.cumsum(count, axis=2) - count
    start = at + before
    end = start + count
    inside = (place >= start) & (place < end)
    first = length + (before if packed else slots // images * jnp.arange(images))
    seen = jnp.where(inside, first + place - start, 0).sum(2)
    read = place[:, 0] - jnp.where(place >= end, count, 0).sum(2)
    read = jnp.minimum(read, length - 1)
    is_visual = inside.any(2)
    index = jnp.where(is_visual, seen, read)
    x = rows(jnp.concatenate([text, visual.tokens], axis=1), index)
    if not several:
        return x, is_visual, None
    of_images = jnp.where(inside, by_image(batch["image_segment"])[:, None], 0).sum(2)
    return x, is_visual, jnp.where(is_visual, of_images, rows(batch["segment"], read))


def by_image(x: Int[Array, "B *M"]) -> Int[Array, "B M"]:
    """Numbers of images with the dimension M, which is left out if a row has at most one image."""
    return x[:, None] if x.ndim == 1 else x
