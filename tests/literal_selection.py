# SPDX-License-Identifier: Apache-2.0
"""Literal selections: one image, float64, lists and loops, as docs/selection.md tells them.

Weights are under published names.
"""

import math

import literal_compressors
import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def class_attention(query, keys, heads):
    """Of the class token to each patch, mean over the heads; the class token's row is first."""
    query, keys = query.reshape(heads, -1), keys.reshape(len(keys), heads, -1)
    rows = [softmax(keys[:, h] @ query[h] / math.sqrt(query.shape[1])) for h in range(heads)]
    return np.mean(rows, axis=0)[1:]


def visionzip(features, keys, attention, dominant, contextual):
    """The tokens before the projector, and the rows that are dominant."""
    ranked = sorted(range(len(attention)), key=lambda j: -attention[j])
    chosen = sorted([0, *(1 + j for j in ranked[: dominant - 1])])
    rest = [j for j in range(len(features)) if j not in chosen]
    tokens = [features[j] for j in chosen]
    keys = unit(keys)
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[k * step] for k in range(contextual)]
    joined = {target: [] for target in targets}
    for j in rest:
        if j not in targets and targets:
            alike = [keys[j] @ keys[target] for target in targets]
            joined[targets[int(np.argmax(alike))]].append(features[j])
    for target in targets:
        tokens.append(features[target] + sum(joined[target]) / max(1, len(joined[target])))
    return np.stack(tokens), chosen


def vispruner(features, attention, count, ratio):
    order = sorted(range(len(attention)), key=lambda j: -attention[j])
    important = int(count * ratio)
    live, kept = order[important:], order[:important]
    rows = unit(features)
    while len(live) > count - important > 0:
        even, odd = live[0::2], live[1::2]
        dropped = min(8, len(live) - (count - important), len(even))
        most = {i: max(rows[i] @ rows[j] for j in odd) for i in even}
        even.sort(key=lambda i: -most[i])
        live = even[dropped:] + odd
    return sorted(kept + (live if count > important else []))


def divprune(tokens, count):
    """In the order in which they are chosen."""
    rows = unit(tokens)
    apart = 1 - rows @ rows.T
    others = range(len(rows))
    order = [int(np.argmax([min(apart[j][i] for i in others if i != j) for j in others]))]
    while len(order) < count:
        free = [j for j in others if j not in order]
        order.append(max(free, key=lambda j: min(apart[j][i] for i in order)))
    return order


def relevance(images, texts):
    unlike = -np.mean([unit(images) @ unit(text) for text in texts], axis=0)
    return (unlike - unlike.min() + 1e-6) / (unlike.max() - unlike.min())


def cdpruner(tokens, weights, count):
    """In the order in which they are chosen: each makes the determinant largest."""
    rows = unit(tokens) * weights[:, None]
    kernel, order = rows @ rows.T, []
    for _ in range(count):
        free = [j for j in range(len(rows)) if j not in order]
        grown = [np.linalg.slogdet(kernel[np.ix_([*order, j], [*order, j])])[1] for j in free]
        order.append(free[int(np.argmax(grown))])
    return order


def mmtok(tokens, features, words, excluded, count, tau_text=0.02, tau_image=0.2, alpha=0.5):
    """In the order in which they are chosen."""
    asked = softmax(unit(words) @ unit(tokens).T / tau_text) / len(words)
    seen = softmax(unit(features) @ unit(features).T / tau_image) / len(features)
    covers, order = np.concatenate([asked, alpha * seen]), []
    for _ in range(count):
        free = [j for j in range(len(tokens)) if j not in order]
        free = [j for j in free if not excluded[j]] or free
        covered = [sum(max(row[i] for i in [*order, j]) for row in covers) for j in free]
        order.append(free[int(np.argmax(covered))])
    return order


def fmix(h):
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def random(image, seed, patches, count):
    key = (seed * 0x9E3779B1 + fmix(image)) % 2**32
    return sorted(range(patches), key=lambda i: fmix((i * 0x9E3779B9 + key) % 2**32))[:count]


def uniform(rows, columns, count):
    """Lines at equal distances, places at equal distances on each."""
    lines = math.floor(math.sqrt(count * rows / columns) + 0.5)
    lines = min(max(lines, math.ceil(count / columns), 1), min(rows, count))
    places = []
    for line in range(lines):
        own = math.floor((line + 1) * count / lines) - math.floor(line * count / lines)
        row = math.floor((2 * line + 1) * rows / (2 * lines))
        places += [
            row * columns + math.floor((2 * c + 1) * columns / (2 * own)) for c in range(own)
        ]
    return places


def unshuffled(features, factor):
    """The patches of each window side by side [V, s^2 E], in raster order."""
    side = math.isqrt(len(features))
    grid = features.reshape(side, side, -1)
    return np.stack([
        np.concatenate([grid[r + dr, c + dc] for dr in range(factor) for dc in range(factor)])
        for r in range(0, side, factor) for c in range(0, side, factor)
    ])  # fmt: skip


def norm(tensors, name, x):
    """LayerNorm with the epsilon of CLIP and InternVL."""
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def clip_text(tensors, ids, heads):
    """CLIP's text tower: the vector of a text that ends with its last id."""
    linear, name = literal_compressors.linear, "text_model."
    x = tensors[f"{name}embeddings.token_embedding.weight"][ids]
    x = x + tensors[f"{name}embeddings.position_embedding.weight"][: len(ids)]
    layer, own = 0, f"{name}encoder.layers.0"
    while f"{own}.layer_norm1.weight" in tensors:
        y = norm(tensors, f"{own}.layer_norm1", x)
        q, k, v = (
            np.split(linear(tensors, f"{own}.self_attn.{part}_proj", y), heads, axis=1)
            for part in "qkv"
        )
        mixed = []
        for head in range(heads):
            scores = q[head] @ k[head].T / math.sqrt(q[head].shape[1])
            scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
            mixed.append(softmax(scores) @ v[head])
        x = x + linear(tensors, f"{own}.self_attn.out_proj", np.concatenate(mixed, axis=1))
        y = linear(tensors, f"{own}.mlp.fc1", norm(tensors, f"{own}.layer_norm2", x))
        x = x + linear(tensors, f"{own}.mlp.fc2", y / (1 + np.exp(-1.702 * y)))
        layer += 1
        own = f"{name}encoder.layers.{layer}"
    last = norm(tensors, f"{name}final_layer_norm", x[-1])
    return linear(tensors, "text_projection", last)


def compress(method, tensors, levels, question, *, width, head=None):
    """The visual tokens of one image from what the encoder gives, by a method's description."""
    count, side = method.tokens, math.isqrt(len(levels))
    beside = {"own_attention": 1, "own_keys": (head or width) + 1, "image_id": 2, "image_size": 2}
    more = levels[:, levels.shape[1] - beside.get(method.reads, 0) :]
    features = levels[:, : levels.shape[1] - more.shape[1]][:, -width:]

    def project(x):
        return literal_compressors.mlp(tensors, "0", "2", x)

    if count == side**2:
        return project(features[-(side**2) :])
    match method.kind:
        case "visionzip":
            attention = more[1:, -1]
            split = method.split(count)
            return project(visionzip(features, more[:, :-1], attention, *split)[0])
        case "vispruner":
            return project(features[vispruner(features, more[:, 0], count, method.important_ratio)])
        case "random":
            image = int(more[0, 0]) * 65536 + int(more[0, 1])
            order = random(image, method.selection_seed, len(features), count)
        case "uniform":
            order = uniform(side, side, count)
        case "divprune":
            order = divprune(project(features), count)
        case "cdpruner":
            images = literal_compressors.linear(
                tensors, "visual_projection", norm(tensors, "post_layernorm", features)
            )
            text = clip_text(tensors, np.asarray(question, int), method.text_heads)
            order = cdpruner(project(features), relevance(images, [text]), count)
        case "mmtok":
            free = np.zeros(len(features), bool)
            order = mmtok(project(features), features, question, free, count)
    return project(features[sorted(order)])
