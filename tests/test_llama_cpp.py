# SPDX-License-Identifier: Apache-2.0
"""A GGUF file becomes the model that it was made of; what it asks for and we lack is refused."""

import jax
import made_ggufs
import numpy as np
import pytest
import tiny
import whole_models
from test_convert import refused, run

from vlm_jax.data.tokenizer import Encoder, load_tokenizer
from vlm_jax.models.rope import Rope
from vlm_jax.weights import architectures, folder, llama_cpp, llama_cpp_tokenizer, sources
from vlm_jax.weights.files import read_tensors
from vlm_jax.weights.methods import Wish

TEXTS = [
    "",
    "is it red?",
    "in 1984 12  345\n\n1. one  2",
    "  x \n",
    "é 日本 🙂",
    "<|im_end|>a</s><s>",
]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A folder of a vision tower."""
    return whole_models.tower(tmp_path_factory.mktemp("tower"), width=8, side=2, blocks=2)


def opened(path):
    """The description and the tensors of a file, as a conversion has them."""
    with llama_cpp.as_folder(path) as home:
        return architectures.read(home), read_tensors(home)


def interleaved(rows, heads):
    """The rows of a matrix in llama.cpp's order (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("arch", made_ggufs.SIZES)
def test_every_tensor_is_that_of_the_file(arch, tmp_path):
    made_ggufs.made(tmp_path / "a.gguf", arch, tied=arch != "qwen2")
    described, tensors = opened(tmp_path / "a.gguf")
    size, llm = made_ggufs.SIZES[arch], described.llm
    assert (llm["width"], llm["mlp"], llm["heads"], llm["kv_heads"], llm["head_size"]) == tuple(
        size.values()
    )
    assert (llm["qkv_bias"], llm["qk_norm"]) == (arch == "qwen2", arch == "qwen3")
    assert (llm["tied_embeddings"], llm["rope_theta"]) == (arch != "qwen2", 1e5)
    assert described.length == made_ggufs.CONTEXT and llm["norm_eps"] == float(np.float32(1e-5))
    expected = made_ggufs.dequantized(tmp_path / "a.gguf")
    assert tensors.keys() == {llama_cpp.canonical(name) for name in expected}
    for name, numbers in expected.items():
        found = tensors[llama_cpp.canonical(name)].read().astype("f4")
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            found = interleaved(found, size["heads" if "attn_q" in name else "kv_heads"])
        np.testing.assert_array_equal(found, numbers, err_msg=name)


def test_a_file_is_converted_by_the_command(tmp_path, capsys):
    made_ggufs.made(tmp_path / "a.gguf", "llama", "smollm", tokenizer__ggml__eot_token_id=0)
    assert run("--llm", tmp_path / "a.gguf", "--to", tmp_path / "ours") == 0
    said = capsys.readouterr().err
    assert "dequantized: tensors of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 became float32" in said
    assert "tower: 39 tensors of a new one, drawn with seed 0" in said
    made = folder.read(tmp_path / "ours")
    assert made.facts["template"] == "checkpoint" and made.facts["ends"]["stop"] == [2, 0]
    assert made.facts["ends"]["text"] == dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    _, tensors = opened(tmp_path / "a.gguf")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(made.tensors[name].read(), tensor.read(), err_msg=name)
        assert made.tensors[name].dtype == tensor.dtype
    loaded = load_tokenizer(tmp_path / "ours/tokenizer")
    assert loaded.chat_template == made_ggufs.CHATML and loaded.eos_token == "<|im_end|>"
    # Another tokenizer takes the place of one that cannot be made.
    made_ggufs.made(tmp_path / "b.gguf", "llama", tokenizer__ggml__pre="default")
    flags = ("--llm", tmp_path / "b.gguf", "--vision", tmp_path / "ours")
    said = refused(capsys, *flags)
    assert "b.gguf: its tokenizer: pre='default' is not supported" in said
    assert said.rstrip().endswith("; or give --tokenizer=DIR, that of the original model")
    assert run(*flags, "--tokenizer", tmp_path / "ours/tokenizer", "--to", tmp_path / "b") == 0
    # The tower of a model that is there.
    other = folder.read(tmp_path / "b")
    assert (other.vit, other.facts["image"]) == (made.vit, made.facts["image"])
    for name in (name for name in made.tensors if name.startswith("vit.")):
        np.testing.assert_array_equal(other.tensors[name].read(), made.tensors[name].read())


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama"])
def test_ids_are_those_of_the_tokenizer_in_the_file(kind, tmp_path):
    arch = "llama" if kind == "llama" else "qwen2"
    original = made_ggufs.made(tmp_path / "a.gguf", arch, kind)
    with llama_cpp.as_folder(tmp_path / "a.gguf") as home:
        encode = Encoder(load_tokenizer(home))
    assert encode.before == [1] * (kind == "llama") and encode.behind == []
    for text in TEXTS:
        assert encode(text).ids == original.encode(text, add_special_tokens=False).ids, text


def test_a_word_that_is_known_is_one_token_and_begins_a_text_as_in_llama_3(tmp_path):
    about, _ = made_ggufs.metadata("llama", "gpt-2")
    about["tokenizer.ggml.tokens"] = [*about["tokenizer.ggml.tokens"], "zzyzx"]
    about["tokenizer.ggml.token_type"] = [*about["tokenizer.ggml.token_type"], 1]
    for pre, ids in (("llama-bpe", 1), ("gpt-2", 5)):
        about["tokenizer.ggml.pre"] = pre
        llama_cpp_tokenizer.write(about, tmp_path)
        encode = Encoder(load_tokenizer(tmp_path))
        assert len(encode("zzyzx").ids) == ids and encode.before == [1] * (pre == "llama-bpe")


def test_stretched_positions_are_those_of_the_file(tmp_path):
    made_ggufs.made(tmp_path / "a.gguf", "llama", llama__rope__scaling__type="linear",
                    llama__rope__scaling__factor=4.0)  # fmt: skip
    llm = opened(tmp_path / "a.gguf")[0].llm
    assert (llm["rope_kind"], llm["rope_factor"]) == ("linear", 4.0)
    about, words = made_ggufs.metadata("llama")
    found = made_ggufs.tensors("llama", len(words.get_vocab()))
    half = made_ggufs.SIZES["llama"]["head"] // 2
    wanted = Rope(1e5, "llama3", 32.0).rates(half)
    divided = np.asarray(Rope(1e5).rates(half) / wanted)
    for factor, words in ((1.0, None), (1.5, "other frequencies than Llama 3 with factor=48")):
        found["rope_freqs.weight"] = np.float32(divided * factor)
        made_ggufs.write(tmp_path / "b.gguf", about, found)
        if words is None:
            llm = opened(tmp_path / "b.gguf")[0].llm
            rope = Rope(1e5, llm["rope_kind"], llm["rope_factor"], llm["rope_low_frequency"],
                        llm["rope_high_frequency"], llm["rope_original_length"])  # fmt: skip
            np.testing.assert_allclose(rope.rates(half), wanted, rtol=1e-6)
            continue
        with pytest.raises(ValueError, match=words):
            opened(tmp_path / "b.gguf")


@pytest.mark.parametrize("name, value, words", [
    ("general.architecture", "gemma2", "general.architecture='gemma2' is not supported; supported"),
    ("general.type", "adapter", "general.type='adapter'"),
    ("general.quantization_version", 1, "general.quantization_version=1"),
    ("llama.tensor_data_layout", "reference", "tensor_data_layout='reference' is not supported"),
    ("llama.rope.scaling.type", "yarn", "llama: rope.scaling.type='yarn'"),
    ("llama.expert_count", 8, "llama: expert_count=8"),
    ("llama.attention.sliding_window", 64, "attention.sliding_window=64 is not supported: a model"),
    ("llama.logit_scale", 0.5, "logit_scale=0.5 is not supported"),
    ("llama.rope.dimension_count", 8, "rope.dimension_count=8 is not supported; supported: 16"),
    ("llama.attention.value_length", 8, "attention.value_length=8"),
    ("llama.attention.causal", False, "attention.causal=False"),
    ("llama.attention.head_count_kv", [2, 1], "attention.head_count_kv=[2, 1]: a whole number"),
    ("llama.block_count", None, "block_count=None: a whole number"),
    ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon=None"),
    ("llama.vocab_size", 7, "llm.vocab (vocab_size) = 7"),
    ("llama.block_count", 3, "llm.depth (num_hidden_layers) = 3"),
    ("tokenizer.ggml.model", "rwkv", "model='rwkv' is not supported; supported: gpt2, llama"),
    ("tokenizer.ggml.model", None, "model=None is not supported"),
    ("tokenizer.ggml.pre", None, "pre=None is not supported"),
    ("tokenizer.ggml.add_space_prefix", True, "add_space_prefix=True is not supported"),
    ("tokenizer.ggml.precompiled_charsmap", [1, 2], "precompiled_charsmap=[1, 2] is not supported"),
    ("tokenizer.ggml.tokens", ["a", "a"], "it has 2 tokens and 320 token_type"),
    ("tokenizer.ggml.merges", ["no pair of tokens"], "transformers cannot make it"),
    ("tokenizer.ggml.merges", None, "merges=None: a list of str is needed"),
    ("tokenizer.ggml.eos_token_id", 320, "eos_token_id=320, and it has 320 tokens"),
    ("tokenizer.chat_template", "{% for %}", "chat template"),
], ids=lambda x: str(x)[:40])  # fmt: skip
def test_what_a_file_asks_for_and_we_lack_is_refused_by_name(
    name, value, words, tower, tmp_path, capsys
):
    made_ggufs.made(tmp_path / "a.gguf", "llama", **{name.replace(".", "__"): value})
    said = refused(capsys, "--llm", tmp_path / "a.gguf", "--vision", tower)
    assert words in said and f"{tmp_path}/a.gguf" in said and said.count("\n") == 1
    assert "vlm-jax-" not in said  # of the folder in between


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    about, words = made_ggufs.metadata("llama")
    found = made_ggufs.tensors("llama", len(words.get_vocab()))
    found["blk.0.ffn_gate_exps.weight"] = np.zeros((2, 32), "f4")
    made_ggufs.write(tmp_path / "a.gguf", about, found)
    with pytest.raises(
        ValueError, match="the tensor 'blk.0.ffn_gate_exps.weight' is not supported"
    ):
        opened(tmp_path / "a.gguf")


def test_a_missing_tensor_and_a_wrong_flag_are_refused(tower, tmp_path, capsys):
    about, words = made_ggufs.metadata("llama")
    found = made_ggufs.tensors("llama", len(words.get_vocab()))
    del found["blk.1.ffn_up.weight"]
    path = made_ggufs.write(tmp_path / "a.gguf", about, found)
    said = refused(capsys, "--llm", path, "--vision", tower)
    assert "1 missing: llm.layers.1.mlp.up_proj.weight" in said
    assert "give it as --llm" in refused(capsys, "--from", path)
    (tmp_path / "b.gguf").write_text("<html>")
    assert "b.gguf is no GGUF file" in refused(capsys, "--llm", tmp_path / "b.gguf")
    gone = refused(capsys, "--llm", tmp_path / "c.gguf")
    assert f"{tmp_path}/c.gguf is not a checkpoint" in gone


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    import sys

    made_ggufs.made(tmp_path / "a.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    llama_cpp.gguf.types.cache_clear()
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'vlm_jax\[gguf\]'"):
        opened(tmp_path / "a.gguf")


def test_a_new_tower_is_that_of_the_configuration(tmp_path, mesh1):
    made_ggufs.made(tmp_path / "a.gguf", "llama")
    config, wish = tiny.config(), Wish(None, None, None, None, None, None, 3, False)
    with llama_cpp.as_folder(tmp_path / "a.gguf") as home, jax.set_mesh(mesh1):
        made = sources.assemble(config, home, wish)
    assert made.vit["levels"] == config.vit.levels and made.vit["width"] == config.vit.width
    assert made.facts["image"]["fit"] == config.data.image_fit
    drawn = [name for name in made.tensors if name.startswith("vit.")]
    assert len(drawn) == 55
    assert made.notes["tower"].startswith("55 tensors of a new one, drawn with seed 3")
