# SPDX-License-Identifier: Apache-2.0
"""Pixels equal those of transformers' processors, and the published numbers."""

import numpy as np
import pytest
import tiny
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from vlm_jax.data.images import Preparation
from vlm_jax.data.pictures import read_image
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.word_tokenizer import train_tokenizer

HALF = (0.5, 0.5, 0.5)


def drawn(width, height, mode="RGB"):
    draw = np.random.default_rng(width * 1000 + height)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 3)).astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(draw.integers(0, 256, (height, width)).astype(np.uint8)))
        return image
    return image.convert(mode)


def published():
    """The image of the published vectors: 50 x 30, R = 5x, G = 7y, B = 3(x + y), modulo 256."""
    y, x = np.mgrid[:30, :50]
    return np.stack([5 * x % 256, 7 * y % 256, 3 * (x + y) % 256], -1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
@pytest.mark.parametrize("size", [(40, 40), (90, 30), (30, 71), (336, 336), (1, 60)])
def test_pixels_are_those_of_transformers(size, mode, tmp_path):
    picture = drawn(*size, mode)
    name = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(name)
    image = read_image(str(name), "x")
    kind = dict(return_tensors="np", do_convert_rgb=True)
    with Image.open(name) as opened:
        # As published, what is transparent is dropped; transformers 5 lays it on white.
        opened = opened.convert("RGB") if mode == "RGBA" else opened
        clip = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)(opened, **kind)
        siglip = SiglipImageProcessorPil(size=dict(height=48, width=48))(opened, **kind)
    ours = Preparation(48, "crop")
    np.testing.assert_array_equal(
        ours.normalized(ours.square(image)), clip["pixel_values"][0].transpose(1, 2, 0)
    )
    ours = Preparation(48, "stretch", HALF, HALF)
    np.testing.assert_array_equal(
        ours.normalized(ours.square(image)), siglip["pixel_values"][0].transpose(1, 2, 0)
    )


def test_the_orientation_in_exif_is_not_applied(tmp_path):
    picture = drawn(40, 20)
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), "x"), np.asarray(picture))


def test_a_processor_prepares_as_the_configuration_says():
    fields = dict(image_mean=HALF, image_std=(0.5, 0.25, 0.5), image_fit="stretch")
    c = tiny.config(data=fields)
    words = train_tokenizer(["a"], 100)
    made, image = Processor(words, RowFormat.of(c)), published()
    expected = Preparation(32, "stretch", HALF, (0.5, 0.25, 0.5))
    np.testing.assert_array_equal(made.pixels(image), expected.normalized(expected.square(image)))
    rows = RowFormat.of(tiny.config(data=fields | dict(blind=True)))
    blind = Processor(words, rows).pixels(image)
    np.testing.assert_allclose(blind, np.zeros((32, 32, 3)), atol=0.02)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("image_fit", "tile", "'tile': choose one of pad, crop, stretch"),
        ("image_resample", "area", "'area': choose one of nearest, .*bilinear"),
        ("image_std", (0.5, 0.0, 0.5), "deviations above 0"),
        ("image_mean", (0.5, 0.5), "three numbers each"),
        ("image_mean", (0.5, 0.5, 1.5), "image_fit='pad' pads with this color"),
        ("image_resize", (0, 3), "one or two whole numbers"),
        ("image_resize", (30, 40), "give one number"),
        ("image_resize", (100_000,), "from 1 to 1344"),
        ("image_rescale", 0.0, "a number above 0"),
    ],
)
def test_a_wrong_preparation_is_named(field, value, words):
    with pytest.raises(ValueError, match=words):
        Preparation.of(tiny.config(data={field: value}).data, 32)


@pytest.mark.parametrize("shape", [(300, 701), (513, 40), (257, 256), (1, 60)])
def test_padding_some_rows_at_a_time_is_resizing_the_whole_square(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    made, side = Preparation(48, "pad"), max(shape)
    whole = np.full((side, side, 3), made.color, np.uint8)
    top, left = ((side - x) // 2 for x in shape)
    whole[top : top + shape[0], left : left + shape[1]] = image
    resized = Image.fromarray(whole).resize((48, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(made.square(image), np.asarray(resized))


def test_an_image_of_twenty_thousand_pixels_needs_no_square_of_them():
    image, largest = np.zeros((300, 20_000, 3), np.uint8), []
    new = Image.new
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Image, "new", lambda mode, of, *a: largest.append(of[0] * of[1]) or new(mode, of, *a)
        )
        assert Preparation(336, "pad").square(image).shape == (336, 336, 3)
    assert max(largest) < 10_000_000


@pytest.mark.parametrize("rescale, mean", [(1 / 255, 0.4), (1 / 127.5, 0.9), (1.0, 110.0)])
def test_a_blank_image_is_nothing_after_normalization(rescale, mean):
    made = Preparation(8, "crop", (mean,) * 3, (1.0,) * 3, rescale=rescale)
    assert np.abs(made.normalized(made.blank())).max() <= rescale  # to the unit of uint8
