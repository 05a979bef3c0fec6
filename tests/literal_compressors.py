# SPDX-License-Identifier: Apache-2.0
"""Literal compressors: one image in raster order, float64, loops, weights under published names."""

import math

import numpy as np
from scipy.special import erf


def linear(tensors, name, x):
    return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)


def mlp(tensors, first, second, x):
    x = linear(tensors, first, x)
    return linear(tensors, second, x * 0.5 * (1 + erf(x / math.sqrt(2))))


def norm(tensors, name, x, eps=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def patches_of(x, window, per_row):
    """The patches of one window of a raster image [P E]."""
    side = math.isqrt(len(x))
    size = side // per_row
    row, column = size * (window // per_row), size * (window % per_row)
    grid = x.reshape(side, side, -1)[row : row + size, column : column + size]
    return grid.reshape(size**2, -1)


def attend(tensors, name, query, keys, values, heads):
    """One row of `query` per window, for one image."""
    parts = zip(
        np.split(tensors[f"{name}.in_proj_weight"], 3),
        np.split(tensors[f"{name}.in_proj_bias"], 3),
        strict=True,
    )
    query, keys, values = (
        x @ w.T + b for x, (w, b) in zip((query, keys, values), parts, strict=True)
    )
    size = query.shape[1] // heads
    out = np.zeros_like(query)
    for window, q in enumerate(query):
        k = patches_of(keys, window, math.isqrt(len(query)))
        v = patches_of(values, window, math.isqrt(len(query)))
        for head in (slice(i * size, (i + 1) * size) for i in range(heads)):
            scores = np.exp(k[:, head] @ q[head] / math.sqrt(size))
            out[window, head] = scores @ v[:, head] / scores.sum()
    return linear(tensors, f"{name}.out_proj", out)


def quecc(tensors, levels, question, *, width, heads, kernel, stride):
    x = levels[:, -width:]
    if question is not None:
        x = x + norm(
            tensors, "0.text_projection.1", linear(tensors, "0.text_projection.0", question)
        )
    x = norm(tensors, "0.q_proj.3", mlp(tensors, "0.q_proj.0", "0.q_proj.2", x))
    side = math.isqrt(len(x))
    grid = x.reshape(side, side, width)
    taps = tensors["0.q_downsample.weight"][:, 0].transpose(1, 2, 0)
    query = [
        (grid[i : i + kernel, j : j + kernel] * taps).sum((0, 1))
        for i in range(0, side - kernel + 1, stride)
        for j in range(0, side - kernel + 1, stride)
    ] + tensors["0.q_downsample.bias"]
    keys = norm(tensors, "0.k_proj.3", mlp(tensors, "0.k_proj.0", "0.k_proj.2", levels))
    values = norm(tensors, "0.v_proj.3", mlp(tensors, "0.v_proj.0", "0.v_proj.2", levels))
    return mlp(tensors, "1", "3", attend(tensors, "0.clip_attn", query, keys, values, heads))


def token_packer(tensors, levels, *, width, heads, tokens):
    side, per_row = math.isqrt(len(levels)), math.isqrt(tokens)
    # The textbook bilinear interpolation with half-pixel centers, one axis after the other.
    along = np.zeros((per_row, side))
    for i in range(per_row):
        source = max((i + 0.5) * side / per_row - 0.5, 0)
        low = int(source)
        along[i, low] += 1 - (source - low)
        along[i, min(low + 1, side - 1)] += source - low
    grid = levels[:, -width:].reshape(side, side, width)
    query = np.einsum("ar,bc,rce->abe", along, along, grid).reshape(tokens, width)
    query = norm(tensors, "ln_q_1", linear(tensors, "q_proj_1", query))
    keys = norm(tensors, "ln_k_1", mlp(tensors, "k_proj_1.0", "k_proj_1.2", levels))
    values = norm(tensors, "ln_v_1", mlp(tensors, "v_proj_1.0", "v_proj_1.2", levels))
    mixed = attend(tensors, "clip_attn", query, keys, values, heads)
    return mlp(tensors, "mlp.0", "mlp.2", mixed)


def pool(tensors, levels, *, width, tokens):
    x = levels[:, -width:]
    means = [patches_of(x, i, math.isqrt(tokens)).mean(0) for i in range(tokens)]
    return mlp(tensors, "0", "2", np.stack(means))


def projected(tensors, levels, *, width):
    return mlp(tensors, "0", "2", levels[:, -width:])


def m3(tensors, levels, *, width, tokens):
    """As published: every patch through the whole projector, then the means."""
    x = projected(tensors, levels, width=width)
    return np.stack([patches_of(x, i, math.isqrt(tokens)).mean(0) for i in range(tokens)])


def cubic(x, new):
    """The textbook cubic convolution (a = -3/4) of a row of samples [n ...], borders repeated."""
    out = []
    for i in range(new):
        place = (i + 0.5) * len(x) / new - 0.5
        t, low = place % 1, math.floor(place)
        four = [x[min(max(low + k, 0), len(x) - 1)] for k in (-1, 0, 1, 2)]
        # Keys' kernel as the cubic through the middle two with slopes a-fold of the outer chords.
        p0, p1, p2, p3 = four
        m1, m2 = 0.75 * (p2 - p0), 0.75 * (p3 - p1)
        out.append(
            (2 * t**3 - 3 * t**2 + 1) * p1
            + (t**3 - 2 * t**2 + t) * m1
            + (3 * t**2 - 2 * t**3) * p2
            + (t**3 - t**2) * m2
        )
    return np.stack(out)


def mqt(tensors, levels, *, width, heads, tokens):
    """As published: positions resampled, keys and values of every patch, every query asked."""
    x, side = levels[:, -width:], math.isqrt(len(levels))
    place = tensors["pos_embed"]
    grid = place.reshape(math.isqrt(len(place)), -1, width)
    rows = cubic(grid, side)
    keys = cubic(rows.transpose(1, 0, 2), side).transpose(1, 0, 2).reshape(side**2, width)
    # One window of all patches per query.
    query = norm(tensors, "ln_q", tensors["query"] + place)[:tokens]
    keys, values = norm(tensors, "ln_k", keys), norm(tensors, "ln_v", x)
    out = [attend(tensors, "attn", q[None], keys, values, heads)[0] for q in query]
    return np.stack(out) @ tensors["proj"]


def llava_mini(tensors, features, *, heads):
    """LLaVA-Mini's tokens before the projector: one query after the other reads all patches."""
    place, side = tensors["pos_embed"], math.isqrt(len(features))
    grid = place.reshape(math.isqrt(len(place)), -1, place.shape[1])
    rows = cubic(grid, side)
    of_patches = cubic(rows.transpose(1, 0, 2), side).transpose(1, 0, 2).reshape(side**2, -1)
    values = norm(tensors, "ln_kv", features, 1e-5)
    queries = norm(tensors, "ln_q", tensors["query"], 1e-5) + place
    return np.concatenate([
        attend(tensors, "attn", query[None], values + of_patches, values, heads)
        for query in queries
    ])  # fmt: skip
