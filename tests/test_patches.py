# SPDX-License-Identifier: Apache-2.0
"""Batches for the encoder: every image with what its patches show, at any position the same."""

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.data import patches, sources
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin
from vlm_jax.data.word_tokenizer import train_tokenizer

SIDE = 4


@pytest.fixture(scope="module")
def source():
    return sources.open_source(Origin.of(tiny.get_config()), "train")


@pytest.fixture(scope="module")
def processor(source):
    c = tiny.get_config()
    texts = [text for i in range(len(source)) for turn in source[i].turns for text in turn]
    return Processor(train_tokenizer(texts, c.llm.vocab), RowFormat.of(c))


def batches(source, processor, **options):
    return patches.PatchBatches(source, processor, batch=8, seed=1, side=SIDE, **options)


def equal(a, b):
    for name in a.keys() | b.keys():
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_an_epoch_shows_every_image_with_its_own_labels(source, processor):
    of_image = {processor.pixels(source.images[i]).tobytes(): i for i in range(len(source.images))}
    made, seen = batches(source, processor), []
    for _ in range(len(source.images) // 8):
        batch = next(made)
        assert batch["pixels"].shape[1:] == (32, 32, 3) and batch["ids"].shape == (8, SIDE**2)
        for pixels, ids, mask in zip(
            batch["pixels"], batch["ids"], batch["loss_mask"], strict=True
        ):
            seen.append(of_image[pixels.tobytes()])
            np.testing.assert_array_equal(ids, source.patch_labels(seen[-1], SIDE))
            assert mask[ids > 0].all()
            assert 0 <= ids.min() and ids.max() < source.patch_classes
    assert sorted(seen) == list(range(len(source.images)))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_as_much_of_the_background_is_asked_for_as_is_said(share, source, processor):
    made = batches(source, processor, background=share)
    asked = [next(made) for _ in range(20)]
    ids, mask = (np.concatenate([b[n] for b in asked]) for n in ("ids", "loss_mask"))
    assert mask[ids == 0].mean() == pytest.approx(share, abs=0.05)
    assert mask[ids > 0].all() and (ids == 0).mean() > 0.2


def test_any_position_can_be_gone_to(source, processor):
    one, other = batches(source, processor), batches(source, processor)
    expected = [next(one) for _ in range(7)]
    other.position = 5
    for k in (5, 6):
        equal(next(other), expected[k])
    assert other.position == one.position == 7


def test_a_mesh_gets_the_same_batch_in_parts(source, processor, mesh8):
    whole, cut = next(batches(source, processor)), next(batches(source, processor, mesh=mesh8))
    equal(whole, {name: np.asarray(x) for name, x in cut.items()})
    assert all(isinstance(x, jax.Array) and len(x.addressable_shards) == 8 for x in cut.values())


@pytest.mark.parametrize("processes", [2, 4])
def test_which_patches_count_depends_on_the_image_alone(source, processor, processes, monkeypatch):
    whole = batches(source, processor).at(3)
    parts = []
    for mine in np.array_split(np.arange(8), processes):
        monkeypatch.setattr(patches, "local_rows", lambda mesh, batch, mine=mine: mine)
        parts.append(batches(source, processor).at(3))
    equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)
