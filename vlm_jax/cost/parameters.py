# SPDX-License-Identifier: Apache-2.0
"""The parameters of encoder, compressor and LLM, from their descriptions.

Formulas, and how they are compared with the built models: docs/cost.md.
"""

from collections.abc import Collection

from vlm_jax.compressors.method import Method, linear
from vlm_jax.models.sizes import LLMSize, ViTSize, interface


def block_weights(llm: LLMSize) -> int:
    """Weights of one decoder block that enter matrix products, without biases and norms."""
    attention = 2 * llm.width * (llm.heads + llm.kv_heads) * llm.head_size
    return attention + 3 * llm.width * llm.mlp


def block_parameters(llm: LLMSize) -> int:
    """Parameters of one decoder block."""
    biases = (llm.heads + 2 * llm.kv_heads) * llm.head_size if llm.qkv_bias else 0
    norms = 2 * llm.width + (2 * llm.head_size if llm.qk_norm else 0)
    return block_weights(llm) + biases + norms


def llm_parameters(llm: LLMSize) -> int:
    """Parameters of the decoder: embeddings included, a tied head counted once."""
    blocks = llm.depth * block_parameters(llm)
    return blocks + llm.width + llm.vocab * llm.width * (1 if llm.tied_embeddings else 2)


def lora_parameters(llm: LLMSize, rank: int, targets: Collection[str] = ()) -> int:
    """Parameters of LoRA adapters of `rank` on the `targets` of every block; () is all layers.

    Names of layers are those of config.lora.
    """
    heads, kv_heads = llm.heads * llm.head_size, llm.kv_heads * llm.head_size
    sides = {
        "q_proj": llm.width + heads,
        "k_proj": llm.width + kv_heads,
        "v_proj": llm.width + kv_heads,
        "o_proj": heads + llm.width,
        "gate_proj": llm.width + llm.mlp,
        "up_proj": llm.width + llm.mlp,
        "down_proj": llm.mlp + llm.width,
    }
    return llm.depth * rank * sum(sides[name] for name in targets or sides)


def vit_parameters(vit: ViTSize) -> int:
    """Parameters of the published tower: all `vit.depth` blocks and the norm after the last."""
    embedding = 3 * vit.patch_size**2 * vit.width + (vit.width if vit.patch_bias else 0)
    embedding += (vit.patches + vit.first) * vit.width + vit.first * vit.width
    block = 4 * linear(vit.width, vit.width) + 4 * vit.width
    block += linear(vit.width, vit.mlp) + linear(vit.mlp, vit.width)
    norms = 2 * vit.width * (1 + vit.pre_norm)
    return embedding + vit.depth * block + norms


def compressor_parameters(compressor: Method, vit: ViTSize, llm: LLMSize) -> int:
    """Parameters of the compressor with its projection into the LLM, and of the layers that it has
    before the LLM; non-tiling V is rounded."""
    before = compressor.prefusion * block_parameters(llm)
    return compressor.parameters(interface(vit, llm)) + before
