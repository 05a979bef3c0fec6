# SPDX-License-Identifier: Apache-2.0
"""One token's keys and values written into a cache in place, on a TPU.

XLA writes rows at different positions one after another, with a separate loop for each layer and
for keys and values. Here one kernel touches only the slots around each position.

B batch  K kv heads  S slots  H head size
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vlm_jax import mesh
from vlm_jax.kernels.tiles import ROWS


def write_token(
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    new_keys: Float[Array, "B K 1 H"],
    new_values: Float[Array, "B K 1 H"],
    position: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """The cache with the new token of each row at its position; `keys` and `values` are reused.

    Each device handles its own rows and heads: nothing is sent. `interpret` runs it on a CPU,
    slowly.
    """
    kv, rows = mesh.spec("batch", "kv_heads", "len", "head"), mesh.spec("batch")
    f = jax.shard_map(
        lambda *given: on_device(*given, interpret=interpret),
        in_specs=(kv, kv, kv, kv, rows),
        out_specs=(kv, kv),
        check_vma=False,
    )
    return f(keys, values, new_keys, new_values, position)


def on_device(keys, values, new_keys, new_values, position, *, interpret: bool):
    """`write_token` for the rows and heads of one device."""
    batch, heads, slots, size = keys.shape
    rows = min(ROWS, slots)
    tile = pl.BlockSpec((1, heads, rows, size), lambda b, at: (b, 0, at[b] // rows, 0))
    token = pl.BlockSpec((1, heads, 1, size), lambda b, at: (b, 0, 0, 0))
    moved = 2 * batch * heads * size * (2 * rows + 1) * keys.dtype.itemsize
    return pl.pallas_call(
        lambda *refs: _write(*refs, rows=rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[tile, tile, token, token],
            out_specs=[tile, tile],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
        input_output_aliases={1: 0, 2: 1},  # operand 0 is the positions
        name="write_token",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
    )(position, keys, values, new_keys, new_values)


def _write(at_ref, keys_ref, values_ref, new_keys_ref, new_values_ref, keys_out, values_out, *,
           rows):  # fmt: skip
    place = at_ref[pl.program_id(0)] % rows
    here = lax.broadcasted_iota(jnp.int32, keys_ref.shape, 2) == place
    for old, new, out in (
        (keys_ref, new_keys_ref, keys_out),
        (values_ref, new_values_ref, values_out),
    ):
        # In float32, because the mask has 32 bits.
        chosen = jnp.where(here, new[...].astype(jnp.float32), old[...].astype(jnp.float32))
        out[...] = chosen.astype(out.dtype)
