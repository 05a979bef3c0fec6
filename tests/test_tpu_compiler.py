# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler accepts and makes of the kernels, on a machine without a TPU."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import kernels
from vlm_jax import mesh
from vlm_jax.compressors.window import WindowAttention

pytestmark = pytest.mark.tpu_compiler

KINDS = ["window_attention", "absorbed_attention", "unprojected_attention"]


def compiled(chip, tokens, name, *, batch=kernels.BATCH, dtype="bfloat16"):
    """The text of a kernel with its gradient; raises where Mosaic or the VMEM refuses one."""
    attend, shapes = kernels.programs(tokens, batch, dtype)[name]

    def with_gradient(toward, *inputs):
        out, back = jax.vjp(attend, *inputs)
        return out, back(toward)

    f = attend
    if name != "unprojected_attention":  # its gradient is that of absorbed_attention
        f, shapes = with_gradient, [shapes[0], *shapes]
    return kernels.lowered(kernels.single(chip), f, shapes).compile().as_text()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tokens", kernels.TOKENS)
@pytest.mark.parametrize("chip", kernels.CHIPS)
def test_forward_and_backward_compile_for_every_chip(chip, tokens, name):
    text = compiled(chip, tokens, name)
    assert f"%{name}." in text
    assert (f"%{name}_gradient." in text) == (name != "unprojected_attention")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tokens, batch, dtype", [
    (1, 16, "bfloat16"), (144, 16, "bfloat16"), (1, 16, "float32"), (36, 16, "float32"),
    (9, 2, "bfloat16"), (64, 2, "bfloat16"),
])  # fmt: skip
def test_other_batches_windows_and_types_compile(tokens, batch, dtype, name):
    compiled("v5e", tokens, name, batch=batch, dtype=dtype)


@pytest.mark.parametrize("tokens", kernels.TOKENS)
def test_a_kernel_moves_little_more_than_it_must(tokens):
    for name in kernels.KERNELS:
        f, shapes = kernels.programs(tokens)[name]
        with jax.set_mesh(kernels.single("v5e")):
            program = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(*s) for s in shapes))
        moved, _ = kernels.block_bytes(program)[name]
        assert 1 <= moved / kernels.floor(tokens, name) <= 1.1, name


def test_the_schedules_wait_for_memory_and_absorbing_halves_the_cycles():
    found = kernels.row("v5e", 36)["programs"]
    assert found["window_attention"]["spills"] == 0
    for name in ("window_attention", "unprojected_attention"):
        assert found[name]["bundle_cycles"] < found[name]["dma_cycles"]
    assert found["absorbed_kernel"]["cycles"] * 2 < found["projected_kernel"]["cycles"]


@pytest.mark.parametrize("tokens", [4, 16])
def test_on_many_chips_no_patch_is_gathered(tokens):
    """Batch over four chips, heads over two: absorbed (4 windows) and projected (windows of 1)."""
    on, width, patches = mesh.make(4, 1, 2, devices=kernels.devices("v5e:2x4")), 256, 16
    with jax.set_mesh(on):
        module = jax.eval_shape(
            lambda: WindowAttention(width, 2, tokens=tokens, patches=patches, rngs=nnx.Rngs(0))
        )
        assert module.form == "pallas" and module.absorbed == (tokens < patches)
        query, keys = (
            jax.ShapeDtypeStruct(
                (8, n, width), jnp.bfloat16, sharding=mesh.sharding(on, "batch", "len", "feature")
            )
            for n in (tokens, patches)
        )

        def loss(module, *inputs):
            return module(*inputs).astype(jnp.float32).sum()

        step = jax.jit(jax.grad(loss, (1, 2, 3)))
        text = step.lower(module, query, keys, keys).compile().as_text()
    assert "tpu_custom_call" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
