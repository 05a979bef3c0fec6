# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens are those of transformers, step by step, for rows that are padded either way."""

import jax
import numpy as np
import published_models as published
import pytest
import tiny

from vlm_jax.__main__ import main
from vlm_jax.serving.decoder import Decoder

pytestmark = pytest.mark.torch

STEPS = 64
# Draws whose likeliest tokens lead by 1e-3 at every step, and whose rows say several things.
SEEDS = {
    "clip_llama": 6, "clip_qwen2": 7, "clip_full": 0, "clip_mistral": 0, "siglip_llama3": 0,
    "siglip_last": 4,
}  # fmt: skip


def moved_left(rows, mask):
    """Rows with their padding moved from the right end to the left."""
    counts = mask.sum(1)
    return np.stack([np.roll(row, len(row) - n) for row, n in zip(rows, counts, strict=True)])


def greedy(model, inputs, pixels, steps=STEPS):
    """Greedy ids of transformers for every row, which it wants padded on the left."""
    import torch

    ids, mask = (moved_left(x, inputs["attention_mask"]) for x in inputs.values())
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
            do_sample=False, max_new_tokens=steps, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return found[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("name", published.LLAVAS)
def test_greedy_tokens_of_a_batch_are_those_of_transformers(name, tmp_path, mesh1):
    model = published.random_llava(tmp_path / "hf", name, SEEDS[name])
    batch, inputs, visual = published.batch(model.config)
    mask = inputs["attention_mask"]
    # Padding on the left is no part of a row: transformers itself scores every token alike.
    right = published.logits(model, inputs, batch["pixels"])
    turned = {key: moved_left(x, mask) for key, x in inputs.items()}
    left = published.logits(model, turned, batch["pixels"])
    kept, moved = mask.astype(bool), turned["attention_mask"].astype(bool)
    assert not mask.all() and np.abs(left[moved] - right[kept]).max() < 1e-4
    # Behind its window a Mistral no longer sees the whole row, which this package refuses.
    window = getattr(model.config.text_config, "sliding_window", None)
    steps = min(STEPS, window - mask.shape[1]) if window else STEPS
    expected = greedy(model, inputs, batch["pixels"], steps)
    assert len({tuple(row) for row in expected}) == len(expected)
    argv = ("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    assert main(["convert", *map(str, argv)]) == 0
    with jax.set_mesh(mesh1):
        decoder = Decoder(tiny.model_of(tmp_path / "ours"), stop_ids=())
        found = decoder(tiny.placed(batch), new_tokens=steps)
    np.testing.assert_array_equal(found, expected)
