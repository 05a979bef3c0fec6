# SPDX-License-Identifier: Apache-2.0
"""Patches at equal distances: the control that reads neither image nor question.

B batch  P patches, raster order  V visual tokens  Y channels  E vit width
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.selector import Selector


class UniformPatches(Selector):
    """V patches spread evenly over the grid, the same for every image and question.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from vlm_jax import mesh
    >>> from vlm_jax.compressors.method import Interface
    >>> from vlm_jax.compressors.uniform import UniformMethod
    >>> between = Interface(side=4, width=32, levels=1, llm_width=64)
    >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
    ...     spread = UniformMethod(tokens=5).build(between, rngs=nnx.Rngs(0))
    ...     jax.jit(lambda m, x: m(x))(spread, jnp.ones((2, 16, 32))).shape
    (2, 5, 64)
    """

    def choose(
        self, levels: Float[Array, "B P Y"], tokens: Float[Array, "B P E"], question: Any
    ) -> Int[Array, "B V"]:
        del levels, question
        places = jnp.array(grid(self.side, self.side, self.tokens), jnp.int32)
        return jnp.broadcast_to(places, (len(tokens), self.tokens))


def grid(rows: int, columns: int, count: int) -> np.ndarray:
    """`count` places on a grid in raster order, int [count]: lines at equal distances.

    The lines share the places as evenly as they can, and on each line they are at equal distances.
    """
    lines = math.floor(math.sqrt(count * rows / columns) + 0.5)
    lines = min(max(lines, math.ceil(count / columns), 1), rows, count)
    places = []
    for line in range(lines):
        row = (2 * line + 1) * rows // (2 * lines)
        own = (line + 1) * count // lines - line * count // lines
        places += [row * columns + (2 * k + 1) * columns // (2 * own) for k in range(own)]
    return np.array(places)
