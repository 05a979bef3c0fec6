# SPDX-License-Identifier: Apache-2.0
"""Splash attention, interpreted on a CPU, equals XLA's form of causal attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import mesh
from vlm_jax.kernels import causal_attention as causal
from vlm_jax.models import attention
from vlm_jax.models.cache import KV, Past, positions_of

B, N, K, H = 4, 4, 2, 64


def placed(x, *dims):
    return jax.device_put(x, mesh.sharding(jax.sharding.get_mesh(), *dims))


def inputs(length, before=0):
    """Random queries, keys and values of grouped heads, on the current mesh."""
    draw = np.random.default_rng(length)
    query = draw.normal(size=(B, length, N, H)).astype(np.float32)
    kv = draw.normal(size=(2, B, before + length, K, H)).astype(np.float32)
    of_keys = ("batch", "len", "kv_heads", "head")
    return placed(query, "batch", "len", "heads", "head"), *(placed(x, *of_keys) for x in kv)


def check(length, past=None, segments=None):
    """Values and gradients of both forms, with the masks that the model makes."""
    query, keys, values = inputs(length, 0 if past is None else past.keys.shape[2])
    positions = positions_of(B, length)
    mask = attention.mask_of(positions, past, segments)
    groups = attention.groups_of(positions, past, segments)

    def loss(f):
        def run(*given):
            out = f(*given)
            return (out * jnp.sin(jnp.arange(H))).sum(), out

        return jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))

    found = loss(lambda *given: causal.causal_attention(*given, groups, interpret=True))
    wanted = loss(lambda q, k, v: attention.mix(q, KV(k, v), mask))
    pairs = zip(jax.tree.leaves(found(query, keys, values)),
                jax.tree.leaves(wanted(query, keys, values)), strict=True)  # fmt: skip
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_rows_that_fill_no_block_and_grouped_heads_on_a_mesh():
    with jax.set_mesh(mesh.make(2, 2, 2)):
        check(130)


def test_rows_of_several_examples_and_rows_behind_a_past():
    with jax.set_mesh(mesh.make(4, 1, 1, devices=jax.devices()[:4])):
        bounds = placed(np.array([[5], [70], [128], [1]], np.int32), "batch", "len")
        segments = (positions_of(B, 130) >= bounds).astype(jnp.int32)
        check(130, segments=segments)
        length = placed(np.array([3, 9, 1, 7], np.int32), "batch")
        keys = np.zeros((1, B, 9, K, H), np.float32)
        of_past = ("layers", "batch", "len", "kv_heads", "head")
        past = Past(placed(keys[0, :, :, 0], "batch"), *[placed(keys, *of_past)] * 2, length)
        check(128, past=past)


@pytest.mark.parametrize("length, side", [
    (128, 128), (200, 128), (512, 512), (548, 128), (1024, 512), (2084, 256), (2816, 512),
])  # fmt: skip
def test_a_block_pads_a_row_by_an_eighth_at_most_or_is_the_smallest(length, side):
    assert causal.block_of(length) == side
    padded = -(-length // side) * side
    assert side == 128 or padded <= causal.PADDED * length
