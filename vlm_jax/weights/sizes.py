# SPDX-License-Identifier: Apache-2.0
"""Compares the sizes of a configuration with the shapes of its tensors.

This happens before anything is built: describing a model makes names and shapes of every layer, and
300,000 layers take minutes and gigabytes.
"""

import re
from collections.abc import Mapping
from typing import Any

Section = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
# The tables that define the size of a model.
POSITIONS, WORDS = "vit.embeddings.position_embedding.weight", "llm.embed_tokens.weight"
LAYER = {"llm": r"llm\.layers\.(\d{1,9})\.", "vit": r"vit\.encoder\.layers\.(\d{1,9})\."}


def patches(vit: Section) -> int:
    """The number of patches of an image."""
    return (vit["image_size"] // vit["patch_size"]) ** 2


def check(vit: Section, llm: Section, shapes: Shapes) -> None:
    """Raises ValueError if the sizes of encoder or LLM differ from the shapes of their tensors.

    `shapes` are by canonical name. Missing tensors are ignored here, except for the tables that
    define the size of a model.
    """
    side = vit["image_size"] // vit["patch_size"]
    rows = side**2 + int(vit["class_token"])
    of_vit, of_llm = "vit.encoder.layers.0.", "llm.layers.0."
    queries = "heads x head size (num_attention_heads, head_dim)"
    keys = "kv heads x head size (num_key_value_heads, head_dim)"
    patches = ("vit.patch_size (patch_size)", vit["patch_size"])
    for name, axis, field, value in (
        (POSITIONS, 0, f"a tower of {side}x{side} patches (image_size, patch_size)", rows),
        (POSITIONS, 1, "vit.width (hidden_size)", vit["width"]),
        ("vit.embeddings.patch_embedding.weight", 2, *patches),
        ("vit.embeddings.patch_embedding.weight", 3, *patches),
        (f"{of_vit}mlp.fc1.weight", 0, "vit.mlp (intermediate_size)", vit["mlp"]),
        (WORDS, 0, "llm.vocab (vocab_size)", llm["vocab"]),
        (WORDS, 1, "llm.width (hidden_size)", llm["width"]),
        (f"{of_llm}mlp.gate_proj.weight", 0, "llm.mlp (intermediate_size)", llm["mlp"]),
        (f"{of_llm}self_attn.q_proj.weight", 0, queries, llm["heads"] * llm["head_size"]),
        (f"{of_llm}self_attn.k_proj.weight", 0, keys, llm["kv_heads"] * llm["head_size"]),
    ):
        shape = shapes.get(name)
        if shape is None and name in (POSITIONS, WORDS):
            raise ValueError(f"it has no tensor {name}, so it is not a whole model")
        if shape is not None and (len(shape) <= axis or shape[axis] != value):
            raise ValueError(f"config.json says {field} = {value}, and {name} is {shape}")
    for part, section in (("vit", vit), ("llm", llm)):
        layers = {int(m[1]) for name in shapes if (m := re.match(LAYER[part], name))}
        if section["depth"] > len(layers):
            raise ValueError(
                f"config.json says {part}.depth (num_hidden_layers) = {section['depth']}, and the "
                f"tensors have {len(layers)} such layers: the file is incomplete, or not of this "
                "configuration"
            )


def check_compressor(vit: Section, compressor: Section, tensors: Mapping[str, Any]) -> None:
    """Raises ValueError if a compressor has more tokens or queries than its tensors allow."""
    most = patches(vit) + 1
    queries = getattr(tensors.get("compressor.query"), "shape", (0,))[0]
    most = max(most, queries)
    for name, value, largest in (
        ("tokens", compressor["tokens"], most),
        ("queries", compressor.get("queries", 0), queries),
        *(("scales", scale, most) for scale in compressor.get("scales", ())),
    ):
        if value > largest:
            raise ValueError(f"config.json says compressor.{name} = {value}: {largest} at most")
