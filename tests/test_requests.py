# SPDX-License-Identifier: Apache-2.0
"""What is no prompt and no image is named before a model sees it; rows go into few shapes."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.pictures import MOST_ELONGATED
from vlm_jax.serving.requests import bucket_of_rows, conversation, padded, picture


def test_a_conversation_is_its_turns_with_the_last_one_open():
    assert conversation("a?", images=0) == (("a?", ""),)
    assert conversation(["a?", "b ", " c? "], images=1) == (("a?", "b "), (" c? ", ""))
    assert conversation("<image>\na?", images=1) == (("a?", ""),)
    # A mark that says more than that an image belongs to the first question stays.
    assert conversation(["a?", "b", "<image> c?"], images=1) == (("a?", "b"), ("<image> c?", ""))
    assert conversation("<image> or <image>? ", images=2) == (("<image> or <image>? ", ""),)
    assert conversation("a?", images=2) == (("a?", ""),)


@pytest.mark.parametrize("prompt, images, words", [
    (5, 1, "list of texts.*not 5"),
    (None, 1, "list of texts.*not None"),
    ({"a": "b"}, 1, "list of texts"),
    (["a", 1, "b"], 1, "list of texts"),
    ([], 1, "0 texts"),
    (["a", "b"], 1, "2 texts: give questions and answers in turn"),
    ("<image> <image>", 1, "2 times <image> in the prompt and 1 image"),
    ("<image>", 0, "1 times <image> in the prompt and 0 image"),
    (["a", "<image>", "c"], 1, "in a question"),
    (["<image>", "b", "<image>"], 1, "2 times <image> in the prompt and 1 image:"),
    ("<image>", 2, "1 times <image> in the prompt and 2 images: each image has one mark"),
    ("\ud800", 1, "half a character"),
])  # fmt: skip
def test_what_is_no_prompt_says_what_is_one(prompt, images, words):
    with pytest.raises(ValueError, match=words):
        conversation(prompt, images=images)


@pytest.mark.parametrize("image, words", [
    (5, "path, a PIL image or an array"),
    (np.zeros((0, 5, 3), np.uint8), "5 x 0 pixels: it is empty"),
    (np.zeros((0, 0, 3), np.uint8), "0 x 0 pixels: it is empty"),
    (Image.new("RGB", (0, 0)), "0 x 0 pixels: it is empty"),
    (np.zeros((1, MOST_ELONGATED + 1, 3), np.uint8), "times as long as wide"),
    (Image.new("L", (1, MOST_ELONGATED + 1)), "times as long as wide"),
    (np.zeros((4, 4), np.uint8), "uint8.*not uint8.4, 4.*np.stack"),
    (np.zeros((4, 4, 1), np.uint8), "np.stack"),
    (np.zeros((4, 4, 3)), "not float64.*255"),
    (np.zeros((4, 4, 3), np.uint16), "not uint16.*257"),
    (np.zeros((4, 4, 3), bool), "not bool.*astype"),
    (np.zeros((4, 4, 4), np.uint8), "leave the opacity out"),
    (np.zeros((3, 4, 5), np.uint8), "channels come last"),
    (np.zeros((2, 4, 4, 3), np.uint8), "one image for each prompt"),
    (np.array(None), "an array image is uint8"),
])  # fmt: skip
def test_what_is_no_image_says_what_is_one(image, words):
    with pytest.raises(ValueError, match=words):
        picture(image)


def test_a_file_a_picture_and_an_array_are_the_same_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for image in (pixels, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(picture(image), pixels)
    assert picture(Image.new("L", (3, 2))).shape == (2, 3, 3)


def test_an_image_too_large_to_decode_is_refused_unread(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 2 - 1)
    with pytest.raises(ValueError, match="decompression bomb"):
        picture(tmp_path / "a.png")


def test_rows_are_padded_on_the_right_and_batches_by_powers_of_two():
    np.testing.assert_array_equal(padded([[1, 2], [3]], 3, 9), [[1, 2, 9], [3, 9, 9]])
    assert [bucket_of_rows(n, 1) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert [bucket_of_rows(n, 4) for n in (1, 4, 5, 9)] == [4, 4, 8, 16]
