# SPDX-License-Identifier: Apache-2.0
"""Cases of the published selections and of pixel unshuffle, run through ours.

The cases are those of methods: no weights but CDPruner's way into CLIP's space and the MLP of pixel
unshuffle. tests/published/methods/README.md has the format.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

import vlm_jax.compressors.divprune.module as divprune
import vlm_jax.compressors.mmtok.module as mmtok
import vlm_jax.compressors.random.module as random
import vlm_jax.compressors.uniform.module as uniform
import vlm_jax.compressors.visionzip.module as visionzip
import vlm_jax.compressors.vispruner.module as vispruner
from vlm_jax.compressors.selector import each_image, kept
from vlm_jax.compressors.window import window_order
from vlm_jax.models.vit import head_attention

GATE = 1e-5  # absolute, in float32 with matmuls at highest precision


def chosen(tokens, order) -> dict:
    """The outputs of a case: which patches, ascending, and their rows."""
    index = jnp.sort(order.astype(jnp.int32), axis=1)
    return {"tokens": kept(tokens, index), "indices": index}


def run_visionzip(meta, state, inputs):
    @jax.jit
    def run(features, queries, keys):
        attention = head_attention(queries[:, 0], keys, meta["heads"])
        means = keys.reshape(*keys.shape[:2], meta["heads"], -1).mean(2)
        zipped = functools.partial(
            visionzip.zipped, dominant=meta["dominant"], contextual=meta["contextual"]
        )
        return each_image(zipped, features, means, attention)

    tokens, dominant = run(**inputs)
    return {"tokens": tokens, "dominant_indices": dominant.astype(jnp.int32)}


def run_vispruner(meta, state, inputs):
    @jax.jit
    def run(features, queries, keys):
        attention = head_attention(queries[:, 0], keys, meta["heads"])
        select = functools.partial(
            vispruner.select, count=meta["tokens"], ratio=meta["important_ratio"]
        )
        return chosen(features, each_image(select, features, attention))

    return run(**inputs)


def run_divprune(meta, state, inputs):
    @jax.jit
    def run(projected_features):
        select = functools.partial(divprune.select, count=meta["tokens"])
        return chosen(projected_features, each_image(select, projected_features))

    return run(**inputs)


def run_cdpruner(meta, state, inputs):
    if meta["layer_norm_eps"] != 1e-5:
        raise ValueError(f"layer_norm_eps={meta['layer_norm_eps']}: CLIP has 1e-5")
    module = jax.eval_shape(
        lambda: tiny.compressor(
            "cdpruner",
            tokens=meta["tokens"],
            side=meta["grid"],
            width=meta["dim"],
            llm_width=meta["hidden"],
            clip_width=meta["clip_dim"],
        )
    )
    rest = {name: np.zeros(shape, np.float32) for name, shape in tiny.tensor_shapes(module).items()}
    module = tiny.filled(module, rest | state)

    @jax.jit
    def run(module, features, projected_features, text_embeds):
        order = module.of_text(features, projected_features, text_embeds)
        return chosen(projected_features, order)

    return run(module, **inputs)


def run_mmtok(meta, state, inputs):
    @jax.jit
    def run(projected_features, features, text_features, excluded):
        select = functools.partial(
            mmtok.select,
            count=meta["tokens"],
            text_temperature=meta["text_temperature"],
            image_temperature=meta["vision_temperature"],
            image_weight=meta["alpha"],
        )
        real = jnp.ones(text_features.shape[:2], bool)
        given = projected_features, features, text_features, real, excluded
        return chosen(projected_features, each_image(select, *given))

    none = np.zeros(inputs["features"].shape[:2], bool)
    return run(**{"excluded": none} | inputs)


def run_random(meta, state, inputs):
    @jax.jit
    def run(projected_features, image_ids):
        select = functools.partial(
            random.select,
            seed=meta["selection_seed"],
            patches=meta["grid"] ** 2,
            count=meta["tokens"],
        )
        return chosen(projected_features, each_image(select, image_ids))

    return run(**inputs)


def run_uniform(meta, state, inputs):
    tokens = jnp.array(inputs["projected_features"])
    places = uniform.grid(meta["rows"], meta["cols"], meta["tokens"])
    return chosen(tokens, jnp.broadcast_to(places, (len(tokens), len(places))))


def run_pixel_unshuffle(meta, state, inputs):
    if meta["layer_norm_eps"] != 1e-5:
        raise ValueError(f"layer_norm_eps={meta['layer_norm_eps']}: pixel unshuffle has 1e-5")
    module = jax.eval_shape(
        lambda: tiny.compressor(
            "pixel_unshuffle",
            tokens=(meta["grid"] // meta["factor"]) ** 2,
            side=meta["grid"],
            width=meta["dim"],
            llm_width=meta["hidden"],
            ps_version=meta["ps_version"],
        )
    )
    order = window_order(meta["grid"], meta["factor"])
    run = jax.jit(lambda module, features: {"tokens": module(features[:, order])})
    return run(tiny.filled(module, state), **inputs)


RUNS = {
    "cdpruner": run_cdpruner,
    "divprune": run_divprune,
    "mmtok": run_mmtok,
    "pixel_unshuffle": run_pixel_unshuffle,
    "random": run_random,
    "uniform": run_uniform,
    "visionzip": run_visionzip,
    "vispruner": run_vispruner,
}
