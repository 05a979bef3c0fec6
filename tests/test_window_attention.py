# SPDX-License-Identifier: Apache-2.0
"""Windowed cross-attention: every way of computing it gives what the direct form gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm_jax import mesh
from vlm_jax.models.compressors.window import WindowAttention, absorbing_pays

NEAR = 1e-5  # absolute, on outputs and gradients of order one, in float32


def attention(tokens, patches, width, heads, seed=0):
    """A WindowAttention with weights of order one, biases too."""
    module = WindowAttention(width, heads, tokens=tokens, patches=patches, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(module)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [
        jax.device_put(draw.normal(scale=width**-0.5, size=x.shape).astype("f4"), x.sharding)
        for x in leaves
    ])  # fmt: skip


def drawn(*shape, seed=0, dtype="f4"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# --- Absorbed projections -------------------------------------------------------------------------


def value_and_gradients(module, absorbed, inputs):
    """The module's output, and the gradients of a weighted sum of it, with one of its two forms."""
    module.absorbed = absorbed
    inputs = [jax.device_put(x, mesh.spec("batch")) for x in inputs]
    towards = drawn(*inputs[0].shape, seed=9)

    def loss(module, *inputs):
        out = module(*inputs)
        return (out * towards).sum() / towards[0].size, out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(
        module, *inputs
    )
    own = {"/".join(k): v for k, v in nnx.to_flat_state(nnx.state(gradients[0]))}
    return {"out": out} | own | dict(zip(("query", "keys", "values"), gradients[1:], strict=True))


@pytest.mark.parametrize("on", ["mesh1", "mesh8"])
@pytest.mark.parametrize(
    "tokens, patches, width, heads", [(1, 36, 32, 4), (4, 16, 32, 2), (9, 36, 24, 2), (4, 4, 16, 4)]
)
def test_absorbed_projections_equal_projected_keys_and_values(
    tokens, patches, width, heads, on, request
):
    with jax.set_mesh(request.getfixturevalue(on)):
        module = attention(tokens, patches, width, heads)
        inputs = [drawn(8, n, width, seed=i) for i, n in enumerate((tokens, patches, patches))]
        direct, absorbed = (value_and_gradients(module, form, inputs) for form in (False, True))
    assert direct.keys() == absorbed.keys()
    for name, value in absorbed.items():
        np.testing.assert_allclose(value, direct[name], atol=NEAR, err_msg=name)
    # Rounding in the one, nothing at all in the other.
    assert not np.any(absorbed["key/bias"])


def test_the_form_with_fewer_multiplications_is_built():
    chosen = [v for v in (1, 4, 9, 16, 36, 64, 144, 576) if absorbing_pays(v, 576, 1024, 8)]
    assert chosen == [1, 4, 9, 16, 36, 64, 144]
    assert absorbing_pays(571, 576, 1024, 8) and not absorbing_pays(573, 576, 1024, 8)
    # Windows of one patch never, and not when the heads are as many as the channels of one.
    assert not absorbing_pays(16, 16, 32, 4) and not absorbing_pays(4, 16, 8, 8)


@pytest.mark.parametrize("tokens, absorbed", [(4, True), (16, False)])
def test_the_choice_shows_in_the_compiled_program(tokens, absorbed, mesh1):
    with jax.set_mesh(mesh1):
        module = attention(tokens, 16, 32, 2)
        inputs = [drawn(2, n, 32, seed=i) for i, n in enumerate((tokens, 16, 16))]
        counted = jax.jit(lambda m, *x: m(*x)).lower(module, *inputs).cost_analysis()["flops"]
    assert module.absorbed == absorbed
    projections = 2 * 2 * 2 * 16 * 32**2  # two of them for two images of 16 patches
    rest = 2 * 2 * 2 * tokens * 32**2
    assert (counted > rest + projections) == (not absorbed)
