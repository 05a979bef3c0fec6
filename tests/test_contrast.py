# SPDX-License-Identifier: Apache-2.0
"""The encoder's second objective against its formula, cut in any way, and as a stage."""

import operator

import jax
import made_pictures
import numpy as np
import pytest
import tiny
from scipy.special import log_softmax

from vlm_jax import mesh
from vlm_jax.data import patches
from vlm_jax.data.benchmark import things
from vlm_jax.training import contrast, objective, stages
from vlm_jax.training.workdir import claim

NAMES = (("red", "apple"), ("apple",), ("old", "red", "star"))
KNOWN = contrast.vocabulary(NAMES)
WIDTH = 6


@pytest.fixture(scope="module")
def batch():
    c = tiny.get_config()
    side, draw = c.vit.image_size // c.vit.patch_size, np.random.default_rng(0)
    return dict(
        pixels=draw.normal(size=(8, *[c.vit.image_size] * 2, 3)).astype("f4"),
        ids=draw.integers(0, 5, (8, side**2)).astype("i4"),
        loss_mask=draw.random((8, side**2)) < 0.5,
        names=draw.integers(0, len(NAMES) + 1, (8, side**2)).astype("i4"),
    )


def made():
    c = tiny.get_config()
    return contrast.name_reader(tiny.size(c), 5, len(KNOWN), WIDTH, seed=c.seed)


def test_a_bag_has_the_words_that_are_known():
    assert KNOWN == ("apple", "old", "red", "star")
    bags = contrast.bags((*NAMES, ("new", "star"), ("new",)), KNOWN)
    none = len(KNOWN)
    assert bags.dtype == np.int32 and bags.tolist() == [
        [2, 0, none], [0, none, none], [1, 2, 3], [none, 3, none], [none] * 3
    ]  # fmt: skip
    assert contrast.bags((), KNOWN).shape == (0, 0)


@pytest.fixture(scope="module")
def model(mesh1):
    with jax.set_mesh(mesh1):
        return made()


def test_sums_equal_their_formulas_patch_by_patch(model, batch, mesh1):
    share = 0.5
    bags = contrast.bags((*NAMES, ("new",)), KNOWN)
    with jax.set_mesh(mesh1):
        ours = jax.jit(contrast.patch_class_and_name(bags, share))(model, tiny.placed(batch))
        shown = jax.jit(objective.patch_class)(model.patches, tiny.placed(batch))
        levels = np.asarray(jax.jit(lambda m, x: m.vit(x))(model, tiny.placed(batch["pixels"])))
    seen = levels @ np.asarray(model.project.kernel[...]) + np.asarray(model.project.bias[...])
    table = np.asarray(model.embedding[...])
    texts = np.stack([*(table[[KNOWN.index(w) for w in words]].sum(0) for words in NAMES)])
    seen /= np.linalg.norm(seen, axis=-1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    # A name of unknown words alone is at right angles to all patches.
    near = np.concatenate([seen @ texts.T, np.zeros((*seen.shape[:2], 1))], -1)
    nll = -log_softmax(near / contrast.TEMPERATURE, -1)
    named = batch["names"] > 0
    chosen = np.take_along_axis(nll, np.maximum(batch["names"] - 1, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(ours.nll, shown.nll + share * chosen[named].sum(), rtol=1e-4)
    np.testing.assert_array_equal(ours[1:], shown[1:])


def test_eight_devices_have_the_sums_of_one(model, batch, mesh1, mesh8):
    objective = contrast.patch_class_and_name(contrast.bags(NAMES, KNOWN), 1.0)
    sums = []
    for devices in (mesh1, mesh8):
        with jax.set_mesh(devices):
            spread = {name: mesh.spread(x, devices, "batch") for name, x in batch.items()}
            sums.append(jax.jit(objective)(model if devices is mesh1 else made(), spread))
    np.testing.assert_allclose(*(np.asarray([float(x) for x in s]) for s in sums), rtol=1e-5)


def test_the_encoder_begins_as_without_names(model, mesh1):
    c = tiny.get_config()
    with jax.set_mesh(mesh1):
        alone = objective.patch_reader(tiny.size(c), 5, seed=c.seed)
        jax.tree.map(np.testing.assert_array_equal, model.patches, alone)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = made_pictures.write(tmp_path_factory.mktemp("packages"))
    return tiny.config(
        data=dict(picture_share=0.5, pictures=str(folder)),
        encoder=dict(steps=4, learning_rate=1e-2),
        contrast=dict(weight=1.0, width=WIDTH),
    )


def test_the_stage_learns_names_and_continues(config, mesh1, tmp_path):
    recipe = tiny.recipe(config)
    with jax.set_mesh(mesh1), claim(tmp_path, config) as claimed:
        inputs, begin = stages.open_inputs(claimed, recipe)
        reader = stages.pretrain_reader(recipe, tmp_path, inputs, begin=begin)
        known = contrast.vocabulary(inputs.source.names)
        fresh = contrast.name_reader(
            recipe.model, inputs.source.patch_classes, len(known), WIDTH, seed=config.seed
        )
        for part in ("project.kernel", "embedding", "scale", "patches.head.kernel"):
            a, b = (operator.attrgetter(part)(m)[...] for m in (reader, fresh))
            assert (a != b).any(), part
        again = stages.pretrain_encoder(recipe, tmp_path, inputs)
        jax.tree.map(np.testing.assert_array_equal, again, reader.vit)
    assert len(known) > 10


def test_batches_name_what_each_patch_shows(config, mesh1, tmp_path):
    recipe = tiny.recipe(config)
    with jax.set_mesh(mesh1), claim(tmp_path, config) as claimed:
        inputs, _ = stages.open_inputs(claimed, recipe)
    source, side = inputs.source, recipe.model.vit.side
    made = patches.PatchBatches(source, inputs.processor, batch=8, seed=0, side=side, names=True)
    of_image = {inputs.processor.pixels(source.images[i]).tobytes(): i
                for i in range(len(source.images))}  # fmt: skip
    seen = 0
    for _ in range(len(source.images) // 8):
        batch = next(made)
        for pixels, ids, names in zip(batch["pixels"], batch["ids"], batch["names"], strict=True):
            i = of_image[pixels.tobytes()]
            np.testing.assert_array_equal(names, source.patch_names(i, side))
            assert (ids[names > 0] > 0).all()
            seen += int((names > 0).sum())
    assert seen > 50
    assert things.read.cache_info().maxsize == 1  # the splits of a run read the packages once


def test_names_are_needed(config, mesh1, tmp_path):
    c = tiny.config(contrast=dict(weight=0.5))
    with jax.set_mesh(mesh1), claim(tmp_path, c) as claimed:
        inputs, _ = stages.open_inputs(claimed, tiny.recipe(c))
        with pytest.raises(ValueError, match="contrast.weight=0.5, but nothing .* has a name: set"):
            stages.pretrain_encoder(tiny.recipe(c), tmp_path, inputs)
