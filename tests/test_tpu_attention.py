# SPDX-License-Identifier: Apache-2.0
"""Splash attention compiled for every chip: both head sizes, values and gradients."""

import jax
import jax.numpy as jnp
import pytest

from vlm_jax import mesh
from vlm_jax.aot import topology
from vlm_jax.kernels.causal_attention import Groups, causal_attention

pytestmark = pytest.mark.tpu_compiler


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e", "tpu7x"])
def test_values_and_gradients_compile_for_every_chip(kind, size):
    topology.prepare()
    slice_ = topology.named(f"{kind}:{topology.KINDS[kind].one}")
    # Mosaic refuses the precision that the tests ask for with bfloat16.
    precision = jax.default_matmul_precision("default")
    with precision, jax.set_mesh(mesh.make(-1, devices=slice_.devices())):

        def shape(of, dtype, *dims):
            at = mesh.sharding(jax.sharding.get_mesh(), *dims)
            return jax.ShapeDtypeStruct(of, dtype, sharding=at)

        query = shape((4, 300, 4, size), jnp.bfloat16, "batch", "len", "heads", "head")
        keys = shape((4, 300, 2, size), jnp.bfloat16, "batch", "len", "kv_heads", "head")
        segments = shape((4, 300), jnp.int32, "batch", "len")

        def loss(query, keys, values, segments):
            groups = Groups(segments, segments)
            return causal_attention(query, keys, values, groups).astype(jnp.float32).sum()

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        text = step.lower(query, keys, keys, segments).compile().as_text()
    for name in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert name in text, name
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
