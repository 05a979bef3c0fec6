# SPDX-License-Identifier: Apache-2.0
"""The base of modules that make one token of each window, for one V or for several.

B batch  P patches  V visual tokens = windows
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.compressors.elastic import rectangles
from vlm_jax.compressors.matryoshka import Matryoshka
from vlm_jax.compressors.method import Interface, Method, window_side
from vlm_jax.compressors.window import WindowAttention


class Windowed(Matryoshka):
    """A compressor of windows, whose method may name several V (`elastic`).

    With one V its patches come window-major in `window`. With several they come in raster order,
    because the order of windows depends on V, and `window_major` sorts them.
    """

    def __init__(self, method: Method, interface: Interface):
        super().__init__(method, interface)
        self.buckets = method.buckets(self.side)
        self.drawn = method.drawn_tokens(self.side)
        self.window = 1 if self.buckets else window_side(self.tokens, self.side)

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns in patches of each of its windows."""
        return rectangles(self.side)[self.tokens]

    def at(self, tokens: int) -> "Windowed":
        """The same weights with `tokens` visual tokens.

        Raises ValueError, with the supported numbers, if `tokens` is not one of them.
        """
        other = super().at(tokens)
        attention = getattr(other, "attention", None)
        if isinstance(attention, WindowAttention):
            attention.choose(tokens, self.interface.patches)
        return other

    def window_major(self, x: Float[Array, "B P *rest"]) -> Float[Array, "B P *rest"]:
        """The patches window by window: as they come, or sorted from raster order."""
        if self.span == (self.window, self.window):
            return x
        return by_window(x, self.side, *self.span)


def by_window(
    x: Float[Array, "B P *rest"], side: int, rows: int, columns: int
) -> Float[Array, "B P *rest"]:
    """Patches of a `side` x `side` grid from raster order window by window, as `window_order` does
    for squares."""
    batch, patches, *rest = x.shape
    of_batch, places, *others = jax.typeof(x).sharding.spec
    cut = jnp.reshape(
        x,
        (batch, side // rows, rows, side // columns, columns, *rest),
        out_sharding=jax.P(of_batch, None, None, None, None, *others),
    )
    return jnp.reshape(
        jnp.swapaxes(cut, 2, 3),
        (batch, patches, *rest),
        out_sharding=jax.P(of_batch, places, *others),
    )
