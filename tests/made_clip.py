# SPDX-License-Identifier: Apache-2.0
"""A small whole CLIP in a folder: random weights, and a tokenizer that begins and ends a text."""

import json

import numpy as np
import real_tokenizers
import whole_models
from safetensors.numpy import load_file
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

WIDTH, LENGTH, SPACE, VOCAB = 8, 16, 12, 300  # of the text tower; of the common space


def text_tokenizer():
    """Byte-level, with CLIP's tokens around every text."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    backend = real_tokenizers.byte_level(ends)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}",
        special_tokens=[(end, backend.token_to_id(end)) for end in ends],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=ends[0], eos_token=ends[1], unk_token=ends[1]
    )


def clip(path, *, width, side, blocks):
    """A folder of a CLIP with this vision tower."""
    whole_models.tower(path, width=width, side=side, blocks=blocks)
    vision = json.loads((path / "config.json").read_text())
    draw = np.random.default_rng(3)
    shapes = {
        "text_model.embeddings.token_embedding.weight": (VOCAB, WIDTH),
        "text_model.embeddings.position_embedding.weight": (LENGTH, WIDTH),
        "text_projection.weight": (SPACE, WIDTH),
        "visual_projection.weight": (SPACE, width),
    }
    norms, stem = ["text_model.final_layer_norm"], "text_model.encoder.layers.0."
    norms += [f"{stem}layer_norm1", f"{stem}layer_norm2"]
    for part, layers in whole_models.LAYERS.items():
        for layer in layers:
            out, inputs = (
                4 * WIDTH if layer == "fc1" else WIDTH,
                4 * WIDTH if layer == "fc2" else WIDTH,
            )
            shapes[f"{stem}{part}.{layer}.weight"] = (out, inputs)
            shapes[f"{stem}{part}.{layer}.bias"] = (out,)
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    tensors = {name: 0.5 * draw.normal(size=shape) for name, shape in shapes.items()}
    tensors |= load_file(path / "model.safetensors")
    text = dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    config = dict(model_type="clip", projection_dim=SPACE, text_config=text, vision_config=vision)
    whole_models.save(path, config, tensors)
    text_tokenizer().save_pretrained(path)
    return path
