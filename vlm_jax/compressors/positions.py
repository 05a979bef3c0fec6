# SPDX-License-Identifier: Apache-2.0
"""Position tables of learned queries that form a grid, and how they are resampled."""

import math

import numpy as np


def sines(grid: int, width: int) -> np.ndarray:
    """Sines and cosines of column and row of each cell of a `grid` x `grid`, float32 [grid^2 E].

    Four quarters: sine and cosine of the column, sine and cosine of the row, at frequencies
    10000^(-4i/E).
    """
    row, column = (x.reshape(-1, 1) for x in np.mgrid[:grid, :grid])
    rate = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    table = [f(x * rate) for x in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(table, 1).astype(np.float32)


def cubic(old: int, new: int) -> np.ndarray:
    """The matrix [new old] of torch's bicubic resampling along one axis.

    Cubic convolution with a = -0.75, half-pixel centers, no antialias, borders repeated.
    """
    a, taps = -0.75, np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        low = math.floor(place)
        for source in range(low - 1, low + 3):
            x = abs(place - source)
            near = ((a + 2) * x - (a + 3)) * x * x + 1
            far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            taps[i, min(max(source, 0), old - 1)] += near if x <= 1 else far
    return taps
