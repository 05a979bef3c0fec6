# SPDX-License-Identifier: Apache-2.0
"""The text tower of a whole CLIP, for a compressor that reads questions with it."""

from dataclasses import dataclass
from pathlib import Path

from vlm_jax.weights import folder
from vlm_jax.weights.classes import DEEPEST, allow, defaults, within
from vlm_jax.weights.files import read_json, read_tensors
from vlm_jax.weights.stored import Stored
from vlm_jax.weights.values import whole

# Tensors of HF's CLIPModel that such a compressor has, by the beginnings of their names; those of
# the other half are in the vision tower too.
PARTS = ("text_model.", "text_projection.", "visual_projection.")
NORM = "vision_model.post_layernorm."
MLP = 4  # the width of the MLP is this multiple, in every published CLIP


@dataclass(frozen=True)
class TextTower:
    """What a compressor takes from a CLIP.

    Attributes:
      section: fields of a `compressor` section.
      tensors: by their canonical names.
      tokenizer: the folder that has its files.
    """

    section: dict[str, int]
    tensors: dict[str, Stored]
    tokenizer: Path


def read(path: Path | None, kind: str) -> TextTower:
    """The text tower in the folder of a whole CLIP, for a compressor of this kind.

    Raises:
      FileNotFoundError, ValueError: for no folder, one without a text tower or its tokenizer, and
        sizes that no published CLIP has.
    """
    if path is None:
        raise ValueError(
            f"--compressor={kind} reads the question with CLIP's text tower: give "
            "--text-tower=DIR, the folder of a whole CLIP, such as that of the vision tower"
        )
    with within(f"--text-tower={path}"):
        fields = read_json(path / "config.json")
        allow("model_type", fields.get("model_type"), ("clip",))
        full = defaults("clip", fields, {"text_config", "text_config_dict", "projection_dim"})
        text = full.text_config
        allow("text_config.hidden_act", text.hidden_act, ("quick_gelu",))
        allow("text_config.layer_norm_eps", text.layer_norm_eps, (1e-5,))
        allow("text_config.intermediate_size", text.intermediate_size, (MLP * text.hidden_size,))
        section = dict(
            clip_width=whole("projection_dim", full.projection_dim),
            text_width=whole("text_config.hidden_size", text.hidden_size),
            text_depth=whole("text_config.num_hidden_layers", text.num_hidden_layers, most=DEEPEST),
            text_heads=whole("text_config.num_attention_heads", text.num_attention_heads),
            text_vocab=whole("text_config.vocab_size", text.vocab_size),
            text_length=whole("text_config.max_position_embeddings", text.max_position_embeddings),
        )
        tensors = {}
        for name, tensor in read_tensors(path).items():
            if name.endswith("position_ids"):
                continue
            if name.startswith(PARTS):
                tensors[f"compressor.{name}"] = tensor
            elif name.startswith(NORM):
                tensors[f"compressor.{name.removeprefix('vision_model.')}"] = tensor
        if missing := [part for part in PARTS if f"compressor.{part}" not in " ".join(tensors)]:
            raise ValueError(
                f"it has no tensors {', '.join(missing)}...: give the folder of a whole CLIP"
            )
        if not folder.has_tokenizer(path):
            raise ValueError(
                f"it holds no tokenizer ({', '.join(folder.WORDS)}): copy those of the CLIP"
            )
    return TextTower(section, tensors, path)
