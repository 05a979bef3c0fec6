# SPDX-License-Identifier: Apache-2.0
"""Packed and bucketed rows are the rows that they hold: loss, gradient, order, what cannot be
used."""

import functools
import itertools

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.data import loader
from vlm_jax.data.example import BadExample, Example, Images
from vlm_jax.data.loader import Batches
from vlm_jax.data.packing import Arrangement
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.skips import Skips
from vlm_jax.data.texts import BadText, Texts
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.models import vlm
from vlm_jax.training import memory, objective

WORDS = "what is this a red star and how many are there two three left of the".split()
PACKED = Arrangement(row_length=96, row_images=4)
BUCKETS = Arrangement(buckets=(20,))


class Made:
    """Examples of no, one and two images and of many lengths; `broken` images cannot be read."""

    name, split, data_hash, protocol = "made", "train", "0" * 64, "exact"

    def __init__(self, count=12, broken=()):
        self.left_out, self.count = Skips(), count
        draw = np.random.default_rng(0)
        self.turns = [
            tuple(
                tuple(" ".join(draw.choice(WORDS, n)) for n in draw.integers(1, 8, 2))
                for _ in range(draw.integers(1, 3))
            )
            for _ in range(count)
        ]

        def read(i):
            if i in broken:
                raise BadExample(f"image {i} is cut short")
            return np.full((20, 30, 3), 10 * i, np.uint8)

        self.images = Images(read, 2 * count)

    def __len__(self):
        return self.count

    def describe(self):
        return {"examples": self.count}

    def notes(self):
        return []

    def __getitem__(self, i):
        image = (None, i, (i, i + self.count))[i % 3]
        return Example(f"e{i}", image, self.turns[i], "made", "made")


def config(**changes):
    return tiny.config(**{
        "data": dict(template="bare", text_length=40, question_length=12, images_per_row=2),
    } | changes)  # fmt: skip


@pytest.fixture(scope="module")
def source():
    return Made()


@pytest.fixture(scope="module")
def tokenizer(source):
    return train_tokenizer((" ".join(WORDS) for _ in range(3)), 256)


def features_of(c, source, width=None):
    size = tiny.size(c)
    width = width or size.vit.width * len(size.vit.levels)
    draw = np.random.default_rng(1)
    return draw.normal(size=(len(source.images), size.vit.patches, width)).astype(np.float32)


def batches_of(c, source, tokenizer, arrangement, *, batch, features=None, **options):
    processor = Processor(tokenizer, RowFormat.of(c))
    of = dict(seed=1, features=features, visual=tiny.size(c).visual_tokens)
    return Batches(source, processor, batch=batch, arrangement=arrangement, **of, **options)


def sums_of(model, batches, run):
    """Sums over batches and the gradient of their loss."""

    def loss(model, batch):
        sums = run(model, batch)
        return sums.nll + 0.1 * sums.log_z_squared, sums

    step = jax.jit(jax.grad(loss, has_aux=True))
    return jax.tree.map(lambda *x: sum(map(np.asarray, x)),
                        *[step(model, tiny.placed(batch)) for batch in batches])  # fmt: skip


def assert_equal(ours, theirs):
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


METHODS = {
    "quecc": dict(kind="quecc", tokens=4, query="separate"),
    "token_packer": dict(kind="token_packer", tokens=4),
    "none": dict(kind="none", tokens=16),
    "pool": dict(kind="pool", tokens=4),
    "downsample": dict(kind="downsample", tokens=4),
    "mqt": dict(kind="mqt", tokens=4),
    "m3": dict(kind="m3", tokens=4, scales=(1, 4)),
    "prumerge": dict(kind="prumerge", tokens=0),
    "prumerge_plus": dict(kind="prumerge_plus", tokens=5),
}


@pytest.mark.parametrize("name", [
    "token_packer", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n[:5] != "token")
])  # fmt: skip
def test_packed_rows_have_the_loss_and_the_gradient_of_single_ones(name, source, tokenizer, mesh1):
    c = config(compressor=METHODS[name])
    adaptive, width = name.startswith("prumerge"), c.vit.width
    features = features_of(c, source, 3 * width + 1 if adaptive else None)
    if adaptive:
        features[..., -1] = np.abs(features[..., -1])
    run = objective.every_scale if name == "m3" else objective.next_token
    whole = Arrangement(row_length=160, row_images=4)
    single = batches_of(c, source, tokenizer, Arrangement(), batch=12, features=features)
    packed = batches_of(c, source, tokenizer, whole, batch=1, features=features)
    rows = packed.plan.rows
    assert 2 < rows < 10
    packed = batches_of(c, source, tokenizer, whole, batch=rows, features=features)
    with jax.set_mesh(mesh1):
        model = tiny.roughened(tiny.created(c), scale=0.1)
        one = sums_of(model, [single.at(0)], run)
        several = sums_of(model, [packed.at(0)], run)
    assert float(one[1].nll) > 10
    assert_equal(several, one)


@pytest.mark.parametrize("query", [
    pytest.param("prefix", marks=pytest.mark.slow), pytest.param("separate", marks=pytest.mark.slow)
])  # fmt: skip
def test_bucketed_rows_have_the_loss_and_the_gradient_of_full_ones(query, source, tokenizer, mesh1):
    """Batches of text alone encode nothing, those with images are as long as they must be."""
    c = config(compressor=dict(kind="quecc", tokens=4, query=query))
    if query == "prefix":
        c.data.update(dict(images_per_row=1, template="question_first"))
        source = Made()
        source.__class__ = type("One", (Made,), {"__getitem__": one_image})
    features = features_of(c, source)
    single = batches_of(c, source, tokenizer, Arrangement(), batch=12, features=features)
    arranged = batches_of(c, source, tokenizer, BUCKETS, batch=1, features=features)
    parts = [arranged.at(k) for k in range(12)]
    assert {"levels" in part for part in parts} == {False, True}
    assert len({part["ids"].shape for part in parts}) > 1
    with jax.set_mesh(mesh1):
        model = tiny.roughened(tiny.created(c), scale=0.1)
        assert_equal(
            sums_of(model, parts, objective.next_token),
            sums_of(model, [single.at(0)], objective.next_token),
        )


def one_image(self, i):
    return Example(f"e{i}", i if i % 3 else None, self.turns[i], "made", "made")


@pytest.mark.parametrize("arrangement", [PACKED, BUCKETS], ids=["packed", "buckets"])
def test_a_batch_depends_on_its_number_alone_on_any_number_of_processes(
    arrangement, source, tokenizer, monkeypatch
):
    c = config()

    def fresh(**options):
        return batches_of(c, source, tokenizer, arrangement, batch=4, **options)

    unbroken = list(itertools.islice(fresh(), 7))
    resumed = fresh()
    resumed.position = 3
    for k in range(3, 7):
        again = next(resumed)
        assert again.keys() == unbroken[k].keys()
        for name in again:
            np.testing.assert_array_equal(again[name], unbroken[k][name])
    parts = []
    for mine in np.array_split(np.arange(4), 2):
        monkeypatch.setattr(loader, "local_rows", lambda mesh, batch, mine=mine: mine)
        parts.append(fresh().at(5))
    for name, whole in unbroken[5].items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole)


def test_rows_hold_their_examples_side_by_side(source, tokenizer):
    c = config()
    made = batches_of(c, source, tokenizer, PACKED, batch=3)
    processor = Processor(tokenizer, RowFormat.of(c))
    for k in range(made.plan.rows // 3):
        batch, group = made.at(k), made.plan.batch(k)
        for row, examples in enumerate(group.rows):
            for number, example in enumerate(examples, start=1):
                text = processor.text(source[int(example)])
                here = batch["segment"][row] == number
                n = int(text["length"])
                np.testing.assert_array_equal(batch["ids"][row][here], text["ids"][:n])
                np.testing.assert_array_equal(batch["loss_mask"][row][here], text["loss_mask"][:n])
                first = int(np.flatnonzero(here)[0])
                ours = batch["image_segment"][row] == number
                places = text["image_at"][text["image_at"] < 40]
                np.testing.assert_array_equal(batch["image_at"][row][ours], first + places)
                np.testing.assert_array_equal(batch["question"][row][ours],
                                              text["question"][: len(places)])  # fmt: skip
            assert not batch["loss_mask"][row][batch["segment"][row] == 0].any()


@pytest.mark.parametrize("arrangement", [PACKED, BUCKETS], ids=["packed", "buckets"])
def test_a_mesh_takes_packed_rows_and_rows_of_text_alone(arrangement, source, tokenizer, mesh8):
    """Traced alone: on an explicit mesh every operation says where its result lies."""
    c = config(compressor=METHODS["quecc"])
    made = batches_of(c, source, tokenizer, arrangement, batch=4, features=features_of(c, source))
    parts = [made.at(k) for k in range(3)]
    with jax.set_mesh(mesh8):
        model = memory.placed(vlm.shapes(tiny.size(c)))
        for part in parts:
            for chunk in (0, 16):
                run = functools.partial(objective.next_token, chunk=chunk)
                sums = jax.eval_shape(run, model, tiny.placed(part))
                assert sums.nll.shape == ()


def test_what_cannot_be_used_is_left_out_of_its_row_and_counted(tokenizer):
    c, broken = config(), Made(broken=(4, 17))
    with pytest.raises(BadExample, match="cut short"):
        list(itertools.islice(batches_of(c, broken, tokenizer, PACKED, batch=1), 12))
    good = batches_of(c, Made(), tokenizer, PACKED, batch=1)
    some = batches_of(c, broken, tokenizer, PACKED, batch=1, skip=True)
    tokens = [0, 0]
    for _ in range(good.plan.rows):
        for which, batch in enumerate((next(good), next(some))):
            tokens[which] += int(batch["length"].sum())
    lost = sum(int(good.plan.lengths.text[i]) for i in (4, 5))  # 17 is the second image of 5
    assert tokens[0] - tokens[1] == lost and some.skipped == 2
    assert some.usage.tokens < good.usage.tokens
    nothing = Made(2, broken=(1,))
    texts = Texts(nothing, Processor(tokenizer, RowFormat.of(c)), answer=True, skip=True)
    texts.bad[0] = BadText("its text cannot be used")
    rows = batches_of(c, nothing, tokenizer, PACKED, batch=1, skip=True, texts=texts)
    with pytest.raises(BadExample, match="not one of 2 examples can be used"):
        next(rows)


def test_the_use_of_rows_is_counted(source, tokenizer):
    c = config()
    single = batches_of(c, source, tokenizer, Arrangement(), batch=12)
    packed = batches_of(c, source, tokenizer, Arrangement(row_length=96, row_images=6), batch=1)
    next(single), [next(packed) for _ in range(packed.plan.rows)]
    # Twelve examples with 12 images of 4 visual tokens, in both.
    lengths = packed.plan.lengths
    used = int(lengths.text.sum()) + 4 * int(lengths.images.sum())
    assert single.usage.tokens == packed.usage.tokens == used
    assert single.usage.tokens_computed == 12 * (40 + 2 * 4)
    assert packed.usage.tokens_computed == 96 * packed.plan.rows
    assert single.usage.images_computed == 24 and single.usage.images == 12
    shares = [x.fields()["tokens_used"] for x in (single, packed)]
    assert shares[0] < shares[1] and shares[1] > 0.75
    assert f"{shares[1]:.1%}" in str(packed.usage)
    assert single.fields() == single.usage.fields()
