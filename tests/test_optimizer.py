# SPDX-License-Identifier: Apache-2.0
"""The training step: one gradient however it is cut, placed or remade; what it may change."""

import math

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import optax
import pytest
import tiny

from vlm_jax.training import objective, optimizer

# A float32 sum over some hundred positions, in another order.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def meshes(mesh1, mesh8):
    return {1: mesh1, 8: mesh8}


@pytest.fixture(scope="module")
def models(meshes):
    """The same weights on one device and on eight."""
    made = {}
    for devices, mesh in meshes.items():
        with jax.set_mesh(mesh):
            made[devices] = tiny.roughened(tiny.created(tiny.get_config()), scale=0.1)
    return made


def under(policy, model):
    """`model` with another remat policy, which is part of its structure."""
    import copy

    other = copy.copy(model)
    other.llm = copy.copy(model.llm)
    other.llm.remat_policy = policy
    return other


@pytest.fixture(scope="module")
def stepped(meshes, models):
    """(metrics, weights before - weights after) of one step of plain descent: its gradient."""
    done = {}

    def step(devices=1, accumulate=1, policy="none", z_loss=0.0):
        key = devices, accumulate, policy, z_loss
        if key not in done:
            with jax.set_mesh(meshes[devices]):
                tx = optax.sgd(1.0)
                graph, state = optimizer.start(under(policy, models[devices]), "finetune", tx)
                before = literal_models.of(state.trained)
                # The models are shared: a copy is given away.
                state = jax.tree.map(jnp.copy, state)
                run = optimizer.make_step(
                    graph, tx, objective.next_token, accumulate=accumulate, z_loss=z_loss
                )
                state, metrics = run(state, tiny.placed(tiny.batch(tiny.get_config())))
                after = literal_models.of(state.trained)
                done[key] = (
                    jax.tree.map(float, metrics),
                    {name: before[name] - after[name] for name in before},
                )
        return done[key]

    return step


def assert_same(ours, theirs, tolerance=ROUNDING):
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name, gradient in theirs[1].items():
        np.testing.assert_allclose(ours[1][name], gradient, atol=tolerance, err_msg=name)


# --- One gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [
    dict(devices=8), dict(accumulate=2), dict(devices=8, accumulate=2),
    dict(policy="full"), dict(policy="dots"),
], ids=str)  # fmt: skip
def test_the_gradient_is_that_of_the_whole_batch_on_one_device(way, stepped):
    plain = stepped()
    assert max(np.abs(g).max() for g in plain[1].values()) > 0.05
    assert_same(stepped(**way), plain)


def test_the_loss_is_the_mean_over_supervised_tokens(stepped, models, mesh1):
    metrics, gradients = stepped()
    batch = tiny.batch(tiny.get_config())
    with jax.set_mesh(mesh1):
        logits = np.asarray(jax.jit(lambda m, b: m.logits(b))(models[1], tiny.placed(batch)), "f8")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, batch["ids"][..., None], -1)[..., 0][batch["loss_mask"]]
    assert metrics.loss == pytest.approx(-chosen.mean(), rel=1e-5)
    assert metrics.tokens == batch["loss_mask"].sum()
    square = sum((g.astype("f8") ** 2).sum() for g in gradients.values())
    assert metrics.gradient_norm == pytest.approx(math.sqrt(square), rel=1e-3)


def test_z_loss_adds_the_gradient_of_the_squared_log_partition_alone(stepped, models, mesh1):
    weight = 0.1
    (plain, without), (metrics, with_it) = stepped(), stepped(z_loss=weight)
    assert metrics.loss == pytest.approx(plain.loss, rel=1e-6)  # reported without it
    batch = tiny.batch(tiny.get_config())

    def penalty(model, batch):
        log_z = jax.nn.logsumexp(model.logits(batch), axis=-1)
        return jnp.where(batch["loss_mask"], log_z**2, 0).sum() / batch["loss_mask"].sum()

    with jax.set_mesh(mesh1):
        extra = literal_models.of(jax.jit(jax.grad(penalty))(models[1], tiny.placed(batch)))
    for name in without:
        np.testing.assert_allclose(
            with_it[name] - without[name], weight * extra[name], atol=ROUNDING, err_msg=name
        )


# --- Several steps --------------------------------------------------------------------------------


def train(model, stage, steps, c, *, compiled=None):
    """Losses and the state after `steps` steps of the stage's own optimizer on fresh batches."""
    tx = optimizer.optimizer(tiny.stage(c[stage]))
    graph, state = optimizer.start(jax.tree.map(jnp.copy, model), stage, tx)
    run = compiled or optimizer.make_step(graph, tx, objective.next_token)
    losses = []
    for k in range(steps):
        state, metrics = run(state, tiny.placed(tiny.batch(c, seed=k)))
        losses.append(float(metrics.loss))
    return losses, state, run


@pytest.fixture(scope="module")
def finetuned(models, mesh1):
    c = tiny.config(finetune=dict(steps=4, warmup=0.25, learning_rate=1e-2, weight_decay=0.1))
    with jax.set_mesh(mesh1):
        return c, *train(models[1], "finetune", 4, c)


def test_four_steps_on_eight_devices_are_four_steps_on_one(finetuned, models, stepped, mesh8):
    c, losses, state, _ = finetuned
    with jax.set_mesh(mesh8):
        losses8, state8, _ = train(models[8], "finetune", 4, c)
    assert losses8 == pytest.approx(losses, rel=1e-4)
    assert abs(losses[3] - losses[0]) > 0.01
    # Adam divides by the size of a gradient: where that is only rounding, so is the direction.
    ours, theirs = literal_models.of(state8.trained), literal_models.of(state.trained)
    clear = {name: np.abs(g) > 1e-3 for name, g in stepped()[1].items()}
    assert np.mean(np.concatenate([x.ravel() for x in clear.values()])) > 0.8
    for name, at in clear.items():
        np.testing.assert_allclose(ours[name][at], theirs[name][at], atol=5e-4, err_msg=name)


def test_the_step_is_compiled_once(finetuned):
    assert finetuned[3].programs[0]._cache_size() == 1


def test_a_step_in_two_programs_is_that_in_one(finetuned, mesh1):
    c, _, state, run = finetuned
    with jax.set_mesh(mesh1):
        batch = tiny.placed(tiny.batch(c))
        copied = jax.tree.map(jnp.copy, state)
        changed = copied.step, copied.trained, copied.optimizer
        (step, _, moments), metrics = run.compiled(changed, state.frozen, batch)
        after, told = run(jax.tree.map(jnp.copy, state), batch)
    assert len(run.programs) == 2 and after.step == step
    np.testing.assert_allclose(metrics, told, rtol=ROUNDING)
    for one, two in zip(*map(jax.tree.leaves, (moments, after.optimizer)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-7)


def test_models_that_differ_in_visual_tokens_share_the_program_of_the_update(mesh1):
    updates = []
    with jax.set_mesh(mesh1):
        for tokens in (1, 4):
            c = tiny.config(compressor=dict(tokens=tokens))
            tx = optimizer.optimizer(tiny.stage(c.finetune))
            graph, state = optimizer.start(tiny.created(c), "finetune", tx)
            step = optimizer.make_step(graph, tx, objective.next_token)
            step(state, tiny.placed(tiny.batch(c)))
            updates.append(step.programs[1])
    assert updates[0] is updates[1]


def test_a_step_transfers_nothing_donates_what_it_changes_and_keeps_frozen_weights(
    finetuned, models, mesh1
):
    c, _, state, run = finetuned
    with jax.set_mesh(mesh1):
        state = jax.tree.map(jnp.copy, state)
        batch = tiny.placed(tiny.batch(c))
        with jax.transfer_guard("disallow"):
            after, _ = run(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.trained, state.step)))
    for old, new in zip(*map(jax.tree.leaves, (state.frozen, after.frozen)), strict=True):
        assert not old.is_deleted() and old is new


@pytest.mark.parametrize(
    "stage, parts", [("align", {"compressor"}), ("finetune", {"compressor", "llm"})]
)
def test_a_stage_changes_its_parts_and_no_other(stage, parts, models, finetuned, mesh1):
    with jax.set_mesh(mesh1):
        c, state = finetuned[0], finetuned[2]
        if stage == "align":
            state = train(models[1], "align", 2, c)[1]
    before, after = (
        literal_models.of(models[1]),
        literal_models.of(state.trained) | literal_models.of(state.frozen),
    )
    assert before.keys() == after.keys()
    moved = {name.split(".")[0] for name in before if (before[name] != after[name]).any()}
    assert moved == parts
    assert {name.split(".")[0] for name in literal_models.of(state.trained)} == parts
    # What has no gradient but rounding moves by that: Adam does not ask how large it is.
    still = [
        name
        for name, x in before.items()
        if name.split(".")[0] in parts and (x == after[name]).all()
    ]
    # The attention's key bias shifts all scores of a window alike: its gradient is nought exactly.
    assert still == ["compressor.attention.key.bias"]


def test_the_encoder_stage_trains_all_of_its_reader(mesh1):
    c = tiny.get_config()
    with jax.set_mesh(mesh1):
        tx = optimizer.optimizer(tiny.stage(c.encoder))
        _, state = optimizer.start(
            objective.patch_reader(tiny.size(c), 5, seed=c.seed), "encoder", tx
        )
    assert not jax.tree.leaves(state.frozen) and len(jax.tree.leaves(state.trained)) > 10


# --- The rule of a step ---------------------------------------------------------------------------


def stage(**changes):
    c = tiny.config(
        finetune=dict(steps=100, learning_rate=0.5, warmup=0.1, clip_norm=0.0) | changes
    )
    return tiny.stage(c.finetune)


def test_the_rate_warms_up_linearly_then_falls_as_a_cosine():
    rate = optimizer.schedule(stage())
    for k in range(11):
        assert float(rate(k)) == pytest.approx(0.5 * k / 10, abs=1e-6)
    for k in range(10, 101):
        expected = 0.25 * (1 + math.cos(math.pi * (k - 10) / 90))
        assert float(rate(k)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "change", [dict(warmup=0.0), dict(steps=1), dict(steps=1, warmup=1.0)], ids=str
)
def test_without_room_for_a_warmup_the_peak_comes_first(change):
    assert float(optimizer.schedule(stage(**change))(0)) == pytest.approx(0.5)


def test_updates_are_adamw_written_out_and_decay_falls_on_matrices():
    of = stage(weight_decay=0.3, beta1=0.8, beta2=0.95, epsilon=1e-6)
    tx, rate = optimizer.optimizer(of), optimizer.schedule(of)
    draw = np.random.default_rng(0)
    matrices = ("kernel", "embedding", "head")
    # A layer called head, as an encoder's classifier is, has a bias like any other.
    names = (*matrices, "scale", "bias", "head.bias")
    theirs = {n: draw.normal(size=5).astype("f4") for n in names}
    ours = jax.tree.map(jnp.asarray, theirs)
    opt = tx.init(ours)
    m, v = ({n: np.zeros(5) for n in names} for _ in range(2))
    for k in range(4):
        grads = {n: draw.normal(size=5).astype("f4") for n in names}
        updates, opt = tx.update(jax.tree.map(jnp.asarray, grads), opt, ours)
        ours = optax.apply_updates(ours, updates)
        for n, g in grads.items():
            m[n] = 0.8 * m[n] + 0.2 * g
            v[n] = 0.95 * v[n] + 0.05 * g**2
            step = m[n] / (1 - 0.8 ** (k + 1)) / (np.sqrt(v[n] / (1 - 0.95 ** (k + 1))) + 1e-6)
            decay = 0.3 * theirs[n] if n in matrices else 0
            theirs[n] = theirs[n] - float(rate(k)) * (step + decay)
    for n, value in ours.items():
        np.testing.assert_allclose(value, theirs[n], rtol=2e-5, atol=2e-6, err_msg=n)


@pytest.mark.parametrize("norm", [0.1, 100.0])
def test_a_clipped_gradient_is_the_gradient_scaled_to_the_norm(norm):
    grads = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}  # norm 5
    weights = jax.tree.map(jnp.ones_like, grads)
    clipped, plain = (optimizer.optimizer(stage(clip_norm=x, warmup=0.0)) for x in (norm, 0.0))
    scaled = jax.tree.map(lambda g: g * min(1.0, norm / 5), grads)
    ours = clipped.update(grads, clipped.init(weights), weights)[1]
    theirs = plain.update(scaled, plain.init(weights), weights)[1]
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_rows_of_a_micro_batch_stay_on_their_device(mesh8):
    with jax.set_mesh(mesh8):
        x = tiny.placed(np.arange(16, dtype="i4").reshape(8, 2))
        cut = jax.jit(lambda x: optimizer.micro_batches({"x": x}, 2)["x"])
        micro = cut(x)
        text = cut.lower(x).compile().as_text()
    assert sorted(np.asarray(micro)[:, :, 0].ravel() // 2) == list(range(8))
    for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert word not in text
