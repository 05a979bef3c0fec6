# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints as transformers writes them, with what its models compute from them."""

import json
from pathlib import Path

import numpy as np

TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    image_size=24, patch_size=8,
)  # fmt: skip
TEXT = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=67, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e3, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
IMAGE = 66  # of the 67 tokens

# Name -> kind of config, its fields, fields of the LLaVA around it.
TOWERS = {
    "clip": ("clip_vision_model", {}),
    "clip_gelu": ("clip_vision_model", dict(hidden_act="gelu", layer_norm_eps=1e-6)),
    "siglip": ("siglip_vision_model", {}),
    "siglip_border": ("siglip_vision_model", dict(image_size=30, num_hidden_layers=2)),
}
LLMS = {
    "llama": ("llama", {}),
    "llama_tied_head": ("llama", dict(tie_word_embeddings=True, head_dim=10, hidden_size=24)),
    "llama_linear": ("llama", dict(rope_parameters=dict(
        rope_type="linear", factor=3.0, rope_theta=1e4))),
    "llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "qwen2": ("qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2_tied": ("qwen2", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral_whole": ("mistral", dict(sliding_window=64, head_dim=10)),
    "qwen3": ("qwen3", dict(head_dim=16, rms_norm_eps=1e-6, vocab_size=68)),
}  # fmt: skip
LLAVAS = {
    "clip_llama": ("clip", "llama", {}),
    "clip_qwen2": ("clip", "qwen2_tied", dict(vision_feature_layer=-1)),
    "clip_mistral": ("clip", "mistral_whole", {}),
    "clip_full": ("clip_gelu", "qwen3", dict(vision_feature_select_strategy="full")),
    "siglip_llama3": ("siglip_border", "llama3", dict(vision_feature_select_strategy="full")),
    "siglip_last": ("siglip", "llama_tied_head", dict(
        vision_feature_select_strategy="full", vision_feature_layer=-1)),
}  # fmt: skip


def config_of(kind, fields):
    """A transformers configuration."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**fields)


def tower(name):
    kind, fields = TOWERS[name]
    return config_of(kind, TOWER | fields)


def llm(name):
    kind, fields = LLMS[name]
    return config_of(kind, TEXT | fields)


def llava(name):
    """The configuration of a small LLaVA."""
    vision, text, fields = LLAVAS[name]
    return config_of("llava", dict(
        vision_config=tower(vision), text_config=llm(text), image_token_index=IMAGE,
        tie_word_embeddings=llm(text).tie_word_embeddings, **fields))  # fmt: skip


def random_model(cls, config, seed=0):
    """A model of transformers whose every parameter, biases and norms too, is drawn at random."""
    import torch

    torch.manual_seed(seed)
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim < 2 else 0.6 * parameter[0].numel() ** -0.5
        draw = scale * torch.randn_like(parameter)
        is_scale = "norm" in name and name.endswith("weight")
        parameter.data = draw + is_scale
    if config.model_type == "llava" and config.tie_word_embeddings:
        model.tie_weights()
    return model


def batch(config, *, rows=3, seed=0):
    """Token ids with one image per row at different places, padded on the right, and pixels.

    Returns what our models read (ids without the placeholders, image_at, length, pixels [B I I 3])
    and the ids with placeholders and mask that transformers reads.
    """
    draw = np.random.default_rng(seed)
    side = config.vision_config.image_size // config.vision_config.patch_size
    full = config.vision_feature_select_strategy == "full"
    clip = config.vision_config.model_type == "clip_vision_model"
    visual = side**2 + int(full and clip)
    length = 9
    ids = draw.integers(3, 60, (rows, length)).astype("i4")
    lengths = np.array([9, 5, 7][:rows], "i4")
    image_at = np.array([2, 5, 0][:rows], "i4")
    size = config.vision_config.image_size
    pixels = draw.normal(size=(rows, size, size, 3)).astype("f4")
    theirs = np.zeros((rows, length + visual), "i8")
    mask = np.zeros_like(theirs)
    for row, (n, at) in enumerate(zip(lengths, image_at, strict=True)):
        text = ids[row, :n]
        whole = np.concatenate([text[:at], np.full(visual, config.image_token_index), text[at:]])
        theirs[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    ours = dict(ids=ids, image_at=image_at, length=lengths, pixels=pixels,
                question=ids[:, :1], question_length=np.ones(rows, "i4"))  # fmt: skip
    return ours, dict(input_ids=theirs, attention_mask=mask), visual


def read_index(folder):
    """The file of each tensor of a sharded checkpoint."""
    return json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]


# Frozen for machines without torch: LLaVA, precision of its file, and largest shard.
FROZEN = {
    "clip_llama": ("float32", "5GB"),
    "clip_full": ("bfloat16", "5GB"),
    "siglip_llama3": ("float16", "20KB"),
}


def logits(model, inputs, pixels):
    """The logits of transformers [B X W] for a spliced batch."""
    import torch

    with torch.no_grad():
        return model(
            input_ids=torch.tensor(inputs["input_ids"]),
            attention_mask=torch.tensor(inputs["attention_mask"]),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        ).logits.numpy()


def difference(found, expected, batch, visual):
    """The largest difference of the scores of every text token but the first of each row."""
    worst = 0.0
    for row, (length, at) in enumerate(zip(batch["length"], batch["image_at"], strict=True)):
        for text in range(length):
            place = text + visual * (text >= at)
            if place:
                gap = found[row, text] - expected[row, place - 1]
                worst = max(worst, float(np.abs(gap).max()))
    return worst


def save(model, path, *, dtype="float32", **options):
    """Writes a model in a precision; it computes on in float32, with the rounded weights.

    What is compared is then how weights are read, not how products are rounded.
    """
    import copy

    import torch

    kind = getattr(torch, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind).float()
    copy.deepcopy(model).to(kind).save_pretrained(path, **options)


# Adapters that PEFT writes beside clip_llama: the fields of their LoraConfig.
EVERY = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
ADAPTERS = {
    "whole": dict(r=3, lora_alpha=6, target_modules=EVERY,
                  modules_to_save=["multi_modal_projector"]),
    "some": dict(r=2, lora_alpha=5, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
    # Of the tower too, of unlike ranks, and scaled by the root of them.
    "uneven": dict(r=4, lora_alpha=3, target_modules=["q_proj", "fc1", "down_proj", "lm_head"],
                   rank_pattern={"down_proj": 2}, use_rslora=True),
}  # fmt: skip


def random_llava(path, name="clip_llama", seed=0):
    """A random LLaVA in a folder, and the model."""
    from transformers import LlavaForConditionalGeneration

    model = random_model(LlavaForConditionalGeneration, llava(name), seed)
    save(model, path)
    return model


def save_adapter(model, name, path):
    """PEFT's model around `model` with a random adapter, written to a folder."""
    import peft
    import torch

    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**ADAPTERS[name])).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(path)
    (path / "README.md").unlink()
    return adapted


def freeze_adapter(path):
    """Writes an adapter of PEFT beside the frozen clip_llama, and the logits of the two."""
    from transformers import LlavaForConditionalGeneration

    model = random_model(LlavaForConditionalGeneration, llava("clip_llama"))
    adapted = save_adapter(model, "whole", path)
    ours, inputs, _ = batch(model.config)
    found = logits(adapted, inputs, ours["pixels"])
    np.savez_compressed(path / "logits.npz", logits=found.astype("f4"))


def freeze(path):
    """Writes the frozen cases: python tests/published_models.py tests/published_weights"""
    import torch
    from transformers import LlavaForConditionalGeneration

    for name, (dtype, shard) in FROZEN.items():
        model = random_model(LlavaForConditionalGeneration, llava(name))
        save(model, path / name, dtype=dtype, max_shard_size=shard)
        (path / name / "generation_config.json").unlink()
        batch_, inputs, _ = batch(model.config)
        found = logits(model, inputs, batch_["pixels"])
        np.savez_compressed(path / name / "logits.npz", logits=found.astype("f4"))
    freeze_adapter(path / "clip_llama_adapter")
    projector = model.model.multi_modal_projector
    torch.save(
        {
            f"model.mm_projector.{2 * k}.{part}": getattr(layer, part).detach().half()
            for k, layer in enumerate((projector.linear_1, projector.linear_2))
            for part in ("weight", "bias")
        },
        path / "mm_projector.bin",
    )


# --- every tensor of the published architectures -------------------------------------------------

CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
              num_attention_heads=16, image_size=336, patch_size=14)  # fmt: skip
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
              num_attention_heads=16, image_size=384, patch_size=14)  # fmt: skip
SIGLIP_B = dict(image_size=224, patch_size=16)


def text(vocab, width, mlp, depth, heads, kv_heads, **more):
    return dict(vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=depth,
                num_attention_heads=heads, num_key_value_heads=kv_heads, **more)  # fmt: skip


TIED = dict(tie_word_embeddings=True)
# Sizes as in the config.json of each published model.
PUBLISHED_TOWERS = {
    "openai/clip-vit-large-patch14-336": ("clip_vision_model", CLIP_L),
    "google/siglip-so400m-patch14-384": ("siglip_vision_model", SO400M),
    "google/siglip-base-patch16-224": ("siglip_vision_model", SIGLIP_B),
}
PUBLISHED_LLMS = {
    "lmsys/vicuna-7b-v1.5": ("llama", text(32000, 4096, 11008, 32, 32, 32)),
    "lmsys/vicuna-13b-v1.5": ("llama", text(32000, 5120, 13824, 40, 40, 40)),
    "meta-llama/Llama-2-70b-hf": ("llama", text(32000, 8192, 28672, 80, 64, 8)),
    "meta-llama/Llama-3.1-70B": ("llama", text(128256, 8192, 28672, 80, 64, 8)),
    "meta-llama/Llama-3.1-8B": ("llama", text(128256, 4096, 14336, 32, 32, 8)),
    "meta-llama/Llama-3.2-1B": ("llama", text(128256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED)),
    "meta-llama/Llama-3.2-3B": ("llama", text(128256, 3072, 8192, 28, 24, 8, head_dim=128, **TIED)),
    "Qwen/Qwen1.5-0.5B": ("qwen2", text(151936, 1024, 2816, 24, 16, 16, **TIED)),
    "Qwen/Qwen1.5-1.8B": ("qwen2", text(151936, 2048, 5504, 24, 16, 16)),
    "Qwen/Qwen1.5-4B": ("qwen2", text(151936, 2560, 6912, 40, 20, 20)),
    "Qwen/Qwen1.5-7B": ("qwen2", text(151936, 4096, 11008, 32, 32, 32)),
    "Qwen/Qwen1.5-14B": ("qwen2", text(152064, 5120, 13696, 40, 40, 40)),
    "Qwen/Qwen1.5-32B": ("qwen2", text(152064, 5120, 27392, 64, 40, 8)),
    "Qwen/Qwen1.5-72B": ("qwen2", text(152064, 8192, 24576, 80, 64, 64)),
    "Qwen/Qwen1.5-110B": ("qwen2", text(152064, 8192, 49152, 80, 64, 8)),
    "Qwen/Qwen2-0.5B": ("qwen2", text(151936, 896, 4864, 24, 14, 2, **TIED)),
    "Qwen/Qwen2-1.5B": ("qwen2", text(151936, 1536, 8960, 28, 12, 2, **TIED)),
    "Qwen/Qwen2-7B": ("qwen2", text(152064, 3584, 18944, 28, 28, 4)),
    "Qwen/Qwen2-72B": ("qwen2", text(152064, 8192, 29568, 80, 64, 8)),
    "Qwen/Qwen2.5-0.5B": ("qwen2", text(151936, 896, 4864, 24, 14, 2, **TIED)),
    "Qwen/Qwen2.5-1.5B": ("qwen2", text(151936, 1536, 8960, 28, 12, 2, **TIED)),
    "Qwen/Qwen2.5-3B": ("qwen2", text(151936, 2048, 11008, 36, 16, 2, **TIED)),
    "Qwen/Qwen2.5-7B": ("qwen2", text(152064, 3584, 18944, 28, 28, 4)),
    "Qwen/Qwen2.5-14B": ("qwen2", text(152064, 5120, 13824, 48, 40, 8)),
    "Qwen/Qwen2.5-32B": ("qwen2", text(152064, 5120, 27648, 64, 40, 8)),
    "Qwen/Qwen2.5-72B": ("qwen2", text(152064, 8192, 29568, 80, 64, 8)),
    "Qwen/Qwen3-0.6B": ("qwen3", text(151936, 1024, 3072, 28, 16, 8, head_dim=128, **TIED)),
    "Qwen/Qwen3-1.7B": ("qwen3", text(151936, 2048, 6144, 28, 16, 8, head_dim=128, **TIED)),
    "Qwen/Qwen3-4B": ("qwen3", text(151936, 2560, 9728, 36, 32, 8, head_dim=128, **TIED)),
    "Qwen/Qwen3-8B": ("qwen3", text(151936, 4096, 12288, 36, 32, 8, head_dim=128)),
    "Qwen/Qwen3-14B": ("qwen3", text(151936, 5120, 17408, 40, 40, 8, head_dim=128)),
    "Qwen/Qwen3-32B": ("qwen3", text(151936, 5120, 25600, 64, 64, 8, head_dim=128)),
}
PUBLISHED_LLAVAS = {
    "llava-hf/llava-1.5-7b-hf": dict(
        vision_config=CLIP_L | dict(model_type="clip_vision_model"),
        text_config=text(32064, 4096, 11008, 32, 32, 32) | dict(model_type="llama"),
    ),
    "llava-hf/llava-1.5-13b-hf": dict(
        vision_config=CLIP_L | dict(model_type="clip_vision_model"),
        text_config=text(32064, 5120, 13824, 40, 40, 40) | dict(model_type="llama"),
    ),
}


def meta(cls, config):
    """The published names and shapes of an architecture; no number is made."""
    import torch

    with torch.device("meta"):
        model = cls(config)
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


if __name__ == "__main__":
    import sys

    freeze(Path(sys.argv[1]))
