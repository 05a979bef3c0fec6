# SPDX-License-Identifier: Apache-2.0
"""The configuration classes of transformers, for omitted fields of a config.json, without torch.

A class gets only the fields that change what a model computes, and their sizes are checked first,
because the class would build lists of any length.
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
    """Adds `place` in front of the ValueErrors of the body."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def allow(name: str, value: Any, allowed: tuple | type) -> None:
    """Raises ValueError unless a property of a published model is supported."""
    if isinstance(value, allowed) if isinstance(allowed, type) else value in allowed:
        return
    choices = allowed.__name__ if isinstance(allowed, type) else ", ".join(map(str, allowed))
    raise ValueError(f"{name}={value_text(value)} is not supported; supported: {choices}")


def check_sizes(fields: dict, names: tuple[str, ...]) -> None:
    """Raises ValueError for an impossible size, before anything is built from it."""
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
    """The largest allowed value of a size."""
    return DEEPEST if name in ("num_hidden_layers", "max_window_layers") else 10**8


def picked(fields: dict, names: set[str]) -> dict:
    """A deep copy of the fields with these names."""
    return {name: copy.deepcopy(value) for name, value in fields.items() if name in names}


def defaults(kind: str, fields: dict, names: set[str]) -> Any:
    """The transformers configuration of a section: its fields of these names, and defaults."""
    # Deferred: transformers takes seconds to import. Its own warnings concern its own models.
    from transformers import CONFIG_MAPPING

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return CONFIG_MAPPING[kind](**picked(fields, names))
    # Its validators raise errors of several libraries.
    except Exception as error:
        message = " ".join(str(error).split())
        message = message if len(message) <= 300 else f"{message[:300]}..."
        raise ValueError(f"transformers cannot make a {kind} of it ({message})") from None
    finally:
        logger.setLevel(level)
