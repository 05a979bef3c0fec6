# SPDX-License-Identifier: Apache-2.0
"""Bad data: each fault is named with file and row, or left out and counted, and reading goes on."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from configs import base
from vlm_jax.data.example import BadExample
from vlm_jax.data.loader import Batches, evaluation_batches
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin, open_source
from vlm_jax.data.word_tokenizer import train_tokenizer


def row(k, **changed):
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"a {k}"}]
    return {"id": f"r{k}", "image": f"{k}.jpg", "conversations": turns, **changed}


def turns(*values):
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


@pytest.fixture
def folder(tmp_path):
    """Ten good rows with an image each."""
    (tmp_path / "images").mkdir()
    for k in range(10):
        Image.new("RGB", (20, 16), (k * 20, 0, 0)).save(tmp_path / "images" / f"{k}.jpg")
    return tmp_path


def opened(folder, rows, **fields):
    path = folder / "rows.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    config = base.get_config()
    config.data.path, config.data.images = str(path), str(folder / "images")
    config.data.text_length, config.data.question_length = 40, 8
    config.data.template, config.vit.image_size = "bare", 8
    with config.unlocked():
        config.data.update(fields)
    source = open_source(Origin.of(config), "train")
    return source, Processor(train_tokenizer(["what is it?", "a"], 200), RowFormat.of(config))


FAULTS = {
    "missing image": (dict(image="gone.jpg"), "missing_image", "gone.jpg.*data.images"),
    "empty answer": (dict(conversations=turns("<image> a?", " ")), "empty_answer", "empty answer"),
    "mark in an answer": (
        dict(conversations=turns("<image> a?", "<image>")),
        "image_mark",
        "turn 2 .gpt.",
    ),
    "a second mark in a later turn": (
        dict(conversations=turns("<image> a?", "b", "<image>", "d")),
        "image_mark",
        "2 times <image> in its questions, and `image` names 1",
    ),
    "two marks": (dict(conversations=turns("<image><image> a?", "b")), "image_mark", "2 times"),
    "no mark": (dict(conversations=turns("a?", "b")), "image_mark", "an image but no <image>"),
    "two images": (dict(image=["0.jpg", "1.jpg"]), "images", "data.images_per_row=1: raise"),
    "an image that is none": (dict(image=["0.jpg", 5]), "image", "not a path or a list of paths"),
    "no image": (dict(image=None), "no_image", "data.text_only=True"),
    "half a character in a question": (
        dict(conversations=turns("<image> a\ud83d?", "b")),
        "text",
        "turn 1 holds '.ud83d' at character 9",
    ),
    "half a character in an answer": (
        dict(conversations=turns("<image> a?", "b\udc00")),
        "text",
        "turn 2 holds",
    ),
    "half a character in an id": (dict(id="r\ud800"), "text", "`id` holds"),
    "half a character in a path": (dict(image="\ud8004.jpg"), "text", "`image` holds"),
    "a zero byte in a path": (dict(image="a\x00/4.jpg"), "missing_image", "no image"),
    "a number that is none": (dict(image=float("nan")), "image", "nan, not a path"),
    "a text that is no number": (
        dict(conversations=turns("<image> a?", float("inf"))),
        "conversations",
        "with a text as value",
    ),
    "a turn that is none": (
        dict(conversations=[{"role": "user", "content": "<image>"}]),
        "conversations",
        "turn 1 of `conversations` is {'role': 'user'",
    ),
    "a conversation of text": (dict(conversations="a"), "conversations", "is 'a', not a list"),
    "no turns": (dict(conversations=[]), "conversations", "human and gpt in turn"),
    "no answer": (dict(conversations=turns("<image> a?")), "conversations", "ending with gpt"),
    "unknown speaker": (
        dict(conversations=[{"from": "system", "value": "x"}, {"from": "gpt", "value": "y"}]),
        "conversations",
        "system",
    ),
    "text that is no text": (
        dict(conversations=[{"from": "human", "value": 3}]),
        "conversations",
        "with a text as value",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_row_is_named_or_counted(folder, name):
    changed, kind, message = FAULTS[name]
    rows = [row(k) for k in range(10)]
    rows[4] = row(4, **changed)
    with pytest.raises(BadExample, match=f"(?s)rows.json, row 4 .*{message}.*on_bad_example=skip"):
        opened(folder, rows)
    source, _ = opened(folder, rows, on_bad_example="skip")
    assert source.describe()["left_out"] == {kind: 1}
    assert [source[i].id for i in range(len(source))] == [f"r{k}" for k in range(10) if k != 4]


def test_an_answer_that_a_row_begins_with_is_left_out_and_counted(folder):
    led = [{"from": "gpt", "value": "hello"}, *turns("<image> a?", "b")]
    source, _ = opened(folder, [row(0), row(1, conversations=led)])
    assert source[1].turns == (("a?", "b"),) and source.describe()["leading_answers"] == 1
    assert any("1 rows begin with an answer" in said for said in source.notes())
    assert "leading_answers" not in opened(folder, [row(0)])[0].describe()


def test_all_bad_rows_are_counted_in_the_error(folder):
    rows = [row(k, image="gone.jpg" if k % 2 else f"{k}.jpg") for k in range(10)]
    with pytest.raises(BadExample, match="row 1 .*4 more bad rows"):
        opened(folder, rows)
    with pytest.raises(ValueError, match="no usable row among 1; the first bad one.*gone"):
        opened(folder, rows[1:2], on_bad_example="skip")


def test_rows_of_text_alone_need_leave(folder):
    rows = [row(0), {"id": "t", "conversations": turns("what?", "b")}]
    source, processor = opened(folder, rows, text_only=True)
    assert source[1].image is None
    batch = next(iter(evaluation_batches(source, processor, batch=2)))
    assert batch["image_at"][1] == processor.text_length and not batch["pixels"][1].any()
    levels = np.ones((1, 4, 3), np.float32)
    batch = next(iter(evaluation_batches(source, processor, batch=2, features=levels)))
    assert batch["levels"][0].all() and not batch["levels"][1].any() and levels.all()
    with pytest.raises(BadExample, match="<image> in a question but no image"):
        opened(folder, [row(0), row(1, image=None)], text_only=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"id": "r0", "image', "not JSON, or cut short"),
        ('{"rows": []}', "a JSON dict at the top, not a list.*save the list 'rows' alone"),
        ("\xff\xfe", "not JSON"),
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("[" * 100_000, "not JSON, or cut short.*not closed"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "line 1 .*nested too deep"),
        ("NaN", "a JSON float at the top"),
        ("[]", "no usable row among 0"),
        ("[7]", "row 0 .*a int, not an object"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_named(folder, text, message):
    with pytest.raises(ValueError, match=f"rows.json.*{message}"):
        opened(folder, text)


def test_a_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match="nowhere.json.*data.path"):
        opened(folder, [row(0)], path="nowhere.json")


def cut_short(path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:900])


def elongated(path):
    Image.new("RGB", (1, 500)).save(path)


BROKEN = {
    "a truncated JPEG": cut_short,
    "an empty file": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_text("<html>404</html>"),
    "a thread": elongated,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_cannot_be_read_fails_with_its_row(folder, name):
    BROKEN[name](folder / "images" / "4.jpg")
    source, processor = opened(folder, [row(k) for k in range(10)])
    with pytest.raises(
        BadExample, match="(?s)rows.json, row 4 .id 'r4'.*4.jpg.*on_bad_example=skip"
    ):
        list(itertools.islice(Batches(source, processor, batch=2, seed=0), 5))


def test_the_next_good_example_stands_in_and_reading_goes_on(folder):
    good = opened(folder, [row(k) for k in range(10)])
    whole = list(itertools.islice(Batches(*good, batch=2, seed=0), 15))
    for k in (4, 5):
        cut_short(folder / "images" / f"{k}.jpg")
    for threads in (True, False):
        batches = Batches(
            *opened(folder, [row(k) for k in range(10)], on_bad_example="skip"),
            batch=2,
            seed=0,
            skip=True,
        )
        made = (
            list(itertools.islice(batches, 15)) if threads else [batches.at(k) for k in range(15)]
        )
        for before, after in zip(whole, made, strict=True):
            expected = [6 if i in (4, 5) else i for i in before["index"]]
            assert list(after["index"]) == expected
            for name in ("ids", "pixels"):
                for a, i in enumerate(before["index"]):
                    if i not in (4, 5):
                        assert np.array_equal(after[name][a], before[name][a])
        assert batches.skipped == 2  # in three epochs, but each counts once
        batches.close()


def test_evaluation_marks_what_it_cannot_read(folder):
    cut_short(folder / "images" / "4.jpg")
    source, processor = opened(folder, [row(k) for k in range(10)], on_bad_example="skip")
    seen = [
        (int(i), bool(v))
        for batch in evaluation_batches(source, processor, batch=4, skip=True)
        for i, v in zip(batch["index"], batch["valid"], strict=True)
    ]
    assert [i for i, v in seen if v] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    with pytest.raises(BadExample, match="r4"):
        list(evaluation_batches(source, processor, batch=4))


def test_a_source_without_one_good_image_ends(folder):
    for k in range(10):
        (folder / "images" / f"{k}.jpg").write_bytes(b"")
    source, processor = opened(folder, [row(k) for k in range(10)], on_bad_example="skip")
    with pytest.raises(BadExample, match="not one of 10 examples"):
        Batches(source, processor, batch=2, seed=0, skip=True).at(0)


def test_images_are_read_by_content_and_found_under_other_suffixes(folder):
    images = folder / "images"
    Image.new("RGB", (9, 9), "red").convert("P").save(images / "gif", format="GIF")
    (images / "gif").rename(images / "0.jpg")  # a GIF named .jpg
    (images / "1.jpg").rename(images / "1.PNG")  # a JPEG named .PNG
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(images / "2.jpg")
    Image.new("RGB", (1, 9), "red").save(images / "3.jpg")  # one pixel wide
    Image.new("L", (9, 9), 7).save(images / "4.jpg")
    source, processor = opened(folder, [row(k) for k in range(5)])
    assert source.describe()["renamed_images"] == 1
    for k in range(5):
        image = source.images[k]
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert np.isfinite(processor.pixels(image)).all()
        assert processor.pixels(image).shape == (8, 8, 3)
    assert tuple(source.images[0][0, 0]) == (255, 0, 0)
    assert source.images[2][0, 0, 0] > 250 and source.images[2][0, 0, 1] < 5
