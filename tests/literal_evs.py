# SPDX-License-Identifier: Apache-2.0
"""Literal EVS: one clip at a time, token by token, float64."""

import numpy as np


def cosine(a, b):
    return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8)


def kept(clip, dropped):
    """Places (frame, token) that are kept of one clip [T V D], in their order."""
    T, V, _ = clip.shape
    differs = {
        (t, v): np.inf if t == 0 else round(4096 * (1 - cosine(clip[t, v], clip[t - 1, v])))
        for t in range(T)
        for v in range(V)
    }
    count = max(V, int(T * V * (1 - dropped)))
    best = sorted(differs, key=lambda place: (-differs[place], place))[:count]
    return sorted(best)
