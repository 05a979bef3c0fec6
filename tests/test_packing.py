# SPDX-License-Identifier: Apache-2.0
"""Plans of packed rows and of buckets: every example once an epoch, nothing too long, one order."""

import itertools
from collections import Counter

import numpy as np
import pytest

from vlm_jax.data.packing import Arrangement, Buckets, Lengths, Packing, packed

TOKENS, IMAGES, VISUAL = 64, 3, 9


def lengths(n=300, seed=0):
    """Examples of one to forty tokens with up to two images, some of them unusable."""
    draw = np.random.default_rng(seed)
    text = draw.integers(1, 41, n).astype(np.int32)
    images = draw.integers(0, 3, n).astype(np.int32)
    return Lengths(text, images, text, draw.random(n) > 0.05)


def packing(n=300, batch=7, seed=1, **room):
    return Packing(lengths(n), batch=batch, seed=seed,
                   **dict(tokens=TOKENS, images=IMAGES, visual=VISUAL) | room)  # fmt: skip


def buckets(n=300, batch=7, seed=1):
    return Buckets(lengths(n), batch=batch, seed=seed, buckets=(8, 20, 40), images=2)


def flat(rows):
    return [int(i) for row in rows for i in row]


def test_each_epoch_of_packed_rows_has_every_usable_example_once():
    plan = packing()
    usable = sorted(plan.usable)
    orders = [flat(plan.units(epoch)) for epoch in range(3)]
    assert [sorted(order) for order in orders] == [usable] * 3
    assert orders[0] != orders[1] and len(usable) < 300
    taken = itertools.chain.from_iterable(plan.batch(k).rows for k in range(40))
    planned = itertools.chain.from_iterable(plan.units(e) for e in range(20))
    # Batches are the rows of all epochs in a line, wherever they are cut.
    assert [row.tolist() for row in taken] == [
        row.tolist() for row in itertools.islice(planned, 280)
    ]


def test_no_row_is_too_long_and_few_places_stay_empty():
    plan, of = packing(3000), lengths(3000)
    need = of.text + VISUAL * of.images
    rows = plan.units(0)
    used = [need[row].sum() for row in rows]
    assert max(used) <= TOKENS and max(of.images[row].sum() for row in rows) <= IMAGES
    # With room for images in every row, tokens alone decide.
    roomy = packing(3000, images=30).units(0)
    assert np.sum([need[row].sum() for row in roomy]) / (TOKENS * len(roomy)) > 0.95


def test_an_example_that_fills_a_row_has_it_alone():
    rows = packed(np.arange(5), np.array([10, 3, 10, 7, 10]), np.zeros(5, int), 10, 1)
    assert sorted(map(tuple, rows)) == [(0,), (1, 3), (2,), (4,)]


def test_every_bucketed_batch_has_one_kind_and_every_example_comes_once_an_epoch():
    plan, of, epochs = buckets(), lengths(), 4
    seen, mixed = Counter(), 0
    for epoch in range(epochs):
        for group in plan.units(epoch):
            rows = flat(group.rows)
            seen.update(rows)
            assert len(rows) == 7 and of.slots[rows].max() <= group.text in (8, 20, 40)
            if group.images == 0:
                assert not of.images[rows].any()
            mixed += group.images > 0 and not of.images[rows].all()
        waiting = plan.epoch(epoch).waiting
        assert len(waiting) < 7
        expected = Counter(dict.fromkeys(map(int, plan.usable), epoch + 1))
        expected.subtract(map(int, waiting))
        assert seen == +expected
    assert mixed <= epochs


@pytest.mark.parametrize("make", [packing, buckets])
def test_a_batch_follows_from_its_number_and_the_seed(make):
    plan, other = make(), make()
    for k in (57, 3, 0, 58):
        for a, b in zip(plan.batch(k), other.batch(k), strict=True):
            np.testing.assert_equal(a, b)
    assert flat(make(seed=2).batch(0).rows) != flat(plan.batch(0).rows)
    with pytest.raises(ValueError, match="no example"):
        nothing = Lengths(*[np.zeros(2, np.int32)] * 3, np.zeros(2, bool))
        Packing(nothing, batch=1, seed=0, tokens=8, images=1, visual=1)


@pytest.mark.parametrize("fields, of, words", [
    (dict(row_length=90), {}, "no room for the longest example.*96; raise it, or set "
                              "data.text_length=58"),
    (dict(row_length=96, row_images=1), {}, "data.row_images=1 is less than data.images_per_row=2"),
    (dict(row_length=96), dict(query="prefix"), "query='prefix'.*cannot be packed: use"),
    (dict(buckets=(16,)), dict(query="prefix"), "more than the data.question_length=16"),
    (dict(buckets=(32, 64)), {}, "below data.text_length=64"),
    (dict(buckets=(32, 16)), {}, "ascending order"),
    (dict(buckets=(16,), row_length=96), {}, "choose one of them"),
])  # fmt: skip
def test_what_has_no_place_for_some_example_is_refused(fields, of, words):
    asked = dict(text=64, question=16, images=2, visual=16, query="none") | of
    with pytest.raises(ValueError, match=words):
        Arrangement(**dict(row_length=0, row_images=2) | fields).check(**asked)
