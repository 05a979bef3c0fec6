# SPDX-License-Identifier: Apache-2.0
"""The loss in chunks is the loss: sums, gradients and what a step makes of them; its memory is
not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax import mesh as meshes
from vlm_jax.training import chunked_loss, memory, objective, optimizer


def sums_of(model, batch, chunk, run=objective.next_token):
    """Every sum, and the gradient of all three parts that have one."""

    def loss(model):
        sums = run(model, batch, chunk=chunk)
        return sums.nll + 0.1 * sums.log_z_squared, sums

    found = jax.jit(jax.grad(loss, has_aux=True))(model)
    return jax.tree.map(np.asarray, found)


def assert_equal(ours, theirs):
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6 * np.abs(b).max() + 3e-5)


@pytest.fixture(scope="module")
def whole(mesh1):
    """Sums and gradients of a batch with its scores whole, on one device."""
    c = tiny.get_config()
    with jax.set_mesh(mesh1):
        model = tiny.roughened(tiny.created(c), scale=0.1)
        return sums_of(model, tiny.placed(tiny.batch(c)), 0)


@pytest.mark.parametrize("devices, chunk", [(1, 5), (8, 8)])
def test_chunks_give_the_sums_and_gradients_of_the_whole(devices, chunk, whole, mesh1, mesh8):
    """5 does not divide the row; on 8 devices rows, table and vocabulary are all cut."""
    c = tiny.get_config()
    with jax.set_mesh({1: mesh1, 8: mesh8}[devices]):
        model = tiny.roughened(tiny.created(c), scale=0.1)
        assert_equal(sums_of(model, tiny.placed(tiny.batch(c)), chunk), whole)


@pytest.mark.slow
def test_every_scale_and_an_output_layer_of_its_own_too(mesh1):
    c = tiny.config(compressor=dict(kind="m3", tokens=4, scales=(1, 4)),
                    llm=dict(tied_embeddings=False))  # fmt: skip
    with jax.set_mesh(mesh1):
        model = tiny.roughened(tiny.created(c), scale=0.1)
        batch = tiny.placed(tiny.batch(c, rows=2))
        results = [sums_of(model, batch, chunk, objective.every_scale) for chunk in (16, 0)]
    assert_equal(*results)


def test_rows_without_a_supervised_token_have_no_sum_and_no_gradient(mesh1):
    draw = np.random.default_rng(0)
    hidden, table = (draw.normal(size=n).astype("f4") for n in ((2, 8, 4), (16, 4)))
    target, mask = np.zeros((2, 8), np.int32), np.zeros((2, 8), bool)

    def loss(hidden, table, target, mask):
        sums = chunked_loss.score(hidden, table, target, mask, 4)
        return sum(sums), sums

    with jax.set_mesh(mesh1):
        table = jax.device_put(table, meshes.sharding(mesh1, "vocab", "embed"))
        hidden, target, mask = tiny.placed((hidden, target, mask))
        given = (hidden, table, target, mask)
        found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*given)
    assert not any(np.any(x) for x in jax.tree.leaves(found))


def test_the_choice_keeps_small_scores_whole_and_bounds_large_ones():
    choose = chunked_loss.positions
    assert choose(-1, rows=64, length=28, vocab=192) == 0  # the demo
    assert choose(0, rows=4, length=2048, vocab=152064) == 0
    assert choose(64, rows=4, length=2048, vocab=152064) == 64
    assert choose(64, rows=4, length=64, vocab=152064) == 0
    for rows, vocab in ((1, 152064), (2, 152064), (1, 32000), (4, 32000)):
        chunk = choose(-1, rows=rows, length=4096, vocab=vocab)
        assert chunk % 128 == 0 and rows * chunk * vocab <= max(2**26, 128 * rows * vocab)


def temporary(c, chunk):
    """Bytes of temporaries of a whole step, as the compiler counts them."""
    stage = tiny.stage(c.align)
    tx, graphs = optimizer.optimizer(stage), []

    def made():
        from flax import nnx

        from vlm_jax.models import vlm

        graph, state = optimizer.start(vlm.build(tiny.size(c), nnx.Rngs(0)), "align", tx)
        graphs.append(graph)
        return state

    mesh = jax.sharding.get_mesh()
    state = memory.placed(jax.eval_shape(made))
    rows = tiny.batch(c, rows=c.align.batch)
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(mesh, "batch"))
        for k, x in rows.items()
    }
    run = functools.partial(objective.next_token, chunk=chunk)
    step = optimizer.make_step(graphs[0], tx, run)
    changed = (state.step, state.trained, state.optimizer)
    return (
        step.compiled.lower(changed, state.frozen, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


@pytest.mark.slow
def test_a_vocabulary_of_qwens_at_2048_tokens_never_has_its_scores(mesh1):
    """152k scores of 2,048 positions are 1.2 GB in float32: more than this step takes in all."""
    c = tiny.config(
        llm=dict(vocab=151936, tied_embeddings=False), data=dict(text_length=2048),
        align=dict(batch=1), remat="full",
    )  # fmt: skip
    scores = 4 * 2048 * 151936
    with jax.set_mesh(mesh1):
        whole, chunks = temporary(c, 0), temporary(c, 128)
        estimates = [
            memory.activations(tiny.recipe(tiny.config(loss_chunk=n, **{
                "llm": dict(vocab=151936, tied_embeddings=False), "remat": "full",
                "data": dict(text_length=2048), "align": dict(batch=1),
            })), "align")
            for n in (0, 128)
        ]  # fmt: skip
    assert whole > 2 * scores and chunks < scores
    for found, estimate in zip((whole, chunks), estimates, strict=True):
        assert 0.5 < estimate / found < 2, (found, estimate)


def test_a_table_crosses_the_mesh_once_and_not_for_each_chunk(mesh8):
    """One gather of the output layer and one reduction of its gradient, behind the loop."""
    with jax.set_mesh(mesh8):
        hidden = jax.ShapeDtypeStruct(
            (8, 64, 16), jnp.float32, sharding=meshes.sharding(mesh8, "batch", "len", "feature")
        )
        table = jax.ShapeDtypeStruct(
            (512, 16), jnp.float32, sharding=meshes.sharding(mesh8, "vocab", "embed")
        )
        rows = meshes.sharding(mesh8, "batch", "len")
        target = jax.ShapeDtypeStruct((8, 64), jnp.int32, sharding=rows)
        mask = jax.ShapeDtypeStruct((8, 64), jnp.bool, sharding=rows)
        step = jax.grad(lambda h, t, i, m: chunked_loss.score(h, t, i, m, 8).nll, (0, 1))
        text = jax.jit(step).lower(hidden, table, target, mask).compile().as_text()
    in_loops = [
        part
        for part in text.split("\n\n")
        if part.lstrip().startswith(("%region", "%body", "%branch", "%closed_call"))
    ]
    moved = [line for line in text.splitlines() if "[256,8]" in line or "[256,16]" in line]
    crossing = [
        line for line in moved if any(f" {kind}(" in line for kind in (
            "all-gather", "all-reduce", "reduce-scatter"))]  # fmt: skip
    assert len([line for line in crossing if "all-gather(" in line]) == 1
    assert len(crossing) <= 3, crossing
    assert not [line for part in in_loops for line in crossing if line in part]
