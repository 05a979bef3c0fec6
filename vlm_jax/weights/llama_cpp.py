# SPDX-License-Identifier: Apache-2.0
"""A language model in a GGUF file of llama.cpp, as the folder that transformers would have of it.

Names of metadata and of tensors: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and
`gguf-py/gguf/constants.py` of ggml-org/llama.cpp. What changes the numbers of a model is read, or
refused by its name.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.models.rope import Rope
from vlm_jax.weights import gguf
from vlm_jax.weights.classes import allow, within
from vlm_jax.weights.gguf import Rows
from vlm_jax.weights.values import number, value_text, whole

ARCHITECTURES = ("llama", "qwen2", "qwen3")
NAME = "model.gguf"  # of the file in its folder
# Names of metadata after that of the architecture -> fields of config.json.
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
OTHERS = (
    "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.causal", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "expert_count",
    "expert_used_count", "tensor_data_layout",
)  # fmt: skip
# Names of tensors; `blk.3.attn_q.weight` is layers.3.self_attn.q_proj.weight.
TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"


@contextmanager
def as_folder(path: Path, *, tokenizer: bool = True) -> Iterator[Path]:
    """A folder for the body as transformers has it: config.json, tokenizer and, linked, the file.

    A ValueError of the body names the file in place of the folder.

    Args:
      tokenizer: whether the file's own is needed.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that is damaged, and for what is not supported.
    """
    metadata, tensors = gguf.read(path)
    with within(str(path)):
        fields = config(metadata, tensors)
    with tempfile.TemporaryDirectory(prefix="vlm-jax-") as home:
        folder = Path(home)
        (folder / NAME).symlink_to(path.resolve())
        (folder / "config.json").write_text(json.dumps(fields, indent=1))
        try:
            if tokenizer:
                # Deferred: transformers takes seconds to import.
                from vlm_jax.weights import llama_cpp_tokenizer

                with within(str(path)):
                    llama_cpp_tokenizer.write(metadata, folder)
            yield folder
        except ValueError as error:
            raise ValueError(str(error).replace(str(folder), str(path))) from error


def read_tensors(path: Path) -> dict[str, Rows]:
    """The tensors of a file by canonical name, rows of queries and keys in transformers' order.

    Raises:
      ValueError: for a damaged file, and for a tensor with another name than those known here.
    """
    path = path.resolve()  # a link may be gone when numbers are read
    metadata, tensors = gguf.read(path)
    with within(str(path)):
        fields = config(metadata, tensors)
        named = {canonical(name): x for name, x in tensors.items() if name != FREQUENCIES}
    if fields["model_type"] != "llama":
        return named
    # llama.cpp turns neighbors in place of halves, and has the rows of Llama in that order.
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for name, tensor in named.items():
        if (count := heads.get(name.split(".")[-2])) and len(tensor.shape) == 2:
            named[name] = replace(tensor, heads=fields[count])
    return named


def canonical(name: str) -> str:
    """The canonical name of a tensor. Raises ValueError for an unknown one."""
    block = re.fullmatch(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)", name)
    if block and block[2] in BLOCK:
        return f"llm.layers.{int(block[1])}.{BLOCK[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    if stem not in TOP or kind != "weight":
        raise ValueError(
            f"the tensor {value_text(name)} is not supported: known are "
            f"{', '.join([*TOP, *(f'blk.N.{part}' for part in BLOCK), FREQUENCIES])}"
        )
    return f"llm.{TOP[stem]}.weight"


def config(metadata: dict[str, Any], tensors: dict[str, Rows]) -> dict[str, Any]:
    """The fields of config.json for a file.

    Raises:
      ValueError: for another architecture, and for metadata that changes what is computed and is
        not supported, by name.
    """
    allow("general.type", metadata.get("general.type", "model"), ("model",))
    name = "general.quantization_version"  # of the layout of blocks
    allow(name, metadata.get(name, 2), (2,))
    arch = metadata.get("general.architecture")
    allow("general.architecture", arch, ARCHITECTURES)
    about = {
        name.removeprefix(f"{arch}."): value
        for name, value in metadata.items()
        if name.startswith(f"{arch}.")
    }
    with within(arch):
        if unknown := sorted(about.keys() - {*SIZES, *OTHERS}):
            raise ValueError(
                f"{unknown[0]}={value_text(about[unknown[0]])} is not supported: a model with it "
                f"may compute something else; known are {', '.join([*SIZES, *OTHERS])}"
            )
        fields = {field: whole(name, about.get(name)) for name, field in SIZES.items()}
        heads, width = fields["num_attention_heads"], fields["hidden_size"]
        size = whole("attention.key_length", about.get("attention.key_length", width // heads))
        for name in ("attention.value_length", "rope.dimension_count"):
            allow(name, about.get(name, size), (size,))
        for name in ("expert_count", "expert_used_count"):
            allow(name, about.get(name, 0), (0,))
        # Older files of Llama: rows as Meta has them, which is llama.cpp's order.
        meta = "Meta AI original pth"
        allow("tensor_data_layout", about.get("tensor_data_layout", meta), (meta,))
        allow("attention.causal", about.get("attention.causal", True), (True,))
        kv_heads = whole("attention.head_count_kv", about.get("attention.head_count_kv", heads))
        eps = "attention.layer_norm_rms_epsilon"
        fields |= dict(
            num_key_value_heads=kv_heads,
            head_dim=size,
            rms_norm_eps=number(eps, about.get(eps)),
            rope_parameters=rope(about, size, tensors.get(FREQUENCIES)),
        )
    embedding = tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else len(metadata.get("tokenizer.ggml.tokens", ()))
    return (
        fields
        | special(metadata)
        | dict(
            model_type=arch,
            vocab_size=whole(f"{arch}.vocab_size", about.get("vocab_size", rows)),
            hidden_act="silu",
            # llama.cpp writes an output layer only where it is another matrix.
            tie_word_embeddings="output.weight" not in tensors,
            # Of the files beside it, whatever class transformers has for such a model.
            tokenizer_class="PreTrainedTokenizerFast",
        )
    )


def special(metadata: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json that name tokens; null where the file names none."""
    names = dict(bos="bos", eos="eos", pad="padding")
    return {
        f"{field}_token_id": token(metadata, f"tokenizer.ggml.{name}_token_id")
        for field, name in names.items()
    }


def token(metadata: dict[str, Any], name: str) -> int | None:
    """The number of a token in the metadata; None where there is none."""
    value = metadata.get(name)
    # llama.cpp's -1, as it is stored.
    return None if value in (None, -1, 2**32 - 1) else whole(name, value, least=0)


def rope(about: dict[str, Any], size: int, frequencies: Rows | None) -> dict[str, Any]:
    """`rope_parameters` of config.json for heads of `size` features."""
    theta = number("rope.freq_base", about.get("rope.freq_base", 10000.0))
    factor = about.get("rope.scaling.factor", 0)
    # Without a type llama.cpp takes a factor for a linear one, and 0 for none.
    kind = about.get("rope.scaling.type", "linear" if factor else "none")
    allow("rope.scaling.type", kind, ("none", "linear"))
    plain = dict(rope_type="default", rope_theta=theta)
    if kind == "linear" and factor:
        plain = dict(
            rope_type="linear", rope_theta=theta, factor=number("rope.scaling.factor", factor)
        )
    if frequencies is None:
        return plain
    divided = frequencies.read().astype(np.float32)
    if plain["rope_type"] != "default" or divided.shape != (size // 2,):
        raise ValueError(
            f"{FREQUENCIES} of shape {divided.shape} with rope.scaling.type={kind!r} is not "
            "supported"
        )
    if (divided == 1).all():
        return plain
    # Llama 3.1 and later; the file has the result, not the numbers that it was computed from.
    scaling = dict(factor=float(divided.max()), low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)  # fmt: skip
    stretched = Rope(theta, "llama3", *scaling.values()).rates(size // 2)
    ratio = Rope(theta).rates(size // 2) / stretched
    if not np.allclose(ratio, divided, rtol=1e-4):
        raise ValueError(
            f"{FREQUENCIES} has other frequencies than Llama 3 with factor={scaling['factor']:g}, "
            "which is all that is supported"
        )
    return dict(rope_type="llama3", rope_theta=theta, **scaling)
