# SPDX-License-Identifier: Apache-2.0
"""Windowed cross-attention on a TPU: reads queries, keys and values once, writes the result once.

B batch  V windows  S keys of one window  P = V S  N heads  H head size
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from vlm_jax.kernels import tiles


def forward(
    query: Float[Array, "B V N H"],
    keys: Float[Array, "B V S N H"],
    values: Float[Array, "B V S N H"],
) -> Float[Array, "B V N H"]:
    """Attention of one query per window."""
    return _call(_forward, "window_attention", (query,), (keys, values), 1, 0, 4)[0]


def backward(
    query: Float[Array, "B V N H"],
    keys: Float[Array, "B V S N H"],
    values: Float[Array, "B V S N H"],
    gradient: Float[Array, "B V N H"],
) -> tuple[Float[Array, "B V N H"], Float[Array, "B V S N H"], Float[Array, "B V S N H"]]:
    """Gradients of queries, keys and values from that of the result; weights are recomputed.

    Windows are disjoint: a key belongs to one query, so no gradient is summed over grid steps.
    """
    rows, patches = (query, gradient), (keys, values)
    return _call(_backward, "window_attention_gradient", rows, patches, 1, 2, 10)


def _call(kernel, name, rows, patches, rows_out, patches_out, flops_per_key):
    """`kernel` on blocks of [windows N H] and [windows S N H]; results shaped like its inputs."""
    batch, windows, heads, size = rows[0].shape
    keys, width, dtype = patches[0].shape[2], heads * size, rows[0].dtype
    n_rows, n_patches = len(rows) + rows_out, len(patches) + patches_out
    window_bytes = width * (n_rows + n_patches * keys) * dtype.itemsize
    block = tiles.windows_per_block(windows, keys, window_bytes)
    # Whole windows if they fit; if one does not, some of its heads.
    part = heads
    while 2 * block * window_bytes * part // heads > tiles.BLOCKS and part % 2 == 0:
        if part // 2 * size % tiles.LANES:
            break
        part //= 2
    row = pl.BlockSpec((1, 1, block, part * size), lambda b, w, h: (b, w, 0, h))
    patch = pl.BlockSpec((1, 1, block * keys, part * size), lambda b, w, h: (b, w, 0, h))
    row_shape = (batch, windows // block, block, width)
    patch_shape = (batch, windows // block, block * keys, width)
    call = pl.pallas_call(
        functools.partial(kernel, windows=block, keys=keys, heads=part, size=size),
        grid=(batch, windows // block, heads // part),
        in_specs=[row] * len(rows) + [patch] * len(patches),
        out_specs=[row] * rows_out + [patch] * patches_out,
        out_shape=[jax.ShapeDtypeStruct(row_shape, dtype)] * rows_out
        + [jax.ShapeDtypeStruct(patch_shape, dtype)] * patches_out,
        name=name,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=flops_per_key * batch * windows * keys * width,
            transcendentals=batch * windows * keys * heads,
            bytes_accessed=batch * windows * window_bytes,
        ),
    )
    out = call(*(x.reshape(row_shape) for x in rows), *(x.reshape(patch_shape) for x in patches))
    shapes = [rows[0].shape] * rows_out + [patches[0].shape] * patches_out
    return tuple(x.reshape(shape) for x, shape in zip(out, shapes, strict=True))


def _parts(windows: int, keys: int, heads: int, size: int):
    """Slices of the rows, the keys and the lanes of each product, and its mask."""
    for first, last in tiles.groups(windows, keys, lanes=2 * tiles.LANES):
        mask = tiles.same_window(last - first, 1, keys) if last - first > 1 else None
        for head in range(heads):
            lanes = slice(head * size, (head + 1) * size)
            yield slice(first, last), slice(first * keys, last * keys), lanes, mask


def _forward(q_ref, k_ref, v_ref, o_ref, *, windows, keys, heads, size):
    for row, key, lanes, mask in _parts(windows, keys, heads, size):
        scores = tiles.product(q_ref[0, 0, row, lanes], k_ref[0, 0, key, lanes], (1, 1))
        weights = tiles.softmax(scores * size**-0.5, mask)
        v = v_ref[0, 0, key, lanes]
        out = tiles.product(weights.astype(v.dtype), v, (1, 0))
        o_ref[0, 0, row, lanes] = out.astype(o_ref.dtype)


def _backward(q_ref, g_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, *, windows, keys, heads, size):
    for row, key, lanes, mask in _parts(windows, keys, heads, size):
        q, g = q_ref[0, 0, row, lanes], g_ref[0, 0, row, lanes]
        k, v = k_ref[0, 0, key, lanes], v_ref[0, 0, key, lanes]
        weights = tiles.softmax(tiles.product(q, k, (1, 1)) * size**-0.5, mask)
        toward = tiles.product(g, v, (1, 1))
        mean = (weights * toward).sum(1, keepdims=True)
        scores = (weights * (toward - mean) * size**-0.5).astype(k.dtype)
        dq_ref[0, 0, row, lanes] = tiles.product(scores, k, (1, 0)).astype(k.dtype)
        dk_ref[0, 0, key, lanes] = tiles.product(scores, q, (0, 0)).astype(k.dtype)
        weights = weights.astype(k.dtype)
        dv_ref[0, 0, key, lanes] = tiles.product(weights, g, (0, 0)).astype(k.dtype)


attend = jax.custom_vjp(forward)
attend.defvjp(lambda *inputs: (forward(*inputs), inputs), lambda inputs, g: backward(*inputs, g))
