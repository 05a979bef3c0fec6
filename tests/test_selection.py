# SPDX-License-Identifier: Apache-2.0
"""Each selection against its literal form, published values, and what a wrong constant changes."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import literal_selection as literal
import numpy as np
import published_selection
import pytest
from made_numbers import numbers
from test_published_compressors import largest_error, read

import vlm_jax.compressors.cdpruner.module as cdpruner
import vlm_jax.compressors.divprune.module as divprune
import vlm_jax.compressors.mmtok.module as mmtok
import vlm_jax.compressors.random.module as random
import vlm_jax.compressors.uniform.module as uniform
import vlm_jax.compressors.visionzip.module as visionzip
import vlm_jax.compressors.vispruner.module as vispruner
from vlm_jax.compressors.hashing import fmix, halves, image_ids, joined
from vlm_jax.compressors.visionzip import VisionZipMethod
from vlm_jax.models.vit import head_attention

CASES = Path(__file__).parent / "published/methods"


def made(t, *shape):
    """The deterministic numbers of place `t`, of variance one."""
    return (math.sqrt(3) * numbers(math.prod(shape), t)).reshape(shape).astype(np.float32)


def compiled(one, *arrays, **static):
    """`one` of each image."""
    return np.asarray(jax.jit(jax.vmap(functools.partial(one, **static)))(*arrays))


# --- Published values -----------------------------------------------------------------------------

X16, X, Q, K = made(3003, 16, 8), *(made(t, 17, 8) for t in (3000, 3001, 3002))


def attention_of(queries, keys, heads=2):
    return head_attention(jnp.array(queries[None, 0]), jnp.array(keys[None]), heads)[0]


def test_visionzip_gives_the_published_values(mesh1):
    with jax.set_mesh(mesh1):
        attention = attention_of(Q, K)
    tokens, dominant = visionzip.zipped(
        jnp.array(X), jnp.array(K.reshape(17, 2, 4).mean(1)), attention, 3, 2
    )
    assert dominant.tolist() == [0, 1, 16]
    assert tokens.mean() == pytest.approx(0.317849882, abs=1e-6)
    assert tokens.std() == pytest.approx(0.890301405, abs=1e-6)
    np.testing.assert_allclose(tokens[0, :3], [0.790535, -0.434595, 0.217021], atol=1e-5)
    np.testing.assert_allclose(tokens[4, -3:], [-0.571084, -0.180964, 0.763225], atol=1e-5)


@pytest.mark.parametrize(
    "count, ratio, places",
    [(10, 0.2, [0, 1, 2, 3, 5, 10, 11, 13, 14, 15]), (4, 1.0, [0, 5, 12, 15])],
)
def test_vispruner_gives_the_published_values(count, ratio, places, mesh1):
    with jax.set_mesh(mesh1):
        attention = attention_of(Q, K)
    found = vispruner.select(jnp.array(X16), attention, count=count, ratio=ratio)
    assert sorted(found.tolist()) == places


def test_divprune_cdpruner_and_mmtok_give_the_published_values():
    assert divprune.select(jnp.array(X16), 5).tolist() == [9, 5, 12, 6, 14]
    weights = cdpruner.relevance(jnp.array(made(3005, 16, 4)), jnp.array(made(3006, 1, 4)))
    order = cdpruner.select(jnp.array(X16), weights, count=5)
    assert order.tolist() == [8, 12, 11, 5, 14]
    order = mmtok.select(
        jnp.array(X16),
        jnp.array(made(3007, 16, 6)),
        jnp.array(made(3004, 2, 8)),
        jnp.ones(2, bool),
        jnp.zeros(16, bool),
        count=5,
    )
    assert order.tolist() == [12, 8, 7, 14, 3]


def test_random_and_uniform_give_the_published_values():
    assert int(fmix(jnp.uint32(1))) == 0x514E28B7
    drawn = [[5, 11, 12, 13, 15], [2, 3, 8, 11, 14], [0, 2, 8, 10, 14], [1, 5, 10, 13, 15]]
    for image, places in enumerate(drawn):
        found = random.select(jnp.uint32(image), seed=7, patches=16, count=5)
        assert sorted(found.tolist()) == places
    lines = {
        1: [300],
        2: [294, 306],
        4: [150, 162, 438, 450],
        5: [150, 162, 436, 444, 452],
        9: [100, 108, 116, 292, 300, 308, 484, 492, 500],
    }
    for count, places in lines.items():
        assert uniform.grid(24, 24, count).tolist() == places
    assert uniform.grid(24, 24, 16)[[0, 1, 2, 3, 4, -1]].tolist() == [75, 81, 87, 93, 219, 525]


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (6, 4), (24, 24)])
def test_uniform_places_are_different_for_every_number(rows, columns):
    for count in range(1, rows * columns + 1):
        places = uniform.grid(rows, columns, count)
        assert len(places) == count and (np.diff(places) > 0).all()
        assert 0 <= places[0] and places[-1] < rows * columns


def test_visionzip_splits_as_published():
    splits = {64: (54, 10), 128: (108, 20), 192: (162, 30), 1: (1, 0), 2: (1, 1), 9: (8, 1)}
    assert {V: VisionZipMethod.split(V) for V in splits} == splits


def test_the_release_of_vispruner_rounds_its_share_down_in_floating_point():
    assert vispruner.VisPrunerMethod.important(100, 0.29) == 28


# --- Literal forms --------------------------------------------------------------------------------

IMAGES, PATCHES = 6, 30


@pytest.fixture(scope="module")
def images():
    """Tokens, features, keys, words and attention of some images, no two patches alike."""
    draw = np.random.default_rng(4)
    normal = lambda *shape: draw.normal(size=(IMAGES, *shape)).astype("f4")  # noqa: E731
    attention = literal.softmax(normal(PATCHES)).astype("f4")
    return normal(PATCHES, 40), normal(PATCHES + 1, 12), normal(PATCHES + 1, 6), normal(4, 40), (
        attention
    )  # fmt: skip


def exact(*arrays):
    return [x.astype(np.float64) for x in arrays]


@pytest.mark.parametrize("count", [1, 7, PATCHES])
def test_divprune_is_the_literal_one(count, images):
    found = compiled(divprune.select, images[0], count=count)
    assert found.tolist() == [literal.divprune(x, count) for x in exact(images[0])[0]]


@pytest.mark.parametrize("count, contextual", [(1, 0), (2, 1), (9, 3), (PATCHES, 5)])
def test_visionzip_is_the_literal_one(count, contextual, images):
    _, features, keys, _, attention = images
    parts = (count - contextual, contextual)
    zipped = jax.jit(jax.vmap(lambda *x: visionzip.zipped(*x, *parts)))
    tokens, dominant = zipped(features, keys, attention)
    for k, image in enumerate(zip(*exact(features, keys, attention), strict=True)):
        theirs, chosen = literal.visionzip(*image, *parts)
        np.testing.assert_allclose(tokens[k], theirs, atol=1e-5)
        assert dominant[k].tolist() == chosen


@pytest.mark.parametrize(
    "count, ratio", [(1, 0.5), (2, 0.5), (3, 0.0), (7, 0.5), (11, 0.3), (6, 1.0), (29, 0.5)]
)
def test_vispruner_is_the_literal_one_at_every_number(count, ratio, images):
    features, attention = images[1][:, 1:], images[4]
    found = compiled(vispruner.select, features, attention, count=count, ratio=ratio)
    theirs = [
        literal.vispruner(*image, count, ratio)
        for image in zip(*exact(features, attention), strict=True)
    ]
    assert np.sort(found).tolist() == theirs


@pytest.mark.parametrize("count", [1, 9, PATCHES])
def test_cdpruner_is_the_literal_one(count, images):
    tokens, features, _, words, _ = images
    patches, texts = features[:, 1:], words[:, :2, :12]

    def one(tokens, patches, texts):
        return cdpruner.select(tokens, cdpruner.relevance(patches, texts), count=count)

    found = compiled(one, tokens, patches, texts)
    theirs = [
        literal.cdpruner(x, literal.relevance(y, z), count)
        for x, y, z in zip(*exact(tokens, patches, texts), strict=True)
    ]
    assert found.tolist() == theirs


def test_alike_patches_are_chosen_once_each_and_from_the_first():
    same = jnp.ones((6, 3))
    everywhere = list(range(6))
    assert divprune.select(same, 6).tolist() == everywhere
    weights = cdpruner.relevance(same, jnp.ones((1, 3)))
    assert sorted(cdpruner.select(same, weights, count=6).tolist()) == everywhere
    alike = mmtok.select(same, same, same[:2], jnp.ones(2, bool), jnp.zeros(6, bool), count=6)
    assert alike.tolist() == everywhere
    three = jnp.tile(X16[:6], (3, 1))
    assert len(set(divprune.select(three, 8).tolist())) == 8  # the release repeats patch 3


@pytest.mark.parametrize("count", [1, 8, 25])
def test_mmtok_is_the_literal_one_and_words_that_do_not_count_change_nothing(count, images):
    tokens, features, _, words, _ = images
    features = features[:, 1:]
    draw = np.random.default_rng(5)
    excluded = draw.random((IMAGES, PATCHES)) < 0.3  # 25 is more than what is left
    lengths = np.array([1, 2, 3, 4, 4, 2])
    real = np.arange(4) < lengths[:, None]
    words = np.where(real[..., None], words, 9)
    found = compiled(mmtok.select, tokens, features, words, real, excluded, count=count)
    theirs = [
        literal.mmtok(x, y, z[:n], out, count)
        for x, y, z, n, out in zip(*exact(tokens, features, words), lengths, excluded, strict=True)
    ]
    assert found.tolist() == theirs


@pytest.mark.parametrize(
    "width, height, lines", [(640, 480, 3), (480, 640, 3), (300, 300, 0), (1000, 10, 11)]
)
def test_mmtok_excludes_the_patches_of_the_padding(width, height, lines):
    outside = mmtok.padding(jnp.array([width, height]), side=24, patch=14).reshape(24, 24)
    across = outside if width > height else outside.T
    assert across.all(1).sum() == across.any(1).sum() == 2 * lines
    assert not across[lines : 24 - lines].any()


def test_random_is_the_literal_one_and_nested():
    ids = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32)
    found = compiled(random.select, ids, seed=2**32 - 1, patches=50, count=50)
    assert found.tolist() == [literal.random(int(i), 2**32 - 1, 50, 50) for i in ids]
    few = compiled(random.select, ids, seed=2**32 - 1, patches=50, count=7)
    assert few.tolist() == found[:, :7].tolist()


def test_an_images_number_is_that_of_its_pixels_and_two_floats_hold_it():
    pixels = np.random.default_rng(6).normal(size=(3, 4, 4, 3)).astype("f4")
    pixels[2] = pixels[0][::-1]  # the same numbers elsewhere
    ids = image_ids(jnp.array(pixels))
    assert len(set(ids.tolist())) == 3
    assert image_ids(jnp.array(pixels[1:])).tolist() == ids[1:].tolist()
    assert joined(halves(ids)).tolist() == ids.tolist()


# --- A wrong constant is caught -------------------------------------------------------------------

WRONG = [
    ("mmtok_many", dict(text_temperature=0.05)),
    ("mmtok_many", dict(vision_temperature=0.25)),
    ("mmtok_many", dict(alpha=1.0)),
    ("vispruner_many", dict(important_ratio=0.4)),
    ("vispruner_many", dict(heads=1)),
    ("visionzip_many", dict(dominant=3, contextual=4)),
    ("visionzip_many", dict(heads=1)),
    ("random_b", dict(selection_seed=1)),
]


@pytest.mark.parametrize("stem, change", WRONG, ids=str)
def test_a_wrong_number_in_a_case_is_caught(stem, change, mesh1):
    meta, state, inputs, outputs = read(CASES / f"{stem}.npz")
    with jax.set_mesh(mesh1):
        ours = published_selection.RUNS[meta["method"]](meta | change, state, inputs)
    wrong = any(not np.array_equal(ours[k], outputs[k]) for k in outputs if "indices" in k)
    assert wrong or np.abs(ours["tokens"] - outputs["tokens"]).max() > published_selection.GATE


relevance = cdpruner.relevance


@pytest.mark.parametrize(
    "stem, module, name, wrong",
    [
        ("cdpruner_many", cdpruner, "relevance", lambda v, t: relevance(v, -t)),
        ("cdpruner_many", cdpruner, "LEAST", 0.3),
        ("cdpruner_many", cdpruner, "relevance", lambda v, t: jnp.ones(len(v))),
        ("vispruner_many", vispruner, "DROPPED", 7),
        ("divprune_many", divprune, "unit", lambda x: x),
        ("visionzip_many", visionzip, "unit", lambda x: x),
        ("random_b", random, "INDEX", random.GOLDEN),
    ],
)
def test_a_wrong_constant_of_ours_is_caught(stem, module, name, wrong, mesh1, monkeypatch):
    monkeypatch.setattr(module, name, wrong)
    with jax.set_mesh(mesh1):
        assert largest_error(*read(CASES / f"{stem}.npz")) > published_selection.GATE


@pytest.mark.parametrize("stem", ["pixel_unshuffle_a", "cdpruner_b"])
def test_a_wrong_weight_is_caught(stem, mesh1):
    meta, state, inputs, outputs = read(CASES / f"{stem}.npz")
    draw = np.random.default_rng(0)
    with jax.set_mesh(mesh1):
        for name, value in state.items():
            off = value + draw.normal(scale=0.5, size=value.shape).astype("f4")
            assert largest_error(meta, state | {name: off}, inputs, outputs) > 1e-5, name
