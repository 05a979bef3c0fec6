# SPDX-License-Identifier: Apache-2.0
"""Literal prunings: one row at a time, lists of places, float64, and masks in place of gathers."""

import literal_models
import numpy as np


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def most(scores, tokens):
    """Places of the largest scores, ascending; of equal ones the first is the larger."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:tokens])


def by_attention(attention, first, slots, tokens):
    """Places that are left of a row: all text, and the best visual tokens. `attention` [N X]."""
    best = most(attention.mean(0)[first : first + slots], tokens)
    text = [j for j in range(attention.shape[1]) if not first <= j < first + slots]
    return sorted([*text, *(first + j for j in best)])


def drop_scores(hidden, norm, query, key, *, heads, kv_heads, head_size, theta, eps, first, slots):
    """PyramidDrop's scores of the visual tokens of one row [X D], whose last token asks."""
    y = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + eps) * norm
    queries, keys = np.split(y @ query.T, heads, 1), np.split(y @ key.T, kv_heads, 1)
    total = np.zeros(len(hidden))
    for head in range(heads):
        q = literal_models.turned(queries[head], theta)
        k = literal_models.turned(keys[head // (heads // kv_heads)], theta)
        total += softmax(k @ q[-1] / np.sqrt(head_size))
    return total[first : first + slots] / heads


def ranks(values):
    """len(values) for the largest, 1 for the smallest; of equal ones the first is the larger."""
    order = sorted(range(len(values)), key=lambda j: (-values[j], j))
    found = np.zeros(len(values))
    for place, j in enumerate(order):
        found[j] = len(values) - place
    return found


def carve(hidden, attention, first, slots, tokens, weight):
    """TokenCarve's row [Y D] and the places that are left."""
    images, asked = hidden[first : first + slots], attention.mean(0)[first : first + slots]
    u, s, _ = np.linalg.svd(images, full_matrices=False)
    score = weight * ranks(asked) + (1 - weight) * ranks(np.abs(u) @ s)
    score = np.where(np.isinf(asked), asked, score)
    ranked, merged = int(tokens / 2 * 3), int(tokens / 2)
    order = sorted(range(slots), key=lambda j: (-score[j], j))[:ranked]
    kept, others = order[: int(0.5 * ranked)], order[int(0.5 * ranked) :]

    def cosine(i, j):
        return images[i] @ images[j] / np.linalg.norm(images[i]) / np.linalg.norm(images[j])

    nearest = {b: max(kept, key=lambda a, b=b: cosine(a, b)) for b in others}
    gone = sorted(others, key=lambda b: -cosine(nearest[b], b))[: min(len(kept), merged)]
    made = hidden.copy()
    for a in kept:
        made[first + a] = np.mean([images[a], *(images[b] for b in gone if nearest[b] == a)], 0)
    text = [j for j in range(len(hidden)) if not first <= j < first + slots]
    left = sorted([*text, *(first + j for j in [*kept, *others] if j not in gone)])
    return made[left], left


def voco_mask(valid, summary):
    """VoCo's mask of one row, as a sentence: a row sees a column that is not behind it, both are
    there, and where the summary is behind the row, the column is no earlier than its start."""
    length, places = len(valid), np.flatnonzero(summary)
    made = np.zeros((length, length), bool)
    for row in range(length):
        for column in range(row + 1):
            past = len(places) and row > places[-1]
            made[row, column] = valid[row] and valid[column] and not (past and column < places[0])
    return made


def llm(weights, x, c, pruning, prompt, first, slots):
    """A decoder that prunes, on one row of embeddings [X D]: its hidden states, nothing left out.

    The first `prompt` tokens are a prefill, the others are decoded one by one. What a cut leaves
    out stays in the row, and a mask hides it. Also which tokens are left at the end.
    """
    alive, behind = np.ones(prompt, bool), None
    if pruning.forgets and len(x) > prompt:  # what decoding may see before the cut
        behind = llm(weights, x[:prompt], c, pruning, prompt, first, slots)[1]
    new = np.ones(len(x) - prompt, bool)
    places, inputs = np.arange(len(x)), []
    for index in range(c.llm.depth):
        if index in pruning.layers:
            w = literal_models.block(weights, index if pruning.looks_ahead else index - 1)
            read = x if pruning.looks_ahead else inputs[-1]
            tokens = pruning.tokens[pruning.layers.index(index)]
            attention = last_attention(w, read, c, np.flatnonzero(alive), places)
            x, alive = cut(x, alive, attention, first, slots, tokens, pruning)
            slots = min(slots, tokens)
        there = np.concatenate([alive, new])
        places = np.cumsum(there) - 1 if pruning.packs else np.arange(len(x))
        mask = np.tri(len(x), dtype=bool) & there
        if behind is not None and index < pruning.layers[0]:
            mask[prompt:, :prompt] &= behind
        inputs.append(x)
        x = layer(literal_models.block(weights, index), x, c, places, mask)
    return literal_models.rms_norm(weights, "norm", x, c.llm.norm_eps), alive


def heads_of(w, name, x, count, c, places):
    """Queries or keys of each head, turned by the places of their tokens."""
    y = literal_models.rms_norm(w, "norm1", x, c.llm.norm_eps)
    parts = np.split(literal_models.affine(w, f"attention.{name}", y), count, axis=1)
    return [turned(part, places, c.llm.rope_theta) for part in parts]


def turned(x, places, theta):
    """Rotary positions that may have gaps."""
    half = x.shape[1] // 2
    angle = np.asarray(places)[:, None] / theta ** (np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def last_attention(w, x, c, present, places):
    """The last token's attention to the tokens that are left, of each head [N Y]."""
    queries = heads_of(w, "query", x, c.llm.heads, c, places)
    keys = heads_of(w, "key", x, c.llm.kv_heads, c, places)
    group = c.llm.heads // c.llm.kv_heads
    scale = np.sqrt(c.llm.head_size)
    return np.stack([
        softmax(keys[n // group][present] @ queries[n][present[-1]] / scale)
        for n in range(c.llm.heads)
    ])  # fmt: skip


def cut(x, alive, attention, first, slots, tokens, pruning):
    """The row after a cut, and which of its tokens are left; the last one is."""
    present, attention = np.flatnonzero(alive), attention.copy()
    attention[:, -1] = np.inf
    x, left = x.copy(), np.zeros(len(alive), bool)
    if pruning.kind == "tokencarve" and slots:
        made, kept = carve(x[present], attention, first, slots, tokens, pruning.weight)
        x[present[kept]] = made
    else:
        kept = by_attention(attention, first, slots, tokens)
    left[present[kept]] = True
    return x, left


def layer(w, x, c, places, mask):
    """One decoder layer on a row, under a mask; what nobody sees at least sees itself."""
    mask = mask | np.eye(len(x), dtype=bool)
    queries = heads_of(w, "query", x, c.llm.heads, c, places)
    keys = heads_of(w, "key", x, c.llm.kv_heads, c, places)
    y = literal_models.rms_norm(w, "norm1", x, c.llm.norm_eps)
    values = np.split(literal_models.affine(w, "attention.value", y), c.llm.kv_heads, axis=1)
    group, mixed = c.llm.heads // c.llm.kv_heads, []
    for n in range(c.llm.heads):
        scores = queries[n] @ keys[n // group].T / np.sqrt(c.llm.head_size)
        mixed.append(softmax(np.where(mask, scores, -np.inf)) @ values[n // group])
    x = x + np.concatenate(mixed, axis=1) @ w["attention.out.kernel"].reshape(-1, c.llm.width)
    y = literal_models.rms_norm(w, "norm2", x, c.llm.norm_eps)
    gate = literal_models.affine(w, "gate", y)
    gated = gate / (1 + np.exp(-gate)) * literal_models.affine(w, "up", y)
    return x + literal_models.affine(w, "down", gated)
