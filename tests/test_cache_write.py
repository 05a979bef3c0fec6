# SPDX-License-Identifier: Apache-2.0
"""What is written into caches, by the kernel of a TPU and by XLA, stands where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import mesh
from vlm_jax.kernels.cache_tpu import write_token
from vlm_jax.models.cache import KV, Cache, by_token, kept, of_rows, part, put_row, write


def test_every_row_is_written_at_its_own_place_and_nowhere_else():
    draw = np.random.default_rng(0)
    with jax.set_mesh(on := mesh.make(2, 1, 2, devices=jax.devices()[:4])):
        kv = mesh.sharding(on, "batch", "kv_heads", "len", "head")
        cache = [jax.device_put(x, kv) for x in draw.normal(size=(2, 4, 2, 48, 8))]
        new = [jax.device_put(x, kv) for x in draw.normal(size=(2, 4, 2, 1, 8))]
        at = jax.device_put(np.array([0, 15, 16, 47], np.int32), mesh.sharding(on, "batch"))
        found = jax.jit(lambda *given: write_token(*given, interpret=True))(*cache, *new, at)
        wanted = write(Cache(*cache), KV(*(x.transpose(0, 2, 1, 3) for x in new)), at)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_move_between_caches_of_one_row_and_of_several(dtype, mesh1):
    """One row lies token by token, several by heads, in float32 where a CPU emulates bfloat16."""
    draw = np.random.default_rng(0)
    by_token_there = mesh.sharding(mesh1, "batch", "len", "kv_heads", "head")
    with jax.set_mesh(mesh1):
        rows = [
            KV(*(jax.device_put(jnp.asarray(x, dtype), by_token_there) for x in drawn))
            for drawn in draw.normal(size=(3, 2, 1, 9, 2, 4))
        ]
        many = of_rows(
            kept(KV(*(x[:, :8] for x in rows[0])), 8),
            jnp.array([0, 0, 0], jnp.int32),
            jnp.dtype(dtype),
        )
        assert isinstance(many, Cache) and many.slots == 8
        for at in (1, 2):
            many = put_row(many, rows[at], jnp.int32(at))
        one = of_rows(many, jnp.array([2], jnp.int32), jnp.dtype(dtype))
        assert isinstance(one, KV) and one.keys.dtype == dtype
        for made, row in ((one, 2), (put_row(one, rows[1], jnp.int32(0)), 1)):
            jax.tree.map(np.testing.assert_array_equal, made, KV(*(x[:, :8] for x in rows[row])))
        for row in range(3):
            found = part(many, jnp.int32(row), jnp.int32(3), 4, jnp.dtype(dtype))
            expected = KV(*(x[:, 3:7] for x in rows[row]))
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert by_token(many, jnp.dtype(dtype)).keys.shape == (3, 8, 2, 4)
