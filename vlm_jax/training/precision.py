# SPDX-License-Identifier: Apache-2.0
"""Frozen weights of a stage in fewer bytes (config.frozen_dtype)."""

import jax

from vlm_jax.models import lora
from vlm_jax.models.vlm import VLM

# Parts of the names of weights that are cast to the type of the activations wherever they are used.
MATRICES = {"kernel", "embedding", "head"}


def frozen(model: VLM, stage: str) -> set[str]:
    """The parts of a model whose matrices stage `stage` does not train."""
    parts = {"vit"}
    if stage == "align" or lora.adapted(model):
        parts.add("llm")
    # Which patches are kept is decided in float32 from the encoder's own weights.
    return parts - {"vit"} if model.compressor.reads else parts


def narrowed(model: VLM, stage: str, dtype: str) -> VLM:
    """The model as stage `stage` holds it: the matrices that it does not train in `dtype`.

    With activations of the same type, a step computes the same as from float32 weights. Norms,
    biases and position tables are used in float32 and stay so.
    """
    parts = frozen(model, stage)

    def narrow(path: tuple, x: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return x.astype(dtype) if names[0] in parts and MATRICES & set(names) else x

    return model if dtype == "float32" else jax.tree_util.tree_map_with_path(narrow, model)


def widened(model: VLM) -> VLM:
    """The model with every weight in float32, values unchanged."""
    return jax.tree.map(lambda x: x if x.dtype == "float32" else x.astype("float32"), model)
