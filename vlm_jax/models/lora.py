# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv 2106.09685): low-rank updates beside the LLM's linear layers, and merged into them.

A layer W becomes W + alpha / r A B with A [inputs r] and B [r outputs]; both are stacked over the
layers as W is. B is zero at first, so that a model with fresh adapters is the model without.
"""

import copy
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from vlm_jax import cpu
from vlm_jax.layers import Linear
from vlm_jax.models.sizes import LoRASize
from vlm_jax.models.vlm import VLM

M = TypeVar("M", bound=nnx.Module)

# Where the linear layers of a block are, under the names that published adapters call them by.
TARGETS = {
    "q_proj": ("attention", "query"),
    "k_proj": ("attention", "key"),
    "v_proj": ("attention", "value"),
    "o_proj": ("attention", "out"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
}


class Adapted(nnx.Module):
    """A stacked linear layer and its low-rank update; the update is never formed as a matrix.

    A and B are sharded over the dimensions that they share with the layer's kernel. A is drawn as
    the layer's own default is, U(+-1/sqrt(fan in)), which is also PEFT's.
    """

    def __init__(self, base: Linear, *, rank: int, alpha: float, rngs: nnx.Rngs):
        self.base, self.rank, self.alpha = base, rank, alpha
        kernel = base.kernel[...]
        place = jax.typeof(kernel).sharding.spec
        halves = _draw(rngs.params(), kernel.shape, place, cut=1 + base.read, rank=rank)
        self.lora_a, self.lora_b = map(nnx.LoRAParam, halves)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        base, kept = self.base, self.lora_b[...].ndim - 1
        between = (*base.out[: len(base.out) - kept], "none")
        low = cpu.project(x, self.lora_a[...], base.read, between) * (self.alpha / self.rank)
        return base(x) + cpu.project(low, self.lora_b[...], 1, base.out)

    def merged(self) -> Linear:
        """The one layer that computes the same; its kernel takes the old one's memory."""
        kernel = _sum(
            self.base.kernel[...],
            self.lora_a[...],
            self.lora_b[...],
            scale=self.alpha / self.rank,
        )
        return changed(self.base, ("kernel",), nnx.Param(kernel))


@jax.jit(static_argnums=(1, 2), static_argnames=("cut", "rank"))
def _draw(key, shape, place, *, cut: int, rank: int):
    """A and B beside a kernel of `shape` at `place`, whose first `cut` dimensions are A's."""
    bound = math.prod(shape[1:cut]) ** -0.5
    a = jax.random.uniform(key, (*shape[:cut], rank), minval=-bound, maxval=bound)
    b = jnp.zeros((shape[0], rank, *shape[cut:]))
    return (
        jax.sharding.reshard(a, jax.P(*place[:cut], None)),
        jax.sharding.reshard(b, jax.P(place[0], None, *place[cut:])),
    )


@jax.jit(donate_argnums=0, static_argnames="scale")
def _sum(kernel, a, b, *, scale: float):
    update = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1, precision=lax.Precision.HIGHEST))
    return (kernel.astype(jnp.float32) + scale * update(a, b)).astype(kernel.dtype)


def check(size: LoRASize) -> tuple[str, ...]:
    """The targets of adapters, all if none are named; ValueError for an unknown target."""
    targets = tuple(size.targets)
    if size.rank < 0:
        raise ValueError(f"lora.rank={size.rank}: 0 trains without adapters, 1 and more with")
    if size.rank == 0:
        if targets:
            raise ValueError(
                f"lora.targets={targets}, but lora.rank=0 makes no adapters: set lora.rank, or "
                "leave lora.targets out"
            )
        return ()
    if size.alpha <= 0:
        raise ValueError(f"lora.alpha={size.alpha}: it scales the adapters and is positive")
    if unknown := [name for name in targets if name not in TARGETS]:
        raise ValueError(f"lora.targets names {unknown}: choose from {list(TARGETS)}, or () is all")
    if len(set(targets)) < len(targets):
        raise ValueError(f"lora.targets={targets} names a layer twice")
    return tuple(name for name in TARGETS if not targets or name in targets)


def adapt(model: VLM, size: LoRASize, *, seed: int) -> VLM:
    """`model` with fresh adapters as described; of rank 0, the model itself.

    ValueError where `check` raises one. The weights are shared with `model`.
    """
    # A separate stream: with the seed's first keys A would repeat the draws of the weights.
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1))
    fields = dict(rank=size.rank, alpha=float(size.alpha))
    for target in check(size):
        layer = Adapted(at(model, target), rngs=rngs, **fields)
        model = changed(model, ("llm", "blocks", *TARGETS[target]), layer)
    return model


def merge(model: VLM) -> VLM:
    """`model` with its adapters merged into its LLM's weights, in place; itself if it has none.

    Equal to `model` up to the rounding of W + alpha / r A B in float32.
    """
    for target in adapted(model):
        merged = at(model, target).merged()
        model = changed(model, ("llm", "blocks", *TARGETS[target]), merged)
    return model


def adapted(model: VLM) -> list[str]:
    """The targets that have an adapter."""
    return [target for target in TARGETS if isinstance(at(model, target), Adapted)]


def described(model: VLM) -> dict[str, Any] | None:
    """Rank, alpha and targets of a model's adapters, for a JSON file; None if it has none."""
    if not (targets := adapted(model)):
        return None
    first = at(model, targets[0])
    return dict(rank=first.rank, alpha=first.alpha, targets=targets)


def changed(module: M, path: tuple[str, ...], part: Any) -> M:
    """`module` with `part` at `path`; everything else is shared with it."""
    first, *rest = path
    other = copy.copy(module)
    setattr(other, first, changed(getattr(module, first), tuple(rest), part) if rest else part)
    return other


def at(model: VLM, target: str) -> Linear | Adapted:
    """The layer of the LLM's blocks that a target names."""
    module = model.llm.blocks
    for name in TARGETS[target]:
        module = getattr(module, name)
    return module
