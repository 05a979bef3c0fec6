# SPDX-License-Identifier: Apache-2.0
"""The forms for XLA's CPU backend give what the plain forms give, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import cpu, mesh


def draw(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def sharded(x):
    """As an encoder gives it: jax from 0.11 on multiplies no batch that is sharded otherwise."""
    return jax.sharding.reshard(x, mesh.spec("batch", "len", "feature"))


@pytest.fixture(autouse=True)
def one_device(mesh1):
    with jax.set_mesh(mesh1):
        yield


# Each form, the plain one that it stands for, and what both read.
FORMS = {
    "sum_of_windows": (cpu.sum_of_windows, lambda x: x.sum(2), [(2, 3, 4, 5)]),
    "for_every_image": (
        lambda s, x: jnp.einsum("BVNP,BPE->BVNE", cpu.for_every_image(s, len(x)), sharded(x)),
        lambda s, x: jnp.einsum("NVP,BPE->BVNE", s, x),
        [(2, 3, 6), (4, 6, 5)],
    ),
    "project": (
        lambda x, w: cpu.project(x, w, 2, ("batch", "len", "feature")),
        lambda x, w: jnp.einsum("BTNH,NHD->BTD", x, w),
        [(2, 3, 4, 5), (4, 5, 6)],
    ),
    "two_rows": (
        lambda x, w: cpu.two_rows(lambda y: y @ w, x, 0),
        lambda x, w: x @ w,
        [(1, 6), (6, 7)],
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_its_plain_form(name, dtype):
    form, plain, shapes = FORMS[name]
    inputs = [draw(*shape, dtype=dtype) for shape in shapes]

    def both(f):
        def total(*x):
            y = f(*x).astype(jnp.float32)
            return (y * jnp.arange(y.size).reshape(y.shape)).sum() / y.size, y

        (_, y), slopes = jax.jit(
            jax.value_and_grad(total, argnums=tuple(range(len(inputs))), has_aux=True)
        )(*inputs)
        return [y, *slopes]

    close = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=0.04, atol=0.04)
    for found, expected in zip(both(form), both(plain), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_allclose(found.astype("f4"), expected.astype("f4"), **close)


def test_only_a_single_row_of_bfloat16_is_given_twice():
    rows = []

    def product(x):
        rows.append(x.shape)
        return x

    for dtype in ("float32", "bfloat16"):
        for shape in ((1, 1, 4), (1, 2, 4), (2, 1, 4)):
            assert cpu.two_rows(product, draw(*shape, dtype=dtype), 1).shape == shape
    assert rows == [(1, 1, 4), (1, 2, 4), (2, 1, 4), (1, 2, 4), (1, 2, 4), (2, 1, 4)]
