# SPDX-License-Identifier: Apache-2.0
"""Layers against their formulas, norms in float32 whatever comes in, and stacks of blocks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax import layers, mesh


@pytest.fixture(autouse=True)
def one_device(mesh1):
    with jax.set_mesh(mesh1):
        yield


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_activations_equal_their_formulas():
    x = np.linspace(-6, 6, 101, dtype="f4")
    exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), exact, atol=1e-6)
    np.testing.assert_allclose(
        layers.quick_gelu(jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), atol=1e-6
    )


def test_norms_undo_scale_and_shift_as_they_promise():
    x = draw(3, 64)
    layer_norm = layers.LayerNorm(64, eps=1e-12, rngs=nnx.Rngs(0))
    rms_norm = layers.RMSNorm(64, eps=1e-12, rngs=nnx.Rngs(0))
    y = layer_norm(x)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(-1), 1, atol=1e-5)
    np.testing.assert_allclose(layer_norm(7 * x + 5), y, atol=1e-4)
    np.testing.assert_allclose(jnp.square(rms_norm(x)).mean(-1), 1, atol=1e-5)
    np.testing.assert_allclose(rms_norm(7 * x), rms_norm(x), atol=1e-5)


def test_the_epsilon_is_added_to_the_variance():
    x = 1e-3 * draw(1, 32)
    norm = layers.LayerNorm(32, eps=1e-5, rngs=nnx.Rngs(0))
    centered = np.asarray(x) - np.mean(x)
    np.testing.assert_allclose(norm(x), centered / np.sqrt((centered**2).mean() + 1e-5), rtol=1e-5)


@pytest.mark.parametrize("kind", [layers.LayerNorm, layers.RMSNorm])
def test_norms_of_bfloat16_compute_in_float32(kind):
    # Far from zero a bfloat16 mean or square would lose every digit that the norm is about.
    x = (300 + draw(2, 256)).astype(jnp.bfloat16)
    norm = kind(256, eps=1e-5, rngs=nnx.Rngs(0))
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_a_linear_is_its_einsum_with_the_published_initialization():
    linear = layers.Linear(
        "BTD,DNH->BTNH",
        (32, 4, 8),
        dims=("embed", "heads", "head"),
        out=("batch", "len", "heads", "head"),
        rngs=nnx.Rngs(0),
    )
    x = draw(2, 3, 32)
    expected = np.asarray(x) @ np.asarray(linear.kernel[...]).reshape(32, 32)
    expected = expected.reshape(2, 3, 4, 8) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(linear(x), expected, atol=1e-5)
    bound = 1 / math.sqrt(32)  # torch's nn.Linear: U(+-1/sqrt(fan in)), kernel and bias alike
    for value in (linear.kernel[...], linear.bias[...]):
        assert bound * 0.8 < jnp.abs(value).max() <= bound
    assert linear.bias[...].shape == (4, 8)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_product_of_bfloat16_is_that_of_float32_rounded_once(rows):
    linear = layers.Linear(
        "BTD,DF->BTF", (64, 32), dims=("embed", "mlp"), out=("batch", "len", "mlp"), bias=False,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), linear)
    x = draw(1, rows, 64).astype(jnp.bfloat16)
    exact = np.asarray(x, "f4")[0] @ np.asarray(narrow.kernel[...], "f4")
    y = jax.jit(lambda m, x: m(x))(narrow, x)
    assert y.dtype == jnp.bfloat16 and y.shape == (1, rows, 32)
    np.testing.assert_allclose(np.asarray(y, "f4")[0], exact, rtol=2**-8, atol=2**-12)
    gradient = jax.jit(jax.grad(lambda m, x: m(x).astype(jnp.float32).sum()))(narrow, x)
    wanted = np.asarray(x, "f4")[0].sum(0)[:, None] * np.ones(32)
    np.testing.assert_allclose(
        np.asarray(gradient.kernel[...], "f4"), wanted, rtol=2**-7, atol=2**-7
    )


def test_a_weight_is_born_where_its_dimensions_say(mesh8):
    with jax.set_mesh(mesh8):
        linear = layers.Linear(
            "BTD,DF->BTF",
            (8, 16),
            dims=("embed", "mlp"),
            out=("batch", "len", "mlp"),
            rngs=nnx.Rngs(0),
        )
        assert jax.typeof(linear.kernel[...]).sharding.spec == P("fsdp", "tensor")
        assert jax.typeof(linear.bias[...]).sharding.spec == P("tensor")


def test_a_stack_is_its_layers_one_by_one():
    blocks = layers.stack(
        lambda r: layers.Linear(
            "BD,DF->BF",
            (6, 6),
            dims=("none", "none"),
            rngs=r,
            out=("batch", "none"),
            init=layers.normal(1.0),
        ),
        3,
        nnx.Rngs(0),
    )
    x = jax.device_put(draw(2, 6), mesh.spec("batch", "none"))
    scanned, _ = jax.lax.scan(lambda x, block: (block(x), None), x, blocks)
    for index in range(3):
        x = layers.layer(blocks, index)(x)
    np.testing.assert_allclose(scanned, x, rtol=1e-5, atol=1e-5)
    kernels = np.asarray(blocks.kernel[...])
    assert abs(np.corrcoef(kernels.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.7


def test_an_unknown_remat_policy_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"remat='some'.*\['dots', 'full', 'none'\]"):
        layers.remat("some")
