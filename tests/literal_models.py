# SPDX-License-Identifier: Apache-2.0
"""Literal transformers: one image or one row of tokens at a time, raster order, float64, loops."""

import literal_compressors
import literal_prumerge
import numpy as np

from vlm_jax.weights import folder


def of(module):
    """The weights of a module as float64 under dotted names; those of blocks still stacked."""
    import jax

    flat = jax.tree_util.tree_flatten_with_path(module)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"):
            np.asarray(x, np.float64) for path, x in flat
    }  # fmt: skip


def block(weights, index):
    """The weights of one block of a stack."""
    return {k.removeprefix("blocks."): v[index] for k, v in weights.items()
            if k.startswith("blocks.")}  # fmt: skip


def affine(w, name, x):
    """x times a kernel whose first axis is x's last, all others flattened, plus a bias if any."""
    kernel = w[f"{name}.kernel"].reshape(x.shape[-1], -1)
    return x @ kernel + w.get(f"{name}.bias", np.zeros(1)).reshape(-1)


def layer_norm(w, name, x, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * w[f"{name}.scale"] + w[f"{name}.bias"]


def rms_norm(w, name, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.scale"]


def attention(query, keys, values, *, causal):
    """One head: [T H], [S H], [S H] -> [T H]."""
    scores = query @ keys.T / np.sqrt(query.shape[1])
    if causal:
        scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True) @ values


def vit(weights, pixels, c, keys=False, whole=False):
    """CLIP's tower on one image [I I 3]: the levels of each patch in raster order [P Z].

    `keys` adds the key of each patch in the block behind the last level and, of the attention of
    all tokens to all there, that of the class token to the patch. `whole` keeps the class token.
    """
    size, side = c.vit.patch_size, c.vit.image_size // c.vit.patch_size
    cut = [pixels[r * size : (r + 1) * size, k * size : (k + 1) * size].reshape(-1)
           for r in range(side) for k in range(side)]  # fmt: skip
    x = np.concatenate([weights["class_token"][None], np.stack(cut) @ weights["patch.kernel"]])
    x = layer_norm(weights, "pre_norm", x + weights["position"], c.vit.norm_eps)
    outputs = []
    for index in range(max(c.vit.levels)):
        w = block(weights, index)
        y = layer_norm(w, "norm1", x, c.vit.norm_eps)
        parts = [np.split(affine(w, f"attention.{n}", y), c.vit.heads, axis=1)
                 for n in ("query", "key", "value")]  # fmt: skip
        heads = [attention(*qkv, causal=False) for qkv in zip(*parts, strict=True)]
        kernel = w["attention.out.kernel"].reshape(c.vit.width, c.vit.width)
        x = x + np.concatenate(heads, 1) @ kernel + w["attention.out.bias"]
        y = affine(w, "up", layer_norm(w, "norm2", x, c.vit.norm_eps))
        x = x + affine(w, "down", y / (1 + np.exp(-1.702 * y)))
        outputs.append(x if whole else x[1:])
    outputs = [outputs[level - 1] for level in c.vit.levels]
    if keys:
        w = block(weights, max(c.vit.levels))
        y = layer_norm(w, "norm1", x, c.vit.norm_eps)
        query, key = affine(w, "attention.query", y), affine(w, "attention.key", y)
        seen = attention(query, key, np.eye(len(y)), causal=False)
        outputs += [key[1:], seen[:1, 1:].T]
    return np.concatenate(outputs, axis=1)


def own_block(weights, pixels, c):
    """Of the block whose output is the last level: the attention of the class token to each patch,
    mean over the heads, and the keys of all tokens, class token first."""
    level = max(c.vit.levels)
    before = c.copy_and_resolve_references()
    before.vit.levels = (level - 1,)
    x = vit(weights, pixels, before, whole=True)
    w = block(weights, level - 1)
    y = layer_norm(w, "norm1", x, c.vit.norm_eps)
    query, key = affine(w, "attention.query", y), affine(w, "attention.key", y)
    heads = zip(*(np.split(z, c.vit.heads, axis=1) for z in (query, key)), strict=True)
    seen = [attention(q, k, np.eye(len(y)), causal=False)[0, 1:] for q, k in heads]
    return np.mean(seen, axis=0), key


def turned(x, theta):
    """Rotary positions by complex numbers: feature i and i + H/2 are one number of the plane."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] / theta ** (np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def llm(weights, x, c):
    """A Llama/Qwen decoder on one row of embeddings [T D]: hidden states after the final norm."""
    heads, kv_heads = c.llm.heads, c.llm.kv_heads
    for index in range(c.llm.depth):
        w = block(weights, index)
        y = rms_norm(w, "norm1", x, c.llm.norm_eps)
        query = np.split(affine(w, "attention.query", y), heads, axis=1)
        keys = np.split(affine(w, "attention.key", y), kv_heads, axis=1)
        values = np.split(affine(w, "attention.value", y), kv_heads, axis=1)
        mixed = []
        for head in range(heads):
            of_group = head // (heads // kv_heads)
            mixed.append(attention(turned(query[head], c.llm.rope_theta),
                                   turned(keys[of_group], c.llm.rope_theta),
                                   values[of_group], causal=True))  # fmt: skip
        kernel = w["attention.out.kernel"].reshape(-1, c.llm.width)
        x = x + np.concatenate(mixed, axis=1) @ kernel
        y = rms_norm(w, "norm2", x, c.llm.norm_eps)
        gate = affine(w, "gate", y)
        x = x + affine(w, "down", gate / (1 + np.exp(-gate)) * affine(w, "up", y))
    return rms_norm(weights, "norm", x, c.llm.norm_eps)


def unembed(weights, hidden):
    return hidden @ weights.get("head", weights["embedding"]).T


def vlm(model, row, c):
    """Logits [length W] of one row's text tokens but the first, each given all before it."""
    weights = of(model.llm)
    text, keys = weights["embedding"][row["ids"][: row["length"]]], model.compressor.reads == "keys"
    place = np.arange(row["length"])
    images = {name: row[name] for name in ("image_at", "levels", "pixels", "question",
                                           "question_length") if name in row}  # fmt: skip
    if np.ndim(row["image_at"]) == 0:
        images = {name: [value] for name, value in images.items()}
    # The last first: what stands before an image is where it was.
    for k in reversed(range(len(images["image_at"]))):
        at = int(images["image_at"][k])
        if at == len(row["ids"]):
            continue
        levels = images["levels"][k] if "levels" in images else vit(
            of(model.vit), images["pixels"][k], c, keys)  # fmt: skip
        question = images["question"][k][: images["question_length"][k]]
        question = llm(weights, weights["embedding"][question], c)[-1]
        visual = compress(model.compressor, levels.astype(np.float64), question, c)
        text = np.concatenate([text[:at], visual, text[at:]])
        place = place + len(visual) * (np.arange(row["length"]) >= at)
    logits = unembed(weights, llm(weights, text, c))
    return logits[place[1:] - 1]


def compress(module, levels, question, c):
    """V visual tokens of one image whose patches come in raster order."""
    tensors = {k: v.astype(np.float64) for k, v in folder.compressor_tensors(module).items()}
    shared = dict(width=c.vit.width, heads=c.compressor.heads)
    match c.compressor.kind:
        case "quecc":
            return literal_compressors.quecc(tensors, levels, question, kernel=module.kernel,
                                             stride=module.stride, **shared)  # fmt: skip
        case "prumerge" | "prumerge_plus":
            merged = literal_prumerge.of_levels(levels, c.compressor.kind, c.compressor.tokens,
                                                c.vit.width)  # fmt: skip
            return literal_compressors.mlp(tensors, "0", "2", merged)
        case "token_packer":
            return literal_compressors.token_packer(tensors, levels, tokens=c.compressor.tokens,
                                                    **shared)  # fmt: skip
