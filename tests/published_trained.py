# SPDX-License-Identifier: Apache-2.0
"""Cases of the published trained compressors and of PruMerge, run through ours."""

import functools
import math

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax.compressors.m3.module import pyramid
from vlm_jax.compressors.window import window_order
from vlm_jax.models.vit import class_attention

GATE = 1e-4  # absolute, on activations of order one, float32 with matmuls at highest precision


def quecc(meta: dict) -> nnx.Module:
    kernel, stride = meta["kernel"], meta["stride"]
    return tiny.compressor(
        "quecc",
        tokens=((meta["grid"] - kernel) // stride + 1) ** 2,
        side=meta["grid"],
        width=meta["dim"],
        levels=meta["levels"],
        llm_width=meta["text_dim"],
        heads=meta["heads"],
        query="separate",
        kernel=kernel,
        stride=stride,
    )


def token_packer(meta: dict) -> nnx.Module:
    return tiny.compressor(
        "token_packer",
        tokens=(meta["grid"] // meta["scale_factor"]) ** 2,
        side=meta["grid"],
        width=meta["dim"],
        levels=meta["levels"],
        llm_width=meta["hidden"],
        heads=meta["heads"],
    )


def mqt(meta: dict) -> nnx.Module:
    queries = meta["query_grid"] ** 2
    return tiny.compressor(
        "mqt",
        tokens=queries,
        queries=queries,
        side=meta["grid"],
        width=meta["dim"],
        llm_width=meta["hidden"],
        heads=meta["heads"],
    )


def m3(meta: dict) -> nnx.Module:
    sizes = dict(side=meta["grid"], width=meta["dim"], llm_width=meta["dim"])
    return tiny.compressor("m3", tokens=1, **sizes)


def side(meta: dict) -> int:
    """Patches per side of the grid."""
    return meta["grid"] if "grid" in meta else math.isqrt(meta["tokens_in"])


def prumerge(meta: dict) -> nnx.Module:
    plus = meta["method"] == "prumerge_plus"
    selected = int(meta["tokens_in"] * meta["reduction_ratio"]) * (2 if plus else 1)
    return tiny.compressor(
        "prumerge_plus" if plus else "prumerge",
        tokens=0 if meta["adaptive"] else selected + 1,
        side=side(meta),
        width=meta["dim"],
        llm_width=meta["dim"],
        neighbors=meta["neighbours"],
    )


@jax.jit
def run_quecc(module, order, image_features, image_features_multi, text_features):
    return {
        "tokens": module.compress(
            image_features[:, order], image_features_multi[:, order], text_features[:, 0]
        )
    }


@jax.jit
def run_token_packer(module, order, image_features, image_features_multi):
    tokens = module.compress(image_features[:, order], image_features_multi[:, order])
    return {"tokens_after_mlp": module.projector(tokens)}


@functools.partial(jax.jit, static_argnames="counts")
def run_mqt(module, order, image_features, counts):
    return {f"tokens_{n}": module.at(n)(image_features[:, order]) for n in counts}


@functools.partial(jax.jit, static_argnames="counts")
def run_m3(module, order, projected_features, counts):
    made = pyramid(projected_features[:, order], [module.at(n).tokens for n in counts])
    return {f"tokens_{n}": tokens for n, tokens in zip(counts, made, strict=True)}


def run_prumerge(module, order, features, queries, keys):
    @jax.jit
    def run(module, features, queries, keys):
        attention = class_attention(queries[:, 0], keys)
        return module.compress(features[:, order], keys[:, 1:], attention)

    tokens, count = run(module, features, queries, keys)
    # The published code fills as many slots in every row of a batch.
    return {"tokens": tokens[:, : int(count.max())]}


# Method -> module, forward pass, where its tensors hang in `mm_projector`, tensors not in a case.
METHODS = {
    "m3": (m3, run_m3, "", ("0.", "2.")),
    "mqt": (mqt, run_mqt, "", ()),
    "prumerge": (prumerge, run_prumerge, "", ("0.", "2.")),
    "prumerge_plus": (prumerge, run_prumerge, "", ("0.", "2.")),
    "quecc": (quecc, run_quecc, "0.", ("1.", "3.")),
    "token_packer": (token_packer, run_token_packer, "", ()),
}


def run(meta: dict, state: dict, inputs: dict) -> dict:
    """Our outputs for one case."""
    if meta.get("layer_norm_eps", 1e-6) != 1e-6:
        pytest.fail(f"layer_norm_eps={meta['layer_norm_eps']}: the compressors have 1e-6")
    build, forward, prefix, absent = METHODS[meta["method"]]
    module = jax.eval_shape(lambda: build(meta))
    tensors = {prefix + name: value for name, value in state.items()}
    for name, shape in tiny.tensor_shapes(module).items():
        if name.startswith(absent):
            tensors[name] = np.zeros(shape, np.float32)
    order = window_order(side(meta), module.window)
    if "token_counts" in meta:
        forward = functools.partial(forward, counts=tuple(meta["token_counts"]))
    return forward(tiny.filled(module, tensors), order, **inputs)


RUNS = dict.fromkeys(METHODS, run)
