# SPDX-License-Identifier: Apache-2.0
"""Small LLaVA checkpoints in their first layout, with a compressor that was trained inside.

The compressor is a published case of tests/published, the tower a random CLIP of 24 blocks, as the
published code reads blocks 12, 16, 22 and 23 of it; the language model is that of a frozen LLaVA,
widened.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from test_published_compressors import read

PUBLISHED = Path(__file__).parent / "published"
BLOCKS = 24
LAYERS = dict(self_attn=("q_proj", "k_proj", "v_proj", "out_proj"), mlp=("fc1", "fc2"))


def tower(path, *, width, side, blocks=BLOCKS):
    """A random CLIP of `side` x `side` patches in a folder."""
    draw = np.random.default_rng(0)
    mlp, patch = 2 * width, 2
    config = dict(
        model_type="clip_vision_model", hidden_size=width, intermediate_size=mlp,
        num_hidden_layers=blocks, num_attention_heads=2, image_size=side * patch, patch_size=patch,
    )  # fmt: skip
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (side**2 + 1, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for k in range(blocks):
        stem = f"encoder.layers.{k}."
        norms += [f"{stem}layer_norm1", f"{stem}layer_norm2"]
        for part, layers in LAYERS.items():
            for layer in layers:
                out = mlp if layer == "fc1" else width
                inputs = mlp if layer == "fc2" else width
                shapes[f"{stem}{part}.{layer}.weight"] = (out, inputs)
                shapes[f"{stem}{part}.{layer}.bias"] = (out,)
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    save(path, config, {f"vision_model.{n}": 0.1 * draw.normal(size=s) for n, s in shapes.items()})
    return path


def llm(width, vocab=40):
    """The fields and the tensors of a random Llama of one block."""
    draw = np.random.default_rng(1)
    fields = dict(
        vocab_size=vocab, hidden_size=width, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=512,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    sizes = dict(q_proj=(16, width), k_proj=(8, width), v_proj=(8, width), o_proj=(width, 16))
    shapes = {f"layers.0.self_attn.{name}.weight": shape for name, shape in sizes.items()}
    shapes |= {f"layers.0.mlp.{n}_proj.weight": (24, width) for n in ("gate", "up")}
    shapes |= {"layers.0.mlp.down_proj.weight": (width, 24), "embed_tokens.weight": (vocab, width)}
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        shapes[f"{name}.weight"] = (width,)
    tensors = {f"model.{n}": 0.1 * draw.normal(size=s) for n, s in shapes.items()}
    return fields, tensors | {"lm_head.weight": draw.normal(size=(vocab, width))}


def save(path, config, tensors):
    """A folder of a config.json and its tensors, in float32."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: np.asarray(x, "f4") for name, x in tensors.items()}
    save_file(tensors, path / "model.safetensors")


def edit(path, **changes):
    """Changes fields of a config.json; None removes one."""
    config = json.loads((path / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


FLAT = dict(
    model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"],
    mm_projector_type="mlp2x_gelu", mm_vision_tower="openai/clip-vit-large-patch14-336",
    mm_vision_select_layer=-2, mm_vision_select_feature="patch", mm_patch_merge_type="flat",
    image_aspect_ratio="pad",
    image_grid_pinpoints=None, mm_use_im_start_end=False, mm_use_im_patch_token=False,
)  # fmt: skip


def whole(path, case):
    """A whole model with the compressor of a published case: folders `tower` and `model`.

    Returns what the case says, its inputs and its outputs.
    """
    meta, state, inputs, outputs = read(PUBLISHED / f"{case}.npz")
    width, side = meta["dim"], meta["grid"]
    wide = meta.get("text_dim") or meta["hidden"]
    fields, tensors = llm(wide)
    prefix, said = "model.mm_projector.", {}
    draw = np.random.default_rng(2)
    if meta["method"] == "quecc":
        state = {f"0.{name}": x for name, x in state.items()}
        for layer, inner in ((1, width), (3, wide)):
            state |= {
                f"{layer}.weight": draw.normal(size=(wide, inner)),
                f"{layer}.bias": draw.normal(size=wide),
            }
        said = dict(
            mm_vision_token_compression_type="quecc", mm_vision_output_token_count=side**2,
            mm_vision_output_text_embedding_size=wide, mm_vision_output_combined_token_count=None,
            mm_vision_token_compression_kernel_size=meta["kernel"],
            mm_vision_token_compression_stride=meta["stride"],
        )  # fmt: skip
    elif meta["method"] == "token_packer":
        said = dict(mm_projector_type="tokenpacker", scale_factor=meta["scale_factor"])
    else:
        prefix = "model.query_abstractor."
        said = dict(mm_projector_type="linear", query_abstractor_type="matry_query",
                    num_visual_tokens="second_stage")  # fmt: skip
    tower(path / "tower", width=width, side=side)
    compressor = {prefix + name: x for name, x in state.items()}
    save(path / "model", fields | FLAT | dict(mm_hidden_size=width) | said, tensors | compressor)
    save_file({n: np.asarray(x, "f4") for n, x in compressor.items()}, path / "stage1.safetensors")
    return meta, inputs, outputs
