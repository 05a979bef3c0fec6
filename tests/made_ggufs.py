# SPDX-License-Identifier: Apache-2.0
"""Small GGUF files of random language models, written by the format's own package."""

import json

import gguf
import numpy as np
import real_tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

CORPUS = [*real_tokenizers.CORPUS, "in 1984 there were 12  345 cats\n\n1. one\n\n2. two  22 33"] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
SIZES = dict(
    llama=dict(width=64, mlp=96, heads=4, kv_heads=2, head=16),
    qwen2=dict(width=64, mlp=96, heads=4, kv_heads=1, head=16),
    qwen3=dict(width=64, mlp=96, heads=2, kv_heads=1, head=128),
)
DEPTH, CONTEXT = 2, 128


def byte_level(pre):
    """A tokenizer as GPT-2's, split as `pre` of a file says."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "qwen2")
    first = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")],
    }[pre]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    return made


def tokenizer(kind):
    """A tokenizer of the library, and the metadata that describe it: `pre`, or "llama"."""
    made = real_tokenizers.pieces("bpe", prefix="first") if kind == "llama" else byte_level(kind)
    vocabulary = made.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {str(token) for token in made.get_added_tokens_decoder().values()}
    special |= {"<unk>", "<s>", "</s>"} if kind == "llama" else set()
    bytes_ = [token.startswith("<0x") for token in tokens]
    about = dict(
        model="llama" if kind == "llama" else "gpt2",
        tokens=tokens,
        token_type=[
            3 if t in special else 6 if b else 1 for t, b in zip(tokens, bytes_, strict=True)
        ],
    )
    if kind == "llama":
        # In the order in which pairs were joined.
        scores = [-float(k) for k in range(len(tokens))]
        about |= dict(
            scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0, add_bos_token=True
        )
    else:
        merges = json.loads(made.to_str())["model"]["merges"]
        about |= dict(pre=kind, merges=[" ".join(pair) for pair in merges], bos_token_id=1,
                      eos_token_id=2, padding_token_id=0)  # fmt: skip
    about = {f"tokenizer.ggml.{name}": value for name, value in about.items()}
    return made, about | {"tokenizer.chat_template": BRACKETS if kind == "llama" else CHATML}


def metadata(arch, kind="qwen2"):
    """The metadata of a file, and the tokenizer in it."""
    size = SIZES[arch]
    made, about = tokenizer(kind)
    sizes = {
        "context_length": CONTEXT, "embedding_length": size["width"], "block_count": DEPTH,
        "feed_forward_length": size["mlp"], "attention.head_count": size["heads"],
        "attention.head_count_kv": size["kv_heads"], "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e5,
    }  # fmt: skip
    if arch == "qwen3":
        sizes |= {"attention.key_length": size["head"], "attention.value_length": size["head"]}
    about |= {f"{arch}.{name}": value for name, value in sizes.items()}
    return about | {"general.architecture": arch, "general.name": "made"}, made


def tensors(arch, vocab, *, tied=True, seed=0):
    """Random tensors as a file has them."""
    size, draw = SIZES[arch], np.random.default_rng(seed)
    queries, keys = size["heads"] * size["head"], size["kv_heads"] * size["head"]
    width, mlp = size["width"], size["mlp"]
    shapes = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (vocab, width)
    for k in range(DEPTH):
        block = {
            "attn_norm.weight": (width,), "ffn_norm.weight": (width,),
            "attn_q.weight": (queries, width), "attn_k.weight": (keys, width),
            "attn_v.weight": (keys, width), "attn_output.weight": (width, queries),
            "ffn_gate.weight": (mlp, width), "ffn_up.weight": (mlp, width),
            "ffn_down.weight": (width, mlp),
        }  # fmt: skip
        if arch == "qwen2":
            block |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
        if arch == "qwen3":
            block |= {f"attn_{n}_norm.weight": (size["head"],) for n in "qk"}
        shapes |= {f"blk.{k}.{name}": shape for name, shape in block.items()}
    found = {}
    for name, shape in shapes.items():
        scale = 0.6 * shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        found[name] = np.float32(scale * draw.normal(size=shape) + name.endswith("norm.weight"))
    return found


def kinds_of(found):
    """A type for each tensor: matrices take turns, vectors are float32 as llama.cpp writes them."""
    matrices = [name for name, x in found.items() if x.ndim > 1]
    return {name: KINDS[k % len(KINDS)] for k, name in enumerate(matrices)}


def write(path, about, found, kinds=None):
    """Writes a file; a tensor may be numbers, or the bytes of the type that `kinds` names."""
    writer = gguf.GGUFWriter(path, about["general.architecture"])
    for name, value in about.items():
        if name != "general.architecture":
            of = value[0] if isinstance(value, list) else value
            kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}[type(of)]
            if isinstance(value, list):
                writer.add_array(name, value)
            else:
                writer.add_key_value(name, value, gguf.GGUFValueType[kind])
    for name, numbers in found.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        if numbers.dtype == np.float32:
            numbers = gguf.quantize(numbers, kind)
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def made(path, arch, kind="qwen2", *, tied=True, **changes):
    """A whole file; its tokenizer. `changes` are metadata, `__` for `.`; None removes one."""
    about, words = metadata(arch, kind)
    about |= {name.replace("__", "."): value for name, value in changes.items()}
    about = {name: value for name, value in about.items() if value is not None}
    found = tensors(arch, len(words.get_vocab()), tied=tied)
    write(path, about, found, kinds_of(found))
    return words


def dequantized(path):
    """Every tensor of a file in float32, by the format's own package."""
    return {
        x.name: gguf.dequantize(x.data, x.tensor_type).reshape(x.shape[::-1].tolist())
        for x in gguf.GGUFReader(path).tensors
    }
