# SPDX-License-Identifier: Apache-2.0
"""Published config.json files as `vit` and `llm` sections of a configuration, and back.

Fields that a config.json omits have the defaults of its transformers class, which needs no torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_jax.weights.classes import (
    DEEPEST,
    LLM_FIELDS,
    LLM_SIZES,
    TOWER_FIELDS,
    TOWER_SIZES,
    allow,
    check_sizes,
    defaults,
    picked,
    within,
)
from vlm_jax.weights.files import read_json
from vlm_jax.weights.layouts import LLMS, family, refuse_quantized, refuse_tiles
from vlm_jax.weights.values import number, table, text, value_text, whole

Section = dict[str, Any]

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# model_type of a config.json -> model_type of the section that is read in it.
TOWERS = {
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
}
SUPPORTED = (
    f"vision towers {', '.join(TOWERS)}; language models {', '.join(LLMS)} (Vicuna is llama, "
    "Qwen1.5 and Qwen2.5 are qwen2); llava of transformers, and LLaVA-1.5 as first published"
)


@dataclass(frozen=True)
class Published:
    """The description of a folder of weights.

    Attributes:
      kind: tower, llm, llava (a whole model of transformers) or llava-1.5 (as first published, with
        its tower in another folder).
      vit, llm: sections of a configuration, if the folder has them; vit has no levels if the folder
        names none.
      image_token: the id that stands for the image.
      image_fit: "pad" or "crop", if the folder says so.
      length: the longest row, in tokens, of the language model.
      family: the model_type of the language model.
    """

    kind: str
    vit: Section | None = None
    llm: Section | None = None
    image_token: int | None = None
    image_fit: str | None = None
    length: int = 0
    family: str = field(default="", compare=False)  # a Mistral may be exactly a Llama


def read(folder: Path) -> Published:
    """The description of a folder, from its config.json.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: for an architecture, or a property of one, that is not supported.
    """
    fields = read_json(folder / "config.json")
    with within(f"{folder}/config.json"):
        return describe(fields)


def describe(fields: dict) -> Published:
    """The description in the fields of a config.json."""
    refuse_quantized(fields)
    kind = fields.get("model_type")
    if kind is not None:
        text("model_type", kind)
    refuse_tiles(fields)
    if "mm_hidden_size" in fields or "mm_vision_tower" in fields:
        return _llava15(fields)
    if kind == "llava":
        return _llava(fields)
    if kind in TOWERS:
        name = next((n for n in ("vision_config", "vision_config_dict") if fields.get(n)), None)
        if name is None and kind in ("clip", "siglip"):
            raise ValueError(f"a whole {kind} needs its vision_config, which is not there")
        section = fields if name is None else table(name, fields[name])
        return Published("tower", vit=vit_section(section, TOWERS[kind]))
    if kind in LLMS:
        return Published("llm", llm=llm_section(fields), length=length(fields), family=kind)
    raise ValueError(f"architecture {kind!r} is not supported; supported are: {SUPPORTED}")


def _llava(fields: dict) -> Published:
    config_fields = {
        name: fields[name]
        for name in (
            "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act",
            "multimodal_projector_bias", "tie_word_embeddings", "image_token_index",
            "image_token_id",
        )
        if name in fields
    }  # fmt: skip
    kinds = {}
    for name, default, read_fields, sizes in (
        ("vision_config", "clip_vision_model", TOWER_FIELDS, TOWER_SIZES),
        ("text_config", "llama", LLM_FIELDS, LLM_SIZES),
    ):
        section = fields.get(name)
        kinds[name] = default
        if section is not None:
            with within(name):
                kind = text("model_type", table(name, section).get("model_type", default))
                check_sizes(section, sizes)
            kinds[name] = kind
            config_fields[name] = picked(section, read_fields) | dict(model_type=kind)
    tower, llm = kinds.values()
    if tower not in TOWERS or llm not in LLMS:
        raise ValueError(
            f"a llava of {value_text(tower)[1:-1]} and {value_text(llm)[1:-1]} is not supported; "
            f"known are: {SUPPORTED}"
        )
    full = defaults("llava", config_fields, set(config_fields))
    with within("vision_config"):
        vit = vit_section(full.vision_config.to_dict(), TOWERS[tower])
    # A list of one level is that level.
    level = full.vision_feature_layer
    level = level[0] if isinstance(level, list) and len(level) == 1 else level
    allow("vision_feature_layer", level, int)
    allow("projector_hidden_act", full.projector_hidden_act, ("gelu",))
    allow("multimodal_projector_bias", full.multimodal_projector_bias, (True,))
    choose_level(vit, level, full.vision_feature_select_strategy)
    with within("text_config"):
        biases = {
            n: (fields.get("text_config") or {}).get(n) for n in ("attention_bias", "mlp_bias")
        }
        llm = llm_section(full.text_config.to_dict() | biases)
    llm |= dict(
        tied_embeddings=bool(full.tie_word_embeddings or full.text_config.tie_word_embeddings)
    )
    token = whole("image_token_index", full.image_token_index, least=0)
    longest = full.text_config.max_position_embeddings
    return Published("llava", vit, llm, token, length=longest, family=kinds["text_config"])


def _llava15(fields: dict) -> Published:
    """One flat config.json: the LLM's fields, and `mm_` fields for the rest."""
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if value := fields.get(name):
            raise ValueError(
                f"{name}={value_text(value)}: image start, end and patch tokens (LLaVA before 1.5) "
                "are not supported; supported: false. Take a LLaVA-1.5"
            )
    kind = family(fields)
    text_fields = fields | dict(model_type=kind)
    llm = llm_section(text_fields)
    layer = fields.get("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise ValueError(
            f"mm_vision_select_layer={value_text(layer)}: the number of one block is needed"
        )
    feature = text("mm_vision_select_feature", fields.get("mm_vision_select_feature", "patch"))
    fit = "pad" if fields.get("image_aspect_ratio") == "pad" else "crop"
    vit = dict(layer=layer, strategy=feature)
    return Published("llava-1.5", vit, llm, image_fit=fit, length=length(text_fields), family=kind)


def choose_level(vit: Section, layer: int, strategy: str) -> None:
    """Sets in `vit` the level that a LLaVA reads and whether it keeps the class token."""
    depth, names = vit["depth"], {"default": False, "patch": False, "full": True, "cls_patch": True}
    # Entry 0 of transformers' hidden_states is the input of the first block.
    level = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= level <= depth:
        raise ValueError(f"vision_feature_layer={layer}: from 1 to {depth}, or -1 to {-depth}")
    allow("vision_feature_select_strategy", strategy, tuple(names))
    if not names[strategy] and not vit["class_token"]:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} drops the first token, and this tower "
            "has no class token: a patch of the image would be lost; supported is full"
        )
    vit |= dict(levels=(level,), keep_class=names[strategy] and vit["class_token"])


def vit_section(fields: dict, kind: str) -> Section:
    """The `vit` section of a tower, without levels."""
    check_sizes(fields, TOWER_SIZES)
    full = defaults(kind, fields, TOWER_FIELDS)
    allow("hidden_act", full.hidden_act, tuple(ACTIVATIONS))
    allow("num_channels", full.num_channels, (3,))
    clip = kind == "clip_vision_model"
    size, patch = (square(name, getattr(full, name)) for name in ("image_size", "patch_size"))
    if size < patch:
        raise ValueError(f"image_size={size} is smaller than patch_size={patch}")
    divides("num_attention_heads", full.num_attention_heads, "hidden_size", full.hidden_size)
    return dict(
        image_size=size,
        patch_size=patch,
        depth=whole("num_hidden_layers", full.num_hidden_layers, most=DEEPEST),
        width=full.hidden_size,
        mlp=whole("intermediate_size", full.intermediate_size),
        heads=full.num_attention_heads,
        norm_eps=number("layer_norm_eps", full.layer_norm_eps),
        activation=ACTIVATIONS[full.hidden_act],
        class_token=clip,
        keep_class=False,
        patch_bias=not clip,
        pre_norm=clip,
        final_norm=False,
        cut_border=size % patch != 0,
    )


def square(name: str, value: Any) -> int:
    """The side of a square; ValueError for other shapes."""
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(f"{name}={value_text(value)}: only squares are supported")
    return whole(name, sides[0], most=2**16)


def divides(name: str, value: int, of: str, whole_of: int) -> None:
    """ValueError unless one size divides another."""
    whole(name, value)
    if whole(of, whole_of) % value:
        raise ValueError(f"{name}={value} does not divide {of}={whole_of}")


# rope_type of published files and of vlm_jax/models/rope.py -> fields that it reads: here -> there.
ROPES = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_frequency": "low_freq_factor",
        "rope_high_frequency": "high_freq_factor",
        "rope_original_length": "original_max_position_embeddings",
    },
}
# Values in the `llm` section of models without these fields.
PLAIN_ROPE = dict(
    rope_factor=1.0, rope_low_frequency=1.0, rope_high_frequency=4.0, rope_original_length=8192
)


def llm_section(fields: dict) -> Section:
    """The `llm` section of a language model."""
    kind = fields["model_type"]
    check_sizes(fields, LLM_SIZES)
    full = defaults(kind, fields, LLM_FIELDS)
    allow("hidden_act", full.hidden_act, ("silu", "swish"))  # two names of one function
    allow("mlp_bias", bool(fields.get("mlp_bias", False)), (False,))
    # Qwen1.5 to 2.5 have biases without this field; with it, Llama and Qwen3 would also have one
    # after the output projection.
    allow("attention_bias", kind != "qwen2" and bool(fields.get("attention_bias")), (False,))
    refuse_windows(kind, fields, full)
    size = fields.get("head_dim") or getattr(full, "head_dim", None)
    heads, kv_heads = full.num_attention_heads, full.num_key_value_heads
    divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if not size:
        divides("num_attention_heads", heads, "hidden_size", full.hidden_size)
    if (size := whole("head_dim", size or full.hidden_size // heads)) % 2:
        raise ValueError(f"head_dim={size} is odd: rotary positions need pairs")
    return dict(
        vocab=whole("vocab_size", full.vocab_size),
        depth=whole("num_hidden_layers", full.num_hidden_layers, most=DEEPEST),
        width=whole("hidden_size", full.hidden_size),
        mlp=whole("intermediate_size", full.intermediate_size),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        norm_eps=number("rms_norm_eps", full.rms_norm_eps),
        qkv_bias=kind == "qwen2",
        tied_embeddings=bool(full.tie_word_embeddings),
        qk_norm=kind == "qwen3",
        **rope_fields(full.rope_parameters),
    )


def length(fields: dict) -> int:
    """The longest row, in tokens, of a language model."""
    return defaults(fields["model_type"], fields, LLM_FIELDS).max_position_embeddings


def refuse_windows(kind: str, fields: dict, full: Any) -> None:
    """Raises ValueError if a token does not see every token before it."""
    kinds, longest = getattr(full, "layer_types", None), full.max_position_embeddings
    kinds = kinds or fields.get("layer_types") or ()
    window = full.sliding_window if hasattr(full, "sliding_window") else None
    if not isinstance(kinds, list | tuple):
        raise ValueError(f"layer_types={value_text(kinds)}: a list of names is needed")
    for name in kinds:
        allow("layer_types", name, ("full_attention", "sliding_attention"))
    # Mistral's class has one window for all of its layers, whatever layer_types says.
    slides = window is not None if kind == "mistral" else "sliding_attention" in kinds
    if slides and (window is None or window < whole("max_position_embeddings", longest)):
        raise ValueError(
            f"sliding_window={window} is less than max_position_embeddings={longest}: windows over "
            "less than a whole row are not supported; where rows of no more tokens than the window "
            "will do, write its size as max_position_embeddings into config.json"
        )


def rope_fields(rope: dict[str, Any]) -> Section:
    """The fields of rotary positions in an `llm` section, from transformers' `rope_parameters`."""
    if "rope_type" not in rope:
        raise ValueError(f"rope_parameters={value_text(rope)} by kind of layer are not supported")
    kind = rope["rope_type"]
    allow("rope_type", kind, tuple(ROPES))
    allow("partial_rotary_factor", rope.get("partial_rotary_factor", 1), (1,))
    plain_fields = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "default" and (strange := sorted(set(rope) - plain_fields)):
        raise ValueError(
            f"rope_parameters has {', '.join(strange)}, and no rope_type that reads it"
        )
    values = {}
    for key, published in ROPES[kind].items():
        value = number(published, rope.get(published))
        values[key] = whole(published, rope[published]) if key == "rope_original_length" else value
    theta = number("rope_theta", rope.get("rope_theta"))
    return dict(rope_theta=theta, rope_kind=kind, **PLAIN_ROPE | values)


def hf_vision(vit: Section) -> Section:
    """The vision_config of a `vit` section; ValueError if no published class has its fields."""
    kind = {
        # class token, patch bias, first norm
        (True, False, True): "clip_vision_model",
        (False, True, False): "siglip_vision_model",
    }.get((vit["class_token"], vit["patch_bias"], vit["pre_norm"]))
    if kind is None:
        raise ValueError("the encoder is neither a CLIP nor a SigLIP tower")
    config = dict(
        model_type=kind,
        image_size=vit["image_size"],
        patch_size=vit["patch_size"],
        num_hidden_layers=vit["depth"],
        hidden_size=vit["width"],
        intermediate_size=vit["mlp"],
        num_attention_heads=vit["heads"],
        layer_norm_eps=vit["norm_eps"],
        hidden_act={here: published for published, here in ACTIVATIONS.items()}[vit["activation"]],
    )
    return config | ({"vision_use_head": False} if kind == "siglip_vision_model" else {})


def hf_text(llm: Section, *, length: int) -> Section:
    """The text_config of an `llm` section for rows of up to `length` tokens."""
    kind = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}.get(
        (llm["qkv_bias"], llm["qk_norm"])
    )
    if kind is None:
        raise ValueError("a language model with biases and norms on q and k has no published class")
    rope_names = ROPES[llm["rope_kind"]]
    return dict(
        model_type=kind,
        vocab_size=llm["vocab"],
        num_hidden_layers=llm["depth"],
        hidden_size=llm["width"],
        intermediate_size=llm["mlp"],
        num_attention_heads=llm["heads"],
        num_key_value_heads=llm["kv_heads"],
        head_dim=llm["head_size"],
        rms_norm_eps=llm["norm_eps"],
        hidden_act="silu",
        max_position_embeddings=length,
        tie_word_embeddings=llm["tied_embeddings"],
        rope_parameters=dict(
            rope_type=llm["rope_kind"],
            rope_theta=llm["rope_theta"],
            **{published: llm[key] for key, published in rope_names.items()},
        ),
    )
