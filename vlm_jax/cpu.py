# SPDX-License-Identifier: Apache-2.0
"""Forms of operations that are fast on XLA's CPU backend, each with its reason.

With them here, models read as TPU code. Results are equal on every platform, and TPU programs are
the same with and without the forms that do not check the platform. benchmarks/cpu.py times each
against the plain form.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vlm_jax import mesh, sharded

# Compiler options of a program that runs once, such as weight initialization: optimizing that of a
# toy model takes 13 s of CPU.
RUN_ONCE = {"xla_backend_optimization_level": 0}
# Of a program that draws weights: with the newer loop emitters it compiles 1.5 times as long. The
# numbers drawn are the same to the bit.
DRAW_ONCE = RUN_ONCE | {"xla_cpu_use_fusion_emitters": False}
# Compiler options of a training step. XLA's newer loop emitters made the small loops of a small
# model's step up to 1.2 times slower. LLVM's optimization level 1 compiles in 60 % of the time of
# level 3, and the step is as fast and gives the same bits (benchmarks/train_step.py).
STEP_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}

# Rows up to which a product has its kernel first, and the kernels for which it pays
# (benchmarks/cpu.py).
FEW_ROWS, LARGE_KERNEL = 128, 2**19


def step_options() -> dict[str, Any]:
    """Compiler options of a training step on the current mesh; what XLA_FLAGS sets stays as set."""
    chosen = os.environ.get("XLA_FLAGS", "")
    options = STEP_OPTIONS if mesh.platform() == "cpu" else {}
    return {name: x for name, x in options.items() if name not in chosen}


def update_apart() -> bool:
    """Whether a training step is two programs, the gradient and the optimizer's update.

    XLA's CPU backend compiles several loops for every weight that is updated, as long as the whole
    gradient of a small model takes. Apart, they are compiled once for all models with these
    weights, whatever their number of visual tokens.
    """
    return mesh.platform() == "cpu"


def emulates(dtype: jnp.dtype) -> bool:
    """Whether products of this type need two rows and a float32 result to avoid casts.

    XLA's CPU backend has bfloat16 kernels for such products, twice as fast as those of float32. It
    computes any other bfloat16 product in float32, casting both factors in every call.
    """
    return dtype == jnp.bfloat16 and mesh.platform() == "cpu"


def two_rows(
    product: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    x: Float[Array, "..."],
    axis: int,
) -> Float[Array, "..."]:
    """`product(x)`; for one emulated row along `axis`, the first row of the product of two."""
    if not emulates(x.dtype) or math.prod(x.shape[: axis + 1]) != 1:
        return product(x)
    return lax.slice_in_dim(product(jnp.concatenate([x, x], axis)), 0, 1, axis=axis)


def project(
    x: Float[Array, "..."], kernel: Float[Array, "..."], read: int, out: tuple[str, ...]
) -> Float[Array, "..."]:
    """Contracts the last `read` dimensions of x with the kernel's first; `out` names the result's.

    Leading dimensions are merged for the product: otherwise XLA's CPU backend transposes the larger
    factor of every weight gradient, element by element.
    """
    lead, given = x.shape[: x.ndim - read], x.shape[x.ndim - read :]
    place = jax.typeof(x).sharding.spec
    rows = jnp.reshape(
        x, (math.prod(lead), *given), out_sharding=jax.P(place[0], *place[len(lead) :])
    )

    def product(rows: Float[Array, "..."]) -> Float[Array, "..."]:
        preferred = jnp.float32 if emulates(x.dtype) else None
        there = mesh.spec(out[0], *out[len(lead) :])
        if sharded.scatters(rows, kernel):
            return sharded.product(rows, kernel.astype(x.dtype), read, there, preferred)
        return jnp.tensordot(
            rows,
            kernel.astype(x.dtype),
            axes=read,
            out_sharding=there,
            preferred_element_type=preferred,
        )

    y = two_rows(product, rows, 0).astype(x.dtype)
    return jnp.reshape(y, lead + y.shape[1:], out_sharding=mesh.spec(*out))


def project_output_first(
    x: Float[Array, "..."], kernel: Float[Array, "O I"], kept: tuple[int, ...], out: tuple[str, ...]
) -> Float[Array, "..."]:
    """Contracts the last dimensions of x with I, on one device; O becomes the dimensions `kept`.

    XLA's CPU backend packs the second factor of a product anew in every call, which for few rows
    takes longer than the product itself: the kernel comes first. Without the barriers XLA swaps the
    two.
    """
    lead = x.shape[: len(out) - len(kept)]
    rows, kernel = (jax.sharding.reshard(y, jax.P()) for y in (x, kernel.astype(x.dtype)))
    rows = rows.reshape(-1, kernel.shape[1])
    if len(rows) > FEW_ROWS:
        y = rows @ kernel.T
    else:
        columns = lax.optimization_barrier(rows.T)
        y = lax.optimization_barrier(kernel @ columns).T
    return jnp.reshape(y, lead + kept, out_sharding=mesh.spec(*out))


def output_first(size: int, dtype: Any) -> bool:
    """Whether `project_output_first` pays in generation, for a kernel of so many numbers.

    It does where that does not fit into a core's cache, on one device, in the type that is not
    emulated.
    """
    alone = jax.sharding.get_abstract_mesh().size == 1 and mesh.platform() == "cpu"
    return alone and jnp.dtype(dtype) == jnp.float32 and size >= LARGE_KERNEL


def sum_of_windows(x: Float[Array, "B V W E"]) -> Float[Array, "B V E"]:
    """The sum over W, as a product with ones.

    XLA fuses a plain sum into the product after it and recomputes it for every tile.
    """
    return jnp.einsum(
        "BVW,BVWE->BVE",
        jnp.ones_like(x[..., 0]),
        x,
        out_sharding=mesh.spec("batch", "len", "feature"),
    )


def for_every_image(scores: Float[Array, "N V P"], batch: int) -> Float[Array, "B V N P"]:
    """The scores that all images share, repeated so that each image has its own product.

    A single product for all images would transpose the patches, which takes longer than the
    product itself.
    """
    heads, tokens, patches = scores.shape
    return jnp.broadcast_to(
        scores.transpose(1, 0, 2),
        (batch, tokens, heads, patches),
        out_sharding=mesh.spec("batch", "len", "heads", "len"),
    )
