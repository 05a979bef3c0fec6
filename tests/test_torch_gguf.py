# SPDX-License-Identifier: Apache-2.0
"""A GGUF file gives the ids, logits and greedy tokens that transformers gives for it."""

import jax
import made_ggufs
import numpy as np
import pytest
import tiny
from test_convert import run

import vlm_jax
from vlm_jax.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.torch

GATE = 1e-4  # absolute, float32, on logits of order one
TEXTS = ["", "is it red?", "in 1984 12 345", "  x \n\n y", "é 日本 🙂", "<|im_end|>a</s><s>b"]
CHAT = [
    {"role": "user", "content": "is it big?"},
    {"role": "assistant", "content": "no, small"},
    {"role": "user", "content": "What colour is the cat?"},
]


@pytest.mark.parametrize(
    "arch, kind, tied",
    [
        ("llama", "llama", False),
        ("llama", "gpt-2", True),
        ("qwen2", "qwen2", True),
        ("qwen3", "qwen2", False),
    ],
)
def test_ids_logits_and_greedy_tokens_are_those_of_transformers(arch, kind, tied, tmp_path, mesh1):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made_ggufs.made(tmp_path / "a.gguf", arch, kind, tied=tied)
    made = ("--llm", tmp_path / "a.gguf", "--vision=tests/tiny.py", "--to", tmp_path / "ours")
    assert run(*made) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    ours = load_tokenizer(tmp_path / "ours/tokenizer")
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
    prompt = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == prompt
    # A new model with a Qwen has the system text of the template chatml.
    system = [{"role": "system", "content": "You are a helpful assistant."}] * arch.startswith(
        "qwen"
    )
    prompt = theirs.apply_chat_template(system + CHAT, tokenize=False, add_generation_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype="float32")
    ids = np.random.default_rng(0).integers(3, 300, (2, 40)).astype("i4")
    asked = theirs(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids.astype("i8"))).logits.numpy()
        tokens = model.generate(asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :]
    with jax.set_mesh(mesh1):
        llm = tiny.model_of(tmp_path / "ours").llm
        found = np.asarray(jax.jit(lambda m, i: m.logits(m(m.embed(i))))(llm, tiny.placed(ids)))
    assert expected.std() > 0.3 and np.abs(found - expected).max() < GATE
    answering = vlm_jax.VLM.from_checkpoint(tmp_path / "ours")
    turns = [turn["content"] for turn in CHAT]
    answer = answering.generate(None, [turns], max_new_tokens=12)[0]
    assert answer.ids == tokens.tolist()
