# SPDX-License-Identifier: Apache-2.0
"""Windowed cross-attention on a TPU whose heads attend to unprojected keys and values.

B batch  V windows  S keys of one window  N heads  E width
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from vlm_jax.kernels import tiles

COLUMNS = 256  # channels of one product: more would spill registers


def forward(
    query: Float[Array, "B V N E"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    *,
    scale: float,
) -> Float[Array, "B V N E"]:
    """Attention of N queries per window."""
    kernel = functools.partial(_forward, scale=scale)
    return _call(kernel, "absorbed_attention", (query,), (keys, values), 1, 0, 4)[0]


def backward(
    query: Float[Array, "B V N E"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    gradient: Float[Array, "B V N E"],
    *,
    scale: float,
) -> tuple[Float[Array, "B V N E"], Float[Array, "B V S E"], Float[Array, "B V S E"]]:
    """Gradients of queries, keys and values from that of the result; weights are recomputed."""
    kernel = functools.partial(_backward, scale=scale)
    rows, patches = (query, gradient), (keys, values)
    return _call(kernel, "absorbed_attention_gradient", rows, patches, 1, 2, 10)


def _call(kernel, name, rows, patches, rows_out, patches_out, flops_per_score):
    """`kernel` on blocks of [windows N E] and [windows S E]; results shaped like its inputs."""
    batch, windows, heads, width = rows[0].shape
    keys, dtype = patches[0].shape[2], rows[0].dtype
    n_rows, n_patches = len(rows) + rows_out, len(patches) + patches_out
    window_bytes = width * (n_rows * heads + n_patches * keys) * dtype.itemsize
    block = tiles.windows_per_block(windows, keys, window_bytes)
    # One window of 576 keys in float32 leaves no room for the next image's.
    buffers = pl.Buffered(2 if 2 * block * window_bytes <= tiles.BLOCKS else 1)
    # Head by head, as the product that makes the queries lays them out.
    row_shape = (heads, batch, windows // block, block, width)
    patch_shape = (batch, windows // block, block * keys, width)
    row = pl.BlockSpec(
        (heads, 1, 1, block, width), lambda b, w: (0, b, w, 0, 0), pipeline_mode=buffers
    )
    patch = pl.BlockSpec(
        (1, 1, block * keys, width), lambda b, w: (b, w, 0, 0), pipeline_mode=buffers
    )
    call = pl.pallas_call(
        functools.partial(kernel, windows=block, keys=keys, heads=heads),
        grid=(batch, windows // block),
        in_specs=[row] * len(rows) + [patch] * len(patches),
        out_specs=[row] * rows_out + [patch] * patches_out,
        out_shape=[jax.ShapeDtypeStruct(row_shape, dtype)] * rows_out
        + [jax.ShapeDtypeStruct(patch_shape, dtype)] * patches_out,
        name=name,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2),
        cost_estimate=pl.CostEstimate(
            flops=flops_per_score * batch * windows * keys * heads * width,
            transcendentals=batch * windows * keys * heads,
            bytes_accessed=batch * windows * window_bytes,
        ),
    )
    out = call(
        *(jnp.moveaxis(x, 2, 0).reshape(row_shape) for x in rows),
        *(x.reshape(patch_shape) for x in patches),
    )
    by_head = (heads, batch, windows, width)
    return (
        *(jnp.moveaxis(x.reshape(by_head), 0, 2) for x in out[:rows_out]),
        *(x.reshape(patches[0].shape) for x in out[rows_out:]),
    )


def _parts(windows: int, keys: int, heads: int):
    """Yields the slices of windows and of keys of each product, and its mask or None."""
    for first, last in tiles.groups(windows, keys, heads=heads, multiple=8):
        mask = tiles.same_window(last - first, heads, keys) if last - first > 1 else None
        yield slice(first, last), slice(first * keys, last * keys), mask


def _rows(ref, windows: slice, columns: slice) -> Float[Array, "R E"]:
    """The queries of some windows, head after head."""
    x = ref[:, 0, 0, windows, columns]
    return x.reshape(-1, x.shape[-1])


def _store(ref, windows: slice, columns: slice, rows: Float[Array, "R E"]) -> None:
    """Writes rows in the order in which `_rows` reads them."""
    ref[:, 0, 0, windows, columns] = rows.reshape(ref.shape[0], -1, rows.shape[-1]).astype(
        ref.dtype
    )


def _columns(width: int) -> list[slice]:
    """Slices of the channels, each as many as the registers hold."""
    return [slice(i, min(i + COLUMNS, width)) for i in range(0, width, COLUMNS)]


def _scores(q_ref, k_ref, windows: slice, keys: slice) -> Float[Array, "R C"]:
    """Products of all queries and keys of some windows."""
    return sum(
        tiles.product(_rows(q_ref, windows, part), k_ref[0, 0, keys, part], (1, 1))
        for part in _columns(q_ref.shape[-1])
    )


def _forward(q_ref, k_ref, v_ref, o_ref, *, windows, keys, heads, scale):
    for some, key, mask in _parts(windows, keys, heads):
        weights = tiles.softmax(_scores(q_ref, k_ref, some, key) * scale, mask)
        weights = weights.astype(v_ref.dtype)
        for part in _columns(v_ref.shape[-1]):
            _store(o_ref, some, part, tiles.product(weights, v_ref[0, 0, key, part], (1, 0)))


def _backward(q_ref, g_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, *, windows, keys, heads, scale):
    for some, key, mask in _parts(windows, keys, heads):
        weights = tiles.softmax(_scores(q_ref, k_ref, some, key) * scale, mask)
        toward = _scores(g_ref, v_ref, some, key)
        mean = (weights * toward).sum(1, keepdims=True)
        scores = (weights * (toward - mean) * scale).astype(k_ref.dtype)
        weights = weights.astype(v_ref.dtype)
        for part in _columns(q_ref.shape[-1]):
            q, g, k = _rows(q_ref, some, part), _rows(g_ref, some, part), k_ref[0, 0, key, part]
            _store(dq_ref, some, part, tiles.product(scores, k, (1, 0)))
            dk_ref[0, 0, key, part] = tiles.product(scores, q, (0, 0)).astype(k.dtype)
            dv_ref[0, 0, key, part] = tiles.product(weights, g, (0, 0)).astype(k.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    query: Float[Array, "B V N E"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    scale: float,
) -> Float[Array, "B V N E"]:
    """`forward` with `backward` as its gradient."""
    return forward(query, keys, values, scale=scale)


attend.defvjp(
    lambda query, keys, values, scale: (
        forward(query, keys, values, scale=scale),
        (query, keys, values),
    ),
    lambda scale, inputs, gradient: backward(*inputs, gradient, scale=scale),
)
