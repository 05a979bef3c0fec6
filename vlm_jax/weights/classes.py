# SPDX-License-Identifier: Apache-2.0
"""The configuration classes of transformers, for what a config.json leaves out; they need no torch.

A class is shown the fields that change what a model computes and no others, and their sizes are
checked first: it would make lists as long as any of them says.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm_jax.weights.values import number, value_text, whole

# Fields that change what is computed: sizes, then others.
TOWER_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size",
)  # fmt: skip
TOWER_FIELDS = {*TOWER_SIZES, "hidden_act", "layer_norm_eps"}
LLM_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
    "max_window_layers", "original_max_position_embeddings",
)  # fmt: skip
LLM_FIELDS = {
    *LLM_SIZES, "hidden_act", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "tie_word_embeddings", "use_sliding_window", "layer_types",
}  # fmt: skip
DEEPEST = 10_000  # blocks


@contextmanager
def within(place: str) -> Iterator[None]:
    """Errors of the body say where they were found."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def allow(name: str, value: Any, allowed: tuple | type) -> None:
    """ValueError unless a property of a published model is one that ours can have."""
    if isinstance(value, allowed) if isinstance(allowed, type) else value in allowed:
        return
    choices = allowed.__name__ if isinstance(allowed, type) else ", ".join(map(str, allowed))
    raise ValueError(f"{name}={value_text(value)} is not supported; supported: {choices}")


def check_sizes(fields: dict, names: tuple[str, ...]) -> None:
    """ValueError for a size that no model has, before anything is made of it."""
    if fields.get("rope_theta") is not None:
        number("rope_theta", fields["rope_theta"])
    for name in names:
        value = fields.get(name)
        if name in ("image_size", "patch_size"):
            for side in value if isinstance(value, list | tuple) else [value]:
                if value is not None:
                    whole(name, side, most=2**16)
        elif value is not None:
            whole(name, value, least=int(name != "max_window_layers"), most=most(name))


def most(name: str) -> int:
    """The largest that a size may be."""
    return DEEPEST if name in ("num_hidden_layers", "max_window_layers") else 10**8


def picked(fields: dict, known: set[str]) -> dict:
    """Those of the fields that are known, to be changed at will."""
    return {name: copy.deepcopy(value) for name, value in fields.items() if name in known}


def defaults(kind: str, fields: dict, known: set[str]) -> Any:
    """The transformers configuration of a section: the known fields, and what they leave out."""
    # Deferred: transformers takes seconds to import. Its own warnings concern its own models.
    from transformers import CONFIG_MAPPING

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return CONFIG_MAPPING[kind](**picked(fields, known))
    # Its validators raise errors of several libraries.
    except Exception as error:
        said = " ".join(str(error).split())
        said = said if len(said) <= 300 else f"{said[:300]}..."
        raise ValueError(f"transformers cannot make a {kind} of it ({said})") from None
    finally:
        logger.setLevel(level)
