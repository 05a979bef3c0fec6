# SPDX-License-Identifier: Apache-2.0
"""Literal PruMerge: one image, one token at a time, lists of indices, as its paper tells it."""

import numpy as np


def selection(attention, kind, tokens):
    """The selected patches in their final order, and the others that count."""
    patches = len(attention)
    ranked = sorted(range(patches), key=lambda j: -attention[j])
    if tokens:
        count = (tokens - 1) // 2 if kind == "prumerge_plus" else tokens - 1
    else:
        low, high = np.percentile(attention, [25, 75])
        count = sum(a > high + 1.5 * (high - low) for a in attention)
    chosen = ranked[:count]
    if kind == "prumerge_plus" and tokens:
        step = int(1 / (count / patches))
        chosen += list(range(int(step / 2), patches - 1, step))
    elif kind == "prumerge_plus" and count:
        step = int(int(1 / (count / patches)) / 3)
        chosen += [j for j in range(0, patches - 1, step) if j not in chosen]
    # Those that were selected twice cost as many of the first others.
    twice = len(chosen) - len(set(chosen))
    return chosen, [j for j in range(patches) if j not in chosen][twice:]


def merged(features, keys, attention, kind, tokens, neighbors=32):
    """The tokens before the projector, [V E]."""
    chosen, others = selection(attention, kind, tokens)
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    made = []
    for place, i in enumerate(chosen):
        rest = chosen[:place] + chosen[place + 1 :] + others
        rest.sort(key=lambda j, i=i: -keys[i] @ keys[j])
        made.append(features[i] + sum(attention[j] * features[j] for j in rest[:neighbors]))
    zero = np.zeros(features.shape[1])
    return np.stack([*made, zero + sum(attention[j] * features[j] for j in others)])


def of_levels(levels, kind, tokens, width):
    """The same from the channels that an encoder gives: all levels, keys, attention."""
    features, keys = levels[:, -2 * width - 1 : -width - 1], levels[:, -width - 1 : -1]
    return merged(features, keys, levels[:, -1], kind, tokens)
