# SPDX-License-Identifier: Apache-2.0
"""The embedded benchmark: answers hold, splits share nothing, wording gives little away."""

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from vlm_jax.data.benchmark import naming, reading, scenes, synthetic
from vlm_jax.data.benchmark.synthetic import Synthetic, majority

SINGULAR = {word: word for word in (*scenes.KINDS, "shape")}
for word, others in naming.SYNONYMS.items():
    if word in SINGULAR:
        SINGULAR |= dict.fromkeys(others, word)
PLURAL = {(w + "es" if w in ("cross", "box") else w + "s"): SINGULAR[w] for w in SINGULAR}
SIZE = {"big": 1, "large": 1, "small": 0, "little": 0, "tiny": 0}


@pytest.fixture(scope="module")
def train():
    return Synthetic("train", images=300)


@pytest.fixture(scope="module")
def test():
    return Synthetic("test", images=150)


def named(scene, words):
    """The shapes that a description names, read from its words: a second road to a mask."""
    found = list(scene.shapes)
    for word in words.split():
        if word in SIZE:
            found = [s for s in found if s.size == SIZE[word]]
        elif word in scenes.COLORS:
            found = [s for s in found if scenes.COLOR_NAMES[s.color] == word]
        else:
            kind = PLURAL.get(word) or SINGULAR[word]
            found = [s for s in found if kind in ("shape", scenes.KINDS[s.kind])]
    return found


def asked(source, task):
    for q, e in zip(source.questions, (source[i] for i in range(len(source))), strict=True):
        if e.task == task:
            text = next(
                (q.text.removeprefix(f + " ") for f in naming.FILLERS if q.text.startswith(f)),
                q.text,
            )
            yield source.specs[e.image], text, q


def test_counts_and_existence_hold_when_the_words_are_read_again(train):
    checked = 0
    for scene, text, q in asked(train, "count"):
        words = re.sub(
            r"how many|are there|can you see|count the|what is the number of|[?.]", "", text
        )
        assert str(len(named(scene, words))) == q.answer, text
        checked += 1
    for scene, text, q in asked(train, "existence"):
        words = re.sub(r"is there|can you see|does the picture show|\ban?\b|\?", "", text)
        assert ("yes" if named(scene, words) else "no") == q.answer, text
        checked += 1
    assert checked > 50


def test_relations_hold_in_pixels_and_are_never_in_doubt(train):
    away = {"left": ("x", -1), "right": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
    words = {w: name for name, several in naming.RELATIONS.items() for w in several}
    pattern = "|".join(sorted(words, key=len, reverse=True))
    checked = 0
    for scene, text, q in asked(train, "relation"):
        if q.form != "is_beside":
            continue
        first, relation, second = re.fullmatch(
            rf"is the (.+?) ({pattern}) the (.+)\?", text
        ).groups()
        (a,), (b,) = named(scene, first), named(scene, second)
        axis, sign = away[words[relation]]
        distance = sign * (getattr(a, axis) - getattr(b, axis))
        assert abs(distance) >= scenes.SIDE // scenes.GRID - 2 * scenes.JITTER
        assert q.answer == ("yes" if distance > 0 else "no"), text
        checked += 1
    assert checked > 5


def test_names_of_a_shape_fit_no_other(train):
    for scene, text, q in asked(train, "attribute"):
        if q.form == "attribute:c":
            words = re.sub(
                r"what colour is the|what is the colour of the|name the colour of the|[?.]",
                "",
                text,
            )
            (shape,) = named(scene, words)
            assert scenes.COLOR_NAMES[shape.color] == q.answer


def test_the_same_seed_gives_the_same_data_in_another_process(train):
    program = (
        "from vlm_jax.data.benchmark.synthetic import Synthetic; "
        "print(Synthetic('train', images=300).data_hash)"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert other.stdout.strip() == train.data_hash
    assert Synthetic("train", images=300, seed=1).data_hash != train.data_hash


def test_splits_share_no_scene_no_long_string_and_no_handwriting():
    made = {
        (split, seed): Synthetic(split, images=120, seed=seed)
        for split in synthetic.SPLITS
        for seed in (0, 1)
    }
    contents, strings, scans = defaultdict(set), defaultdict(set), defaultdict(set)
    for (split, _), source in made.items():
        for spec in source.specs:
            if isinstance(spec, reading.Page):
                contents[split].add(reading.content(spec))
                for line in spec.lines:
                    scans[split] |= set(line.digits)
                    if len(line.text) >= reading.HELD_OUT:
                        strings[split].add(line.text)
            else:
                contents[split].add(scenes.content(spec))
    for kept in (contents, strings, scans):
        for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
            assert kept[a] and kept[b] and not kept[a] & kept[b]
    digits = [set(reading.scans_of(split, d)) for split in synthetic.SPLITS for d in range(10)]
    assert sum(map(len, digits)) == len(set.union(*digits)) == 1797


def test_no_image_comes_twice(train):
    contents = [
        (reading if isinstance(s, reading.Page) else scenes).content(s) for s in train.specs
    ]
    assert len(set(contents)) == len(contents) == len(train.images)


def test_every_answer_of_a_form_is_about_as_frequent(train):
    forms = defaultdict(Counter)
    for q, e in zip(train.questions, (train[i] for i in range(len(train))), strict=True):
        if e.family == "reasoning":
            forms[q.form][q.label] += 1
    for form, labels in forms.items():
        assert max(labels.values()) - min(labels.values()) <= synthetic.SLACK + 1, (form, labels)


def test_wording_alone_stays_near_chance(train, test):
    scores = majority(train, test)
    assert set(scores) == {
        "existence",
        "count",
        "compare",
        "relation",
        "attribute",
        "composition",
        "number",
        "word",
        "label",
        "handwriting",
    }
    for task in ("existence", "compare"):
        assert scores[task] < 0.65
    for task in ("count", "relation", "attribute", "composition"):
        assert scores[task] < 0.55
    for task in ("number", "word", "label", "handwriting"):
        assert scores[task] < 0.15


def test_a_patch_is_labeled_with_what_its_pixels_show(train):
    rgb = np.array([scenes.COLORS[name] for name in scenes.COLOR_NAMES])
    for i, spec in enumerate(train.specs[:60]):
        labels = train.patch_labels(i, 6)
        assert labels.shape == (36,) and labels.max() < train.patch_classes
        if isinstance(spec, reading.Page):
            shown = Counter(labels[labels >= reading.GLYPH_CLASS] - reading.GLYPH_CLASS)
            written = Counter(reading.CHARACTERS.index(c) for s in spec.lines for c in s.text)
            assert shown == written
            continue
        tiles = train.images[i].reshape(6, 12, 6, 12, 3).swapaxes(1, 2).reshape(36, 144, 3)
        for label, tile in zip(labels, tiles, strict=True):
            if label:
                color = (label - 1) // len(scenes.SIZES) % len(scenes.COLORS)
                assert (np.abs(tile - rgb[color]).max(1) < 8).any()
            else:
                assert (np.abs(tile - np.array(spec.background)).max(1) < 8).mean() > 0.7


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'dev'.*train, val, test"):
        Synthetic("dev", images=1)


def test_rows_of_several_questions_hold_each_question_once():
    def of(questions_per_row, split="train"):
        source = Synthetic(split, images=60, questions_per_row=questions_per_row)
        return source, [source[i] for i in range(len(source))]

    def asked_of(examples):
        return Counter((e.image, turn) for e in examples for turn in e.turns)

    alone, single = of(1)
    for most in (0, 2):
        source, examples = of(most)
        assert asked_of(examples) == asked_of(single) and source.questions == alone.questions
        assert max(len(e.turns) for e in examples) == (most or 6)
        assert len({e.id for e in examples}) == len(examples) < len(single)
        assert source.data_hash != alone.data_hash
    # One row an image; its order is drawn, so that any form may come first.
    whole = of(0)[1]
    assert [e.image for e in whole] == list(range(60))
    assert all(q != "describe the picture." for e in whole for q, _ in e.turns[:-1])
    scenes_alone = [e.turns[0] for e in single if e.id.endswith("-0")]
    moved = sum(e.turns[0] != turn for e, turn in zip(whole, scenes_alone, strict=True))
    assert 15 < moved < 55 and of(0)[1] == whole
    with pytest.raises(ValueError, match="questions_per_row=-1: 1 or more, or 0 for all"):
        Synthetic("train", images=1, questions_per_row=-1)
