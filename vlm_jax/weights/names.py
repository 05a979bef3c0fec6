# SPDX-License-Identifier: Apache-2.0
"""Canonical names of published tensors, without the prefixes of layouts, and their parameters.

`vit.` + the name inside CLIPVisionModel or SiglipVisionModel, `llm.` + the name inside LlamaModel,
Qwen2Model or Qwen3Model (and `llm.lm_head.weight`), `compressor.` + the name inside `mm_projector`
(and `compressor.prefusion_layers.` + the name inside LLaVA-Mini's).
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax

from vlm_jax.compressors.compressor import Compressor
from vlm_jax.compressors.tensors import CLIP_BLOCK, Table, Tensor, linear, norm, stacked
from vlm_jax.models.llm import LLM
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM

T = TypeVar("T")
PARTS = ("vit.", "llm.", "compressor.")

# The prefixes of the supported layouts; the first match is used.
PREFIXES = (
    # haotian-liu/LLaVA and code based on it: the tower inside, and files of stage 1.
    (r"model\.vision_tower\.vision_tower\.(vision_model\.)?", "vit."),
    (r"(base_model\.model\.)?(model\.)?(mm_projector|query_abstractor)\.", "compressor."),
    # ictnlp/LLaVA-Mini: layers before the LLM, beside its compressor and LLaVA's projector.
    (r"(model\.)?prefusion_layers\.", "compressor.prefusion_layers."),
    (r"model\.compressor\.", "compressor."),
    # transformers' LlavaForConditionalGeneration: as published, and as its class names them.
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vit."),
    (r"(model\.)?multi_modal_projector\.linear_1\.", "compressor.0."),
    (r"(model\.)?multi_modal_projector\.linear_2\.", "compressor.2."),
    (r"(language_model\.)?lm_head\.", "llm.lm_head."),
    (r"language_model\.model\.|model\.language_model\.|language_model\.", "llm."),
    # A tower, or a language model, alone.
    (r"vision_model\.", "vit."),
    (r"(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)", "vit."),
    (r"model\.", "llm."),
)

# Tensors of published files that are not read: their presence or absence does not matter.
UNREAD = (
    "vit.head.*",  # SigLIP's pooling
    "vit.embeddings.position_ids",
    "llm.*.rotary_emb.inv_freq",
    "text_model.*",  # the other half of CLIP and SigLIP
    "text_projection.*",
    "visual_projection.*",
    "logit_scale",
    "logit_bias",
)


def canonical(name: str) -> str:
    """The canonical name of a published tensor; its own name if no layout matches."""
    if name.startswith(PARTS):
        return name
    for prefix, part in PREFIXES:
        if match := re.match(prefix, name):
            return part + name[match.end() :]
    return name


def by_canonical_name(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors by canonical name. Raises ValueError if two have the same."""
    by_name: dict[str, T] = {}
    for name, tensor in tensors.items():
        if (canonical_name := canonical(name)) in by_name:
            raise ValueError(f"two tensors mean {canonical_name}: the second is {name}")
        by_name[canonical_name] = tensor
    return by_name


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of the patterns (`*` is anything)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def vit_table(vit: ViT) -> Table:
    """The tensors of CLIPVisionModel and SiglipVisionModel, without the latter's pooling head."""
    table = {
        "embeddings.patch_embedding.weight": Tensor((("patch", "kernel"),), patches=True),
        "embeddings.position_embedding.weight": Tensor((("position",),), unchanged=True),
        **norm("post_layernorm", "post_norm"),
    }
    if vit.patch.bias is not None:
        table["embeddings.patch_embedding.bias"] = Tensor((("patch", "bias"),))
    if vit.class_token is not None:
        table["embeddings.class_embedding"] = Tensor((("class_token",),))
    if vit.pre_norm is not None:
        table |= norm("pre_layrnorm", "pre_norm")  # published with this spelling
    for k in range(vit.size.depth):
        table |= stacked(f"encoder.layers.{k}.", k, CLIP_BLOCK)
    return table


def llm_table(llm: LLM) -> Table:
    """The tensors of LlamaModel, Qwen2Model and Qwen3Model, and the output layer if it is one."""
    table = {
        "embed_tokens.weight": Tensor((("embedding",),), unchanged=True),
        "norm.weight": Tensor((("norm", "scale"),)),
    }
    if llm.head is not None:
        table["lm_head.weight"] = Tensor((("head",),), unchanged=True)
    return table | decoder_layers(llm.blocks, llm.size.depth)


def compressor_table(compressor: Compressor) -> Table:
    """The tensors of a compressor, and of the layers that it has before the LLM."""
    table = compressor.method.published()
    if compressor.fusion is not None:
        layers = decoder_layers(compressor.fusion.blocks, compressor.fusion.depth)
        table |= {
            f"prefusion_{name}": replace(row, paths=tuple(("fusion", *path) for path in row.paths))
            for name, row in layers.items()
        }
    return table


def decoder_layers(blocks: Any, depth: int) -> Table:
    """The tensors of `depth` layers of a Llama or Qwen, which are stacked here."""
    attention = blocks.attention
    biased = attention.query.bias is not None
    table: Table = {}
    for k in range(depth):
        block = {
            "input_layernorm.weight": Tensor((("norm1", "scale"),)),
            "post_attention_layernorm.weight": Tensor((("norm2", "scale"),)),
            **linear("self_attn.q_proj", "attention", "query", bias=biased, outputs=2),
            **linear("self_attn.k_proj", "attention", "key", bias=biased, outputs=2),
            **linear("self_attn.v_proj", "attention", "value", bias=biased, outputs=2),
            **linear("self_attn.o_proj", "attention", "out", bias=False),
            **linear("mlp.gate_proj", "gate", bias=False),
            **linear("mlp.up_proj", "up", bias=False),
            **linear("mlp.down_proj", "down", bias=False),
        }
        if attention.query_norm is not None:
            block["self_attn.q_norm.weight"] = Tensor((("attention", "query_norm", "scale"),))
            block["self_attn.k_norm.weight"] = Tensor((("attention", "key_norm", "scale"),))
        table |= stacked(f"layers.{k}.", k, block)
    return table


def model_table(model: VLM) -> Table:
    """Every published tensor of a whole model by canonical name; `model` may be abstract."""
    parts = {
        "vit": vit_table(model.vit),
        "llm": llm_table(model.llm),
        "compressor": compressor_table(model.compressor),
    }
    return {
        f"{part}.{name}": replace(row, paths=tuple((part, *path) for path in row.paths))
        for part, table in parts.items()
        for name, row in table.items()
    }


def parameters(model: Any) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """The arrays of a module, or their descriptions, under dotted names."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model)
    return {dotted(path): leaf for path, leaf in flat}


def dotted(path: Sequence) -> str:
    """A path inside a model as `llm.blocks.up.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def shapes(table: Table, module: Any) -> dict[str, tuple[int, ...]]:
    """The published shape of every tensor of a module, which may be abstract."""
    of_module = parameters(module)
    by_name = {}
    for name, row in table.items():
        of_row = [of_module[".".join(path)].shape for path in row.paths]
        by_name[name] = row.shape([row.item_shape(shape) for shape in of_row])
    return by_name


def fit(
    expected: Mapping[str, tuple[int, ...]],
    existing: Mapping[str, tuple[int, ...]],
    *,
    allow_missing: Sequence[str] = (),
    allow_surplus: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """The missing and the surplus names that are allowed; others are listed in one ValueError.

    A shape that differs is never allowed.
    """
    missing = [name for name in expected if name not in existing]
    surplus = [name for name in existing if name not in expected and not matches(name, UNREAD)]
    bad = {
        "missing": [name for name in missing if not matches(name, allow_missing)],
        "surplus": [name for name in surplus if not matches(name, allow_surplus)],
        "of another shape": [
            f"{name} {existing[name]} instead of {expected[name]}"
            for name in expected
            if name in existing and existing[name] != expected[name]
        ],
    }
    if any(bad.values()):
        listed = "; ".join(
            f"{len(entries)} {kind}: {names_text(entries)}"
            for kind, entries in bad.items()
            if entries
        )
        raise ValueError(
            f"the tensors do not make this model: {listed}. Names that may be absent or ignored "
            "are given as --allow-missing=PATTERN,... and --allow-surplus=PATTERN,..."
        )
    return missing, surplus


def names_text(names: Sequence[str], most: int = 12) -> str:
    """Names as a list for a message, shortened after `most`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))
