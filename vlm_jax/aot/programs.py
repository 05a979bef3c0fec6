# SPDX-License-Identifier: Apache-2.0
"""The real programs of a configuration, traced from shapes on the current mesh.

Nothing is allocated: parameters, optimizer state, batches and caches are shapes with shardings.

B batch  M images of a row  T text tokens  U question tokens  I image side in pixels
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax import mesh
from vlm_jax.models import vlm
from vlm_jax.serving import decoder
from vlm_jax.training import memory, optimizer
from vlm_jax.training.objective import of_stage
from vlm_jax.training.recipe import Recipe

MODES = ("align", "finetune", "prefill", "decode", "evaluate")


@dataclass(frozen=True)
class Program:
    """One traced program, and the bytes of its inputs on one device, by kind."""

    name: str
    traced: Any  # jax.stages.Traced
    inputs: dict[str, int]


def shape_of(shape: tuple[int, ...], dtype: Any, *dims: str) -> jax.ShapeDtypeStruct:
    """A shape on the current mesh."""
    now = jax.sharding.get_mesh()
    dims = (*dims, *["none"] * (len(shape) - len(dims)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.sharding(now, *dims))


def batch_of(recipe: Recipe, rows: int, *, answer: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the loader makes it for this recipe, with pixels; `answer` as in training."""
    side = recipe.model.vit.image_size
    # With buckets, the length of the largest one. Requests are not packed.
    packed = answer and recipe.arrangement.row_length > 0
    text, images = (
        recipe.row[:2] if packed else (recipe.rows.text_length, recipe.rows.images_per_row)
    )
    of_image = (rows, images) if images > 1 else (rows,)
    specs: dict[str, tuple[tuple[int, ...], Any]] = dict(
        ids=((rows, text), jnp.int32),
        length=((rows,), jnp.int32),
        image_at=(of_image, jnp.int32),
        question=((*of_image, recipe.rows.question_length), jnp.int32),
        question_length=(of_image, jnp.int32),
        pixels=((*of_image, side, side, 3), jnp.float32),
    )
    if recipe.rows.reads == "image_size":
        specs["image_size"] = ((*of_image, 2), jnp.int32)
    if answer:
        specs["loss_mask"] = ((rows, text), jnp.bool_)
    if packed:
        specs |= dict(segment=((rows, text), jnp.int32), image_segment=(of_image, jnp.int32))
    elif answer:
        specs["index"] = ((rows,), jnp.int32)
    return {name: shape_of(*of, "batch") for name, of in specs.items()}


def train_step(recipe: Recipe, name: str) -> Program:
    """The step of stage `name`, as `training/stages.py` runs it."""
    stage = recipe.stage(name)
    graph, state = memory.state_of(recipe, name)
    state = memory.placed(state)
    compressor = vlm.shapes(recipe.model).compressor
    objective = of_stage(name, compressor, chunk=recipe.loss_chunk)
    step = optimizer.make_step(
        graph,
        optimizer.optimizer(stage),
        objective,
        accumulate=stage.accumulate,
        z_loss=stage.z_loss,
    )
    batch = batch_of(recipe, stage.batch, answer=True)
    traced = step.compiled.trace((state.step, state.trained, state.optimizer), state.frozen, batch)
    inputs = dict(
        weights=memory.in_shards(state.trained),
        optimizer=memory.in_shards(state.optimizer),
        frozen=memory.in_shards(state.frozen),
        batch=memory.in_shards(batch),
    )
    return Program(name, traced, inputs)


def serving(recipe: Recipe, *, rows: int, new_tokens: int, dtype: str) -> Callable[[str], Program]:
    """A function that traces "prefill" or "decode" for `rows` requests, as `serving/` runs them,
    with weights of `dtype`."""

    def stored(model: vlm.VLM) -> vlm.VLM:
        """The model as `serving/` holds it: the layers of the LLM unstacked."""
        if model.compressor.buckets:
            model = model.at(model.compressor.slots(recipe.model.compressor.tokens))
        model = jax.tree.map(lambda x: x.astype(dtype), model)
        compressor = model.compressor.fold() if model.compressor.buckets else model.compressor
        return vlm.VLM(model.vit, compressor, model.llm.unrolled())

    model = memory.placed(jax.eval_shape(stored, memory.placed(vlm.shapes(recipe.model))))
    first, following = decoder.programs()
    batch = batch_of(recipe, rows, answer=False)
    if model.compressor.buckets:
        batch["limit"] = shape_of((rows,), jnp.int32, "batch")
    weights = memory.in_shards(model)

    def program_of(name: str) -> Program:
        given = (model, batch, None, None)
        room = dict(new_tokens=decoder.bucket(new_tokens))
        if name == "prefill":
            traced = first.trace(*given, **room)
            return Program(name, traced, dict(frozen=weights, batch=memory.in_shards(batch)))
        ids, caches, place = memory.placed(
            jax.eval_shape(lambda *given: first(*given, **room), *given)
        )
        traced = following.trace(model, ids, caches, place, None)
        inputs = dict(frozen=weights, cache=memory.in_shards(caches), batch=memory.in_shards(ids))
        return Program(name, traced, inputs)

    return program_of


def programs(
    recipe: Recipe, mode: str, *, rows: int, new_tokens: int
) -> list[Callable[[], Program]]:
    """Functions that trace the programs of a mode, in order; `rows` and `new_tokens` of serving.

    Raises:
      ValueError: for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"--mode={mode}: choose one of {', '.join(MODES)}")
    if mode in ("align", "finetune"):
        return [lambda: train_step(recipe, mode)]
    names = ("prefill", "decode") if mode == "evaluate" else (mode,)
    # A run is evaluated with the weights that it trained; `VLM.from_checkpoint` rounds them.
    dtype = "float32" if mode == "evaluate" else recipe.model.compute_dtype
    program_of = serving(recipe, rows=rows, new_tokens=new_tokens, dtype=dtype)
    return [lambda name=name: program_of(name) for name in names]  # type: ignore[misc]
