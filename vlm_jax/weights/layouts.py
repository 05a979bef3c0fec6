# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of a layout before its sizes: quantized, in tiles, and of which family.

A layout that is taken for another gives another model without a word; these are refused by name.
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
# Where a checkpoint says that its weights are not the numbers themselves.
QUANTIZED = ("quantization_config", "compression_config", "quantization", "quant_config")


def refuse_quantized(fields: dict, level: str = "") -> None:
    """ValueError where weights are quantized, at whatever level the file says so."""
    for name in QUANTIZED:
        if said := fields.get(name):
            how = said.get("quant_method") if isinstance(said, dict) else said
            raise ValueError(
                f"{level}{name} says that the weights are quantized ({value_text(how)}): get them "
                "as they were before (float32, bfloat16 or float16), or dequantize them with the "
                "library that quantized them and save them again"
            )
    for name in ("text_config", "vision_config", "llm_config", "language_config"):
        if not level and isinstance(fields.get(name), dict):
            refuse_quantized(fields[name], f"{name}.")


def refuse_tiles(fields: dict) -> None:
    """ValueError for LLaVA-1.6 and its kin, which cut an image into tiles."""
    way = "LLaVA-1.6 and NeXT cut images into tiles, which is not supported: take a LLaVA-1.5"
    if (kind := fields.get("model_type")) in TILED:
        raise ValueError(f"model_type={kind!r}: {way}")
    for name, plain in (
        ("image_aspect_ratio", (None, "square", "pad")),
        ("mm_patch_merge_type", (None, "flat")),
        ("image_grid_pinpoints", (None, [])),
        ("mm_resampler_type", (None,)),
        ("s2", (None, False)),
    ):
        if (value := fields.get(name)) not in plain:
            known = ", ".join(str(x) for x in plain if x not in (None, [])) or "null"
            raise ValueError(
                f"{name}={value_text(value)} is not supported; supported: {known}. {way}"
            )


def family(fields: dict) -> str:
    """The language model of a flat LLaVA: model_type and architectures say it, and must agree."""
    said: dict[str, str | None] = {}
    if (kind := fields.get("model_type")) is not None:
        said[f"model_type={value_text(kind)}"] = FLAT.get(kind)
    classes = fields.get("architectures")
    for name in classes if isinstance(classes, list) else []:
        found = re.fullmatch(r"(?:Llava)?(\w+?)(?:LM)?ForCausalLM", text("architectures", name))
        said[f"architectures=[{value_text(name)}]"] = found and CLASSES.get(found[1])
    unknown = [name for name, family in said.items() if family is None]
    if unknown or not said:
        raise ValueError(
            f"{unknown[0] if unknown else 'model_type=null'} is not supported for a LLaVA as first "
            f"published; supported are model_type {', '.join(FLAT)}"
        )
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(said)} name different language models")
    return next(iter(said.values()))
