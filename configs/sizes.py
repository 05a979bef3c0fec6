# SPDX-License-Identifier: Apache-2.0
"""Published sizes as `llm` and `vit` fields of configs/base.py, with parameters and sources."""


def _llama2(depth: int, width: int, mlp: int) -> dict:
    """Llama 2 as Vicuna-1.5 has it (arXiv 2307.09288, lmsys/vicuna-*-v1.5/config.json)."""
    return dict(
        vocab=32000,
        depth=depth,
        width=width,
        mlp=mlp,
        heads=width // 128,
        kv_heads=width // 128,
        head_size=128,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=False,
        tied_embeddings=False,
    )


def _qwen15(depth: int, width: int, mlp: int, **differing) -> dict:
    """Qwen1.5 (Qwen/Qwen1.5-*/config.json): heads of 128 and separate embeddings unless said."""
    return {
        **_llama2(depth, width, mlp),
        **dict(vocab=151936, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True),
        **differing,
    }


LLM = {
    "vicuna-1.5-7b": _llama2(32, 4096, 11008),
    "vicuna-1.5-13b": _llama2(40, 5120, 13824),
    "qwen1.5-0.5b": _qwen15(
        24, 1024, 2816, heads=16, kv_heads=16, head_size=64, tied_embeddings=True
    ),
    "qwen1.5-1.8b": _qwen15(24, 2048, 5504),
    "qwen1.5-4b": _qwen15(40, 2560, 6912, rope_theta=5e6),
    "qwen1.5-7b": _qwen15(32, 4096, 11008),
    "qwen1.5-14b": _qwen15(40, 5120, 13696, vocab=152064),
}

# Counted from the published architectures: embeddings included, a tied head counted once.
LLM_PARAMETERS = {
    "vicuna-1.5-7b": 6_738_415_616,
    "vicuna-1.5-13b": 13_015_864_320,
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
}

# openai/clip-vit-large-patch14-336/config.json, without the text tower and the projection.
VIT = {
    "clip-vit-large-patch14-336": dict(
        image_size=336, patch_size=14, depth=24, width=1024, mlp=4096, heads=16, norm_eps=1e-5
    ),
}

VIT_PARAMETERS = {"clip-vit-large-patch14-336": 303_507_456}
