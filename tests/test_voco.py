# SPDX-License-Identifier: Apache-2.0
"""VoCo: a mask in one pass equals two passes, and an image leaves its summary in the cache."""

import jax
import literal_models
import literal_pruning
import numpy as np
import pytest
import tiny
from test_cost import CLIP, VICUNA, compressor
from test_generate import PROMPTS, made

import vlm_jax
from vlm_jax.compressors.voco import VocoMethod
from vlm_jax.cost import flops as cost
from vlm_jax.cost import roofline
from vlm_jax.models.cache import Pruned
from vlm_jax.models.voco import voco_mask
from vlm_jax.training import stages

N, P = 2, 16  # summary tokens, patches
SECTION = dict(kind="voco", tokens=N)


@pytest.fixture(scope="module")
def c():
    return tiny.config(compressor=SECTION)


@pytest.fixture(scope="module")
def model(c, mesh1):
    with jax.set_mesh(mesh1):
        return tiny.roughened(tiny.created(c), scale=0.2)


def two_passes(weights, first, rest, c):
    """Hidden states of the summary's last token and of `rest`, which reads the summary alone."""
    end = len(first)
    for index in range(c.llm.depth):
        w = literal_models.block(weights, index)
        seen = np.concatenate([first[-N:], rest])
        places = np.arange(end - N, end + len(rest))
        rest = literal_pruning.layer(w, seen, c, places, np.tri(len(seen), dtype=bool))[N:]
        first = literal_pruning.layer(w, first, c, np.arange(end), np.tri(end, dtype=bool))
    hidden = np.concatenate([first[-1:], rest])
    return literal_models.rms_norm(weights, "norm", hidden, c.llm.norm_eps)


def logits_of(model, batch):
    return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


def test_one_pass_under_the_mask_is_two_passes(model, c, mesh1):
    batch = tiny.batch(c, rows=4)
    with jax.set_mesh(mesh1):
        ours = logits_of(model, batch)
        tokens = np.asarray(jax.jit(lambda m, b: m.compressor(m.levels(b)))(
            model, tiny.placed(batch)), np.float64)  # fmt: skip
    weights = literal_models.of(model.llm)
    assert (tokens[:, P] == tokens[:, P + 1]).all() and tokens.shape[1] == P + N
    for row in range(4):
        at, length = int(batch["image_at"][row]), int(batch["length"][row])
        text = weights["embedding"][batch["ids"][row, :length]]
        if at >= length:  # without an image: a causal pass
            hidden = literal_models.llm(weights, text, c)
            scores = literal_models.unembed(weights, hidden[:-1])
            np.testing.assert_allclose(ours[row, 1:length], scores, atol=3e-4)
            continue
        hidden = two_passes(weights, np.concatenate([text[:at], tokens[row]]), text[at:], c)
        scores = literal_models.unembed(weights, hidden[:-1])
        np.testing.assert_allclose(ours[row, at:length], scores, atol=3e-4)


def test_decoding_reads_the_summary_from_the_cache(model, c, mesh1):
    """Token by token it gives what the mask gives, from caches without the patches."""
    new, every = 3, np.arange(4)
    batch = tiny.batch(c, rows=4)
    start = (batch["length"] - new).astype(np.int32)
    prompt = {name: x for name, x in batch.items() if name != "loss_mask"} | dict(length=start)
    with jax.set_mesh(mesh1):
        whole = logits_of(model, batch)
        decode = jax.jit(lambda m, *x: m.decode(*x))
        logits, caches, position = jax.jit(lambda m, b: m.prefill(b, new_tokens=new))(
            model, tiny.placed(prompt))  # fmt: skip
        assert isinstance(caches, Pruned)
        assert {cache.slots for cache in caches.layers} == {batch["ids"].shape[1] + N + new}
        there = batch["image_at"] < batch["ids"].shape[1]
        assert caches.dropped.tolist() == [np.where(there, batch["image_at"] + P, 0).tolist()]
        for step in range(new):
            np.testing.assert_allclose(logits, whole[every, start + step], atol=2e-4)
            ids = tiny.placed(batch["ids"][every, start + step])
            logits, caches = decode(model, ids, caches, position)
            position = position + 1


def test_the_mask_is_the_sentence_about_it(mesh1):
    draw = np.random.default_rng(0)
    length = 9
    summary = np.zeros((4, length), bool)
    summary[0, 4:6] = summary[1, 8] = summary[2, 1:4] = True  # the last row has none
    valid = np.arange(length) >= draw.integers(0, 2, 4)[:, None]
    with jax.set_mesh(mesh1):
        ours = voco_mask(*map(tiny.placed, (valid, summary & valid)))
    for row in range(4):
        theirs = literal_pruning.voco_mask(valid[row], summary[row] & valid[row])
        np.testing.assert_array_equal(ours[row], theirs)


def test_a_request_gets_the_same_tokens_in_any_company(trained, tmp_path, mesh1, mesh8):
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(2)]
    path = made(tmp_path / "m", trained, compressor=SECTION)
    one, many = (vlm_jax.VLM.from_checkpoint(path, mesh=mesh) for mesh in (mesh1, mesh8))
    pictures, prompts = [*images, None], PROMPTS[:3]
    together, spread = (m.generate(pictures, prompts, max_new_tokens=4) for m in (one, many))
    assert [a.visual_tokens for a in together] == [P + N, P + N, 0]
    for image, prompt, a, b in zip(pictures, prompts, together, spread, strict=True):
        assert a.ids == b.ids == one.generate([image], [prompt], max_new_tokens=4)[0].ids
    with pytest.raises(ValueError, match="one image of a row"):
        one.generate([images], ["which?"])


def test_text_before_the_image_would_be_lost_and_is_refused(c, mesh1):
    with jax.set_mesh(mesh1):
        stages.check(tiny.recipe(c))
        for template in ("vicuna_v1", "question_first"):
            other = tiny.config(compressor=SECTION, data=dict(template=template))
            with pytest.raises(ValueError, match=f"'{template}' writes text before .*bare"):
                stages.check(tiny.recipe(other))


def test_the_first_pass_is_paid_and_the_cache_is_small():
    voco = VocoMethod(tokens=2)
    none = compressor("none", 576)
    request = cost.request_flops(CLIP, voco, VICUNA, Q=60, G=9)
    whole = cost.request_flops(CLIP, none, VICUNA, Q=60, G=9)
    assert request.prefill == cost.llm_flops(VICUNA, 576 + 2 + 60) > whole.prefill
    assert request.compressor == whole.compressor
    assert request.decode == cost.decode_flops(VICUNA, context=62, G=9) < whole.decode
    asked = roofline.Request(60, 9)
    small, large = (roofline.memory(CLIP, of, VICUNA, asked) for of in (voco, none))
    assert large.cache - small.cache == 574 * 2 * roofline.cache_numbers(VICUNA)
    with pytest.raises(ValueError, match="cached_text=True: the text of compressor 'voco'"):
        cost.request_flops(CLIP, voco, VICUNA, Q=60, G=9, cached_text=True)
    with pytest.raises(ValueError, match="no text reads the patches of compressor.kind='voco'"):
        tiny.size(tiny.config(compressor=SECTION, pruning=dict(kind="fastv", layers=(1,),
                                                               tokens=(4,))))  # fmt: skip
