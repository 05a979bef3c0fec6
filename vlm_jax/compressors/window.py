# SPDX-License-Identifier: Apache-2.0
"""Square windows of patches: the orders that tile a grid, and attention of one query per window.

B batch  P patches, window-major  V visual tokens = windows  S patches of one window
E vit width  N heads  H head size
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.kernels import window_attention
from vlm_jax.layers import Initializer, Linear, uniform


def windows(x: Float[Array, "B P *rest"], tokens: int) -> Float[Array, "B V S *rest"]:
    """The patches of each window; patches are window-major, so this is a reshape."""
    # Explicit, because for a single image a reshape would guess another sharding.
    spec = jax.typeof(x).sharding.spec
    return jnp.reshape(
        x,
        (x.shape[0], tokens, x.shape[1] // tokens, *x.shape[2:]),
        out_sharding=jax.P(*spec[:2], None, *spec[2:]),
    )


class WindowAttention(nnx.Module):
    """Multi-head attention of one query per window to the patches of that window.

    Every projection is biased. Initialization is that of torch's MultiheadAttention; `out_init`
    replaces it for the output projection. No residual, no norm, no positions.

    With one query per window the key and value projections may be absorbed: each head attends to
    the patches themselves with W_k q and projects the result, W_v (weighted sum of patches). This
    is equal in exact arithmetic: the bias of W_k adds the same to all scores of a window and leaves
    the softmax as it is, and the softmax weights sum to one, so the bias of W_v is added once. The
    key's bias stays a parameter, without effect and without gradient: published states have it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        tokens: int,
        patches: int,
        rngs: nnx.Rngs,
        kernels: str = "auto",
        out_init: Initializer | None = None,
    ):
        if heads < 1 or width % heads:
            raise ValueError(
                f"compressor.heads={heads} does not divide vit.width={width}: "
                f"choose one of {[n for n in range(1, width + 1) if width % n == 0]}"
            )
        size = width // heads
        self.width, self.heads = width, heads
        self.form = window_attention.form(kernels)
        self.choose(tokens, patches)
        # Xavier over the stacked [3 width, width] matrix of the three in-projections.
        inward = dict(
            dims=("embed", "heads", "head"),
            out=("batch", "len", "heads", "head"),
            init=uniform(math.sqrt(6 / (4 * width))),
            rngs=rngs,
        )
        self.query = Linear("BVE,ENH->BVNH", (width, heads, size), **inward)
        self.key = Linear("BPE,ENH->BPNH", (width, heads, size), **inward)
        self.value = Linear("BPE,ENH->BPNH", (width, heads, size), **inward)
        self.out = Linear(
            "BVNH,NHE->BVE",
            (heads, size, width),
            dims=("heads", "head", "embed"),
            out=("batch", "len", "feature"),
            rngs=rngs,
            init=out_init or uniform(width**-0.5),
        )

    def choose(self, tokens: int, patches: int) -> None:
        """Takes the form that is cheaper for so many windows and patches."""
        self.absorbed = absorbing_pays(tokens, patches, self.width, self.heads)

    def __call__(
        self,
        query: Float[Array, "B V E"],
        keys: Float[Array, "B P E"],
        values: Float[Array, "B P E"],
    ) -> Float[Array, "B V E"]:
        query = self.query(query)
        attend = self.attend_absorbed if self.absorbed else self.attend
        return self.out(attend(query, keys, values))

    def attend(
        self,
        query: Float[Array, "B V N H"],
        keys: Float[Array, "B P E"],
        values: Float[Array, "B P E"],
    ) -> Float[Array, "B V N H"]:
        """Each head's mean of the projected values, weighted by its query and projected keys."""
        tokens = query.shape[1]
        keys = windows(self.key(keys), tokens)
        values = windows(self.value(values), tokens)
        return window_attention.window_attention(query, keys, values, form=self.form)

    def attend_absorbed(
        self,
        query: Float[Array, "B V N H"],
        keys: Float[Array, "B P E"],
        values: Float[Array, "B P E"],
    ) -> Float[Array, "B V N H"]:
        """The same result without projecting a key or a value."""
        tokens, dtype = query.shape[1], query.dtype
        out = window_attention.unprojected_attention(
            query,
            windows(keys, tokens),
            windows(values, tokens),
            self.key.kernel[...].astype(dtype),
            self.value.kernel[...].astype(dtype),
            form=self.form,
        )
        return out + self.value.bias[...].astype(dtype)


def absorbing_pays(tokens: int, patches: int, width: int, heads: int) -> bool:
    """Whether absorbing the key and value projections saves multiplications; on a tie it does not.

    The only place of this choice. Projected, a patch costs 2 width^2 for its key and value and
    2 width for its scores and sums; absorbed, every query costs 2 width^2 and every patch
    2 width heads, because each head attends at full width. For 576 patches at width 1024 with 8
    heads absorbing pays below 573 tokens: only windows of a single patch are projected.
    """
    projected = 2 * patches * width * (width + 1)
    absorbed = 2 * tokens * width**2 + 2 * patches * width * heads
    return absorbed < projected


def check_window(side: int, window: int) -> None:
    """Raises ValueError unless windows of `window` x `window` patches tile the grid."""
    if window < 1 or side % window:
        raise ValueError(
            f"windows of {window}x{window} patches do not tile a {side}x{side} grid: "
            f"choose one of {[k for k in range(1, side + 1) if side % k == 0]}"
        )


def window_order(side: int, window: int) -> np.ndarray:
    """Raster index of each patch in window-major order, int [side^2]."""
    check_window(side, window)
    n = side // window
    raster = np.arange(side**2).reshape(n, window, n, window)
    return raster.transpose(0, 2, 1, 3).reshape(-1)
