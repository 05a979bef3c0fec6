# SPDX-License-Identifier: Apache-2.0
"""Several images in a row of the model: spliced as by hand, absent ones change nothing.

B batch  M images of a row  V visual tokens
"""

import itertools

import jax
import literal_models
import numpy as np
import pytest
import tiny

from vlm_jax.compressors.compressor import Visual
from vlm_jax.models import splice, vlm

# Of every kind of compressor: windows, the question, as many tokens as an image needs, any number.
KINDS = {
    "token_packer": dict(kind="token_packer", tokens=4),
    "quecc": dict(kind="quecc", tokens=4, query="separate"),
    "prumerge": dict(kind="prumerge", tokens=0),
    "mqt": dict(kind="mqt", tokens=4),
}


def several(c, images, *, rows=8, seed=0):
    """A random batch with `images` [rows] images in each of its rows of two."""
    draw, made = np.random.default_rng(seed), tiny.batch(c, rows=rows, seed=seed, levels=False)
    text, side = c.data.text_length, c.vit.image_size
    at = np.sort(draw.integers(0, made["length"][:, None], (rows, 2)), axis=1)
    at[np.arange(2) >= np.array(images)[:, None]] = text
    asked = draw.integers(0, c.llm.vocab, (rows, 2, c.data.question_length))
    return made | dict(
        image_at=at.astype("i4"),
        pixels=draw.normal(size=(rows, 2, side, side, 3)).astype("f4"),
        question=asked.astype("i4"),
        question_length=draw.integers(1, 20, (rows, 2)).astype("i4"),
    )


OF_IMAGES = ("image_at", "pixels", "question", "question_length")
COUNTS = (2, 1, 0, 2, 2, 1, 2, 2)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, mesh1):
    """Configuration, model and batch of one compressor."""
    c = tiny.config(compressor=KINDS[request.param])
    with jax.set_mesh(mesh1):
        return c, tiny.roughened(tiny.created(c), scale=0.2), several(c, COUNTS)


LOGITS = jax.jit(lambda model, batch: model.logits(batch))


def logits_of(model, batch):
    return np.asarray(LOGITS(model, tiny.placed(batch)))


@pytest.fixture(scope="module")
def whole(kind, mesh1):
    with jax.set_mesh(mesh1):
        return logits_of(*kind[1:])


def test_splicing_is_cutting_and_joining_at_every_place(mesh1):
    """Places in any ascending order, side by side too, and images that fill none of their slots."""
    draw, rows = np.random.default_rng(0), []
    for at in itertools.combinations_with_replacement(range(5), 2):
        rows += [(at, count) for count in itertools.product((0, 1, 2), repeat=2)]
    at, count = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    text = draw.normal(size=(len(rows), 4, 3)).astype("f4")
    visual = draw.normal(size=(len(rows), 2, 2, 3)).astype("f4")
    count = np.where(at < 4, count, 0).astype("i4")
    with jax.set_mesh(mesh1):
        model = vlm.shapes(tiny.size(tiny.config()))
        placed = tiny.placed((text, visual.reshape(len(rows), 4, 3), count, at))
        read = dict(ids=placed[0][..., 0], image_at=placed[3])
        ours = np.asarray(splice.splice(placed[0], Visual(*placed[1:3]), read)[0])
        made = vlm.Assembled(placed[0], placed[2])
        before = np.asarray(model.before(read, made))
    for k, ((first, second), (m, n)) in enumerate(zip(at, count, strict=True)):
        row = np.concatenate([text[k, :first], visual[k, 0, :m], text[k, first:second],
                              visual[k, 1, :n], text[k, second:]])  # fmt: skip
        np.testing.assert_array_equal(ours[k, : len(row)], row)
        # Each text token stands one behind the place that is said.
        for token in range(1, 4):
            place = before[k, token] + 1
            np.testing.assert_array_equal(ours[k, place], text[k, token])


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"mqt"}), indirect=True)
def test_two_images_are_the_row_that_is_spliced_by_hand(kind, whole):
    c, model, batch = kind
    for index in range(4):
        row = {name: values[index] for name, values in batch.items()}
        theirs = literal_models.vlm(model, row, c)
        assert theirs.std() > 0.3
        np.testing.assert_allclose(whole[index, 1 : row["length"]], theirs, atol=5e-4)


def test_an_image_that_is_not_there_changes_nothing(kind, mesh1):
    c, model, batch = kind
    first = {name: values[:, 0] if name in OF_IMAGES else values for name, values in batch.items()}
    padded = dict(batch, image_at=np.stack([first["image_at"], np.full(8, 32, "i4")], 1))
    with jax.set_mesh(mesh1):
        one, two = logits_of(model, first), logits_of(model, padded)
        # Whatever stands in for it.
        pixels = padded["pixels"] * np.array([1, 7], "f4").reshape(2, 1, 1, 1)
        other = logits_of(model, padded | dict(pixels=pixels))
    seen = np.arange(32) < batch["length"][:, None]
    np.testing.assert_allclose(two[seen], one[seen], atol=2e-5)
    np.testing.assert_array_equal(other[seen], two[seen])


def test_each_image_is_seen_from_its_place_on_and_their_order_matters(kind, whole, mesh1):
    c, model, batch = kind
    with jax.set_mesh(mesh1):
        swapped = logits_of(model, batch | dict(pixels=batch["pixels"][:, ::-1]))
    for row, images in enumerate(COUNTS):
        first, length = batch["image_at"][row, 0], batch["length"][row]
        np.testing.assert_array_equal(swapped[row, :first], whole[row, :first])
        gap = np.abs(swapped[row, first:length] - whole[row, first:length])
        assert images == 0 or gap.max() > 1e-3
    pixels = batch["pixels"] + np.array([0, 1], "f4").reshape(2, 1, 1, 1)
    with jax.set_mesh(mesh1):
        later = logits_of(model, batch | dict(pixels=pixels))
    for row in range(8):
        second = batch["image_at"][row, 1]
        np.testing.assert_array_equal(later[row, :second], whole[row, :second])


def test_other_company_gives_the_same(kind, whole, mesh1):
    _, model, batch = kind
    turned = {name: np.roll(values, 3, axis=0) for name, values in batch.items()}
    with jax.set_mesh(mesh1):
        np.testing.assert_allclose(np.roll(logits_of(model, turned), -3, axis=0), whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["quecc"], indirect=True)
def test_eight_devices_give_the_logits_of_one(kind, whole, mesh8):
    c, _, batch = kind
    seen = np.arange(32) < batch["length"][:, None]
    with jax.set_mesh(mesh8):
        many = tiny.roughened(tiny.created(c), scale=0.2)
        np.testing.assert_allclose(logits_of(many, batch)[seen], whole[seen], atol=1e-4)


@pytest.mark.parametrize("kind", ["prumerge"], indirect=True)
def test_decoding_goes_on_behind_every_image_on_eight_devices(kind, mesh8):
    c, _, batch = kind
    new, every = 3, np.arange(8)
    start = (batch["length"] - new).astype("i4")
    # What is cut off the end of a row takes its images along.
    at = np.where(batch["image_at"] < start[:, None], batch["image_at"], 32).astype("i4")
    prompt = {k: v for k, v in batch.items() if k != "loss_mask"}
    prompt |= dict(image_at=at, length=start)
    with jax.set_mesh(mesh8):
        model = tiny.roughened(tiny.created(c), scale=0.2)
        expected = logits_of(model, prompt | dict(length=batch["length"]))
        prefill = jax.jit(lambda m, b: m.prefill(b, new_tokens=new))
        decode = jax.jit(lambda m, *x: m.decode(*x), donate_argnums=2)
        logits, caches, position = prefill(model, tiny.placed(prompt))
        for step in range(new):
            np.testing.assert_allclose(logits, expected[every, start + step], atol=1e-4)
            ids = tiny.placed(batch["ids"][every, start + step])
            logits, caches = decode(model, ids, caches, position)
            position = position + 1


@pytest.mark.parametrize("kind", ["mqt"], indirect=True)
def test_a_limit_holds_for_each_image(kind, whole, mesh1):
    _, model, batch = kind
    limit = np.array([1, 4] * 4, "i4")
    with jax.set_mesh(mesh1):
        limited, one = logits_of(model, batch | dict(limit=limit)), logits_of(model.at(1), batch)
    seen = np.arange(32) < batch["length"][:, None]
    expected = np.where(limit[:, None, None] == 1, one, whole)
    np.testing.assert_allclose(limited[seen], expected[seen], atol=2e-5)
