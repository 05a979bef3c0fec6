# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints as transformers writes them, with what its models compute from them."""

import json
from pathlib import Path

import numpy as np

TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    image_size=24, patch_size=8,
)  # fmt: skip
TEXT = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=67, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e3, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
IMAGE = 66  # of the 67 tokens

# Name -> kind of config, its fields, fields of the LLaVA around it.
TOWERS = {
    "clip": ("clip_vision_model", {}),
    "clip_gelu": ("clip_vision_model", dict(hidden_act="gelu", layer_norm_eps=1e-6)),
    "siglip": ("siglip_vision_model", {}),
    "siglip_border": ("siglip_vision_model", dict(image_size=30, num_hidden_layers=2)),
}
LLMS = {
    "llama": ("llama", {}),
    "llama_tied_head": ("llama", dict(tie_word_embeddings=True, head_dim=10, hidden_size=24)),
    "llama_linear": ("llama", dict(rope_parameters=dict(
        rope_type="linear", factor=3.0, rope_theta=1e4))),
    "llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "qwen2": ("qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2_tied": ("qwen2", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen3": ("qwen3", dict(head_dim=16, rms_norm_eps=1e-6)),
}  # fmt: skip
LLAVAS = {
    "clip_llama": ("clip", "llama", {}),
    "clip_qwen2": ("clip", "qwen2_tied", dict(vision_feature_layer=-1)),
    "clip_full": ("clip_gelu", "qwen3", dict(vision_feature_select_strategy="full")),
    "siglip_llama3": ("siglip_border", "llama3", dict(vision_feature_select_strategy="full")),
    "siglip_last": ("siglip", "llama_tied_head", dict(
        vision_feature_select_strategy="full", vision_feature_layer=-1)),
}  # fmt: skip


def config_of(kind, fields):
    """A transformers configuration."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**fields)


def tower(name):
    kind, fields = TOWERS[name]
    return config_of(kind, TOWER | fields)


def llm(name):
    kind, fields = LLMS[name]
    return config_of(kind, TEXT | fields)


def llava(name):
    """The configuration of a small LLaVA."""
    vision, text, fields = LLAVAS[name]
    return config_of("llava", dict(
        vision_config=tower(vision), text_config=llm(text), image_token_index=IMAGE,
        tie_word_embeddings=llm(text).tie_word_embeddings, **fields))  # fmt: skip


def random_model(cls, config, seed=0):
    """A model of transformers whose every parameter, biases and norms too, is drawn at random."""
    import torch

    torch.manual_seed(seed)
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim < 2 else 0.6 * parameter[0].numel() ** -0.5
        draw = scale * torch.randn_like(parameter)
        is_scale = "norm" in name and name.endswith("weight")
        parameter.data = draw + is_scale
    if config.model_type == "llava" and config.tie_word_embeddings:
        model.tie_weights()
    return model


def batch(config, *, rows=3, seed=0):
    """Token ids with one image per row at different places, padded on the right, and pixels.

    Returns what our models read (ids without the placeholders, image_at, length, pixels [B I I 3])
    and the ids with placeholders and mask that transformers reads.
    """
    draw = np.random.default_rng(seed)
    side = config.vision_config.image_size // config.vision_config.patch_size
    full = config.vision_feature_select_strategy == "full"
    clip = config.vision_config.model_type == "clip_vision_model"
    visual = side**2 + int(full and clip)
    length = 9
    ids = draw.integers(3, 60, (rows, length)).astype("i4")
    lengths = np.array([9, 5, 7][:rows], "i4")
    image_at = np.array([2, 5, 0][:rows], "i4")
    size = config.vision_config.image_size
    pixels = draw.normal(size=(rows, size, size, 3)).astype("f4")
    theirs = np.zeros((rows, length + visual), "i8")
    mask = np.zeros_like(theirs)
    for row, (n, at) in enumerate(zip(lengths, image_at, strict=True)):
        text = ids[row, :n]
        whole = np.concatenate([text[:at], np.full(visual, config.image_token_index), text[at:]])
        theirs[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    ours = dict(ids=ids, image_at=image_at, length=lengths, pixels=pixels,
                question=ids[:, :1], question_length=np.ones(rows, "i4"))  # fmt: skip
    return ours, dict(input_ids=theirs, attention_mask=mask), visual


def read_index(folder):
    """The file of each tensor of a sharded checkpoint."""
    return json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]
