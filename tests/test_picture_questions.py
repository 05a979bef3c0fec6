# SPDX-License-Identifier: Apache-2.0
"""Questions about pictures: their answers hold when the words are read again, and are balanced."""

import re
from collections import Counter, defaultdict

import made_pictures
import numpy as np
import pytest

from configs import base
from vlm_jax.data.benchmark import picture_questions, picture_scenes, reading, synthetic, things
from vlm_jax.data.benchmark.synthetic import Synthetic, majority
from vlm_jax.data.sources import Origin, open_source

TASKS = {"name", "category", "color", "presence", "same"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    return things.read(made_pictures.write(tmp_path_factory.mktemp("packages")))


@pytest.fixture(scope="module")
def splits(shown):
    return {
        split: Synthetic(split, images=count, things=shown, picture_share=1.0)
        for split, count in (("train", 250), ("test", 200))
    }


def asked(source):
    for q, e in zip(source.questions, (source[i] for i in range(len(source))), strict=True):
        assert e.turns == ((q.text, q.answer),)
        yield source.specs[e.image], e, q


def meant(scene, text):
    """The picture that a question is about, read from its words."""
    found = [p for p in scene.pictures if picture_scenes.PLACES[p.place] in text]
    return found[0] if len(scene.pictures) > 1 else scene.pictures[0]


def test_answers_hold_when_the_words_are_read_again(splits, shown):
    checked = Counter()
    held_out = things.STYLES.index("facebook")
    for source in splits.values():
        for scene, example, q in asked(source):
            task = q.task.removeprefix("style_")
            names = [shown.things[p.thing].name for p in scene.pictures]
            if task == "presence":
                words = re.fullmatch(r"(?:is there|are there|can you see) (?:an? )?(.*)\?", q.text)
                assert q.answer == ("yes" if words[1] in names else "no")
            elif task == "same":
                assert q.answer == ("yes" if names[0] == names[1] else "no")
            elif task == "caption":
                assert q.answer.split(", ") == names and example.family == "caption"
            else:
                p = meant(scene, q.text)
                thing = shown.things[p.thing]
                color = shown.colors[things.STYLES[p.style]][p.thing]
                assert q.answer == dict(name=thing.name, category=thing.category, color=color)[task]
                assert example.family != "style" or p.style == held_out
            checked[example.family, task] += 1
    assert {task for family, task in checked if family == "pictures"} == TASKS
    assert {task for family, task in checked if family == "style"} == TASKS
    assert len(TASKS) == len(picture_questions.FORMS)


def test_a_name_that_says_part_of_another_is_not_denied(splits, shown):
    for scene, _, q in asked(splits["train"]):
        if q.task == "presence" and q.answer == "no":
            words = set(q.key[1].split())
            for p in scene.pictures:
                theirs = set(shown.things[p.thing].name.split())
                assert not words <= theirs and not theirs <= words


def test_the_wording_says_nothing(splits):
    train, test = splits["train"], splits["test"]
    scores = majority(train, test)
    assert scores.keys() == TASKS | {f"style_{task}" for task in TASKS}
    answers = defaultdict(Counter)
    for q in train.questions:
        answers[q.task][q.label] += 1
    for task in ("category", "color", "presence", "same"):
        counts = answers[task].values()
        assert max(counts) - min(counts) <= synthetic.SLACK + 1, (task, answers[task])
        for name in (task, f"style_{task}"):
            assert scores[name] <= 1 / len(answers[task]) + 0.1, (name, scores[name])
    for name in ("name", "style_name"):
        assert scores[name] < 0.1


def test_the_other_families_are_bit_equal_beside_pictures(shown):
    alone = Synthetic("train", images=30)
    beside = Synthetic("train", images=40, things=shown, picture_share=0.25)
    assert beside.specs[:30] == alone.specs and len(beside.specs) == 40
    assert [beside[k] for k in range(len(alone))] == [alone[k] for k in range(len(alone))]
    for i in range(30):
        np.testing.assert_array_equal(beside.images[i], alone.images[i])
        np.testing.assert_array_equal(beside.patch_labels(i, 6), alone.patch_labels(i, 6))
    assert all(isinstance(spec, picture_scenes.Scene) for spec in beside.specs[30:])
    assert beside.data_hash != alone.data_hash
    assert Synthetic("train", images=30, things=shown).data_hash == alone.data_hash


def test_the_same_seed_gives_the_same_scenes_and_another_style_or_package_others(shown, splits):
    def made(**changed):
        return Synthetic("test", **dict(images=20, things=shown, picture_share=1.0) | changed)

    assert made().data_hash == made().data_hash
    other = things.Things(list(shown.things), {s: p[..., ::-1].copy() for s, p in
                                               shown.pictures.items()})  # fmt: skip
    hashes = {made(**changed).data_hash for changed in
              ({}, dict(seed=1), dict(held_out_style="google"), dict(things=other))}  # fmt: skip
    assert len(hashes) == 4
    specs = splits["train"].specs
    assert len(set(specs)) == len(specs)


def test_patches_have_the_class_and_the_name_of_their_thing(splits, shown):
    source = splits["test"]
    for i in range(20):
        owners = picture_scenes.owners(source.specs[i], shown, 6)
        labels, names = source.patch_labels(i, 6), source.patch_names(i, 6)
        assert labels.max() < source.patch_classes
        for owner, label, name in zip(owners, labels, names, strict=True):
            if not owner:
                assert label == name == 0
                continue
            thing = shown.things[source.specs[i].pictures[owner - 1].thing]
            kind = shown.subcategories[label - reading.PATCH_CLASSES]
            assert kind == thing.subcategory
            assert source.names[name - 1] == (*thing.name.split(), *thing.words)


def test_a_share_of_pictures_needs_things_and_a_known_style(shown):
    with pytest.raises(ValueError, match="picture_share=0.5 of the images need `things`"):
        Synthetic("train", images=4, picture_share=0.5)
    with pytest.raises(ValueError, match="held_out_style='apple': choose one of google, twitter"):
        Synthetic("train", images=4, things=shown, held_out_style="apple")


def test_a_configuration_names_the_folder_of_the_packages(shown, tmp_path):
    config = base.get_config()
    config.data.update(dict(source="synthetic", train_images=8, picture_share=0.5))
    with pytest.raises(ValueError, match="picture_share=0.5, .*`vlm-jax data fetch pictures`"):
        open_source(Origin.of(config), "train")
    config.data.pictures = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="no package emoji-datasource-google 16.0.0"):
        open_source(Origin.of(config), "train")
    config.data.pictures = str(made_pictures.write(tmp_path))
    source = open_source(Origin.of(config), "train")
    assert source.data_hash == Synthetic(
        "train", images=8, things=shown, picture_share=0.5
    ).data_hash  # fmt: skip
