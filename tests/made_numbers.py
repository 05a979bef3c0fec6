# SPDX-License-Identifier: Apache-2.0
"""Numbers that anyone can make again: the inputs and weights behind published values."""

import math

import numpy as np


def numbers(n, t):
    """Deterministic numbers in (-1, 1): splitmix64 of i + t 2^32."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64)
        z += np.uint64(t << 32)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * (2 / 2**53) - 1


def filled(t, name, shape):
    """The tensor at place `t` of a published state, scaled so that activations are of order one."""
    u = numbers(math.prod(shape), t).reshape(shape)
    if len(shape) == 1:
        return (0.1 * u + name.endswith("weight")).astype(np.float32)
    return (u * math.sqrt(3 / math.prod(shape[1:]))).astype(np.float32)
