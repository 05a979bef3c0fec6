# SPDX-License-Identifier: Apache-2.0
"""The moments that an optimizer keeps: in float32, in bfloat16, or factored by rows and columns.

Each scaling turns a gradient into the direction of an update, as Adam does (arXiv 1412.6980).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vlm_jax.training.recipe import Stage

# For a matrix with a smaller side, rows and columns are about as large as the matrix.
FACTORED_FROM = 16
# Of Adafactor (arXiv 1804.04235): the mean of squares decays by 1 - t^-0.8, and the root mean
# square of an update is at most 1.
FACTORED_DECAY, FACTORED_MOST = 0.8, 1.0


class Halves(NamedTuple):
    """Adam's two moments in bfloat16."""

    count: Int[Array, ""]
    mean: Any
    square: Any


def scaling(stage: Stage) -> optax.GradientTransformation:
    """The scaling that `stage.moments` names."""
    return KINDS[stage.moments](stage)


def in_halves(stage: Stage) -> optax.GradientTransformation:
    """Adam with both moments in bfloat16: 4 bytes per parameter instead of 8.

    If `beta2` is near 1, the mean of squares changes by less than the spacing of bfloat16, and
    rounding to nearest would freeze it. It is rounded stochastically instead (`dithered`).
    """

    def init(params: optax.Params) -> Halves:
        def zeros() -> Any:
            return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.bfloat16), params)

        return Halves(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads: optax.Updates, state: Halves, params: Any = None) -> tuple[Any, Halves]:
        count = state.count + 1

        def towards(old: Any, new: Any, beta: float) -> Any:
            return jax.tree.map(
                lambda a, b: beta * a.astype(jnp.float32) + (1 - beta) * b, old, new
            )

        mean = towards(state.mean, grads, stage.beta1)
        square = towards(state.square, jax.tree.map(jnp.square, grads), stage.beta2)
        first, second = (
            1 - beta ** count.astype(jnp.float32) for beta in (stage.beta1, stage.beta2)
        )
        updates = jax.tree.map(
            lambda m, s: m / first / (jnp.sqrt(s / second) + stage.epsilon), mean, square
        )
        kept = Halves(
            count,
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), mean),
            jax.tree.map(lambda x: dithered(x, count), square),
        )
        return updates, kept

    return optax.GradientTransformation(init, update)


def dithered(x: Float[Array, "..."], count: Int[Array, ""]) -> Float[Array, "..."]:
    """`x` rounded stochastically to bfloat16: to a neighbor, in proportion to its closeness.

    The draw is a hash of the number's bits and of `count`, so a step is a function of its state and
    each shard needs no other.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    mixed = (bits ^ (count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    rounded = (bits + (mixed >> 16)) & jnp.uint32(0xFFFF0000)
    neighbor = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(x), neighbor, x).astype(jnp.bfloat16)


def factored(stage: Stage) -> optax.GradientTransformation:
    """Adafactor's scaling with the mean of updates in bfloat16: about 2 bytes per parameter.

    The mean of squares of a matrix is stored by rows and columns. `beta2` and `epsilon` are not
    used.
    """
    inner = optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=FACTORED_DECAY, min_dim_size_to_factor=FACTORED_FROM
        ),
        optax.clip_by_block_rms(FACTORED_MOST),
        optax.ema(stage.beta1, debias=True, accumulator_dtype=jnp.bfloat16),
    )

    def init(params: optax.Params) -> Any:
        state = inner.init(params)
        # optax creates rows and columns unsharded. Sharded as an update leaves them, they stay so.
        after = jax.eval_shape(inner.update, params, state, params)[1]
        return jax.tree.map(
            lambda x, like: jax.sharding.reshard(x, like.sharding.spec).astype(like.dtype),
            state,
            after,
        )

    return optax.GradientTransformation(init, inner.update)


def adam(stage: Stage) -> optax.GradientTransformation:
    """Adam with both moments in float32."""
    return optax.scale_by_adam(b1=stage.beta1, b2=stage.beta2, eps=stage.epsilon)


KINDS = {"float32": adam, "bfloat16": in_halves, "factored": factored}
