# SPDX-License-Identifier: Apache-2.0
"""Clips of the embedded benchmark: what happens can be read off, and not off one frame."""

import random
import re
from collections import Counter

import numpy as np
import pytest
import tiny

from vlm_jax.data import clips
from vlm_jax.data.benchmark import scenes, videos
from vlm_jax.data.benchmark.synthetic import Synthetic, majority
from vlm_jax.data.sources import Origin, open_source


@pytest.fixture(scope="module")
def train():
    return Synthetic("train", images=120, video_share=1.0, frames=videos.FRAMES)


@pytest.fixture(scope="module")
def test():
    return Synthetic("test", images=40, video_share=1.0, frames=videos.FRAMES)


def asked(source, task):
    """The frames of each clip, and a question about it."""
    for k, q in enumerate(source.questions):
        if q.task == task:
            yield [source.specs[i] for i in source[k].images], q


def shape(scene, kind):
    """The one shape of a kind, None without one."""
    found = [s for s in scene.shapes if scenes.KINDS[s.kind] == kind]
    assert len(found) < 2
    return found[0] if found else None


def test_directions_hold_in_pixels(train):
    for frames, q in asked(train, "direction"):
        kind = re.search("|".join(scenes.KINDS), q.text)[0]
        at = np.array([(s.x, s.y) for s in (shape(f, kind) for f in frames)]) - scenes.SIDE / 2
        (x, y), (then_x, then_y) = at[:-1].T, at[1:].T
        turned = x * then_y - y * then_x
        # In pixels y grows downwards: a positive turn is clockwise.
        assert (turned > 0).all() or (turned < 0).all()
        assert q.answer == videos.DIRECTIONS[int(turned[0] < 0)]
        assert abs(turned.sum()) > 0 and abs(_angle(at)) < np.pi


def _angle(at):
    """The whole turn from the first to the last place."""
    angles = np.unwrap(np.arctan2(at[:, 1], at[:, 0]))
    return angles[-1] - angles[0]


def test_orders_hold_when_the_colors_are_read_again(train):
    for frames, q in asked(train, "order"):
        color, a, b = re.findall("|".join(scenes.COLORS), q.text)
        lamp = next(
            kind
            for kind in scenes.KINDS
            if (places := {(s.x, s.y) for f in frames if (s := shape(f, kind))})
            and places <= {(x, y) for x in (30, 42) for y in (30, 42)}
        )
        lit = [scenes.COLOR_NAMES[shape(f, lamp).color] for f in frames]
        follows = {x: y for x, y in zip(lit, lit[1:], strict=False) if x != y}
        # Three colors in turn: one step is enough to know them all.
        x, y = next(iter(follows.items()))
        third = ({color, a, b} - {x, y}).pop()
        follows |= {y: third, third: x}
        assert follows[color] == q.answer and q.answer in (a, b)
        assert q.label == ("first" if q.answer == a else "second")


def test_counts_hold_when_the_frames_are_counted(train):
    for frames, q in asked(train, "events"):
        kind = re.search("|".join(scenes.KINDS), q.text)[0]
        there = [shape(f, kind) is not None for f in frames]
        assert str(sum(there)) == q.answer
        assert not any(a and b for a, b in zip(there, there[1:], strict=False))


def test_a_frame_by_itself_says_nothing_of_direction_and_order():
    """Over all beginnings each frame shows the same scenes, equally often, whatever happens."""
    rng = random.Random(0)
    for _ in range(5):
        one = videos.draw_clip(rng, direction=0, order=1, blinks=2)
        for other, name, beginnings in (
            (one._replace(direction=1), "start", len(videos.BORDER)),
            (one._replace(order=-1), "phase", videos.turn()),
        ):
            for frame in range(videos.FRAMES):
                shown = [
                    Counter(videos.scene(clip._replace(**{name: k}), frame)
                            for k in range(beginnings))
                    for clip in (one, other)
                ]  # fmt: skip
                assert shown[0] == shown[1]
            pairs = [
                Counter((videos.scene(c, 0), videos.scene(c, 3)) for k in range(beginnings)
                        for c in [clip._replace(**{name: k})])
                for clip in (one, other)
            ]  # fmt: skip
            assert pairs[0] != pairs[1]  # two frames do


def test_answers_are_equally_frequent_so_that_words_alone_give_chance(train, test):
    for source in (train, test):
        for task, answers in (("direction", 2), ("order", 2), ("events", 4)):
            counts = Counter(q.label for _, q in asked(source, task))
            assert len(counts) == answers and len(set(counts.values())) == 1
    assert majority(train, test) == {"direction": 0.5, "order": 0.5, "events": 0.25}


def test_splits_share_no_clip_and_clips_follow_from_the_seed(train, test):
    shown = [
        {videos.content(clip) for clip, _ in videos.clips_of(split, 60, seed=0)}
        for split in ("train", "val", "test")
    ]
    assert [len(one) for one in shown] == [60] * 3 and not set.intersection(*shown)
    again = Synthetic("test", images=40, video_share=1.0, frames=videos.FRAMES)
    other = Synthetic("test", images=40, video_share=1.0, frames=videos.FRAMES, seed=1)
    assert again.data_hash == test.data_hash != other.data_hash


def test_fewer_frames_are_those_at_even_places_and_the_questions_stay(test):
    few = Synthetic("test", images=40, video_share=1.0, frames=3)
    taken = clips.sampled(videos.FRAMES, 3)
    assert few.questions == test.questions and few.data_hash != test.data_hash
    for k in (0, 4, 100):
        whole = [test.specs[i] for i in test[k].images]
        assert [few.specs[i] for i in few[k].images] == [whole[place] for place in taken]
        assert few[k].frames == 3 and few[k].cluster == str(few[k].images)


def test_other_families_are_bit_for_bit_those_without_clips():
    plain = Synthetic("train", images=30)
    mixed = Synthetic("train", images=60, video_share=0.5, frames=2)
    assert mixed.specs[:30] == plain.specs and mixed.questions[: len(plain)] == plain.questions
    assert [repr(mixed[k]) for k in range(len(plain))] == [
        repr(plain[k]) for k in range(len(plain))
    ]
    assert {mixed[k].family for k in range(len(plain), len(mixed))} == {"video"}
    assert plain.data_hash == Synthetic("train", images=30, frames=4).data_hash


def test_an_encoder_learns_from_every_frame(test):
    for index in (0, 7, 100):
        spec = test.specs[index]
        labels = test.patch_labels(index, videos.ACROSS)
        wanted = sorted(scenes.shape_class(s.kind, s.color, s.size) for s in spec.shapes)
        assert sorted(labels[labels > 0].tolist()) == wanted  # a shape lies in one patch
        assert test.images[index].shape == (scenes.SIDE, scenes.SIDE, 3)
        assert not test.patch_names(index, videos.ACROSS).any()


@pytest.mark.parametrize("data, said", [
    (dict(video_share=0.5), "data.frames=0: clips have 8 frames, take 1 to 8"),
    (dict(video_share=0.5, frames=9), "data.frames=9: clips have 8 frames"),
    (dict(video_share=0.7, picture_share=0.7, frames=2, pictures="x"), "more than all images"),
    (dict(frames=2), "data.video_share=0.0: none of the examples"),
])  # fmt: skip
def test_shares_and_frames_that_do_not_fit_are_refused(data, said, monkeypatch):
    monkeypatch.setattr("vlm_jax.data.benchmark.things.read", lambda path: None)
    with pytest.raises(ValueError, match=said):
        open_source(Origin.of(tiny.config(data=data)), "train")
