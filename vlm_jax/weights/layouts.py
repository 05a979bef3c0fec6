# SPDX-License-Identifier: Apache-2.0
"""Layouts in a config.json: quantized weights, image tiles and the family of the language model.

A layout that is mistaken for another would silently give another model; these are refused by name.
"""

import re

from vlm_jax.weights.values import text, value_text

LLMS = ("llama", "qwen2", "qwen3", "mistral")
# The language model of a flat LLaVA, by its model_type and by the middle of its class's name.
FLAT = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_qwen3": "qwen3",
    **{name: name for name in LLMS},
}
CLASSES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen": "qwen2",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
}
TILED = ("llava_next", "llava_next_video", "llava_onevision")
# Fields of checkpoints whose weights are quantized.
QUANTIZED = ("quantization_config", "compression_config", "quantization", "quant_config")


def refuse_quantized(fields: dict, level: str = "") -> None:
    """Raises ValueError if the weights are quantized, at any level of the file."""
    for name in QUANTIZED:
        if quantization := fields.get(name):
            method = (
                quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            )
            raise ValueError(
                f"{level}{name} says that the weights are quantized ({value_text(method)}): get "
                "the original ones (float32, bfloat16 or float16), or dequantize them with the "
                "library that quantized them and save them again"
            )
    for name in ("text_config", "vision_config", "llm_config", "language_config"):
        if not level and isinstance(fields.get(name), dict):
            refuse_quantized(fields[name], f"{name}.")


def refuse_tiles(fields: dict) -> None:
    """Raises ValueError for LLaVA-1.6 and similar models, which cut an image into tiles."""
    advice = "LLaVA-1.6 and NeXT cut images into tiles, which is not supported: take a LLaVA-1.5"
    if (kind := fields.get("model_type")) in TILED:
        raise ValueError(f"model_type={kind!r}: {advice}")
    for name, plain in (
        ("image_aspect_ratio", (None, "square", "pad")),
        ("mm_patch_merge_type", (None, "flat")),
        ("image_grid_pinpoints", (None, [])),
        ("mm_resampler_type", (None,)),
        ("s2", (None, False)),
    ):
        if (value := fields.get(name)) not in plain:
            allowed = ", ".join(str(x) for x in plain if x not in (None, [])) or "null"
            raise ValueError(
                f"{name}={value_text(value)} is not supported; supported: {allowed}. {advice}"
            )


def family(fields: dict) -> str:
    """The language model of a flat LLaVA, from model_type and architectures, which must agree."""
    families: dict[str, str | None] = {}
    if (kind := fields.get("model_type")) is not None:
        families[f"model_type={value_text(kind)}"] = FLAT.get(kind)
    classes = fields.get("architectures")
    for name in classes if isinstance(classes, list) else []:
        match = re.fullmatch(r"(?:Llava)?(\w+?)(?:LM)?ForCausalLM", text("architectures", name))
        families[f"architectures=[{value_text(name)}]"] = match and CLASSES.get(match[1])
    unknown = [name for name, family in families.items() if family is None]
    if unknown or not families:
        raise ValueError(
            f"{unknown[0] if unknown else 'model_type=null'} is not supported for a LLaVA as first "
            f"published; supported are model_type {', '.join(FLAT)}"
        )
    if len(set(families.values())) > 1:
        raise ValueError(f"{' and '.join(families)} name different language models")
    return next(iter(families.values()))
