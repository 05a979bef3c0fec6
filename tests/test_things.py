# SPDX-License-Identifier: Apache-2.0
"""Packages of pictures: what is used of them, what is left out, and what is refused."""

import json
import shutil

import made_pictures
import numpy as np
import pytest
from PIL import Image, ImageColor

from vlm_jax.data.benchmark import things


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_pictures.write(tmp_path_factory.mktemp("packages"))


def test_things_are_what_the_packages_say(folder):
    read = things.read(folder)
    assert len(read) == made_pictures.COUNT
    entries = json.loads(next(folder.glob("*google*/emoji.json")).read_text())
    for k, (thing, entry) in enumerate(zip(read.things, entries, strict=True)):
        assert thing.name == entry["name"].lower() and thing.subcategory == entry["subcategory"]
        assert "thing" in thing.words and not set(thing.words) & set(thing.name.split())
        for style in things.STYLES:
            drawn = Image.open(next(folder.glob(f"*{style}*/img/{style}/64/{entry['image']}")))
            np.testing.assert_array_equal(read.pictures[style][k], np.asarray(drawn))
            x, y = 32, 6  # on the disc, above all marks
            (named,) = [
                n for n, c in made_pictures.DISCS.items() if c == drawn.getpixel((x, y))[:3]
            ]
            assert read.colors[style][k] == named
    assert {t.category for t in read.things} == {"food and drink", "objects", "symbols"}


def test_what_a_question_cannot_name_or_tell_apart_is_left_out(folder, tmp_path):
    entry, n = made_pictures.entry, made_pictures.COUNT
    extra = [
        (entry(n, "lone star", "Symbols"), "red", 200),  # alone of these it stays
        (entry(n + 1, "one two three four", "Objects"), "red", 201),
        (entry(n + 2, "keycap #", "Symbols"), "red", 202),
        (entry(n + 3, "twice", "Symbols"), "red", 203),
        (entry(n + 4, "twice", "Objects"), "red", 204),
        (entry(n + 5, "somewhere", "Objects", has_img_facebook=False), "red", 205),
        (entry(n + 6, "older", "Objects", obsoleted_by="2B50"), "red", 206),
        (entry(n + 7, "skin", "Component"), "red", 207),
        (entry(n + 8, "another lone star", "Symbols"), "red", 200),  # looks like the first
    ]
    read = things.read(made_pictures.write(tmp_path, extra=extra))
    assert [t.name for t in read.things[n:]] == ["lone star"]
    assert read.version_hash != things.read(folder).version_hash


def test_the_files_decide_the_hash_and_not_their_folder(folder, tmp_path):
    before = things.read(folder).version_hash
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert things.read(copy).version_hash == before
    path = next(copy.glob("*google*/img/google/64/1.png"))
    made_pictures.drawn("google", "blue", 255).save(path)
    things.read.cache_clear()
    assert things.read(copy).version_hash != before


@pytest.mark.parametrize("name", things.COLORS)
def test_a_picture_of_one_color_has_its_name(name):
    code = {"brown": "saddlebrown", "purple": "rebeccapurple", "pink": "hotpink"}.get(name, name)
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[16:48, 8:56] = (*ImageColor.getrgb(code), 255)
    assert things.color_of(picture) == name
    turned = picture.transpose(1, 0, 2)
    assert things.color_of(turned) == name


def test_without_a_prevailing_color_there_is_none():
    picture = np.zeros((64, 64, 4), np.uint8)
    assert things.color_of(picture) == ""  # nothing is opaque
    picture[:] = (220, 20, 20, 255)
    for rows, found in ((12, "red"), (14, ""), (40, "")):  # 19 %, 22 % and 62 % of it blue
        picture[:rows, :, :3] = (20, 60, 220)
        assert things.color_of(picture) == found, rows
    half = np.zeros((64, 64, 4), np.uint8)
    half[:] = (220, 20, 20, 255)
    for k, color in enumerate(((20, 60, 220), (20, 160, 40), (250, 230, 20), (120, 40, 160))):
        half[k * 9 : k * 9 + 9, :, :3] = color
    assert things.color_of(half) == ""  # red has 44 %


@pytest.mark.parametrize(("change", "error", "says"), [
    (lambda home: shutil.rmtree(home), FileNotFoundError, "no package emoji-datasource-twitter"),
    (lambda home: (home / "package.json").write_text(
        '{"name": "emoji-datasource-twitter", "version": "15.1.2"}'), ValueError,
     "has emoji-datasource-twitter 15.1.2 .* are those of 16.0.0; `vlm-jax data fetch pictures`"),
    (lambda home: (home / "emoji.json").write_text("[]"), ValueError, "says other things than"),
    (lambda home: (home / "emoji.json").write_text("[{"), ValueError, "emoji.json cannot be read"),
    (lambda home: (home / "emoji.json").write_text('[{"name": "A"}]'), ValueError,
     "entry 0 lacks category, has_img_facebook"),
    (lambda home: (home / "img/twitter/64/1.png").unlink(), FileNotFoundError,
     "1.png is not there: fetch the package again"),
    (lambda home: (home / "img/twitter/64/1.png").write_bytes(b"\x89PNG"), ValueError,
     "1.png cannot be decoded .*: fetch the package again"),
    (lambda home: Image.new("RGB", (32, 64)).save(home / "img/twitter/64/1.png"), ValueError,
     "is 32 x 64 pixels, not 64 x 64"),
])  # fmt: skip
def test_damaged_and_other_packages_are_refused(change, error, says, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(next(copy.glob("*twitter*")))
    with pytest.raises(error, match=says):
        things.read(copy)
