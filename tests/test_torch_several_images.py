# SPDX-License-Identifier: Apache-2.0
"""Rows of two images: logits and greedy tokens of converted LLaVAs are those of transformers."""

import jax
import numpy as np
import published_models as published
import pytest
import tiny
from test_torch_decode import greedy

from vlm_jax.__main__ import main
from vlm_jax.serving.decoder import Decoder

pytestmark = pytest.mark.torch

STEPS, LENGTH = 12, 9
# Side by side, apart, at both ends, and one where there is room for two.
PLACES = [(2, 2), (1, 4), (0, 6), (3, LENGTH)]
LENGTHS = np.array([9, 5, 7, 6], "i4")


def batch(config, visual):
    """What our models read, what transformers reads, and the pixels of all images in order."""
    draw, size = np.random.default_rng(0), config.vision_config.image_size
    ids = draw.integers(3, 60, (len(PLACES), LENGTH)).astype("i4")
    pixels = draw.normal(size=(len(PLACES), 2, size, size, 3)).astype("f4")
    theirs = np.zeros((len(PLACES), LENGTH + 2 * visual), "i8")
    mask = np.zeros_like(theirs)
    for row, (n, places) in enumerate(zip(LENGTHS, PLACES, strict=True)):
        text = list(ids[row, :n])
        for place in reversed([place for place in places if place < LENGTH]):
            text[place:place] = [config.image_token_index] * visual
        theirs[row, : len(text)], mask[row, : len(text)] = text, 1
    at = np.array(PLACES, "i4")
    ours = dict(ids=ids, image_at=at, length=LENGTHS, pixels=pixels)
    return ours, dict(input_ids=theirs, attention_mask=mask), pixels[at < LENGTH]


@pytest.mark.parametrize("name, seed", [("clip_llama", 0), ("siglip_last", 0)])
def test_rows_of_two_images_are_those_of_transformers(name, seed, tmp_path, mesh1):
    model = published.random_llava(tmp_path / "hf", name, seed)
    _, _, visual = published.batch(model.config)
    ours, inputs, pixels = batch(model.config, visual)
    scores = published.logits(model, inputs, pixels)
    expected = greedy(model, inputs, pixels, STEPS)
    assert len({tuple(row) for row in expected}) == len(expected)
    argv = ("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    assert main(["convert", *map(str, argv)]) == 0
    with jax.set_mesh(mesh1):
        made = tiny.model_of(tmp_path / "ours")
        found = np.asarray(jax.jit(lambda m, b: m.logits(b))(made, tiny.placed(ours)))
        tokens = Decoder(made, stop_ids=())(tiny.placed(ours), new_tokens=STEPS)
    for row, (n, places) in enumerate(zip(LENGTHS, PLACES, strict=True)):
        for text in range(n):
            # The token before stands behind the images that come no later than this one.
            place = text + visual * sum(at <= text for at in places if at < LENGTH) - 1
            if place >= 0:
                np.testing.assert_allclose(found[row, text], scores[row, place], atol=1e-4)
    np.testing.assert_array_equal(tokens, expected)
