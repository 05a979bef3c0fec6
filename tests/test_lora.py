# SPDX-License-Identifier: Apache-2.0
"""Adapters: one model and one gradient by two roads, what they train, how a run of them ends."""

import json

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import optax
import pytest
import tiny

from vlm_jax import train
from vlm_jax.data import sources
from vlm_jax.data.processor import Processor, train_tokenizer
from vlm_jax.learn import objective, optimizer, workdir
from vlm_jax.learn.log import Log
from vlm_jax.models import lora, vlm
from vlm_jax.scaling import cost

pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    # Orbax leaves coroutines behind when a read of it fails.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
RANK, ALPHA = 2, 6.0
SOME = ("q_proj", "v_proj", "down_proj")
# A float32 sum over some hundred positions, in another order.
ROUNDING = 2e-5


def config(targets=(), **changes):
    return tiny.config(lora=dict(rank=RANK, alpha=ALPHA, targets=targets), **changes)


@pytest.fixture(scope="module")
def meshes(mesh1, mesh8):
    return {1: mesh1, 8: mesh8}


@pytest.fixture(scope="module")
def models(meshes):
    """One model on one device and on eight, with adapters of which neither half is zero."""
    c, made = config(), {}
    for devices, mesh in meshes.items():
        with jax.set_mesh(mesh):
            model = lora.adapt(vlm.create(c, seed=0), c.lora, seed=0)
            made[devices] = tiny.roughened(model, scale=0.06)
    return made


def logits(model, batch):
    return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


def copied(model):
    """Merging and training take a model's memory, and the tests share theirs."""
    return jax.tree.map(jnp.copy, model)


# --- One model by two roads -----------------------------------------------------------------------


def test_fresh_adapters_change_no_bit_of_the_logits(mesh1):
    c = config()
    batch = tiny.batch(c)
    with jax.set_mesh(mesh1):
        plain = vlm.create(c, seed=0)
        adapted = lora.adapt(plain, c.lora, seed=0)
        other = lora.adapt(plain, c.lora, seed=1)
        np.testing.assert_array_equal(logits(adapted, batch), logits(plain, batch))
    assert lora.adapted(adapted) == list(lora.TARGETS) and not lora.adapted(plain)
    halves = [np.asarray(lora.at(m, "up_proj").lora_a[...]) for m in (adapted, other)]
    assert (halves[0] != halves[1]).all() and np.abs(halves[0]).max() <= c.llm.width**-0.5
    assert halves[0].std() == pytest.approx((c.llm.width * 3) ** -0.5, rel=0.2)


@pytest.mark.parametrize("devices", [1, 8])
def test_merged_weights_give_the_logits_of_the_adapters(devices, models, meshes):
    batch = tiny.batch(config())
    with jax.set_mesh(meshes[devices]):
        before = literal_models.of(models[devices].compressor)
        model = copied(models[devices])
        found, effect = logits(model, batch), logits(without(model), batch)
        merged = lora.merge(model)
        assert jax.tree.structure(merged) == jax.tree.structure(vlm.shapes(config()))
        after = logits(merged, batch)
    assert 0.5 < found.std() < 1.5 and np.abs(found - effect).max() > 0.3
    np.testing.assert_allclose(after, found, atol=1e-5)
    for name, weights in literal_models.of(merged.compressor).items():
        np.testing.assert_array_equal(weights, before[name])


def without(model):
    """The same model, its adapters as they began."""
    for target in lora.adapted(model):
        layer = lora.at(model, target)
        layer = lora.changed(layer, ("lora_b",), jax.tree.map(jnp.zeros_like, layer.lora_b))
        model = lora.changed(model, ("llm", "blocks", *lora.TARGETS[target]), layer)
    return model


def test_halves_are_sharded_as_the_kernel_is(models):
    for target, dims in (("q_proj", (None, "fsdp", "tensor", None)),
                         ("o_proj", (None, "tensor", None, "fsdp")),
                         ("down_proj", (None, "tensor", "fsdp"))):  # fmt: skip
        layer = lora.at(models[8], target)
        cut = 1 + layer.base.read
        assert layer.base.kernel[...].sharding.spec == jax.P(*dims)
        assert layer.lora_a[...].sharding.spec == jax.P(*dims[:cut], None)
        assert layer.lora_b[...].sharding.spec == jax.P(None, None, *dims[cut:])


# --- One gradient by two roads --------------------------------------------------------------------


def stepped(mesh, model, policy="none", accumulate=1, z_loss=0.0):
    """(metrics, weights before - weights after) of one step of plain descent: its gradient."""
    with jax.set_mesh(mesh):
        tx = optax.sgd(1.0)
        model = lora.changed(model, ("llm", "remat_policy"), policy)
        graph, state = optimizer.start(model, "finetune", tx)
        before = literal_models.of(state.trained)
        run = optimizer.make_step(
            graph, tx, objective.next_token, accumulate=accumulate, z_loss=z_loss
        )
        state, metrics = run(jax.tree.map(jnp.copy, state), tiny.placed(tiny.batch(config())))
    after = literal_models.of(state.trained)
    return jax.tree.map(float, metrics), {name: before[name] - after[name] for name in before}


@pytest.fixture(scope="module")
def plain(models, mesh1):
    return stepped(mesh1, models[1])


def test_the_gradient_is_that_of_the_merged_weights_seen_through_the_other_half(
    models, plain, mesh1
):
    """d/dA = s dW B^T and d/dB = s A^T dW, with dW the gradient of every weight of the model."""
    with jax.set_mesh(mesh1):
        _, whole = stepped(mesh1, lora.merge(copied(models[1])))
    _, ours = plain
    for target, path in lora.TARGETS.items():
        layer, name = lora.at(models[1], target), ".".join(["llm.blocks", *path])
        a, b = (np.asarray(x[...], "f8") for x in (layer.lora_a, layer.lora_b))
        inputs = a.reshape(len(a), -1, RANK)
        outputs = b.reshape(len(b), RANK, -1)
        of = ALPHA / RANK * whole[f"{name}.kernel"].reshape(len(a), inputs.shape[1], -1)
        for half, expected in (
            ("a", of @ outputs.swapaxes(1, 2)),
            ("b", inputs.swapaxes(1, 2) @ of),
        ):
            found = ours[f"{name}.lora_{half}"]
            assert np.abs(expected).max() > 5e-3
            np.testing.assert_allclose(found, expected.reshape(found.shape), atol=ROUNDING)
    for name in (n for n in ours if n.startswith("compressor")):
        np.testing.assert_allclose(ours[name], whole[name], atol=ROUNDING, err_msg=name)


@pytest.mark.parametrize("way", [
    dict(devices=8, accumulate=2, policy="full"), dict(policy="dots", z_loss=1e-9),
], ids=str)  # fmt: skip
def test_the_gradient_is_one_however_it_is_cut_placed_or_remade(way, models, plain, meshes):
    devices = way.get("devices", 1)
    way = {name: value for name, value in way.items() if name != "devices"}
    metrics, gradients = stepped(meshes[devices], models[devices], **way)
    assert metrics == pytest.approx(plain[0], rel=1e-5)
    for name, gradient in plain[1].items():
        np.testing.assert_allclose(gradients[name], gradient, atol=ROUNDING, err_msg=name)


# --- What is trained ------------------------------------------------------------------------------


def test_adapters_and_the_compressor_are_trained_and_nothing_else_has_moments(mesh1):
    c = config(targets=SOME, compressor=dict(kind="mqt", tokens=4))
    with jax.set_mesh(mesh1):
        model = lora.adapt(vlm.create(c, seed=0), c.lora, seed=0)
        _, state = optimizer.start(model, "finetune", optimizer.optimizer(c.finetune))
        counted = cost.lora_parameters(cost.LLM.of(c.llm), RANK, SOME)
    held = literal_models.of(state.trained)
    adapters = [x.size for name, x in held.items() if name.startswith("llm.")]
    assert sum(adapters) == counted and len(adapters) == 2 * len(SOME)
    # MQT's position table is trained in align alone.
    rest = {name for name in held if not name.startswith("llm.")}
    assert {n.split(".")[0] for n in rest} == {"compressor"} and "compressor.position" not in rest
    trained, frozen, moments = (
        sum(x.size for x in jax.tree.leaves(part))
        for part in (state.trained, state.frozen, state.optimizer)
    )
    # Two moments of each number, and the two counters of the rule.
    assert moments == 2 * trained + 2
    assert frozen + trained == vlm.parameters(model) > 3 * trained


def test_a_step_gives_away_the_adapters_and_shares_the_base(models, mesh1):
    c = config(finetune=dict(compressor_rate=0.25))
    with jax.set_mesh(mesh1):
        tx = optimizer.optimizer(c.finetune)
        graph, state = optimizer.start(copied(models[1]), "finetune", tx)
        run = optimizer.make_step(graph, tx, objective.next_token)
        after, _ = run(state, tiny.placed(tiny.batch(c)))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trained))
    for old, new in zip(*map(jax.tree.leaves, (state.frozen, after.frozen)), strict=True):
        assert old is new and not old.is_deleted()


def test_the_compressor_learns_at_a_multiple_of_the_rate():
    plain, slow = (
        optimizer.optimizer(config(finetune=dict(compressor_rate=rate)).finetune)
        for rate in (1.0, 0.1)
    )
    weights = {"compressor": {"kernel": jnp.ones(3)}, "llm": {"lora_a": jnp.ones(3)}}
    updates = []
    for tx in (plain, slow):
        state = tx.init(weights)
        for _ in range(2):  # the first step of a warm-up is of rate nought
            found, state = tx.update(weights, state, weights)
        updates.append(found)
    np.testing.assert_allclose(
        updates[1]["compressor"]["kernel"], 0.1 * updates[0]["compressor"]["kernel"], rtol=1e-6
    )
    np.testing.assert_array_equal(updates[1]["llm"]["lora_a"], updates[0]["llm"]["lora_a"])
    assert (updates[0]["llm"]["lora_a"] != 0).all()


def test_weight_decay_falls_on_both_halves():
    tx = optimizer.optimizer(config(finetune=dict(weight_decay=0.5, clip_norm=0.0)).finetune)
    weights = {"query": {"lora_a": jnp.ones(3), "lora_b": jnp.ones(3), "bias": jnp.ones(3)}}
    state = tx.init(weights)
    for _ in range(2):
        found, state = tx.update(jax.tree.map(jnp.zeros_like, weights), state, weights)
    assert all((found["query"][name] < 0).all() for name in ("lora_a", "lora_b"))
    assert (found["query"]["bias"] == 0).all()


# --- A run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs():
    c = config()
    source = sources.open_source(c, "train")
    texts = [text for i in range(len(source)) for turn in source[i].turns for text in turn]
    return train.Inputs(source, Processor(train_tokenizer(texts, c.llm.vocab), c))


SHORT = dict(
    encoder=dict(steps=0), align=dict(steps=1), finetune=dict(steps=4, compressor_rate=0.5)
)


@pytest.fixture(scope="module")
def unbroken(inputs, mesh1, tmp_path_factory):
    """A short run's folder, and the model that it returned."""
    path = tmp_path_factory.mktemp("lora")
    with jax.set_mesh(mesh1):
        model = train.train(config(**SHORT), path, inputs)
    return path, jax.tree.map(np.asarray, model)


def test_a_run_broken_between_checkpoints_ends_bit_identical(
    unbroken, inputs, mesh1, tmp_path, monkeypatch
):
    c, note = config(**SHORT), Log.__call__

    def die(self, step, metrics, newest):
        note(self, step, metrics, newest)
        if self.name == "finetune" and step == 3:
            raise KeyboardInterrupt

    with jax.set_mesh(mesh1):
        monkeypatch.setattr(Log, "__call__", die)
        with pytest.raises(KeyboardInterrupt):
            train.train(c, tmp_path, inputs)
        monkeypatch.undo()
        # Adapters of another seed stand ready, and those of the checkpoint take their place.
        model = train.train(c, tmp_path, inputs)
    steps = [json.loads(line)["step"] for line in (tmp_path / "finetune/metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    for ours, theirs in zip(*map(jax.tree.leaves, (model, unbroken[1])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_base_is_where_it_began_and_the_adapters_are_not(unbroken, mesh1):
    path, returned = unbroken
    c = config(**SHORT)
    with jax.set_mesh(mesh1):
        before = literal_models.of(vlm.create(c, seed=0))
        adapted = workdir.finished(path, c, merge=False)
        after = {n.replace(".base.", "."): x for n, x in literal_models.of(adapted).items()}
        for name in (n for n in before if not n.startswith("compressor")):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
        moved = [n for n, x in after.items() if n.endswith("lora_b") and (x != 0).any()]
        assert len(moved) == len(lora.TARGETS)
        merged = workdir.finished(path, c)
    for ours, theirs in zip(*map(jax.tree.leaves, (merged, returned)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("change, said", [
    (dict(rank=3), "LoRA of rank 3, alpha 6 on q_proj"),
    (dict(targets=SOME), "LoRA of rank 2, alpha 6 on q_proj, v_proj, down_proj: give the same"),
    (dict(alpha=4.0), "LoRA of rank 2, alpha 4 on q_proj"),
    (dict(rank=0), "says no LoRA: give the same"),
])  # fmt: skip
def test_a_checkpoint_of_other_adapters_is_refused_with_both_named(
    change, said, unbroken, inputs, mesh1, monkeypatch
):
    monkeypatch.setattr(optimizer, "make_step", None)  # no step is even built
    c = config(**SHORT)
    c.lora.update(change)
    words = f"finetune/4 was written with LoRA of rank 2, alpha 6 on q_proj, k_proj.*{said}"
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=words):
        train.train(c, unbroken[0], inputs)


def test_plain_checkpoints_do_not_take_adapters(trained, mesh1):
    c = config()
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="written with no LoRA, and.*rank 2"):
        workdir.finished(trained, c)


# --- Errors before the first step -----------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    (dict(targets=("q_proj", "query")), r"lora.targets names \['query'\]: choose from \['q_proj'"),
    (dict(targets=("q_proj", "q_proj")), "names a layer twice"),
    (dict(rank=0, targets=("q_proj",)), "lora.rank=0 makes no adapters: set lora.rank"),
    (dict(rank=-1), "lora.rank=-1: 0 trains without"),
    (dict(alpha=0.0), "lora.alpha=0.0: it scales"),
])  # fmt: skip
def test_adapters_that_cannot_be_are_refused(change, words, mesh1):
    c = config()
    c.lora.update(change)
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=words):
        train.check(c)


def test_adapters_without_a_stage_that_trains_them_are_refused(mesh1):
    c = config(finetune=dict(steps=0))
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="but finetune.steps=0"):
        train.check(c)
