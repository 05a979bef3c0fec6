# SPDX-License-Identifier: Apache-2.0
"""Products with sharded weights are plain products, and their gradients are never reduced whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import cpu, mesh, sharded
from vlm_jax.aot import counted

# As the layers have them: the weight's dimensions, sizes, how many are contracted, the result's.
WEIGHTS = {
    "query": (("embed", "heads", "head"), (16, 4, 6), 1, ("batch", "len", "heads", "head")),
    "out": (("heads", "head", "embed"), (4, 6, 16), 2, ("batch", "len", "feature")),
    "gate": (("embed", "mlp"), (16, 24), 1, ("batch", "len", "mlp")),
    "down": (("mlp", "embed"), (24, 16), 1, ("batch", "len", "feature")),
    "middle": (("none", "embed", "mlp"), (6, 16, 4), 1, ("batch", "len", "none", "mlp")),
}


def draw(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def placed(x, on, *dims):
    return jax.device_put(x, mesh.sharding(on, *dims))


def weighted(y):
    """A number that depends on every entry of y differently."""
    y = y.astype(jnp.float32)
    return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum()


def slopes(f, on, *given):
    """Value and gradients, and what is sent for them."""
    with jax.set_mesh(on):
        step = jax.jit(jax.value_and_grad(lambda *x: weighted(f(*x)), (0, 1)))
        program = step.trace(*given).lower().compile()
        return program(*given), counted.facts(program.as_text()).collectives


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_is_the_plain_product_in_values_and_gradients(name, mesh1, mesh8):
    dims, shape, read, out = WEIGHTS[name]
    x, w = draw(4, 3, *shape[:read]), draw(*shape)
    of_x = ("batch", "len", *("len" if d == "none" else d for d in dims[:read]))
    of_x = tuple("feature" if d == "embed" else d for d in of_x)
    found = [
        slopes(
            lambda x, w: cpu.project(x, w, read, out),
            on,
            placed(x, on, *of_x),
            placed(w, on, *dims),
        )[0]
        for on in (mesh1, mesh8)
    ]
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
    with jax.set_mesh(mesh8):
        rows = placed(x.reshape(12, *shape[:read]), mesh8, "batch", *of_x[2:])
        assert sharded.scatters(rows, placed(w, mesh8, *dims))


def test_a_lookup_is_the_plain_lookup_in_values_and_gradients(mesh1, mesh8):
    table, ids = draw(10, 16), np.random.default_rng(0).integers(0, 10, (4, 7)).astype(np.int32)

    def found(on):
        of_ids = placed(ids, on, "batch", "len")
        look = lambda table, _: sharded.lookup(table, of_ids, "float32")  # noqa: E731
        one = placed(np.zeros((), np.float32), on)
        return slopes(look, on, placed(table, on, "vocab", "embed"), one)[0]

    (value, (slope, _)), (value8, (slope8, _)) = found(mesh1), found(mesh8)
    expected = weighted(jnp.asarray(table)[ids])
    np.testing.assert_allclose([value, value8], expected, rtol=1e-5)
    np.testing.assert_allclose(slope8, slope, rtol=1e-5, atol=1e-5)


def test_on_one_device_a_lookup_is_the_plain_one_bit_for_bit(mesh1):
    """Numbers that were trained on one device stay as they are."""
    table, ids = draw(10, 16), np.array([[1, 2, 3], [1, 1, 0]], np.int32)

    def gradient(read):
        with jax.set_mesh(mesh1):
            given = placed(table, mesh1, "vocab", "embed"), placed(ids, mesh1, "batch", "len")
            return jax.jit(jax.grad(lambda table, ids: weighted(read(table, ids))))(*given)

    def plain(table, ids):
        whole = jax.sharding.reshard(table, mesh.spec("vocab", "feature"))
        return whole.at[ids].get(out_sharding=mesh.spec("batch", "len", "feature"))

    np.testing.assert_array_equal(
        gradient(lambda table, ids: sharded.lookup(table, ids, jnp.float32)), gradient(plain)
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_gradient_of_a_weight_is_reduced_whole(name):
    """Of a weight one shard at most is reduced over data; the rest is scattered over fsdp."""
    dims, shape, read, out = WEIGHTS[name]
    on = mesh.make(2, 4, 1)
    x = placed(draw(8, 3, *shape[:read]), on, "batch", "len", *["none"] * read)
    w = placed(draw(*shape), on, *dims)
    _, sent = slopes(lambda x, w: cpu.project(x, w, read, out), on, x, w)
    assert sum(c.bytes for c in sent if c.kind == "reduce-scatter") == 4 * w.size
    assert (
        sum(c.bytes for c in sent if c.kind == "all-reduce" and c.group > 1) <= 4 * w.size / 4 + 4
    )
