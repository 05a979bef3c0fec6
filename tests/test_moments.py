# SPDX-License-Identifier: Apache-2.0
"""What is kept in fewer bytes: Adam's means, and weights that a stage leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from vlm_jax.models import vlm
from vlm_jax.training import memory, moments, objective, optimizer, precision


def stage(kind, **changes):
    return tiny.stage(tiny.config(finetune=dict(moments=kind, **changes)).finetune)


def test_float32_is_optaxs_adamw_to_the_bit(mesh1):
    of = stage("float32", weight_decay=0.1)
    theirs = optax.adamw(optimizer.schedule(of), b1=of.beta1, b2=of.beta2, eps=of.epsilon,
                         weight_decay=0.1)  # fmt: skip
    params = {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
    ours = optimizer.optimizer(stage("float32", weight_decay=0.1, clip_norm=0.0))
    states = [tx.init(params) for tx in (ours, theirs)]
    for step in range(3):
        grads = jax.tree.map(lambda x, k=step: jnp.sin(7 * x + k), params)
        pairs = [tx.update(grads, s, params) for tx, s in zip((ours, theirs), states, strict=True)]
        states = [state for _, state in pairs]
        for a, b in zip(*(jax.tree.leaves(updates) for updates, _ in pairs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_dithering_is_right_on_average_and_moves_what_rounding_would_hold():
    x = jnp.full(4096, 1 + 2.0**-10)  # an eighth of the way to the next bfloat16
    drawn = np.stack([moments.dithered(x * (1 + 1e-6 * k), jnp.int32(k)) for k in range(8)])
    assert set(np.unique(drawn.astype("f4"))) <= {1.0, 1 + 2.0**-7}
    # The same bits are drawn alike in a step: of eight steps some go up.
    values = jnp.linspace(1.0, 1.99, 4096)
    error = np.mean([np.asarray(moments.dithered(values, jnp.int32(k)), "f8") - values
                     for k in range(16)])  # fmt: skip
    assert abs(error) < 1e-4
    nothing = moments.dithered(jnp.array([0.0, jnp.inf, jnp.nan]), jnp.int32(3))
    np.testing.assert_array_equal(nothing.astype("f4"), [0, np.inf, np.nan])
    # A mean of squares at beta2 = 0.999 goes to where it should, and rounded to the nearest stands.
    scale = moments.scaling(stage("bfloat16", beta2=0.999))
    params = jnp.linspace(1.0, 2.0, 512)
    state, held = scale.init(params), jnp.zeros(512, jnp.bfloat16)
    step = jax.jit(lambda s: scale.update(params, s)[1])
    for _ in range(1500):
        state = step(state)
        held = (0.999 * held.astype(jnp.float32) + 0.001 * params**2).astype(jnp.bfloat16)
    expected = (1 - 0.999**1500) * params**2
    assert np.mean(np.abs(state.square.astype("f4") / expected - 1)) < 0.05
    assert np.mean(held.astype("f4") / expected) < 0.6


def bytes_of(kind, mesh):
    with jax.set_mesh(mesh):
        return memory.of_stage(tiny.recipe(tiny.config(finetune=dict(moments=kind))), "finetune")


def test_memory_counts_what_is_kept(mesh1):
    needs = {kind: bytes_of(kind, mesh1) for kind in moments.KINDS}
    learnt = needs["float32"].gradients
    assert 2 * learnt <= needs["float32"].optimizer < 2.01 * learnt
    assert learnt <= needs["bfloat16"].optimizer < 1.01 * learnt
    # Of matrices this small rows and columns still take something.
    assert learnt / 2 < needs["factored"].optimizer < 0.95 * learnt
    with jax.set_mesh(mesh1):
        plain, narrow = (
            memory.of_stage(tiny.recipe(tiny.config(frozen_dtype=dtype)), "align").parameters
            for dtype in ("float32", "bfloat16")
        )
    assert 0.5 < narrow / plain < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "factored"])
def test_a_step_keeps_its_types_and_places_on_a_mesh_and_the_loss_falls(kind, mesh8):
    """One compiled step: a state that changed its layout would compile anew in every process."""
    c = tiny.config(finetune=dict(moments=kind, learning_rate=1e-2, clip_norm=0.0, steps=40))
    with jax.set_mesh(mesh8):
        tx = optimizer.optimizer(tiny.stage(c.finetune))
        graph, state = optimizer.start(tiny.created(c), "finetune", tx)
        run = optimizer.make_step(graph, tx, objective.next_token)
        batch = tiny.placed(tiny.batch(c))
        told = [(x.dtype, x.shape, x.sharding.spec) for x in jax.tree.leaves(state.optimizer)]
        losses = []
        for _ in range(8):
            state, metrics = run(state, batch)
            losses.append(float(metrics.loss))
        after = [(x.dtype, x.shape, x.sharding.spec) for x in jax.tree.leaves(state.optimizer)]
    assert [t[:2] for t in told] == [t[:2] for t in after]
    assert run.programs[0]._cache_size() == 1
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.slow
def test_a_step_from_narrow_weights_is_the_step_from_wide_ones(mesh1):
    """With bfloat16 activations every matrix is rounded where it is used, or before."""
    c = tiny.config(compute_dtype="bfloat16")
    batch = tiny.batch(c, levels=False)
    with jax.set_mesh(mesh1):
        model = tiny.created(c)
        found = []
        for dtype in ("float32", "bfloat16"):
            held = precision.narrowed(model, "align", dtype)
            sums = jax.jit(objective.next_token)(held, tiny.placed(batch))
            found.append([float(x) for x in sums])
        assert found[0] == found[1]
        kinds = {str(x.dtype) for x in jax.tree.leaves(held.llm)}
        assert kinds == {"float32", "bfloat16"}
        assert {str(x.dtype) for x in jax.tree.leaves(held.compressor)} == {"float32"}
        back = precision.widened(held)
        assert vlm.parameters(back) == vlm.parameters(model)
        kept = precision.narrowed(model, "finetune", "bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(kept.llm)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(kept.vit)} == {"float32", "bfloat16"}
