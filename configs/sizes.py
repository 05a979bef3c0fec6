# SPDX-License-Identifier: Apache-2.0
"""Published sizes, as the `llm` and `vit` fields of configs/base.py, with their parameter counts
and sources."""

# Parameters are counted from the published architectures (embeddings included, tied head counted
# once).
# Vicuna-1.5 is Llama 2: arXiv 2307.09288 and lmsys/vicuna-*-v1.5/config.json. Qwen1.5:
# Qwen/Qwen1.5-*/config.json.
LLM = {
    "vicuna-1.5-7b": dict(
        vocab=32000,
        depth=32,
        width=4096,
        mlp=11008,
        heads=32,
        kv_heads=32,
        head_size=128,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=False,
        tied_embeddings=False,
    ),
    "vicuna-1.5-13b": dict(
        vocab=32000,
        depth=40,
        width=5120,
        mlp=13824,
        heads=40,
        kv_heads=40,
        head_size=128,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=False,
        tied_embeddings=False,
    ),
    "qwen1.5-0.5b": dict(
        vocab=151936,
        depth=24,
        width=1024,
        mlp=2816,
        heads=16,
        kv_heads=16,
        head_size=64,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        tied_embeddings=True,
    ),
    "qwen1.5-1.8b": dict(
        vocab=151936,
        depth=24,
        width=2048,
        mlp=5504,
        heads=16,
        kv_heads=16,
        head_size=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        tied_embeddings=False,
    ),
    "qwen1.5-4b": dict(
        vocab=151936,
        depth=40,
        width=2560,
        mlp=6912,
        heads=20,
        kv_heads=20,
        head_size=128,
        rope_theta=5e6,
        norm_eps=1e-6,
        qkv_bias=True,
        tied_embeddings=False,
    ),
    "qwen1.5-7b": dict(
        vocab=151936,
        depth=32,
        width=4096,
        mlp=11008,
        heads=32,
        kv_heads=32,
        head_size=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        tied_embeddings=False,
    ),
    "qwen1.5-14b": dict(
        vocab=152064,
        depth=40,
        width=5120,
        mlp=13696,
        heads=40,
        kv_heads=40,
        head_size=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        tied_embeddings=False,
    ),
}

LLM_PARAMETERS = {
    "vicuna-1.5-7b": 6_738_415_616,
    "vicuna-1.5-13b": 13_015_864_320,
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
}

# openai/clip-vit-large-patch14-336/config.json; 303,507,456 parameters without the text tower and
# projection.
VIT = {
    "clip-vit-large-patch14-336": dict(
        image_size=336, patch_size=14, depth=24, width=1024, mlp=4096, heads=16, norm_eps=1e-5
    ),
}

VIT_PARAMETERS = {"clip-vit-large-patch14-336": 303_507_456}
