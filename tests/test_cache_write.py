# SPDX-License-Identifier: Apache-2.0
"""The kernel that writes a token into a cache, interpreted on a CPU, equals XLA's writes."""

import jax
import numpy as np

from vlm_jax import mesh
from vlm_jax.kernels.cache_tpu import write_token
from vlm_jax.models.cache import KV, Cache, write


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
