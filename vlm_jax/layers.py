# SPDX-License-Identifier: Apache-2.0
"""The few layers that every model is made of: weights described once, computing in an einsum.

Einsum letters, repo-wide: B batch  P patches  V visual tokens  T tokens  S keys  L layers
E vit width  D llm width  F mlp width  N heads  K kv heads  G = N/K  H head size  W vocabulary
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax import cpu, mesh

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def rows(x: Shaped[Array, "B X *D"], index: Int[Array, "B Y"]) -> Shaped[Array, "B Y *D"]:
    """x[b, index[b, y]], row by row, so that nothing leaves the shard of its batch row."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


def normal(std: float) -> Initializer:
    """Draws from N(0, std^2)."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def uniform(bound: float) -> Initializer:
    """Draws from U(-bound, bound)."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def constant(value: float) -> Initializer:
    """Fills with one value."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str, ...], init: Initializer
) -> nnx.Param:
    """A float32 parameter born on the mesh, sharded as the names of its dimensions say."""
    mesh.check_split(jax.sharding.get_abstract_mesh(), shape, dims)
    return nnx.Param(jax.sharding.reshard(init(rngs.params(), shape), mesh.spec(*dims)))


class Linear(nnx.Module):
    """One einsum between an activation and a weight, with an optional bias on the output.

    The equation contracts the activation's last dimensions with the weight's first ones; the rest
    of the weight's come last in the result. `dims` names the weight's dimensions, `out` the
    result's; the bias has the output dimensions that the weight shares with the result. Default
    initialization is torch's: U(+-1/sqrt(fan in)).
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        *,
        dims: tuple[str, ...],
        out: tuple[str, ...],
        rngs: nnx.Rngs,
        bias: bool = True,
        init: Initializer | None = None,
    ):
        (letters, weights), result = equation.split("->")[0].split(","), equation.split("->")[1]
        self.read = sum(x not in result for x in weights)  # dimensions that are contracted
        given, kept = weights[: self.read], weights[self.read :]
        if letters.removesuffix(given) + kept != result or not letters.endswith(given):
            raise ValueError(f"{equation}: not of the form ...I,IO->...O")
        fan_in = math.prod(shape[: self.read])
        bound = uniform(1 / math.sqrt(fan_in))
        self.out = out
        self.kernel = weight(rngs, shape, dims, init or bound)
        # A bias is small: it is sharded like the activation that it is added to.
        self.bias = (
            weight(rngs, shape[self.read :], out[-len(kept) :], constant(0.0) if init else bound)
            if bias
            else None
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = cpu.project(x, self.kernel[...], self.read, self.out)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class OutputFirst(nnx.Module):
    """A `Linear` that generates on one CPU device, with its kernel stored output first, [O I]."""

    def __init__(self, base: Linear):
        self.read, self.out, self.bias = base.read, base.out, base.bias
        kernel = jax.sharding.reshard(base.kernel[...], jax.P())
        self.kept = kernel.shape[base.read :]
        self.kernel = nnx.Param(kernel.reshape(-1, math.prod(self.kept)).T)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = cpu.project_output_first(x, self.kernel[...], self.kept, self.out)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def store_output_first(module: nnx.Module, dtype: str) -> None:
    """Makes every `Linear` inside a module an `OutputFirst` if that pays."""
    for name, part in list(vars(module).items()):
        if isinstance(part, Linear):
            if cpu.output_first(part.kernel.size, dtype):
                setattr(module, name, OutputFirst(part))
        elif isinstance(part, nnx.Module):
            store_output_first(part, dtype)


class LayerNorm(nnx.Module):
    """Normalized over the last axis in float32, biased variance; result in the input's type."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = weight(rngs, (width,), ("none",), constant(1.0))
        self.bias = weight(rngs, (width,), ("none",), constant(0.0))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = standardize(x, self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def standardize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """Zero mean and unit biased variance over the last axis, in float32."""
    y = x.astype(jnp.float32)
    centered = y - y.mean(-1, keepdims=True)
    return centered * lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization in float32; result in the input's type."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = weight(rngs, (width,), ("none",), constant(1.0))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU that every published projector and compressor uses, in float32."""
    # One plus erf instead of jax.nn.gelu's erfc, which costs an exponential more; torch's own form.
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's activation, x sigmoid(1.702 x), in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.nn.sigmoid(1.702 * y)).astype(x.dtype)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SigLIP's activation: GELU through a hyperbolic tangent, in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def swiglu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Llama's gated activation, silu(gate) up, in float32 and rounded once."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


# Of an encoder's MLP, under the names of configs/base.py.
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


class Attention(nnx.Module):
    """Multi-head self-attention, every projection with a bias.

    A token attends to all tokens, or to those whose columns are true in its row of `seen`.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        size = width // heads
        inward = dict(dims=("embed", "heads", "head"), out=("batch", "len", "heads", "head"))
        self.query = Linear("BSE,ENH->BSNH", (width, heads, size), rngs=rngs, **inward)
        self.key = Linear("BSE,ENH->BSNH", (width, heads, size), rngs=rngs, **inward)
        self.value = Linear("BSE,ENH->BSNH", (width, heads, size), rngs=rngs, **inward)
        self.out = Linear(
            "BSNH,NHE->BSE",
            (heads, size, width),
            rngs=rngs,
            dims=("heads", "head", "embed"),
            out=("batch", "len", "feature"),
        )

    def __call__(
        self, x: Float[Array, "B S E"], seen: Bool[Array, "S S"] | None = None
    ) -> Float[Array, "B S E"]:
        query = self.query(x)
        scores = jnp.einsum(
            "BTNH,BSNH->BNTS", query, self.key(x), preferred_element_type=jnp.float32
        )
        scores = scores if seen is None else jnp.where(seen, scores, -jnp.inf)
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5).astype(x.dtype)
        return self.out(jnp.einsum("BNTS,BSNH->BTNH", weights, self.value(x)))

    def keys(self, x: Float[Array, "B S E"]) -> tuple[Float[Array, "B S E"], Float[Array, "B E"]]:
        """The keys of all tokens and the query of the first, their heads side by side."""
        flat = mesh.spec("batch", "len", "feature")
        keys, query = self.key(x), self.query(x[:, :1])
        # Heads may be on several devices: each needs all of them to compare whole keys.
        keys, query = (
            jnp.reshape(
                jax.sharding.reshard(y, mesh.spec("batch", "len", "none", "none")),
                (*y.shape[:2], x.shape[2]),
                out_sharding=flat,
            )
            for y in (keys, query)
        )
        return keys, query[:, 0]


class Block(nnx.Module):
    """One pre-norm block: attention, then an MLP with the activation that is named."""

    def __init__(
        self, width: int, mlp: int, heads: int, *, eps: float, activation: str, rngs: nnx.Rngs
    ):
        self.activation = activation
        self.norm1 = LayerNorm(width, eps=eps, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps, rngs=rngs)
        self.up = Linear(
            "BSE,EF->BSF",
            (width, mlp),
            dims=("embed", "mlp"),
            out=("batch", "len", "mlp"),
            rngs=rngs,
        )
        self.down = Linear(
            "BSF,FE->BSE",
            (mlp, width),
            dims=("mlp", "embed"),
            out=("batch", "len", "feature"),
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B S E"], seen: Bool[Array, "S S"] | None = None
    ) -> Float[Array, "B S E"]:
        with jax.named_scope("attention"):
            x = x + self.attention(self.norm1(x), seen)
        with jax.named_scope("mlp"):
            return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm2(x))))


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """One block whose weights carry a leading layer axis, from `depth` independent seeds."""
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), depth))


def layer(blocks: Any, index: int) -> Any:
    """Entry `index` of what is stacked over layers (a block, keys and values), or of a list."""
    return (
        blocks[index] if isinstance(blocks, nnx.List) else jax.tree.map(lambda w: w[index], blocks)
    )


def unstacked(blocks: nnx.Module, depth: int, *, consume: bool) -> Sequence[nnx.Module]:
    """The blocks of a stack one by one; with `consume` the stack's memory is freed on the way."""
    leaves, tree = jax.tree.flatten(blocks)
    layers = [[] for _ in range(depth)]
    for leaf in leaves:
        for index in range(depth):
            layers[index].append(leaf[index])
        if consume:
            jax.block_until_ready([found[-1] for found in layers])
            leaf.delete()
    return nnx.List([jax.tree.unflatten(tree, found) for found in layers])


# What the backward pass recomputes: nothing, everything but matmul results, everything.
REMAT = {
    "none": lambda f: f,
    "dots": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "full": lambda f: jax.checkpoint(f, prevent_cse=False),
}


def remat(policy: str) -> Callable[[Callable], Callable]:
    """The rematerialization that `config.remat` names."""
    if policy not in REMAT:
        raise ValueError(f"remat={policy!r}: choose one of {sorted(REMAT)}")
    return REMAT[policy]
