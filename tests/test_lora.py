# SPDX-License-Identifier: Apache-2.0
"""Adapters: one model and one gradient by two roads, what is trained, what a step of it costs."""

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding

from vlm_jax.cost import flops as cost
from vlm_jax.models import lora, vlm
from vlm_jax.models.sizes import LLMSize, LoRASize
from vlm_jax.training import cells, objective, optimizer
from vlm_jax.weights import names

pytestmark = [
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
def bases(meshes):
    """One model without adapters on one device and on eight."""
    with jax.set_mesh(meshes[1]):
        model = tiny.created(config())
    return {
        devices: jax.tree.map(
            lambda x: jax.device_put(np.asarray(x), NamedSharding(mesh, x.sharding.spec)),  # noqa: B023
            model,
        )
        for devices, mesh in meshes.items()
    }


@pytest.fixture(scope="module")
def models(bases, meshes):
    """The same with adapters of which neither half is zero."""
    made = {}
    for devices, mesh in meshes.items():
        with jax.set_mesh(mesh):
            made[devices] = tiny.adapted(bases[devices], rank=RANK, alpha=ALPHA)
    return made


def logits(model, batch):
    return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


def copied(model):
    """Merging and training take a model's memory, and the tests share theirs."""
    return jax.tree.map(jnp.copy, model)


# --- One model by two roads -----------------------------------------------------------------------


def test_fresh_adapters_change_no_bit_of_the_logits(bases, mesh1):
    c = config()
    batch = tiny.batch(c)
    with jax.set_mesh(mesh1):
        adapted, other = (lora.adapt(bases[1], LoRASize.of(c.lora), seed=seed) for seed in (0, 1))
        np.testing.assert_array_equal(logits(adapted, batch), logits(bases[1], batch))
    assert lora.adapted(adapted) == list(lora.TARGETS) and not lora.adapted(bases[1])
    halves = [np.asarray(lora.at(m, "up_proj").lora_a[...]) for m in (adapted, other)]
    assert (halves[0] != halves[1]).all() and np.abs(halves[0]).max() <= c.llm.width**-0.5
    assert halves[0].std() == pytest.approx((c.llm.width * 3) ** -0.5, rel=0.2)


@pytest.mark.parametrize("devices", [1, 8])
def test_merged_weights_give_the_logits_of_the_adapters(devices, bases, models, meshes):
    batch = tiny.batch(config())
    with jax.set_mesh(meshes[devices]):
        model = copied(models[devices])
        found = logits(model, batch)
        merged = lora.merge(model)
        assert jax.tree.structure(merged) == jax.tree.structure(bases[devices])
        for target in lora.TARGETS:
            kernels = [lora.at(m, target).kernel[...] for m in (merged, bases[devices])]
            assert kernels[0].sharding.spec == kernels[1].sharding.spec
            assert np.abs(np.asarray(kernels[0]) - np.asarray(kernels[1])).max() > 0.05
        after = logits(merged, batch)
    assert 0.5 < found.std() < 1.5
    np.testing.assert_allclose(after, found, atol=1e-5)
    before = literal_models.of(models[devices].compressor)
    for name, weights in literal_models.of(merged.compressor).items():
        np.testing.assert_array_equal(weights, before[name])


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


def stepped(mesh, model, policy="none", accumulate=1):
    """(metrics, weights before - weights after) of one step of plain descent: its gradient."""
    with jax.set_mesh(mesh):
        tx = optax.sgd(1.0)
        model = lora.changed(model, ("llm", "remat_policy"), policy)
        graph, state = optimizer.start(model, "finetune", tx)
        before = literal_models.of(state.trained)
        run = optimizer.make_step(
            graph, tx, objective.next_token, accumulate=accumulate, z_loss=0.1
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
    dict(devices=8, accumulate=2, policy="full"), dict(policy="dots"),
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

    def start():
        model = lora.adapt(vlm.build(tiny.size(c), nnx.Rngs(0)), LoRASize.of(c.lora), seed=0)
        return model, optimizer.start(
            model, "finetune", optimizer.optimizer(tiny.stage(c.finetune))
        )[1]

    with jax.set_mesh(mesh1):
        model, state = jax.eval_shape(start)
    counted = cost.lora_parameters(LLMSize.of(c.llm), RANK, SOME)
    held = names.parameters(state.trained)
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
        tx = optimizer.optimizer(tiny.stage(c.finetune))
        graph, state = optimizer.start(copied(models[1]), "finetune", tx)
        run = optimizer.make_step(graph, tx, objective.next_token)
        after, _ = run(state, tiny.placed(tiny.batch(c)))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trained))
    for old, new in zip(*map(jax.tree.leaves, (state.frozen, after.frozen)), strict=True):
        assert old is new and not old.is_deleted()


def test_the_compressor_learns_at_a_multiple_of_the_rate():
    plain, slow = (
        optimizer.optimizer(tiny.stage(config(finetune=dict(compressor_rate=rate)).finetune))
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
    tx = optimizer.optimizer(
        tiny.stage(config(finetune=dict(weight_decay=0.5, clip_norm=0.0)).finetune)
    )
    weights = {"query": {"lora_a": jnp.ones(3), "lora_b": jnp.ones(3), "bias": jnp.ones(3)}}
    state = tx.init(weights)
    for _ in range(2):
        found, state = tx.update(jax.tree.map(jnp.zeros_like, weights), state, weights)
    assert all((found["query"][name] < 0).all() for name in ("lora_a", "lora_b"))
    assert (found["query"]["bias"] == 0).all()


# --- What a step costs ----------------------------------------------------------------------------


def test_training_flops_are_the_compilers(mesh1):
    wide = dict(vocab=600, depth=1, width=1024, mlp=2816, heads=8, kv_heads=4, head_size=128)
    vit = dict(image_size=32, patch_size=8, width=1024)
    c = config(SOME, llm=wide, vit=vit, compressor=dict(kind="none", tokens=16))
    c.lora.rank = 128

    def loss(trained, frozen, batch):
        return objective.next_token(nnx.merge(graph, trained, frozen), batch).nll

    with jax.set_mesh(mesh1):
        model = jax.eval_shape(
            lambda: lora.adapt(vlm.build(tiny.size(c), nnx.Rngs(0)), LoRASize.of(c.lora), seed=0)
        )
        graph, trained, frozen = nnx.split(model, optimizer.ADAPTERS, ...)
        batch = tiny.placed(tiny.batch(c, rows=1))
        compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, batch).compile()
        adapters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    size = tiny.size(c)
    vit, compressor, llm = size.vit, size.compressor, size.llm
    assert adapters == cost.lora_parameters(llm, 128, SOME)
    text = c.data.text_length
    sizes = dict(vit=vit, stage="finetune", tokens=text + 16, logits=text)
    counted = cost.train_step_flops(True, compressor, llm, adapters=adapters, **sizes)
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.01)
    # And training the weights themselves costs more.
    assert counted < 0.85 * cost.train_step_flops(True, compressor, llm, **sizes)
    steps = c.finetune.steps * c.finetune.batch * counted
    c.align.steps = 0
    assert cells.train_flops(tiny.recipe(c)) == pytest.approx(steps)
