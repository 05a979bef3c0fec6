# SPDX-License-Identifier: Apache-2.0
"""The loss in chunks of positions: the scores of a whole row over the vocabulary never exist.

Each device sums its own rows. The gradient of the table adds up locally in the loop and is reduced
over devices once, after it.

B batch  T tokens  D llm width  W vocabulary  C chunks  c positions of a chunk
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax import mesh

# Scores (float32) that a device holds at once unless config.loss_chunk says otherwise: 268 MB.
MOST_SCORES = 1 << 26


class Sums(NamedTuple):
    """Totals over the supervised positions of a batch."""

    nll: Float[Array, ""]  # nats
    log_z_squared: Float[Array, ""]
    correct: Float[Array, ""]  # positions whose likeliest token is right


def positions(chunk: int, *, rows: int, length: int, vocab: int) -> int:
    """Positions of each row whose scores are computed at once; 0: all of them.

    Args:
      chunk: config.loss_chunk: that many; 0: all; -1: as many as MOST_SCORES holds, at least 128.
      rows, vocab: of a device. length: T.
    """
    if chunk < 0:
        chunk = max(MOST_SCORES // (rows * vocab) // 128 * 128, 128)
    return chunk if chunk < length else 0


def on_this_mesh(chunk: int, *, rows: int, length: int, vocab: int) -> int:
    """`positions` for rows and a vocabulary of all devices of the current mesh."""
    now = jax.sharding.get_abstract_mesh()
    return positions(
        chunk,
        rows=math.ceil(rows / mesh.batch_shards(now)),
        length=length,
        vocab=math.ceil(vocab / now.shape["tensor"]),
    )


def supervised_first(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The positions of each row, supervised ones first, otherwise in order."""
    return jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)


@jax.named_scope("loss")
def score(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "W D"],
    target: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk: int,
) -> Sums:
    """`objective.score` of these hidden states, computed `chunk` positions at a time.

    Equal to it in value and in gradient, up to the rounding of float32 sums. The scores of a chunk
    are recomputed for the gradient. Chunks without a supervised position in any row are skipped, so
    supervised positions should come first.
    """
    batch = mesh.RULES["batch"]
    rows = jax.P(batch)

    def local(hidden, table, target, mask):
        table = gathered(table.astype(hidden.dtype))
        parts = [in_chunks(x, chunk) for x in (hidden, target, mask)]
        # All devices of the mesh take the same branch, because it sums over "tensor".
        needed = lax.pmax(parts[2].any((1, 2)).astype(jnp.int32), batch) > 0
        nothing = lax.pcast(jnp.zeros(3), batch, to="varying")

        def add(sums, part):
            needed, hidden, target, mask = part
            sums_of_chunk = lax.cond(
                needed,
                lambda hidden, table: of_chunk(hidden, table, target, mask),
                lambda hidden, table: nothing,
                hidden,
                table,
            )
            return sums + sums_of_chunk, None

        step = jax.checkpoint(add, prevent_cse=False)
        return lax.psum(lax.scan(step, nothing, (needed, *parts))[0], batch)

    of_rows = jax.shard_map(
        local,
        in_specs=(rows, mesh.spec("vocab", "embed"), rows, rows),
        out_specs=jax.P(),
    )
    return Sums(*of_rows(hidden, table, target, mask))


def gathered(table: Float[Array, "W d"]) -> Float[Array, "W D"]:
    """A device's part of the vocabulary, gathered over fsdp, as float32.

    Float32, so that the gradients of many chunks add up in it; they are rounded and scattered to
    their shards once.
    """
    # After the loop the gradient is scattered over fsdp, then reduced over "data": fewer bytes.
    table = lax.pcast(table, "data", to="varying")
    return lax.all_gather(table, "fsdp", axis=1, tiled=True).astype(jnp.float32)


def of_chunk(
    hidden: Float[Array, "B c D"],
    table: Float[Array, "W D"],
    target: Int[Array, "B c"],
    mask: Bool[Array, "B c"],
) -> Float[Array, "3"]:
    """`Sums` of one device's rows, over the vocabulary of all devices."""
    scores = jnp.einsum(
        "BTD,WD->BTW", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    most = lax.pmax(lax.stop_gradient(scores.max(-1)), "tensor")
    log_z = most + jnp.log(lax.psum(jnp.exp(scores - most[..., None]).sum(-1), "tensor"))
    # A comparison instead of a gather, as where scores are whole.
    first = lax.axis_index("tensor") * table.shape[0]
    at_target = first + jnp.arange(table.shape[0]) == target[..., None]
    chosen = lax.psum(jnp.where(at_target, scores, 0).sum(-1), "tensor")
    return jnp.stack(
        [
            jnp.where(mask, log_z - chosen, 0).sum(),
            jnp.where(mask, jnp.square(log_z), 0).sum(),
            (mask & (chosen >= most)).sum().astype(jnp.float32),
        ]
    )


def in_chunks(x: Shaped[Array, "B T *D"], chunk: int) -> Shaped[Array, "C B c *D"]:
    """The positions of each row in chunks, the last one padded with zeros."""
    count = math.ceil(x.shape[1] / chunk)
    room = [(0, 0), (0, count * chunk - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    filled = jnp.pad(x, room).reshape(x.shape[0], count, chunk, *x.shape[2:])
    return jnp.swapaxes(filled, 0, 1)
