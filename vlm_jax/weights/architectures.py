# SPDX-License-Identifier: Apache-2.0
"""Published config.json files as the `vit` and `llm` sections of our configurations, and back.

What a config.json leaves out has the default of its transformers class, which needs no torch.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.weights.files import read_json

Section = dict[str, Any]

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# model_type of a config.json -> model_type of the section that we read in it.
TOWERS = {
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
}
LLMS = ("llama", "qwen2", "qwen3")
SUPPORTED = (
    f"vision towers {', '.join(TOWERS)}; language models {', '.join(LLMS)} (Vicuna is llama, "
    "Qwen1.5 and Qwen2.5 are qwen2); llava of transformers, and LLaVA-1.5 as first published"
)


@dataclass(frozen=True)
class Published:
    """What a folder of weights says about itself.

    kind: tower, llm, llava (a whole model of transformers) or llava-1.5 (as first published: its
    tower lies elsewhere). vit and llm: sections of our configuration, where the folder has them;
    vit has no levels where the folder names none. image_token: the id that stands for the image.
    """

    kind: str
    vit: Section | None = None
    llm: Section | None = None
    image_token: int | None = None
    image_fit: str | None = None


def read(folder: Path) -> Published:
    """The description of a folder, from its config.json.

    Raises:
      FileNotFoundError: where there is no config.json.
      ValueError: for an architecture, or a property of one, that our models do not have.
    """
    fields = read_json(folder / "config.json")
    try:
        return describe(fields)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None


def describe(fields: dict) -> Published:
    """The description that a config.json gives."""
    kind = fields.get("model_type")
    if "mm_hidden_size" in fields or "mm_vision_tower" in fields:
        return _llava15(fields)
    if kind == "llava":
        return _llava(fields)
    if kind in TOWERS:
        return Published(
            "tower", vit=vit_section(fields.get("vision_config", fields), TOWERS[kind])
        )
    if kind in LLMS:
        return Published("llm", llm=llm_section(fields))
    raise ValueError(f"architecture {kind!r} is not supported; supported are: {SUPPORTED}")


def _llava(fields: dict) -> Published:
    full = defaults("llava", fields)
    tower, text = full.vision_config.model_type, full.text_config.model_type
    if tower not in TOWERS or text not in LLMS:
        raise ValueError(f"a llava of {tower} and {text} is not supported; known are: {SUPPORTED}")
    vit = vit_section(full.vision_config.to_dict(), TOWERS[tower])
    allow("vision_feature_layer", full.vision_feature_layer, int)
    allow("projector_hidden_act", full.projector_hidden_act, ("gelu",))
    allow("multimodal_projector_bias", full.multimodal_projector_bias, (True,))
    choose_level(vit, full.vision_feature_layer, full.vision_feature_select_strategy)
    llm = llm_section(full.text_config.to_dict()) | dict(
        tied_embeddings=bool(full.tie_word_embeddings or full.text_config.tie_word_embeddings)
    )
    return Published("llava", vit, llm, full.image_token_index)


def _llava15(fields: dict) -> Published:
    """One flat config.json: the LLM's fields, and `mm_` fields for the rest."""
    kind = fields.get("mm_projector_type", "linear")
    allow("mm_projector_type", kind, ("mlp2x_gelu",))
    if fields.get("mm_use_im_start_end") or fields.get("mm_use_im_patch_token"):
        raise ValueError("image start, end and patch tokens (LLaVA before 1.5) are not supported")
    text = "qwen2" if "qwen" in fields.get("model_type", "") else "llama"
    llm = llm_section(fields | dict(model_type=text))
    vit = dict(
        layer=fields.get("mm_vision_select_layer", -2),
        strategy=fields.get("mm_vision_select_feature", "patch"),
    )
    fit = "pad" if fields.get("image_aspect_ratio") == "pad" else "crop"
    return Published("llava-1.5", vit, llm, image_fit=fit)


def choose_level(vit: Section, layer: int, strategy: str) -> None:
    """Writes into `vit` the one level that a LLaVA reads, and whether with the class token."""
    depth, names = vit["depth"], {"default": False, "patch": False, "full": True, "cls_patch": True}
    # Entry 0 of transformers' hidden_states is what enters the first block.
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
    """Our `vit` fields of a tower, without levels."""
    full = defaults(kind, fields)
    allow("hidden_act", full.hidden_act, tuple(ACTIVATIONS))
    allow("num_channels", full.num_channels, (3,))
    clip = kind == "clip_vision_model"
    size, patch = (x if isinstance(x, int) else x[0] for x in (full.image_size, full.patch_size))
    return dict(
        image_size=size,
        patch_size=patch,
        depth=full.num_hidden_layers,
        width=full.hidden_size,
        mlp=full.intermediate_size,
        heads=full.num_attention_heads,
        norm_eps=full.layer_norm_eps,
        activation=ACTIVATIONS[full.hidden_act],
        class_token=clip,
        keep_class=False,
        patch_bias=not clip,
        pre_norm=clip,
        final_norm=False,
        cut_border=size % patch != 0,
    )


# How a published rope_type is called in vlm_jax/models/rope.py, and the fields that it reads.
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
# Fields of our `llm` section that a model without them does not have.
PLAIN_ROPE = dict(
    rope_factor=1.0, rope_low_frequency=1.0, rope_high_frequency=4.0, rope_original_length=8192
)


def llm_section(fields: dict) -> Section:
    """Our `llm` fields of a language model."""
    kind = fields["model_type"]
    full = defaults(kind, fields)
    allow("hidden_act", full.hidden_act, ("silu",))
    for name in ("mlp_bias", "use_sliding_window"):
        allow(name, bool(fields.get(name, False)), (False,))
    # Qwen1.5 to 2.5 have biases without saying so; with the field, Llama and Qwen3 would have one
    # behind the output projection too.
    allow("attention_bias", kind != "qwen2" and bool(fields.get("attention_bias")), (False,))
    allow("layer_types", set(fields.get("layer_types") or ()) - {"full_attention"}, (set(),))
    rope = full.rope_parameters
    allow("rope_type", rope["rope_type"], tuple(ROPES))
    size = fields.get("head_dim") or getattr(full, "head_dim", None)
    return dict(
        vocab=full.vocab_size,
        depth=full.num_hidden_layers,
        width=full.hidden_size,
        mlp=full.intermediate_size,
        heads=full.num_attention_heads,
        kv_heads=full.num_key_value_heads,
        head_size=size or full.hidden_size // full.num_attention_heads,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=full.rms_norm_eps,
        qkv_bias=kind == "qwen2",
        tied_embeddings=bool(full.tie_word_embeddings),
        qk_norm=kind == "qwen3",
        rope_kind=rope["rope_type"],
        **PLAIN_ROPE | {ours: rope[theirs] for ours, theirs in ROPES[rope["rope_type"]].items()},
    )


def defaults(kind: str, fields: dict) -> Any:
    """The transformers configuration of a section, everything that it leaves out filled in."""
    # Deferred: transformers takes seconds to import. Its own warnings concern its own models.
    from transformers import CONFIG_MAPPING

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return CONFIG_MAPPING[kind](**{k: v for k, v in fields.items() if k != "model_type"})
    # Its validators raise errors of several libraries.
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(f"transformers cannot make a {kind} of it ({said})") from None
    finally:
        logger.setLevel(level)


def allow(name: str, value: Any, allowed: tuple | type) -> None:
    """ValueError unless a property of a published model is one that ours can have."""
    if isinstance(value, allowed) if isinstance(allowed, type) else value in allowed:
        return
    choices = allowed.__name__ if isinstance(allowed, type) else ", ".join(map(str, allowed))
    raise ValueError(f"{name}={value!r} is not supported; supported: {choices}")


def hf_vision(vit: Section) -> Section:
    """The vision_config of a `vit` section; ValueError where no published class has its fields."""
    kind = {
        # class token, patch bias, first norm
        (True, False, True): "clip_vision_model",
        (False, True, False): "siglip_vision_model",
    }.get((vit["class_token"], vit["patch_bias"], vit["pre_norm"]))
    if kind is None:
        raise ValueError("the encoder is neither a CLIP nor a SigLIP tower")
    found = dict(
        model_type=kind,
        image_size=vit["image_size"],
        patch_size=vit["patch_size"],
        num_hidden_layers=vit["depth"],
        hidden_size=vit["width"],
        intermediate_size=vit["mlp"],
        num_attention_heads=vit["heads"],
        layer_norm_eps=vit["norm_eps"],
        hidden_act={ours: theirs for theirs, ours in ACTIVATIONS.items()}[vit["activation"]],
    )
    return found | ({"vision_use_head": False} if kind == "siglip_vision_model" else {})


def hf_text(llm: Section, *, length: int) -> Section:
    """The text_config of an `llm` section for rows of up to `length` tokens."""
    kind = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}.get(
        (llm["qkv_bias"], llm["qk_norm"])
    )
    if kind is None:
        raise ValueError("a language model with biases and norms on q and k has no published class")
    named = ROPES[llm["rope_kind"]]
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
            **{theirs: llm[ours] for ours, theirs in named.items()},
        ),
    )
