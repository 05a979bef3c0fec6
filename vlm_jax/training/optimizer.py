# SPDX-License-Identifier: Apache-2.0
"""AdamW under warm-up and cosine, and the training step as a pure function of state and batch."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx import filterlib
from jaxtyping import Array, Float, Int

from vlm_jax import cpu, mesh
from vlm_jax.models import lora
from vlm_jax.models.vlm import Batch
from vlm_jax.training import compiler, moments
from vlm_jax.training.objective import Sums
from vlm_jax.training.recipe import Stage


class State(NamedTuple):
    """All that a step changes, and the weights that it reads and leaves alone."""

    step: Int[Array, ""]
    trained: nnx.State
    frozen: nnx.State
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """One step's totals; read by the loop one step later, so that the device never waits."""

    loss: Float[Array, ""]  # nats per supervised token
    accuracy: Float[Array, ""]  # of supervised tokens, teacher-forced
    gradient_norm: Float[Array, ""]
    tokens: Int[Array, ""]  # supervised


# MQT's position table: published training moves it in the first stage and leaves it then.
ALIGNED = filterlib.PathIn(("compressor", "position"))
# A CLIP inside a compressor has no gradient; weight decay would still shrink it.
COMPRESSOR = nnx.All(nnx.PathContains("compressor"), nnx.Not(nnx.PathContains("clip")))
# Part of the module tree that a stage trains; everything else is frozen.
TRAINED = {
    "encoder": nnx.Everything(),
    "align": COMPRESSOR,
    "finetune": nnx.All(nnx.Any(COMPRESSOR, nnx.PathContains("llm")), nnx.Not(ALIGNED)),
}
# The same of finetune where the LLM has adapters: they are trained in place of its weights.
ADAPTERS = nnx.All(nnx.Any(nnx.LoRAParam, COMPRESSOR), nnx.Not(ALIGNED))


MATRICES = (
    "kernel",
    "embedding",
    "head",
    "lora",
)  # parts of their names; `head` alone may also hold a bias


def schedule(stage: Stage) -> optax.Schedule:
    """Linear warm-up over a fraction of the steps, all but one at most, then cosine to zero."""
    warmup = min(math.ceil(stage.warmup * stage.steps), stage.steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, warmup, stage.steps)


@functools.lru_cache(maxsize=32)
def optimizer(stage: Stage) -> optax.GradientTransformation:
    """AdamW with the moments that the stage keeps; weight decay falls on matrices only, as in the
    published recipes. Equal stages have the same object, so that they share their programs."""

    def decays(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: (
                any(n in jax.tree_util.keystr(path) for n in MATRICES)
                and "bias" not in jax.tree_util.keystr(path)
            ),
            tree,
        )

    # optax.adamw, but for what the scaling remembers.
    adamw = optax.chain(
        moments.scaling(stage),
        optax.add_decayed_weights(stage.weight_decay, decays),
        optax.scale_by_learning_rate(schedule(stage)),
    )
    clip = [optax.clip_by_global_norm(stage.clip_norm)] if stage.clip_norm > 0 else []
    # An update is proportional to its rate: another rate is a multiple of the update.
    rate = optax.stateless(functools.partial(scale_compressor, stage.compressor_rate))
    return optax.chain(*clip, adamw, *([rate] if stage.compressor_rate != 1 else []))


def scale_compressor(factor: float, updates: optax.Updates, _: optax.Params) -> optax.Updates:
    """The updates, those of the compressor times `factor`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * factor if "compressor" in jax.tree_util.keystr(path) else x, updates
    )


def start(
    model: nnx.Module,
    stage: str,
    tx: optax.GradientTransformation,
) -> tuple[nnx.GraphDef, State]:
    """The model cut into its structure and a fresh training state."""
    adapted = stage == "finetune" and lora.adapted(model)
    graph, trained, frozen = nnx.split(model, ADAPTERS if adapted else TRAINED[stage], ...)
    return graph, State(jnp.zeros((), jnp.int32), trained, frozen, initial(tx)(trained))


def finish(graph: nnx.GraphDef, state: State) -> nnx.Module:
    """The model that a training state holds."""
    return nnx.merge(graph, state.trained, state.frozen)


def make_step(
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    objective: Callable[[nnx.Module, Batch], Sums],
    *,
    accumulate: int = 1,
    z_loss: float = 0.0,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The compiled step: mean over all supervised tokens of the batch, however it is cut up.

    `accumulate` micro-batches give the gradient of the whole batch (to rounding), because sums and
    not means are added up. What the step changes is donated; frozen weights may be shared.
    Where the loss or the gradient is not finite, the step counts and changes nothing else.

    `step.compiled` is the whole step as one program, `step.programs` are those that run: on a CPU
    the gradient and the update apart (`cpu.update_apart`), with the same results to rounding.
    """

    def loss(trained, frozen, batch, total):
        sums = objective(nnx.merge(graph, trained, frozen), batch)
        return (sums.nll + z_loss * sums.log_z_squared) / total, sums

    def gradient(trained, frozen, batch: Batch):
        tokens = batch["loss_mask"].sum()
        total = jnp.maximum(tokens, 1).astype(jnp.float32)
        of_rows = jax.grad(loss, has_aux=True)

        def add(carry, micro):
            new = of_rows(trained, frozen, micro, total)
            return jax.tree.map(jnp.add, carry, new), None

        if accumulate == 1:
            grads, sums = of_rows(trained, frozen, batch, total)
        else:
            zero = jax.tree.map(jnp.zeros_like, trained), Sums(*[jnp.zeros(())] * 3)
            (grads, sums), _ = jax.lax.scan(add, zero, micro_batches(batch, accumulate))
        return grads, sums, tokens

    options = mesh.known(compiler.step_options())

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def update(changed, frozen, batch: Batch):
        return apply(tx, changed, *gradient(changed[1], frozen, batch))

    run, programs = update, (update,)
    if cpu.update_apart():
        programs = jax.jit(gradient, compiler_options=options), applying(tx)

        def run(changed, frozen, batch: Batch):
            return programs[1](changed, *programs[0](changed[1], frozen, batch))

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        changed, metrics = run((state.step, state.trained, state.optimizer), state.frozen, batch)
        return State(changed[0], changed[1], state.frozen, changed[2]), metrics

    step.compiled, step.programs = update, programs
    return step


def apply(tx: optax.GradientTransformation, changed, grads, sums: Sums, tokens):
    """What a step changes (step, weights, optimizer's state) after an update, and its metrics."""
    step, trained, opt = changed
    total = jnp.maximum(tokens, 1).astype(jnp.float32)
    norm = optax.tree.norm(grads)
    with jax.named_scope("optimizer"):
        updates, moved = tx.update(grads, opt, trained)
        new = optax.apply_updates(trained, updates), moved
        # One number that is not finite would be in every weight after it.
        finite = jnp.isfinite(sums.nll) & jnp.isfinite(norm)
        trained, opt = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (trained, opt))
    metrics = Metrics(sums.nll / total, sums.correct / total, norm, tokens)
    return (step + 1, trained, opt), metrics


@functools.lru_cache(maxsize=32)
def applying(tx: optax.GradientTransformation) -> Any:
    """`apply` as a program of a CPU: the same one for all models whose trained weights have equal
    shapes."""
    options = mesh.known(compiler.step_options())
    return jax.jit(functools.partial(apply, tx), donate_argnums=0, compiler_options=options)


@functools.lru_cache(maxsize=32)
def initial(tx: optax.GradientTransformation) -> Any:
    """The first state of an optimizer as a program, as `applying`."""
    return jax.jit(tx.init)


def micro_batches(batch: Batch, accumulate: int) -> Batch:
    """[B ...] -> [A B/A ...]: micro-batch a holds rows a, a + A, ... so that no row changes
    device."""

    def cut(x):
        dims = ("batch",) + ("len",) * x.ndim
        x = jnp.reshape(
            x, (x.shape[0] // accumulate, accumulate, *x.shape[1:]), out_sharding=mesh.spec(*dims)
        )
        return jnp.swapaxes(x, 0, 1)

    return {name: cut(x) for name, x in batch.items()}
