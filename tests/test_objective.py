# SPDX-License-Identifier: Apache-2.0
"""Sums over supervised positions against their formulas, and nothing but them."""

import jax
import numpy as np
import pytest
import tiny
from scipy.special import log_softmax, logsumexp

from vlm_jax.training import objective


@pytest.fixture(scope="module")
def scored():
    draw = np.random.default_rng(0)
    logits = draw.normal(scale=3, size=(4, 6, 11)).astype("f4")
    return logits, draw.integers(0, 11, (4, 6)).astype("i4"), draw.random((4, 6)) < 0.5


def test_sums_equal_their_formulas_position_by_position(scored, mesh1):
    logits, target, mask = scored
    with jax.set_mesh(mesh1):
        ours = objective.score(*tiny.placed(scored))
    nll = log_z = correct = 0
    for b, t in np.argwhere(mask):
        nll -= log_softmax(logits[b, t].astype("f8"))[target[b, t]]
        log_z += logsumexp(logits[b, t].astype("f8")) ** 2
        correct += logits[b, t].argmax() == target[b, t]
    np.testing.assert_allclose(ours, (nll, log_z, correct), rtol=1e-5)
    assert mask.any() and not mask.all()


def test_positions_outside_the_mask_do_not_count(scored, mesh1):
    logits, target, mask = scored
    other = np.where(mask[..., None], logits, 1e4), np.where(mask, target, 0).astype("i4"), mask
    with jax.set_mesh(mesh1):
        np.testing.assert_array_equal(
            objective.score(*tiny.placed(other)), objective.score(*tiny.placed(scored))
        )


def test_large_logits_do_not_overflow(scored, mesh1):
    logits, target, mask = scored
    with jax.set_mesh(mesh1):
        ours = objective.score(*tiny.placed((logits + 1e4, target, mask)))
        plain = objective.score(*tiny.placed(scored))
    # float32 keeps three decimals at 1e4.
    np.testing.assert_allclose(ours.nll, plain.nll, rtol=1e-3)


def test_a_patch_reader_scores_each_patch_by_its_class(mesh1):
    c = tiny.get_config()
    side = c.vit.image_size // c.vit.patch_size
    draw = np.random.default_rng(0)
    batch = dict(
        pixels=draw.normal(size=(4, *[c.vit.image_size] * 2, 3)).astype("f4"),
        ids=draw.integers(0, 5, (4, side**2)).astype("i4"),
        loss_mask=draw.random((4, side**2)) < 0.5,
    )
    with jax.set_mesh(mesh1):
        reader = objective.patch_reader(tiny.size(c), 5, seed=c.seed)
        ours = jax.jit(objective.patch_class)(reader, tiny.placed(batch))
        levels = np.asarray(jax.jit(lambda r, x: r.vit(x))(reader, tiny.placed(batch["pixels"])))
    logits = levels @ np.asarray(reader.head.kernel[...]) + np.asarray(reader.head.bias[...])
    nll = -np.take_along_axis(log_softmax(logits, -1), batch["ids"][..., None], -1)[..., 0]
    right = logits.argmax(-1) == batch["ids"]
    np.testing.assert_allclose(ours.nll, nll[batch["loss_mask"]].sum(), rtol=1e-5)
    assert float(ours.correct) == right[batch["loss_mask"]].sum()
