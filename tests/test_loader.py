# SPDX-License-Identifier: Apache-2.0
"""Batches: the same from any position and for any number of processes; nothing is left out."""

import itertools

import jax
import numpy as np
import pytest

from configs import base
from vlm_jax import mesh as meshes
from vlm_jax.data import loader
from vlm_jax.data.benchmark.synthetic import Synthetic
from vlm_jax.data.loader import Batches, evaluation_batches
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.texts import Texts
from vlm_jax.data.word_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def source():
    return Synthetic("train", images=50)


@pytest.fixture(scope="module")
def processor(source):
    config = base.get_config()
    config.data.template = "bare"
    config.data.text_length = config.data.question_length = 32
    config.vit.image_size = 96
    texts = (text for i in range(len(source)) for turn in source[i].turns for text in turn)
    return Processor(train_tokenizer(texts, 1000), RowFormat.of(config))


@pytest.fixture(scope="module")
def features(source):
    return np.random.default_rng(0).normal(size=(len(source.images), 9, 4)).astype(np.float16)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(np.asarray(a[name]), np.asarray(b[name])), name


def test_an_epoch_holds_every_example_once_in_its_own_order(source, processor, features):
    batches = Batches(source, processor, batch=1, seed=3, features=features)
    n = len(source)
    order = [int(batch["index"][0]) for batch in itertools.islice(batches, 2 * n)]
    assert sorted(order[:n]) == sorted(order[n:]) == list(range(n))
    assert order[:n] != order[n:] and order[:n] != list(range(n))
    other = Batches(source, processor, batch=1, seed=4, features=features)
    assert [int(batch["index"][0]) for batch in itertools.islice(other, n)] != order[:n]


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_depends_on_its_number_alone(source, processor, features, cached):
    def fresh():
        return Batches(source, processor, batch=16, seed=1, features=features if cached else None)

    unbroken = list(itertools.islice(fresh(), 9))
    resumed = fresh()
    resumed.position = 4
    for k in range(4, 9):
        same(next(resumed), unbroken[k])
        same(fresh().at(k), unbroken[k])
    assert resumed.position == 9
    resumed.position = 2
    same(next(resumed), unbroken[2])
    resumed.close()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_make_the_batch_of_one(
    source, processor, features, processes, monkeypatch
):
    whole = Batches(source, processor, batch=8, seed=1, features=features).at(11)
    parts = []
    for mine in np.array_split(np.arange(8), processes):
        monkeypatch.setattr(loader, "local_rows", lambda mesh, batch, mine=mine: mine)
        parts.append(Batches(source, processor, batch=8, seed=1, features=features).at(11))
    same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_a_mesh_gets_the_same_batch_in_parts(source, processor, features, mesh8):
    plain = Batches(source, processor, batch=8, seed=1, features=features)
    sharded = Batches(source, processor, batch=8, seed=1, features=features, mesh=mesh8)
    batch = next(sharded)
    same(batch, next(plain))
    for array in batch.values():
        assert array.sharding == meshes.sharding(mesh8, "batch")
        assert {s.data.shape[0] for s in array.addressable_shards} == {2}
    assert isinstance(batch["levels"], jax.Array)


def test_rows_hold_their_example(source, processor, features):
    pictures = Batches(source, processor, batch=8, seed=1).at(0)
    levels = Batches(source, processor, batch=8, seed=1, features=features).at(0)
    for row, index in enumerate(pictures["index"]):
        example = source[int(index)]
        for name, value in processor.text(example).items():
            if name != "cut":
                assert np.array_equal(pictures[name][row], value)
        assert np.array_equal(
            pictures["pixels"][row], processor.pixels(source.images[example.image])
        )
        assert np.array_equal(levels["levels"][row], features[example.image])


def test_text_made_on_the_fly_is_the_text_of_the_table(source, processor, features, monkeypatch):
    table = Batches(source, processor, batch=8, seed=1, features=features).at(5)
    pictures = Batches(source, processor, batch=8, seed=1).at(5)
    monkeypatch.setattr("vlm_jax.data.texts.TABLE_BYTES", 0)
    same(Batches(source, processor, batch=8, seed=1, features=features).at(5), table)
    same(Batches(source, processor, batch=8, seed=1).at(5), pictures)


@pytest.mark.parametrize("batch", [8, 1000])
def test_evaluation_sees_every_example_once(source, processor, features, batch, mesh8):
    for mesh in (None, mesh8):
        seen = []
        for made in evaluation_batches(
            source, processor, batch=batch, features=features, mesh=mesh
        ):
            assert made["ids"].shape == (batch, 32) and made["valid"].shape == (batch,)
            seen += [int(i) for i, v in zip(made["index"], made["valid"], strict=True) if v]
            assert not made["loss_mask"].any()
        assert seen == list(range(len(source)))


def test_cut_rows_are_counted(source, processor, features):
    config = base.get_config()
    config.data.template, config.data.text_length, config.vit.image_size = "bare", 9, 96
    short = Processor(processor.tokenizer, RowFormat.of(config))
    batches = Batches(source, short, batch=len(source), seed=1, features=features)
    next(batches)
    longer = sum(processor.text(source[i])["length"] > 9 for i in range(len(source)))
    assert batches.cut == longer > 0


def test_worker_processes_make_the_same_batches(source, processor):
    batches = Batches(source, processor, batch=4, seed=1, workers=1)
    alone = Batches(source, processor, batch=4, seed=1)
    batches.position = 2
    same(next(batches), alone.at(2))
    same(next(batches), alone.at(3))
    batches.close()


def test_what_cannot_be_batched_is_refused(source, processor, features, mesh8):
    with pytest.raises(ValueError, match="batch of 6 rows.*multiple of 4"):
        Batches(source, processor, batch=6, seed=0, features=features, mesh=mesh8)
    with pytest.raises(ValueError, match="features of 49 images.*50"):
        Batches(source, processor, batch=8, seed=0, features=features[1:])
    with pytest.raises(ValueError, match="has no examples"):
        Batches(Synthetic("val", images=0), processor, batch=8, seed=0)


def test_shortened_texts_are_the_same_texts_in_shorter_rows(source, processor):
    texts = Texts(source, processor, answer=False, skip=False)
    longest = int(texts.lengths().slots.max())
    assert longest + 1 < processor.text_length
    short = texts.shortened((longest - 1, longest + 1))
    assert short.processor.text_length == short.table["ids"].shape[1] == longest + 1
    for name, column in short.table.items():
        whole = texts.table[name]
        if name in ("ids", "loss_mask"):
            assert (column == whole[:, : longest + 1]).all()
            assert not texts.table["loss_mask"][:, longest + 1 :].any()
        else:
            assert (column == whole).all()
    assert processor.text_length == texts.table["ids"].shape[1]
    assert texts.shortened((longest - 1,)) is texts
