# SPDX-License-Identifier: Apache-2.0
"""What a step works in: near what the TPU compiler took for the rows of docs/pods.md, and what the
blocks save is what JAX saves. Compiled steps of a CPU are in test_memory.py."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from vlm_jax.layers import remat
from vlm_jax.models.llm import Block
from vlm_jax.models.rope import Rope
from vlm_jax.training import stages, working_set
from vlm_jax.training.recipe import Recipe
from vlm_jax.verbs import configuration

ROWS = tiny.ROOT / "benchmarks" / "results" / "pods.jsonl"
# Of what lives during a step, gradients, code and padding included; and of all.
STEP = {"finetune": (0.85, 1.02), "align": (1.0, 1.25)}
ALL = {"finetune": (0.86, 1.02), "align": (1.0, 1.14)}


def test_the_formula_is_near_what_the_tpu_compiler_took_for_71_steps():
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    assert len(rows) == 71
    for row in rows:
        recipe = Recipe.of(stages.with_start(configuration.read(row["config"]).config))
        found = working_set.of_step(recipe, row["stage"], row["mesh"], "tpu")
        hbm = row["hbm_bytes"]
        kept = hbm["weights"] + hbm["frozen"] + hbm["optimizer"]
        said = hbm["weights"] + found.total  # a gradient for each trained weight
        for (low, high), ratio in (
            (STEP[row["stage"]], said / (hbm["total"] - kept)),
            (ALL[row["stage"]], (kept + said) / hbm["total"]),
        ):
            assert low < ratio < high, (row["name"], ratio, found)


@pytest.mark.parametrize("policy", ["full", "dots"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_what_a_block_saves_is_what_jax_saves(policy, kv_heads, mesh1):
    c = tiny.config(remat=policy)
    c.llm.update(dict(width=48, mlp=136, heads=4, kv_heads=kv_heads, head_size=16, depth=1))
    c.finetune.update(dict(batch=3, accumulate=1))
    recipe = tiny.recipe(c)
    rows, places = 3, recipe.row[2]

    def passed(block, x):
        turns = Rope.of(block_size).turns(jnp.arange(places)[None], 8)
        mask = jnp.ones((rows, places, places), bool)
        return jax.vjp(remat(policy)(lambda b, x: b(x, turns, mask)[0]), block, x)[1]

    block_size = recipe.model.llm
    with jax.set_mesh(mesh1):
        block = jax.eval_shape(lambda: Block(block_size, rngs=nnx.Rngs(0)))
        x = jax.ShapeDtypeStruct((rows, places, block_size.width), jnp.float32)
        saved = jax.tree.leaves(jax.eval_shape(passed, block, x))
        found = working_set.of_step(recipe, "finetune", mesh1.shape, "cpu")
    of_rows = [s for s in saved if s.shape[0] in (rows, rows * places) and s.dtype != bool]
    assert found.saved == sum(math.prod(s.shape) * s.dtype.itemsize for s in of_rows)
