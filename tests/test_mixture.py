# SPDX-License-Identifier: Apache-2.0
"""A mixture draws each part with its share, none twice before all once, from any position."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import tiny
from PIL import Image
from test_tars import shards

from vlm_jax.data import loader
from vlm_jax.data.loader import Batches
from vlm_jax.data.mixture import shares
from vlm_jax.data.order import examples
from vlm_jax.data.packing import Arrangement
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import BadExample, Origin, open_source
from vlm_jax.data.word_tokenizer import train_tokenizer

SIZES = {"many": 30, "few": 5}


def written(folder, name, rows):
    for k in range(rows):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{name}{k}.png")
    made = [
        {"id": f"{k}", "image": f"{name}{k}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?" + " red" * (k % 4)},
            {"from": "gpt", "value": f"{name} {k}"}]}
        for k in range(rows)
    ]  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(made))
    return str(path)


def mixed(folder, weights=(1, 1), **changed):
    parts = tuple(
        (name, weight, {"path": written(folder, name, rows), "images": str(folder)})
        for (name, rows), weight in zip(SIZES.items(), weights, strict=True)
    )
    return tiny.config(data=dict(source="mixture", mixture=parts) | changed)


def opened(folder, weights=(1, 1), **changed):
    return open_source(Origin.of(mixed(folder, weights, **changed)), "train")


@pytest.mark.parametrize("weights, quotas", [
    ((1, 1), [18, 17]), ((30, 5), [30, 5]), ((0.1, 0.3), [9, 26]), ((6, 0.2), [34, 1])
])  # fmt: skip
def test_an_epoch_has_the_share_of_each_part(weights, quotas, tmp_path):
    source = opened(tmp_path, weights)
    assert len(source) == 35 == sum(quotas)
    for epoch in range(3):
        order = source.order(7, epoch)
        drawn = Counter(source[int(i)].id.split("/")[0] for i in order)
        assert [drawn[name] for name in SIZES] == quotas


@pytest.mark.parametrize("weights", [(1, 1), (6, 0.2), (1, 9)])
def test_a_part_is_used_up_before_one_of_it_is_repeated(weights, tmp_path):
    source = opened(tmp_path, weights)
    for (name, count), start in zip(SIZES.items(), (0, 30), strict=True):
        seen = Counter()
        for epoch in range(40):
            order = source.order(3, epoch)
            seen.update(order[(order >= start) & (order < start + count)].tolist())
            assert max(seen.values()) - min(seen[start + k] for k in range(count)) <= 1, name
            if sum(seen.values()) >= 2 * count:
                break


def test_with_the_weights_of_sizes_an_epoch_is_every_example_once(tmp_path):
    source = opened(tmp_path, (30, 5))
    orders = [source.order(0, epoch).tolist() for epoch in range(2)]
    assert [sorted(order) for order in orders] == [list(range(35))] * 2 and orders[0] != orders[1]
    assert source.order(1, 0).tolist() != orders[0]


def test_the_order_is_that_of_the_epochs_from_any_place(tmp_path):
    source = opened(tmp_path)
    endless = examples(source, 5)
    whole = np.concatenate([source.order(5, epoch) for epoch in range(3)]).tolist()
    assert [endless[k] for k in range(105)] == whole
    assert [examples(source, 5)[k] for k in (104, 3, 36)] == [whole[k] for k in (104, 3, 36)]


def batches(source, **how):
    texts = [text for i in range(len(source)) for turn in source[i].turns for text in turn]
    rows = RowFormat.of(tiny.config())
    made = Processor(train_tokenizer(texts, 256), rows)
    return Batches(source, made, batch=4, seed=5, **how)


@pytest.mark.parametrize("arrangement", [
    Arrangement(), Arrangement(row_length=64, row_images=4), Arrangement(buckets=(12, 16)),
], ids=["plain", "packed", "buckets"])  # fmt: skip
def test_batches_go_on_at_any_position_with_the_shares(arrangement, tmp_path, monkeypatch):
    source = opened(tmp_path, (1, 3))
    made = batches(source, arrangement=arrangement, visual=4)
    first = list(itertools.islice(made, 14))
    again = batches(source, arrangement=arrangement, visual=4)
    again.position = 9
    for ours, theirs in zip(first[9:], itertools.islice(again, 5), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    # On another number of processes: each takes its rows of the same batches.
    for processes in (2, 4):
        parts = []
        for mine in np.array_split(np.arange(4), processes):
            monkeypatch.setattr(loader, "local_rows", lambda mesh, batch, mine=mine: mine)
            parts.append(batches(source, arrangement=arrangement, visual=4))
            parts[-1].position = 9
        for ours, *rest in zip(first[9:12], *parts, strict=False):
            assert all(
                np.array_equal(ours[name], np.concatenate([part[name] for part in rest]))
                for name in ours
            )
    if arrangement.plain:
        drawn = np.concatenate([batch["index"] for batch in first])[:35]
        assert (drawn >= 30).sum() == 26
    if made.plan is not None:
        assert made.plan.per_epoch == 35


def test_examples_say_which_part_they_are_of(tmp_path):
    source = opened(tmp_path)
    example = source[31]
    assert (example.id, example.given, example.task) == ("few/1", "1", "few")
    assert example.turns[0][1] == "few 1" and source.images[example.image][0, 0, 0] == 1
    assert source.images.name(31).endswith("few1.png")
    assert len({source[k].id for k in range(35)}) == 35 == len(source.images)
    told = source.describe()
    assert (
        told["parts"]["few"]["examples_per_epoch"] == 17 and told["parts"]["many"]["share"] == 0.5
    )
    assert "few 17 of its 5" in source.notes()[-1]


def test_weights_and_parts_are_in_the_hash(tmp_path):
    one = opened(tmp_path).data_hash
    assert one == opened(tmp_path).data_hash != opened(tmp_path, (1, 2)).data_hash


def test_bad_rows_of_all_parts_are_counted(tmp_path):
    config = mixed(tmp_path, on_bad_example="skip")
    rows = json.loads((tmp_path / "few.json").read_text())
    rows[2]["image"] = "gone.png"
    (tmp_path / "few.json").write_text(json.dumps(rows))
    source = open_source(Origin.of(config), "train")
    assert len(source) == 34 and dict(source.left_out.kinds) == {"missing_image": 1}
    assert len(source.left_out) == 1 and "gone.png" in str(*source.left_out.first.values())
    config.data.on_bad_example = "fail"
    with pytest.raises(BadExample, match="data.mixture, part 'few': .*gone.png"):
        open_source(Origin.of(config), "train")


FILE = {"path": "x.json"}


@pytest.mark.parametrize("mixture, sentence", [
    ((), 'give \\("NAME", WEIGHT'),
    ((("a", 1),), "a part is \\('a', 1\\)"),
    (("a", 1, FILE), "a part is 'a'"),
    ((("a", 0, FILE),), "the weight of 'a' is 0"),
    ((("a", -1.5, FILE),), "the weight of 'a' is -1.5"),
    ((("a", float("nan"), FILE),), "the weight of 'a' is nan"),
    ((("a", "half", FILE),), "the weight of 'a' is 'half'"),
    ((("a", True, FILE),), "the weight of 'a' is True"),
    ((("a", 1, FILE), ("a", 1, FILE)), "called 'a': give each a name of its own"),
    ((("", 1, FILE),), "called ''"),
    ((("a", 1, {"pth": "x"}),), "'pth', did you mean path?"),
    ((("a", 1, {"text_length": 9}),), "'text_length'"),
    ((("a", 1, {"source": "mixture"}),), "write its parts beside"),
    ((("a", 1, {"source": "lava"}),), "choose one of llava"),
    ((("a", 1, {"path": "gone.json"}),), "part 'a': no such file: gone.json"),
])  # fmt: skip
def test_a_wrong_part_is_refused_by_its_name(mixture, sentence):
    config = tiny.config(data=dict(source="mixture", mixture=mixture))
    with pytest.raises((ValueError, OSError), match=sentence):
        open_source(Origin.of(config), "train")


def test_a_part_that_would_never_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none would be of 'few' .weight 0.001 of 1.001"):
        opened(tmp_path, (1, 0.001))


def test_parts_without_a_mixture_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data.mixture has 2 parts, and data.source='llava'"):
        Origin.of(mixed(tmp_path, source="llava"))


def test_the_embedded_benchmark_can_be_a_part(tmp_path):
    part = ("shapes", 1, {"source": "synthetic"})
    own = ("own", 1, {"path": written(tmp_path, "few", 5), "images": str(tmp_path)})
    config = tiny.config(data=dict(source="mixture", mixture=(own, part)))
    source = open_source(Origin.of(config), "train")
    assert source[len(source) - 1].id.startswith("shapes/")
    nlvr = ("pairs", 1, {"source": "nlvr", "path": "tests/nlvr"})
    config.data.mixture = (own, nlvr)
    with pytest.raises((ValueError, OSError), match="part 'pairs'"):
        open_source(Origin.of(config), "train")


def test_shares_add_up_and_are_near_the_weights():
    assert shares([1, 1, 1], 10) == [4, 3, 3] and shares([0.2, 0.8], 5) == [1, 4]
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights, total = rng.random(4) + 0.01, int(rng.integers(4, 1000))
        found = shares(list(weights), total)
        assert sum(found) == total
        assert np.abs(np.array(found) - weights / weights.sum() * total).max() < 1


@pytest.mark.slow
def test_worker_processes_read_the_same_batches_of_files_and_tars(tmp_path):
    shards(tmp_path)
    own = ("own", 2, {"path": written(tmp_path, "few", 5), "images": str(tmp_path)})
    packed = ("packed", 1, {"source": "tars", "path": f"{tmp_path}/train-*.tar"})
    config = tiny.config(data=dict(source="mixture", mixture=(own, packed)))
    source = open_source(Origin.of(config), "train")
    here, elsewhere = batches(source), batches(source, workers=2)
    here.position = elsewhere.position = 5
    for ours, theirs in itertools.islice(zip(here, elsewhere, strict=False), 4):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    elsewhere.close()
