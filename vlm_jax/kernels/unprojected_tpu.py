# SPDX-License-Identifier: Apache-2.0
"""Windowed cross-attention on a TPU with absorbed projections: full-width queries stay on the chip.

B batch  V windows  S keys of one window  N heads  H head size  E width
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from vlm_jax.kernels import absorbed_tpu, tiles

VMEM = 15 * 2**20  # bytes of blocks and scratch, out of the 16 MiB that every chip grants


def fits(windows: int, keys: int, heads: int, size: int, width: int, itemsize: int) -> bool:
    """Whether one image, both weights and the heads' queries and results fit into VMEM at once."""
    blocks = 2 * (2 * windows * heads * size + 2 * windows * keys * width)
    resident = 2 * width * heads * size + 2 * heads * windows * width
    return (blocks + resident) * itemsize <= VMEM


def forward(
    query: Float[Array, "B V N H"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    key_kernel: Float[Array, "N H E"],
    value_kernel: Float[Array, "N E H"],
) -> Float[Array, "B V N H"]:
    """Attention of projected queries to unprojected keys and values, one image per grid step."""
    batch, windows, heads, size = query.shape
    per, width, dtype = keys.shape[2], keys.shape[3], query.dtype
    row = pl.BlockSpec((1, windows, heads * size), lambda b: (b, 0, 0))
    patch = pl.BlockSpec((1, windows * per, width), lambda b: (b, 0, 0))
    # The same for every image: one buffer, filled once.
    weight = functools.partial(
        pl.BlockSpec, index_map=lambda b: (0, 0, 0), pipeline_mode=pl.Buffered(1)
    )
    scratch = pltpu.VMEM((heads, windows, width), dtype)
    patches = (batch, windows * per, width)
    out = pl.pallas_call(
        functools.partial(_forward, per=per, size=size),
        grid=(batch,),
        in_specs=[row, patch, patch, weight((heads, size, width)), weight((heads, width, size))],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((batch, windows, heads * size), dtype),
        scratch_shapes=[scratch, scratch],
        name="unprojected_attention",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * windows * heads * width * (size + per),
            transcendentals=batch * windows * heads * per,
            bytes_accessed=dtype.itemsize
            * (2 * batch * windows * (heads * size + per * width) + 2 * width * heads * size),
        ),
    )(
        query.reshape(batch, windows, heads * size),
        keys.reshape(patches),
        values.reshape(patches),
        key_kernel,
        value_kernel,
    )
    return out.reshape(query.shape)


def _forward(q_ref, k_ref, v_ref, wk_ref, wv_ref, o_ref, full_query, mixed, *, per, size):
    heads, windows, width = full_query.shape
    lanes = [slice(h * size, (h + 1) * size) for h in range(heads)]
    for h in range(heads):
        full_query[h] = tiles.product(q_ref[0, :, lanes[h]], wk_ref[h], (1, 0)).astype(
            full_query.dtype
        )
    for first, last in tiles.groups(windows, per, heads=heads, multiple=8):
        mask = tiles.same_window(last - first, heads, per) if last - first > 1 else None
        some, keys = slice(first, last), slice(first * per, last * per)
        rows = full_query[:, some].reshape(-1, width)
        scores = tiles.product(rows, k_ref[0, keys], (1, 1)) * size**-0.5
        v = v_ref[0, keys]
        rows = tiles.product(tiles.softmax(scores, mask).astype(v.dtype), v, (1, 0))
        mixed[:, some] = rows.reshape(heads, -1, width).astype(mixed.dtype)
    for h in range(heads):
        out = tiles.product(mixed[h], wv_ref[h], (1, 0))
        o_ref[0, :, lanes[h]] = out.astype(o_ref.dtype)


def in_steps(
    query: Float[Array, "B V N H"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    key_kernel: Float[Array, "N H E"],
    value_kernel: Float[Array, "N E H"],
) -> Float[Array, "B V N H"]:
    """The same result in three steps, each of which has a gradient."""
    full_query = jnp.einsum("BVNH,NHE->BVNE", query, key_kernel)
    mixed = absorbed_tpu.attend(full_query, keys, values, query.shape[-1] ** -0.5)
    return jnp.einsum("BVNE,NEH->BVNH", mixed, value_kernel)


@jax.custom_vjp
def attend(
    query: Float[Array, "B V N H"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    key_kernel: Float[Array, "N H E"],
    value_kernel: Float[Array, "N E H"],
) -> Float[Array, "B V N H"]:
    """`forward` if it fits into VMEM, else `in_steps`.

    A differentiated call uses `in_steps`: the gradients of the weights need the inner results.
    """
    windows, heads, size = query.shape[1:]
    if fits(windows, keys.shape[2], heads, size, keys.shape[3], query.dtype.itemsize):
        return forward(query, keys, values, key_kernel, value_kernel)
    return in_steps(query, keys, values, key_kernel, value_kernel)


attend.defvjp(lambda *inputs: jax.vjp(in_steps, *inputs), lambda back, gradient: back(gradient))
