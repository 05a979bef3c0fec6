# SPDX-License-Identifier: Apache-2.0
"""Fwd2Bot: outputs of the LLM at the summary tokens stand for the image, in all that is done."""

import dataclasses

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import pytest
import tiny
from flax import nnx
from test_cost import CLIP, VICUNA, WIDE_LLM, compressor, flops, shape
from test_engine_models import check, small
from test_generate import PROMPTS, made

import vlm_jax
from vlm_jax import mesh as meshes
from vlm_jax.compressors.fwd2bot import Fwd2BotMethod
from vlm_jax.compressors.method import Interface
from vlm_jax.cost import flops as cost
from vlm_jax.cost import roofline
from vlm_jax.models.llm import LLM
from vlm_jax.models.sizes import LLMSize
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.training.objective import next_token

V, P = 3, 16
SECTION = dict(kind="fwd2bot", tokens=V)


@pytest.fixture(scope="module")
def c():
    return tiny.config(compressor=SECTION)


@pytest.fixture(scope="module")
def model(c, mesh1):
    with jax.set_mesh(mesh1):
        return tiny.roughened(tiny.created(c), scale=0.2)


def logits_of(model, batch):
    return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


def two_passes(weights, seen, before, after, scale, c):
    """Hidden states of a row: the first pass reads an image alone, the second its V outputs."""
    tokens = scale * literal_models.llm(weights, seen, c)[-V:]
    return literal_models.llm(weights, np.concatenate([before, tokens, after]), c)


def test_a_model_is_two_passes_of_its_llm(model, c, mesh1):
    batch = tiny.batch(c, rows=4)
    with jax.set_mesh(mesh1):
        ours = logits_of(model, batch)
        seen = np.asarray(jax.jit(lambda m, b: m.compressor(m.levels(b)))(
            model, tiny.placed(batch)), np.float64)  # fmt: skip
    weights, scale = literal_models.of(model.llm), float(model.compressor.scale[...][0])
    assert seen.shape[1] == P + V and np.abs(seen[0, P] - seen[0, P + 1]).max() > 0.1
    for row in range(4):
        at, length = int(batch["image_at"][row]), int(batch["length"][row])
        text = weights["embedding"][batch["ids"][row, :length]]
        if at >= length:  # without an image: one causal pass
            hidden = literal_models.llm(weights, text, c)
            scores = literal_models.unembed(weights, hidden[:-1])
            np.testing.assert_allclose(ours[row, 1:length], scores, atol=3e-4)
            continue
        hidden = two_passes(weights, seen[row], text[:at], text[at:], scale, c)
        scores = literal_models.unembed(weights, hidden)
        np.testing.assert_allclose(ours[row, 1:at], scores[: max(at - 1, 0)], atol=3e-4)
        np.testing.assert_allclose(ours[row, at:length], scores[at + V - 1 : -1], atol=3e-4)


def test_both_passes_have_gradients(model, c, mesh1):
    """The slope of the loss along a direction in all weights, which the LLM's two passes share."""
    batch = tiny.batch(c, rows=4)

    def loss(parts, batch):
        sums = next_token(VLM(model.vit, *parts), batch)
        return sums.nll / batch["loss_mask"].sum()

    with jax.set_mesh(mesh1):
        placed, parts = tiny.placed(batch), (model.compressor, model.llm)
        value, draw = jax.jit(jax.value_and_grad(loss)), np.random.default_rng(0)
        _, found = value(parts, placed)
        for name, gradient in literal_models.of(found[0]).items():
            assert np.abs(gradient).max() > 1e-7, name
        along = jax.tree.map(lambda x: draw.normal(size=x.shape).astype("f4") * 1e-3, parts)
        slope = sum(
            float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (found, along)), strict=True)
        )
        low, high = (
            float(value(jax.tree.map(lambda x, d, s=s: x + s * d, parts, along), placed)[0])
            for s in (-1, 1)
        )
    assert (high - low) / 2 == pytest.approx(slope, rel=0.02, abs=1e-5)


@pytest.fixture(scope="module")
def path(trained, tmp_path_factory):
    return made(tmp_path_factory.mktemp("fwd2bot") / "model", trained, compressor=SECTION)


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(3)]


def test_a_request_gets_the_same_tokens_in_any_company(path, images, mesh1, mesh8):
    one, many = (vlm_jax.VLM.from_checkpoint(path, mesh=mesh) for mesh in (mesh1, mesh8))
    pictures, prompts = [*images[:2], None, images[:2]], PROMPTS[:4]
    together, spread = (m.generate(pictures, prompts, max_new_tokens=4) for m in (one, many))
    assert [a.visual_tokens for a in together] == [V, V, 0, 2 * V]  # several images too
    for image, prompt, a, b in zip(pictures, prompts, together, spread, strict=True):
        assert a.ids == b.ids == one.generate([image], [prompt], max_new_tokens=4)[0].ids
    assert len({tuple(a.ids) for a in together}) > 2
    with pytest.raises(ValueError, match=f"trained for {V} visual tokens, not 2"):
        one.generate(images[0], "b", visual_tokens=2)


def test_v_vectors_are_all_that_an_engine_keeps_of_an_image(path, images, mesh1):
    model = vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)
    engine = small(model)
    answers = check(engine, model, images[:2], "what is this?")
    assert all(answer.usage.reused_image_tokens == V for answer in answers)
    held = engine.index
    assert (len(held.images.values), held.images.bytes) == (2, 2 * V * model.width * 4)
    assert engine.drain(60.0)


@pytest.mark.slow
def test_pruning_leaves_some_of_the_v_tokens_out(path, images, mesh1):
    """It goes with it as with any compressor; the first pass reads all patches."""
    whole = vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)
    kept = vlm_jax.VLM.from_checkpoint(path, mesh=mesh1, pruning=f"fastv:layers=1:tokens={V}")
    less = vlm_jax.VLM.from_checkpoint(path, mesh=mesh1, pruning="fastv:layers=1:tokens=1")
    answers = [m.generate(images, PROMPTS[:3], max_new_tokens=4) for m in (whole, kept, less)]
    same, *others = [[a.ids for a in some] for some in answers]
    assert same == others[0] != others[1]


@pytest.mark.parametrize("tokens", [0, 17])
def test_a_v_beyond_the_patches_is_refused(tokens):
    with pytest.raises(ValueError, match=f"cannot make {tokens} visual tokens from a 4x4 patch"):
        tiny.size(tiny.config(compressor=dict(kind="fwd2bot", tokens=tokens)))


def test_a_packed_row_is_its_examples_one_by_one(model, c, mesh1):
    """Images are condensed alone, so that rows of several examples need no other mask."""
    batch = {k: x[1:] for k, x in tiny.batch(c, rows=3).items()}  # the first has no image
    lengths = batch["length"]
    assert (batch["image_at"] < lengths).all()
    total = int(lengths.sum()) + 2 * V
    packed = dict(
        ids=np.concatenate([x[:n] for x, n in zip(batch["ids"], lengths, strict=True)])[None],
        segment=np.repeat([1, 2], lengths)[None],
        image_at=(batch["image_at"] + [0, lengths[0]])[None],
        image_segment=np.array([[1, 2]]),
        levels=batch["levels"][None],
    )
    for name in ("ids", "segment"):
        packed[name] = np.pad(packed[name], [(0, 0), (0, total - packed[name].shape[1])])
    packed = {k: x.astype(np.float32 if k == "levels" else np.int32) for k, x in packed.items()}
    with jax.set_mesh(mesh1):
        alone, together = logits_of(model, batch), logits_of(model, packed)
    start = 0
    for row, n in enumerate(lengths):
        ours = together[0, start + 1 : start + n]
        np.testing.assert_allclose(ours, alone[row, 1:n], atol=1e-4)
        start += n


def test_the_first_pass_is_paid_and_the_row_is_short(mesh1):
    method = Fwd2BotMethod(tokens=2)
    short, whole = (
        cost.request_flops(CLIP, of, VICUNA, Q=60, G=9) for of in (method, compressor("none", 576))
    )
    alone = cost.llm_flops(VICUNA, 576 + 2, logits=0)
    assert short.compressor == whole.compressor + alone
    assert short.prefill == cost.llm_flops(VICUNA, 62) < whole.prefill / 9
    assert short.decode == cost.decode_flops(VICUNA, context=62, G=9)
    assert cost.request_flops(CLIP, method, VICUNA, Q=60, G=9, frames=3).compressor == (
        3 * short.compressor
    )
    asked = roofline.Request(60, 9)
    assert roofline.passes(method, asked)["compressor"] == 1
    moved = roofline.request_bytes(CLIP, method, VICUNA, asked)["compressor"]
    assert moved > 2 * (cost.llm_parameters(VICUNA) - 2 * VICUNA.vocab * VICUNA.width)
    need = roofline.memory(CLIP, method, VICUNA, asked)
    assert need.cache == (62 + 9) * 2 * roofline.cache_numbers(VICUNA)
    assert need.activations == roofline.live_bytes(CLIP, method, VICUNA, 62, 2)[0]


def test_flops_are_the_compilers(mesh1):
    """Of what the model runs for an image, in a model of one layer; the compiler counts one."""
    llm, between = LLMSize.of(WIDE_LLM), Interface(8, 1024, 1, LLMSize.of(WIDE_LLM).width)
    method = Fwd2BotMethod(tokens=4)
    vit = dataclasses.replace(CLIP, image_size=112, patch_size=14)
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: VLM(
            ViT(vit, rngs=nnx.Rngs(0)), method.build(between, rngs=nnx.Rngs(0)),
            LLM(llm, rngs=nnx.Rngs(0))))  # fmt: skip
        got = flops(lambda model, levels: model.compress(levels, None), model, shape(1, 64, 1024))
    counted = cost.compressor_flops(method, vit, llm) + cost.condensing_flops(method, vit, llm)
    assert llm.depth == 1 and got == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_a_step_pays_both_passes(stage):
    method, none = Fwd2BotMethod(tokens=4), compressor("pool", 4)
    how = dict(vit=CLIP, tokens=70, stage=stage, logits=10)
    more = cost.train_step_flops(True, method, VICUNA, **how)
    more -= cost.train_step_flops(True, none, VICUNA, **how)
    alone = cost.llm_flops(VICUNA, 580, logits=0)
    assert (2 if stage == "align" else 2.9) * alone < more < 3.2 * alone


def test_it_is_made_and_read_again_bit_by_bit(path, mesh1):
    with jax.set_mesh(meshes.make(devices=jax.devices()[:1])):
        once, twice = (tiny.model_of(path) for _ in range(2))
    assert once.compressor.tokens == V and once.compressor.method == Fwd2BotMethod(tokens=V)
    for a, b in zip(*map(jax.tree.leaves, (once, twice)), strict=True):
        assert jnp.array_equal(a, b)
