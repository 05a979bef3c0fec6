# SPDX-License-Identifier: Apache-2.0
"""Several examples in one row: where each starts, and which tokens may see which.

B batch  X tokens of a row
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from vlm_jax.models.cache import positions_of


def starts(segments: Int[Array, "B X"]) -> Int[Array, "B X"]:
    """The position in its row at which the segment of each token starts.

    The tokens of a segment are contiguous and share a number that differs from their neighbors'.
    """
    place = positions_of(*segments.shape)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return lax.cummax(jnp.where(first, place, 0), axis=1)


def same(segments: Int[Array, "B X"]) -> Bool[Array, "B X X"]:
    """Whether two tokens belong to one segment."""
    return segments[:, :, None] == segments[:, None, :]
