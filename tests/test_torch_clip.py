# SPDX-License-Identifier: Apache-2.0
"""CDPruner in front of a LLaVA and with a CLIP that transformers writes: its numbers are ours."""

import jax
import literal_selection
import made_clip
import numpy as np
import published_models as published
import pytest
import tiny

from vlm_jax.__main__ import main
from vlm_jax.data.reading import clip_ids

pytestmark = pytest.mark.torch

V, SPACE = 4, 12
QUESTIONS = ["a red cat?", "is there a star\nAnswer the question using a single word or phrase.",
             "what is it? " * 9]  # fmt: skip


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """A random LLaVA and a random CLIP of its encoder's sizes, with their folders."""
    from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration

    home, tokenizer = tmp_path_factory.mktemp("clip"), made_clip.text_tokenizer()
    llava = published.random_model(LlavaForConditionalGeneration, published.llava("clip_llama"))
    published.save(llava, home / "llava")
    text = dict(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=0,
    )  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=published.TOWER, projection_dim=SPACE)
    clip = published.random_model(CLIPModel, config, seed=1)
    clip.save_pretrained(home / "clip")
    tokenizer.save_pretrained(home / "clip")
    return llava, clip, tokenizer, home


@pytest.fixture(scope="module")
def ours(peers, mesh1):
    *_, home = peers
    flags = ("--compressor=cdpruner", f"--tokens={V}", f"--text-tower={home}/clip")
    assert main(["convert", f"--from={home}/llava", *flags, f"--to={home}/ours"]) == 0
    with jax.set_mesh(mesh1):
        return tiny.model_of(home / "ours")


def read(tokenizer, question, length=24):
    """The ids as transformers cuts them: the end token stays."""
    question = question.removesuffix("\nAnswer the question using a single word or phrase.")
    return tokenizer(question, truncation=True, max_length=length)["input_ids"]


def test_questions_are_read_and_cut_as_clip_s_tokenizer_does(peers):
    tokenizer = peers[2]
    lengths = []
    for question in QUESTIONS:
        ids = clip_ids(tokenizer, question, 24)
        assert ids == read(tokenizer, question) and ids[-1] == tokenizer.eos_token_id
        lengths.append(len(ids))
    assert lengths[-1] == 24 > lengths[0]


def test_the_kept_patches_are_those_of_the_formula_on_transformers_numbers(peers, ours, mesh1):
    import torch

    llava, clip, tokenizer, _ = peers
    draw, room = np.random.default_rng(0), 24
    pixels = draw.normal(size=(len(QUESTIONS), 24, 24, 3)).astype("f4")
    ids = [read(tokenizer, question) for question in QUESTIONS]
    with torch.inference_mode():
        given = torch.tensor(pixels).permute(0, 3, 1, 2)
        tower, projector = llava.model.vision_tower, llava.model.multi_modal_projector
        features = tower(given, output_hidden_states=True).hidden_states[-2][:, 1:]
        tokens = projector(features)
        images = clip.visual_projection(clip.vision_model.post_layernorm(features))
        texts = [
            clip.text_projection(clip.text_model(torch.tensor([row])).pooler_output)[0]
            for row in ids
        ]
    lengths = np.array([len(row) for row in ids], np.int32)
    padded = np.array([[*row, *[5] * (room - len(row))] for row in ids], np.int32)
    rows = len(ids)
    batch = dict(
        pixels=pixels, ids=np.zeros((rows, 4), np.int32), image_at=np.zeros(rows, np.int32),
        question=padded, question_length=lengths,
    )  # fmt: skip
    with jax.set_mesh(mesh1):
        found = jax.jit(lambda m, b: m.visual_tokens(b, m.question(b)).tokens)(
            ours, tiny.placed(batch)
        )
        read_texts = jax.jit(lambda m, *given: m.compressor.clip.text(*given))(
            ours, *tiny.placed((padded, lengths))
        )
    np.testing.assert_allclose(read_texts, np.stack([x.numpy() for x in texts]), atol=1e-4)
    chosen = []
    for row in range(rows):
        weights = literal_selection.relevance(
            images[row].double().numpy(), [texts[row].double().numpy()]
        )
        order = literal_selection.cdpruner(tokens[row].double().numpy(), weights, V)
        chosen.append(tuple(sorted(order)))
        np.testing.assert_allclose(found[row], tokens[row].numpy()[sorted(order)], atol=1e-4)
    assert len(set(chosen)) > 1
