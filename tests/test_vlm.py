# SPDX-License-Identifier: Apache-2.0
"""The whole model against literal raster-order equations, and its two ways to read a row."""

import re

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import pytest
import tiny

from configs import sizes
from vlm_jax.cost import flops as cost
from vlm_jax.models import splice, vlm


@pytest.fixture(scope="module")
def c():
    return tiny.get_config()


@pytest.fixture(scope="module")
def born(c, mesh1, mesh8):
    """Fresh models of one seed on one device and on eight, by the number of devices."""
    made = {}
    for mesh in (mesh1, mesh8):
        with jax.set_mesh(mesh):
            made[mesh.size] = vlm.create(tiny.size(c), seed=0)
    return made


@pytest.fixture(scope="module")
def models(born):
    """The same weights on one device and on eight."""
    return {devices: tiny.roughened(model, scale=0.2) for devices, model in born.items()}


def logits_of(model, batch):
    return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


@pytest.fixture(scope="module")
def batch(c):
    return tiny.batch(c)


@pytest.fixture(scope="module")
def whole(models, batch, mesh1):
    """Logits of one full pass on one device."""
    with jax.set_mesh(mesh1):
        return logits_of(models[1], batch)


def row_of(batch, index):
    return {name: rows[index] for name, rows in batch.items()}


# --- Two roads to the same logits -----------------------------------------------------------------


@pytest.mark.parametrize("compressor", [
    dict(kind="token_packer", tokens=4), dict(kind="quecc", tokens=4, query="separate"),
], ids=lambda x: x["kind"])  # fmt: skip
def test_every_row_equals_the_literal_model_from_its_pixels(compressor, mesh1):
    # Raster order there, window-major here; one row at its own length there, padding here.
    c = tiny.config(compressor=compressor)
    batch = tiny.batch(c, rows=3, levels=False)
    with jax.set_mesh(mesh1):
        model = tiny.roughened(tiny.created(c), scale=0.2)
        ours = logits_of(model, batch)
    for index in range(3):
        row = row_of(batch, index)
        theirs = literal_models.vlm(model, row, c)
        assert theirs.std() > 0.5
        np.testing.assert_allclose(ours[index, 1 : row["length"]], theirs, atol=3e-4)


def test_cached_levels_in_raster_order_stand_for_their_pixels(c, models, mesh1):
    pixels = tiny.batch(c, levels=False)
    with jax.set_mesh(mesh1):
        levels = np.asarray(
            jax.jit(lambda m, x: m.vit(x))(models[1], tiny.placed(pixels["pixels"]))
        )
        cached = {k: v for k, v in pixels.items() if k != "pixels"} | dict(levels=levels)
        np.testing.assert_allclose(
            logits_of(models[1], cached), logits_of(models[1], pixels), atol=1e-4
        )


def test_eight_devices_give_the_logits_of_one(models, batch, whole, mesh8):
    with jax.set_mesh(mesh8):
        np.testing.assert_allclose(logits_of(models[8], batch), whole, atol=1e-4)


@pytest.mark.parametrize("devices", [1, 8])
def test_decoding_token_by_token_gives_the_teacher_forced_logits(
    devices, request, models, batch, whole
):
    # Prompts of eight different lengths, one without an image, go on with the tokens of their rows.
    new, every = 4, np.arange(8)
    assert len(set(batch["length"])) > 4 and batch["image_at"][0] == batch["ids"].shape[1]
    prompt = dict(batch, length=(batch["length"] - new).astype(np.int32))
    del prompt["loss_mask"]
    start = prompt["length"]
    # What stands behind the prompt is padding to the model: it must not matter.
    place = np.arange(batch["ids"].shape[1])
    prompt["ids"] = np.where(place < start[:, None], batch["ids"], 7).astype(np.int32)
    model = models[devices]
    with jax.set_mesh(request.getfixturevalue(f"mesh{devices}")):
        prefill = jax.jit(lambda m, b: m.prefill(b, new_tokens=new))
        decode = jax.jit(lambda m, *x: m.decode(*x), donate_argnums=2)
        logits, caches, position = prefill(model, tiny.placed(prompt))
        for step in range(new):
            np.testing.assert_allclose(logits, whole[every, start + step], atol=1e-4)
            ids = tiny.placed(batch["ids"][every, start + step])
            logits, caches = decode(model, ids, caches, position)
            position = position + 1
        assert decode._cache_size() == 1


def test_a_profile_names_phases_and_layers(c, models, mesh1):
    def names(run, *given):
        text = jax.jit(run).lower(*given).as_text(debug_info=True)
        places = re.findall(r'loc\("([^"]*/[^"]*)"', text)
        return {name for place in places for name in place.split("/")}

    with jax.set_mesh(mesh1):
        batch = tiny.placed(tiny.batch(c, levels=False))
        whole = names(lambda m, b: m.logits(b), models[1], batch)
        prompt = names(lambda m, b: m.prefill(b, new_tokens=1), models[1], batch)
    layers = {"encoder", "compressor", "splice", "embedding", "llm", "attention", "mlp", "logits"}
    assert layers <= whole and layers | {"prefill"} <= prompt


# --- What may reach what --------------------------------------------------------------------------


def test_a_row_without_an_image_does_not_see_one(models, batch, whole, mesh1):
    other = dict(batch, levels=batch["levels"] + 1)
    with jax.set_mesh(mesh1):
        changed = logits_of(models[1], other)
    length = batch["length"][0]
    np.testing.assert_array_equal(changed[0, :length], whole[0, :length])
    for row in range(1, 8):
        at, length = batch["image_at"][row], batch["length"][row]
        # Token `at` is the first whose scores are read from the image's last visual token.
        np.testing.assert_array_equal(changed[row, :at], whole[row, :at])
        if at > 0:
            assert np.abs(changed[row, at:length] - whole[row, at:length]).max(-1).min() > 1e-4


def test_no_gradient_reaches_the_encoder_or_behind_it(c, models, mesh1):
    batch = tiny.batch(c, levels=False)

    def picked(model, pixels, rest):
        out = model.logits(rest | dict(pixels=pixels))
        return jnp.where(rest["loss_mask"][..., None], out, 0).sum()

    with jax.set_mesh(mesh1):
        rest = tiny.placed(batch)
        by_weight, by_pixel = jax.jit(jax.grad(picked, (0, 1)))(models[1], rest.pop("pixels"), rest)
    for leaf in jax.tree.leaves(by_weight.vit):
        np.testing.assert_array_equal(leaf, 0)
    np.testing.assert_array_equal(by_pixel, 0)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(by_weight.compressor)) > 1e-3


def test_splicing_is_cutting_and_joining(models, mesh1):
    draw = np.random.default_rng(0)
    text, visual = (
        draw.normal(size=(5, 5, 3)).astype("f4"),
        draw.normal(size=(5, 2, 3)).astype("f4"),
    )
    at, count = np.array([0, 2, 4, 5, 1], np.int32), np.array([2, 1, 2, 0, 0], np.int32)
    with jax.set_mesh(mesh1):
        parts = tiny.placed((text, visual, count, at))
        batch = {"image_at": parts[3]}
        ours, inside, _ = splice.splice(parts[0], vlm.Visual(*parts[1:3]), batch)
    # Packed: visual slots that a row does not fill leave no hole.
    for row, t, v, n, i in zip(np.asarray(ours), text, visual, count, at, strict=True):
        np.testing.assert_array_equal(row[: len(t) + n], np.concatenate([t[:i], v[:n], t[i:]]))
    place = np.arange(7)
    np.testing.assert_array_equal(inside, (place >= at[:, None]) & (place < (at + count)[:, None]))


# --- Numbers --------------------------------------------------------------------------------------


def test_bfloat16_computes_near_float32_with_float32_parameters(c, batch, whole, models, mesh1):
    low = tiny.config(compute_dtype="bfloat16")
    with jax.set_mesh(mesh1):
        model = tiny.roughened(tiny.created(low), scale=0.2)
        out = jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch))
        hidden = jax.eval_shape(
            lambda m, ids: m.llm(m.llm.embed(ids)), model, tiny.placed(batch["ids"])
        )
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    assert hidden.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    seen = np.arange(whole.shape[1]) < batch["length"][:, None]
    error = np.abs(np.asarray(out) - whole)[seen]
    # 8 bits of mantissa through a few dozen products: some percent of the spread, never all of it.
    assert 1e-3 < error.mean() < 0.05 * whole[seen].std()


def test_a_seed_decides_the_weights_wherever_they_live(c, born, mesh1):
    with jax.set_mesh(mesh1):
        other, same = (tiny.created(c, seed=seed) for seed in (1, 0))
    for one, drawn in zip(*map(jax.tree.leaves, (born[1], same)), strict=True):
        np.testing.assert_array_equal(one, drawn)
    for one, eight, another in zip(*map(jax.tree.leaves, (born[1], born[8], other)), strict=True):
        np.testing.assert_allclose(one, eight, atol=1e-6)
        # Biases and the scales of norms start at one value.
        assert one.std() == 0 or not np.allclose(one, another)


@pytest.mark.parametrize("name", ["vicuna-1.5-7b", "qwen1.5-0.5b"])
def test_parameters_of_a_published_whole(name, mesh1):
    from configs import base

    c = base.get_config()
    c.llm.update(sizes.LLM[name])
    with jax.set_mesh(mesh1):
        shapes = vlm.shapes(tiny.size(c))
    size = tiny.size(c)
    parts = size.vit, size.compressor, size.llm
    assert vlm.parameters(shapes.vit) == cost.vit_parameters(parts[0])
    assert vlm.parameters(shapes.llm) == cost.llm_parameters(parts[2]) == sizes.LLM_PARAMETERS[name]
    assert vlm.parameters(shapes.compressor) == cost.compressor_parameters(
        parts[1], parts[0], parts[2]
    )


@pytest.mark.parametrize("change, words", [
    (dict(tokens=3), r"cannot make 3 visual tokens from a 4x4 patch grid: choose one of"),
    (dict(kind="squeeze"), "compressor.kind='squeeze': choose one of"),
    (dict(heads=3), "compressor.heads=3 does not divide vit.width=16"),
])  # fmt: skip
def test_impossible_compressors_are_refused_with_the_way_out(change, words, mesh1):
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=words):
        vlm.shapes(tiny.size(tiny.config(compressor=change)))


# --- A single row ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, tokens, kv_heads", [
    ("token_packer", 1, 2), ("quecc", 16, 1), ("pool", 1, 2), ("mqt", 1, 1), ("prumerge", 4, 2),
])  # fmt: skip
def test_one_row_is_trained_and_answered_like_many(kind, tokens, kv_heads, mesh1):
    """Only traced: of dimensions of one, shardings that a reshape guesses differ by release."""
    c = tiny.config(compressor=dict(kind=kind, tokens=tokens), llm=dict(kv_heads=kv_heads))
    batch = tiny.batch(c, rows=1, levels=False)

    def answer(model, batch):
        scores, caches, place = model.prefill(batch, new_tokens=2)
        return model.decode(jnp.argmax(scores, -1).astype(jnp.int32), caches, place)[0]

    with jax.set_mesh(mesh1):
        model, batch = vlm.shapes(tiny.size(c)), tiny.placed(batch)
        gradient = jax.eval_shape(jax.grad(lambda m, b: m.logits(b).sum()), model, batch)
        same = zip(jax.tree.leaves(gradient), jax.tree.leaves(model), strict=True)
        assert all(slope.shape == weight.shape for slope, weight in same)
        assert jax.eval_shape(answer, model, batch).shape == (1, c.llm.vocab)
