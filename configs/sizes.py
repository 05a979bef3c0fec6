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


def _qwen3(depth: int, width: int, mlp: int, heads: int, **differing) -> dict:
    """Qwen3 (arXiv 2505.09388, Qwen/Qwen3-*/config.json): 8 kv heads of 128."""
    sizes = _qwen15(depth, width, mlp, heads=heads, kv_heads=8, qkv_bias=False)
    return sizes | dict(qk_norm=True) | differing


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
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied_embeddings=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied_embeddings=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied_embeddings=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64),
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
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}

# openai/clip-vit-large-patch14-336/config.json, without the text tower and the projection;
# google/siglip-so400m-patch14-384/config.json, without the text tower and the pooling head.
VIT = {
    "clip-vit-large-patch14-336": dict(
        image_size=336, patch_size=14, depth=24, width=1024, mlp=4096, heads=16, norm_eps=1e-5
    ),
    "siglip-so400m-patch14-384": dict(
        image_size=384,
        patch_size=14,
        depth=27,
        width=1152,
        mlp=4304,
        heads=16,
        norm_eps=1e-6,
        activation="gelu_tanh",
        class_token=False,
        patch_bias=True,
        pre_norm=False,
        cut_border=True,
    ),
}

VIT_PARAMETERS = {
    "clip-vit-large-patch14-336": 303_507_456,
    "siglip-so400m-patch14-384": 412_987_248,
}
