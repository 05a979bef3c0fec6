# SPDX-License-Identifier: Apache-2.0
"""A model as the folder that transformers' LlavaForConditionalGeneration loads."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax import compressors
from vlm_jax.models.pruning import prunes
from vlm_jax.weights import architectures, preprocessor
from vlm_jax.weights.folder import Model, appearing, pending
from vlm_jax.weights.stored import Stored, write_safetensors

# Writes a model's tokenizer into a folder: the number and the name of its image token, or None.
Words = Callable[[Path], tuple[int, str] | None]
PREFIXES = {
    "vit.": "vision_tower.vision_model.",
    "compressor.0.": "multi_modal_projector.linear_1.",
    "compressor.2.": "multi_modal_projector.linear_2.",
    "llm.lm_head.": "language_model.lm_head.",
    "llm.": "language_model.model.",
}


def inexpressible(model: Model) -> str | None:
    """Why transformers has no class for this model; None if it has one."""
    if prunes(model.pruning):
        return f"transformers does not prune by {model.pruning['kind']!r}"
    if (method := compressors.named(model.compressor["kind"])).compresses:
        return f"transformers has no compressor {method.kind!r}"
    try:
        architectures.hf_vision(model.vit)
        architectures.hf_text(model.llm, length=1)
    except ValueError as error:
        return str(error)
    if model.vit["final_norm"]:
        return "its LLaVA never applies the norm after a tower's last block"
    return None


def published(name: str) -> str:
    """The published name of a tensor."""
    prefix = next(p for p in PREFIXES if name.startswith(p))
    return PREFIXES[prefix] + name.removeprefix(prefix)


def write(model: Model, target: Path, *, words: Words, dtype: str | None = None) -> None:
    """Writes a llava-hf folder: configuration, weights, and tokenizer and processor if it has them.

    Raises:
      ValueError: if transformers has no class for the model, and what `words` raises.
    """
    if reason := inexpressible(model):
        raise ValueError(f"this is not a llava-hf model: {reason}")
    with appearing(target) as fresh:
        token = model.facts.get("image_token")
        if image_token := words(fresh):
            token, name = image_token
            processor(model, fresh, name)
        images = preprocessor.files(model.facts["image"], model.vit["image_size"])
        (fresh / preprocessor.NAME).write_text(json.dumps(images, indent=1) + "\n")
        token = model.llm["vocab"] if token is None else token
        tensors, vocab = dict(model.tensors), model.llm["vocab"]
        if token >= vocab:
            # transformers embeds the placeholder before it inserts the image.
            vocab = 64 * math.ceil((token + 1) / 64)
            grow(tensors, vocab)
        llm = model.llm | dict(vocab=vocab)
        config = configuration(model, llm, token)
        tensors = {published(name): tensor for name, tensor in tensors.items()}
        kinds = {np.dtype(dtype) if dtype else tensor.dtype for tensor in tensors.values()}
        config["dtype"] = str(max(kinds, key=lambda kind: kind.itemsize))
        (fresh / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_safetensors(fresh, pending(tensors, dtype))


def configuration(model: Model, llm: dict[str, Any], token: int) -> dict[str, Any]:
    """The config.json of a LlavaForConditionalGeneration."""
    vit, length = model.vit, model.facts.get("max_length") or 4096
    ends = model.facts.get("ends") or dict(outer={}, text={})
    return dict(
        **ends["outer"],
        architectures=["LlavaForConditionalGeneration"],
        model_type="llava",
        image_token_index=token,
        image_seq_length=model.compressor["tokens"],
        multimodal_projector_bias=True,
        projector_hidden_act="gelu",
        tie_word_embeddings=llm["tied_embeddings"],
        text_config=architectures.hf_text(llm, length=length) | ends["text"],
        vision_config=architectures.hf_vision(vit),
        vision_feature_layer=vit["levels"][-1] - vit["depth"] - 1,
        vision_feature_select_strategy=strategy(vit),
    )


def strategy(vit: dict[str, Any]) -> str:
    """transformers' name for reading all tokens of the tower ("full") or all but the first."""
    return "default" if vit["class_token"] and not vit["keep_class"] else "full"


def processor(model: Model, folder: Path, image: str) -> None:
    """Writes the processor's configuration; `image` is the name of the image token."""
    fields = dict(
        processor_class="LlavaProcessor",
        image_token=image,
        patch_size=model.vit["patch_size"],
        num_additional_image_tokens=int(model.vit["class_token"]),
        vision_feature_select_strategy=strategy(model.vit),
    )
    (folder / preprocessor.WHOLE).write_text(json.dumps(fields, indent=1) + "\n")


def grow(tensors: dict[str, Stored | np.ndarray], vocab: int) -> None:
    """Adds rows to the embedding and the output layer: their mean, which is never the argmax."""
    for name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        if (tensor := tensors.get(name)) is not None:
            rows = tensor.read() if isinstance(tensor, Stored) else tensor
            mean = rows.astype(np.float32).mean(0, keepdims=True).astype(rows.dtype)
            added = np.repeat(mean, vocab - len(rows), axis=0)
            tensors[name] = np.concatenate([rows, added])
