# SPDX-License-Identifier: Apache-2.0
"""PruMerge against its literal loop and published values, and models that read what it keeps."""

import math

import jax
import jax.numpy as jnp
import literal_models
import literal_prumerge
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from made_numbers import numbers

from vlm_jax.compressors.prumerge import most_outliers
from vlm_jax.compressors.prumerge.module import selected_first
from vlm_jax.models import vlm
from vlm_jax.models.vit import class_attention
from vlm_jax.models.vlm import VLM
from vlm_jax.rows import records
from vlm_jax.serving.decoder import Decoder
from vlm_jax.training import optimizer
from vlm_jax.training.objective import next_token

KINDS = ("prumerge", "prumerge_plus")


def built(kind, mesh, *, side, width=6, tokens=0):
    with jax.set_mesh(mesh):
        return tiny.compressor(kind, tokens=tokens, side=side, width=width, llm_width=width)


_compress = jax.jit(lambda module, *given: module.compress(*given))


def compress(module, *given):
    return jax.tree.map(np.asarray, _compress(module, *given))


# --- Two roads to the same tokens -----------------------------------------------------------------


@pytest.mark.parametrize("side", [4, 7, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_images_equal_the_literal_loop(kind, side, mesh1):
    module, seen = built(kind, mesh1, side=side), set()

    @settings(max_examples=25)
    @given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 0.3, 1.0, 3.0]))
    def check(seed, spread):
        draw = np.random.default_rng(seed)
        features, keys = draw.normal(size=(2, 2, side**2, 6)).astype("f4")
        # From attention that is the same everywhere to that of a few patches.
        attention = np.exp(spread * draw.normal(size=(2, side**2)))
        attention = (attention / (1 + attention.sum(1, keepdims=True))).astype("f4")
        with jax.set_mesh(mesh1):
            tokens, count = compress(module, features, keys, attention)
        assert tokens.shape[1] == module.tokens
        for row, n, *image in zip(tokens, count, features, keys, attention, strict=True):
            theirs = literal_prumerge.merged(*(x.astype("f8") for x in image), kind, 0)
            assert n == len(theirs) <= module.tokens
            np.testing.assert_allclose(row[:n], theirs, atol=1e-5)
            seen.add(int(n))

    check()
    assert 1 in seen and len(seen) > 3


# What the published code gave in float64: the seed of the inputs, outliers, tokens, mean, the first
# three numbers of one token and of the last.
@pytest.mark.parametrize("t, kind, k, tokens, mean, at, three, last", [
    (0, "prumerge", 65, 66, -0.005346753, 0, (0.109414, 0.940119, 0.745487),
     (-0.04092, -0.022626, -0.001471)),
    (0, "prumerge_plus", 65, 324, -0.012416089, 65, (-0.007278, 1.443817, 1.421391),
     (0.010513, -0.004634, -0.006462)),
    (1, "prumerge", 51, 52, -0.029901013, 0, (-0.83898, -1.790258, -0.804199), None),
    (1, "prumerge_plus", 51, 230, -0.000620137, 51, (1.31221, -0.345217, 1.463654), None),
])  # fmt: skip
def test_values_of_the_published_code(t, kind, k, tokens, mean, at, three, last, mesh1):
    width, x = 64, math.sqrt(3) * numbers(577 * 64, 2000 + t).reshape(577, 64)
    parts = [numbers(width**2, i).reshape(width, width) * math.sqrt(3 / width) for i in (0, 2)]
    key, query = (x @ w.T + 0.1 * numbers(width, i) for w, i in zip(parts, (1, 3), strict=True))
    x, key, query = (jnp.asarray(y, "f4")[None] for y in (x, key, query[0]))
    module = built(kind, mesh1, side=24, width=width)
    with jax.set_mesh(mesh1):
        found = compress(module, x[:, 1:], key[:, 1:], class_attention(query, key))
    (n,), (ours,) = found.count, found.tokens
    assert n == tokens and module.tokens >= n
    np.testing.assert_allclose(ours[:n].mean(), mean, atol=1e-6)
    np.testing.assert_allclose(ours[at, :3], three, atol=2e-6)
    if last:
        np.testing.assert_allclose(ours[n - 1, :3], last, atol=2e-6)
    # Without what is sampled the outliers are the same.
    assert kind == "prumerge_plus" or n == k + 1


# --- What is selected -----------------------------------------------------------------------------


# Of 576 patches: outliers -> the distance of what is sampled, and how many before overlap.
@pytest.mark.parametrize("kept, step, grid", [
    (12, 16, 36), (20, 9, 64), (21, 9, 64), (25, 7, 83), (27, 7, 83), (28, 6, 96), (32, 6, 96),
    (33, 5, 115), (39, 4, 144), (48, 4, 144), (49, 3, 192), (64, 3, 192), (65, 2, 288),
    (96, 2, 288), (97, 1, 575), (144, 1, 575),
])  # fmt: skip
def test_what_prumerge_plus_samples_beside_its_outliers(kept, step, grid, mesh1):
    attention = np.zeros(576, "f4")
    outliers = np.random.default_rng(kept).permutation(576)[:kept]
    attention[outliers] = 1 + np.arange(kept) / 1000
    module = built("prumerge_plus", mesh1, side=24)
    order, count = jax.jit(module.select)(attention)
    assert sorted(order.tolist()) == list(range(576))
    sampled = set(range(0, 575, step))
    assert len(sampled) == grid and count == len(sampled | set(outliers.tolist()))
    assert order[:kept].tolist() == outliers[::-1].tolist()
    assert set(order[kept:count].tolist()) == sampled - set(outliers.tolist())


@pytest.mark.parametrize("patches", [4, 16, 25, 36, 144, 576])
def test_no_image_has_more_outliers_than_there_are_slots(patches, mesh1):
    module = built("prumerge", mesh1, side=math.isqrt(patches))
    select, place = jax.jit(module.select), np.arange(patches)
    counts = [int(select((place >= patches - n).astype("f4"))[1]) for n in range(patches // 4 + 3)]
    assert max(counts) == most_outliers(patches) == module.tokens - 1


@pytest.mark.parametrize("first, rest", [
    ([5, 3, 3, 9], [1, 2, 4, 6, 7, 8, 10, 11]), ([5, 3, 9], [0, 1, 2, 4, 6, 7, 8, 10, 11]),
])  # fmt: skip
def test_a_patch_that_is_selected_twice_costs_the_first_that_is_not(first, rest):
    assert selected_first(jnp.array(first), 12).tolist() == first + rest


@pytest.mark.parametrize("kind, tokens, said", [
    ("prumerge", 17, r"cannot make 17 visual tokens from a 4x4 patch grid: .* 0 .*\[1, 2, .*16\]"),
    ("prumerge_plus", 4, r"'prumerge_plus' cannot make 4 .*\[3, 5, 7, 9, 11, 15\]"),
    ("prumerge_plus", -1, r"cannot make -1 visual tokens"),
])  # fmt: skip
def test_tokens_that_cannot_be_made_are_refused_with_the_choices(kind, tokens, said, mesh1):
    with pytest.raises(ValueError, match=said):
        built(kind, mesh1, side=4, tokens=tokens)


def test_attention_without_a_class_token_is_refused(mesh1):
    module, x = built("prumerge", mesh1, side=4), jnp.ones((1, 16, 6))
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="16 patches, but.* to 15: prumerge"):
        module.compress(x, x, class_attention(jnp.ones((1, 6)), x))


def test_features_that_were_made_for_another_method_are_refused(mesh1):
    with jax.set_mesh(mesh1):
        with pytest.raises(ValueError, match=r"prumerge reads 13 channels .*not 24: encode with"):
            built("prumerge", mesh1, side=4)(jnp.ones((1, 16, 24)))
        small = tiny.compressor("downsample", tokens=4, side=4, width=6, llm_width=6)
        with pytest.raises(ValueError, match="features of 16 patches.*tokens=4.*shrink=2"):
            small(jnp.ones((1, 16, 6)))


# --- In a model -----------------------------------------------------------------------------------


def model_of(c, mesh):
    with jax.set_mesh(mesh):
        return tiny.roughened(tiny.created(c), scale=0.2)


def logits_of(model, batch):
    return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


@pytest.fixture(scope="module", params=KINDS)
def case(request, mesh1):
    """A configuration, its model on one device, a batch of pixels, and its logits."""
    c = tiny.config(compressor=dict(kind=request.param, tokens=0))
    model, batch = model_of(c, mesh1), tiny.batch(c, levels=False)
    with jax.set_mesh(mesh1):
        return c, model, batch, logits_of(model, batch)


def test_every_row_equals_the_literal_model_at_its_own_length(case):
    # There each image has its own number of tokens and none is padded.
    c, model, batch, ours = case
    for index, out in enumerate(ours):
        row = {name: rows[index] for name, rows in batch.items()}
        theirs = literal_models.vlm(model, row, c)
        np.testing.assert_allclose(out[1 : row["length"]], theirs, atol=3e-4)


def test_images_of_a_batch_have_different_numbers_of_tokens(case, mesh1):
    c, model, batch, _ = case
    with jax.set_mesh(mesh1):
        count = jax.jit(lambda m, b: m.assemble(b)[1])(model, tiny.placed(batch)).tolist()
    assert count[0] == 0 and min(count[1:]) >= 1
    assert len(set(count[1:])) > 1


def test_cached_features_and_eight_devices_give_the_same_logits(case, mesh1, mesh8):
    c, model, batch, whole = case
    with jax.set_mesh(mesh1):
        levels = jax.jit(lambda m, x: m.vit(x, reads="keys"))(model, batch["pixels"])
    cached = {k: v for k, v in batch.items() if k != "pixels"} | dict(levels=np.asarray(levels))
    with jax.set_mesh(mesh1):
        np.testing.assert_allclose(logits_of(model, cached), whole, atol=1e-4)
    many = model_of(c, mesh8)
    with jax.set_mesh(mesh8):
        np.testing.assert_allclose(logits_of(many, batch), whole, atol=1e-4)


def test_what_fills_the_other_slots_is_never_seen(case, mesh1, monkeypatch):
    c, model, batch, whole = case
    made = type(model.compressor).__call__

    def spoilt(self, *given):
        out = made(self, *given)
        empty = jnp.arange(out.tokens.shape[1])[:, None] >= out.count[:, None, None]
        return out._replace(tokens=jnp.where(empty, 1e6, out.tokens))

    monkeypatch.setattr(type(model.compressor), "__call__", spoilt)
    with jax.set_mesh(mesh1):
        ours = logits_of(model, batch)
    for row, out, expected in zip(batch["length"], ours, whole, strict=True):
        np.testing.assert_allclose(out[:row], expected[:row], atol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_decoding_gives_the_teacher_forced_answer(devices, case, request, mesh1):
    c, model, batch, whole = case
    new, every, mesh = 3, np.arange(8), request.getfixturevalue(f"mesh{devices}")
    model = model if devices == 1 else model_of(c, mesh)
    prompt = dict(batch, length=(batch["length"] - new).astype(np.int32))
    del prompt["loss_mask"]
    with jax.set_mesh(mesh):
        prefill = jax.jit(lambda m, b: m.prefill(b, new_tokens=new))
        decode = jax.jit(lambda m, *x: m.decode(*x))
        logits, caches, position = prefill(model, tiny.placed(prompt))
        for step in range(new):
            at = prompt["length"] + step
            np.testing.assert_allclose(logits, whole[every, at], atol=1e-4)
            logits, caches = decode(model, tiny.placed(batch["ids"][every, at]), caches, position)
            position = position + 1


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_it_learns_and_answers(devices, case, request):
    c, _, batch, _ = case
    stage = c.finetune
    stage.learning_rate, stage.steps = 1e-2, 12
    with jax.set_mesh(request.getfixturevalue(f"mesh{devices}")):
        model, placed = tiny.created(c), tiny.placed(batch)
        before = jax.tree.map(np.asarray, model.vit)
        tx = optimizer.optimizer(tiny.stage(stage))
        graph, state = optimizer.start(model, "finetune", tx)
        step = optimizer.make_step(graph, tx, next_token, accumulate=1, z_loss=0.0)
        losses = []
        for _ in range(stage.steps):
            state, metrics = step(state, placed)
            losses.append(float(metrics.loss))
        trained: VLM = optimizer.finish(graph, state)
        answers = Decoder(trained, stop_ids=())(
            {k: v for k, v in placed.items() if k != "loss_mask"}, new_tokens=3
        )
    assert losses[-1] < 0.8 * losses[0] and answers.shape == (8, 3)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, trained.vit), before)


@pytest.mark.parametrize("change, said", [
    (dict(levels=(1, 3)), "keys of the block behind the last level.*raise vit.depth to 4"),
    (dict(class_token=False), "asks the class token which patches matter"),
])  # fmt: skip
def test_an_encoder_that_cannot_serve_it_is_refused_before_anything_is_run(change, said, mesh1):
    c = tiny.config(compressor=dict(kind="prumerge", tokens=0), vit=change)
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=said):
        vlm.shapes(tiny.size(c))


@pytest.mark.slow
def test_a_grid_with_images_that_choose_and_images_that_were_shrunk(tmp_path):
    folder, baselines = tmp_path / "run", (("prumerge", 0), ("prumerge_plus", 5), ("downsample", 4))
    done = tiny.run("grid", "--config=tests/one_size.py", "--config.grid.tokens=(1,)",
                    "--config.finetune.steps=2", "--config.align.steps=0",
                    "--config.encoder.steps=2",
                    f"--config.grid.baselines={baselines}", f"--workdir={folder}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row.compressor: row for row in records.read(folder / "rows.jsonl")}
    assert (rows["prumerge_plus"].V, rows["downsample"].V, rows["token_packer"].V) == (5, 4, 1)
    assert 1 <= rows["prumerge"].V <= most_outliers(16) + 1
    assert rows["downsample"].flops["encoder"] < rows["token_packer"].flops["encoder"]
    files = {path.name: np.load(path, mmap_mode="r") for path in folder.glob("features/test*.npy")}
    assert {name: x.shape[1:] for name, x in files.items()} == {
        "test.npy": (16, 32), "test-keys.npy": (16, 49), "test-shrink2.npy": (4, 32),
    }  # fmt: skip
    np.testing.assert_allclose(files["test-keys.npy"][..., :32], files["test.npy"], atol=1e-5)
