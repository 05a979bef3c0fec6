# SPDX-License-Identifier: Apache-2.0
"""Scenes of pictures: pixels and labels are those of the pictures, splits share no thing."""

import itertools
import random

import made_pictures
import numpy as np
import pytest

from vlm_jax.data.benchmark import picture_scenes, scenes, things


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    return things.read(made_pictures.write(tmp_path_factory.mktemp("packages")))


def deck(shown, split="train", in_held_out=False):
    return picture_scenes.Deck(shown, split, held_out="facebook", in_held_out=in_held_out)


def drawn(deck, count=60):
    rng = random.Random(0)
    return [picture_scenes.draw_scene(rng, deck) for _ in range(count)]


def test_pictures_lie_in_their_quarters_and_do_not_overlap(shown):
    half = scenes.SIDE // 2
    for scene in drawn(deck(shown)):
        if len(scene.pictures) == 1:
            (p,) = scene.pictures
            assert p.place == -1 and min(p.x, p.y) >= 0 and max(p.x, p.y) + p.size <= scenes.SIDE
            continue
        assert [p.place for p in scene.pictures] == sorted({p.place for p in scene.pictures})
        for p in scene.pictures:
            row, column = divmod(p.place, 2)
            assert column * half <= p.x and p.x + p.size <= (column + 1) * half
            assert row * half <= p.y and p.y + p.size <= (row + 1) * half
            assert picture_scenes.PLACES[p.place].split() == [
                ("top", "bottom")[row], ("left", "right")[column]
            ]  # fmt: skip


def test_a_whole_picture_is_seen_as_it_was_drawn(shown):
    size = things.PIXELS
    for texture in ("plain", *picture_scenes.TEXTURES):
        picture = picture_scenes.Picture(3, 1, -1, 5, 2, size)
        scene = picture_scenes.Scene((90, 120, 150), texture, (picture,))
        image = picture_scenes.render(scene, shown)
        assert image.shape == (scenes.SIDE, scenes.SIDE, 3) and image.dtype == np.uint8
        given = shown.pictures["twitter"][3]
        opaque = given[..., 3] == 255
        np.testing.assert_array_equal(
            image[2 : 2 + size, 5 : 5 + size][opaque], given[opaque][:, :3]
        )
        ground = image[:, -2:].astype(int) - (90, 120, 150)
        assert np.abs(ground).max() <= picture_scenes.TEXTURE
        assert (texture == "plain") == (not ground.any())
        np.testing.assert_array_equal(image, picture_scenes.render(scene, shown))


def test_a_patch_belongs_to_the_picture_that_covers_most_of_it(shown):
    side = 6
    for scene in drawn(deck(shown), 20):
        plain = scene._replace(texture="plain", ground=(1, 2, 3))
        other = scene._replace(texture="plain", ground=(201, 202, 203))
        # Where two grounds give one pixel, a picture covers it.
        covered = (picture_scenes.render(plain, shown) == picture_scenes.render(other, shown)).all(
            2
        )
        owners = picture_scenes.owners(scene, shown, side).reshape(side, side)
        for row, column in itertools.product(range(side), repeat=2):
            part = np.s_[row * 12 : row * 12 + 12, column * 12 : column * 12 + 12]
            owner = owners[row, column]
            if not owner:
                assert covered[part].mean() < 0.2
                continue
            p = scene.pictures[owner - 1]
            assert covered[part].any()
            assert p.x < column * 12 + 12 and column * 12 < p.x + p.size
            assert p.y < row * 12 + 12 and row * 12 < p.y + p.size


def test_splits_share_no_thing_and_training_never_shows_the_held_out_style(shown):
    held_out = things.STYLES.index("facebook")
    members = {split: set(deck(shown, split).members) for split in ("train", "val", "test")}
    assert sum(map(len, members.values())) == len(set().union(*members.values())) == len(shown)
    for split, mine in members.items():
        for scene in drawn(deck(shown, split)):
            assert {p.thing for p in scene.pictures} <= mine
            assert held_out not in {p.style for p in scene.pictures}
    for scene in drawn(deck(shown, in_held_out=True)):
        styles = [p.style for p in scene.pictures]
        assert {p.thing for p in scene.pictures} <= members["train"]
        assert held_out in styles and (len(styles) == 2 or set(styles) == {held_out})


def test_two_pictures_are_of_two_styles_and_half_of_them_of_one_thing(shown):
    for in_held_out in (False, True):
        pairs = [s.pictures for s in drawn(deck(shown, in_held_out=in_held_out), 600)
                 if len(s.pictures) == 2]  # fmt: skip
        assert all(a.style != b.style for a, b in pairs)
        alike = np.mean([a.thing == b.thing for a, b in pairs])
        assert alike == pytest.approx(0.5, abs=3 * 0.5 / len(pairs) ** 0.5)
    others = [s.pictures for s in drawn(deck(shown)) if len(s.pictures) > 2]
    assert others and all(len({p.thing for p in found}) == len(found) for found in others)


def test_variants_of_a_thing_are_in_one_split():
    kin = [things.Thing(name, "", "", (), "").kin for name in ("man cook", "woman cook", "cook")]
    assert kin == ["cook"] * 3
    assert things.Thing("woman", "", "", (), "").kin == "woman"


def test_too_few_things_are_refused(shown):
    few = things.Things(list(shown.things[:4]), {s: p[:4] for s, p in shown.pictures.items()})
    with pytest.raises(ValueError, match="things for the val split: a scene needs 4"):
        deck(few, "val")
