# SPDX-License-Identifier: Apache-2.0
"""How windows are tiled for a TPU: windows per grid step, and windows per matrix product.

V windows  S keys of one window  R query rows of a product  C keys of a product
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

LANES = 128
ROWS = 16  # sublanes of a packed bfloat16 tile: slices of rows start at its multiples
BLOCKS = 10 * 2**20  # bytes of blocks, doubly buffered, out of the 16 MiB that every chip grants
SCORES = 16 * 1024  # float32 scores in a quarter of the registers
MASKED = -1e30  # the score of a key of another window; finite, or a difference of two would be nan


def windows_per_block(windows: int, keys: int, window_bytes: int) -> int:
    """Windows whose queries, keys, values and results one grid step holds.

    The most that divide the windows evenly, start at a multiple of ROWS, and fit into BLOCKS; the
    fewest if none fits.
    """
    counts = [
        n
        for n in range(1, windows + 1)
        if windows % n == 0 and (n == windows or n * keys % ROWS == 0)
    ]
    return max((n for n in counts if 2 * n * window_bytes <= BLOCKS), default=counts[0])


def groups(
    windows: int, keys: int, *, heads: int = 1, lanes: int = LANES, multiple: int = 1
) -> list[tuple[int, int]]:
    """First and last + 1 of the windows that share a product, of `heads` query rows per window.

    Scores of a query with keys of other windows are computed and masked, which is wasted work, and
    so are lanes of the matrix unit that a group does not fill. A group has at least `lanes` keys,
    or it is all windows if their scores stay in the registers. Its keys begin at a multiple of
    ROWS, its windows at a multiple of `multiple`.
    """
    step = math.lcm(multiple, ROWS // math.gcd(ROWS, keys))
    size = step * math.ceil(lanes / (step * keys))
    if heads * windows * windows * keys <= SCORES:
        size = windows
    return [(first, min(first + size, windows)) for first in range(0, windows, size)]


def same_window(windows: int, heads: int, keys: int) -> Bool[Array, "R C"]:
    """Mask of the query rows (head after head) and keys of a group that belong to one window."""
    row = lax.rem(lax.broadcasted_iota(jnp.int32, (heads * windows, 1), 0), jnp.int32(windows))
    column = lax.div(lax.broadcasted_iota(jnp.int32, (1, windows * keys), 1), jnp.int32(keys))
    return row == column


def softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax over the keys of each row's own window (`mask`), in float32."""
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def product(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """x y over one axis of each, accumulated in float32; float32 inputs are not rounded first."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x,
        y,
        (((over[0],), (over[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
