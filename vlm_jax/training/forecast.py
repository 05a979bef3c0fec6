# SPDX-License-Identifier: Apache-2.0
"""What a training will take before it begins, and a grid still takes from its finished cells."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from vlm_jax import mesh as meshes
from vlm_jax.models import vlm
from vlm_jax.progress import duration
from vlm_jax.rows.records import Row
from vlm_jax.training import memory
from vlm_jax.training.cells import (
    SMALL_MODEL_EFFICIENCY,
    Cell,
    describe,
    encoder_stage_flops,
    matmul_flops_per_second,
    stage_flops,
)
from vlm_jax.training.fields import STAGES
from vlm_jax.training.memory import gigabytes
from vlm_jax.training.recipe import Recipe

# Of a device's matrix products, what a training of a large model on an accelerator reaches about.
LARGE_MODEL_EFFICIENCY = 0.4


def speed(recipe: Recipe) -> tuple[float, str]:
    """FLOP/s that a training reaches here on all devices, about, and how that was estimated."""
    if meshes.platform() == "cpu":
        rate = matmul_flops_per_second() * SMALL_MODEL_EFFICIENCY
        what = "a product of two float32 matrices of 768 x 768"
        return rate, f"{SMALL_MODEL_EFFICIENCY:.0%} of what {what} reaches here now"
    kind, count = recipe.model.compute_dtype, jax.device_count()
    rate = matmul_flops_per_second(4096, kind) * LARGE_MODEL_EFFICIENCY * count
    what = f"a product of two {kind} matrices of 4096 x 4096"
    return rate, f"{count} times {LARGE_MODEL_EFFICIENCY:.0%} of what {what} reaches here now"


def dry_run(recipe: Recipe) -> None:
    """Prints what a training would take on the current mesh; nothing of the model is allocated."""
    size = recipe.model
    shapes = vlm.shapes(size)
    parts = {name: vlm.parameters(getattr(shapes, name)) for name in ("vit", "compressor", "llm")}
    named = "   ".join(f"{name} {count:,}" for name, count in parts.items())
    print(f"parameters  {named}   together {sum(parts.values()):,}")
    text, images, _ = recipe.row
    V = " or ".join(map(str, recipe.drawn or (size.visual_tokens,)))
    shape = f"{text} tokens of text and {images} x {V} of images"
    if recipe.arrangement.row_length:
        shape = f"packed: {text} tokens, text and at most {images} images"
    print(f"rows        {shape}")
    rate, how = speed(recipe)
    columns = ("parameters", "gradients", "optimizer", "activations")
    heads = "".join(f"{name:>13}" for name in (*columns, "together", "FLOPs")) + f"{'time':>18}"
    print(f"{'stage':10}{'steps':>8}{'batch':>7}{heads}")
    total, needs = 0.0, []
    for name in STAGES:
        if not recipe.stage(name).steps:
            continue
        need = memory.of_stage(recipe, name)
        needs.append(need)
        flops = (
            encoder_stage_flops(recipe)
            if name == "encoder"
            else stage_flops(recipe, name, cached=False)
        )
        total += flops
        sizes = [*(getattr(need, column) for column in columns), need.total]
        numbers = "".join(f"{gigabytes(n):>13}" for n in sizes)
        print(
            f"{name:10}{recipe.stage(name).steps:8,}{recipe.stage(name).batch:7,}{numbers}{flops:13.3g}"
            f"  {span(flops / rate):>16}"
        )
    there, where = memory.available()
    shape = " x ".join(f"{k}={v}" for k, v in jax.sharding.get_mesh().shape.items())
    print(f"memory      of each device (mesh {shape}); {gigabytes(there)} are free {where}")
    print(
        f"time        about {span(total / rate)} for {total:.3g} FLOPs at {rate / 1e9:,.0f} "
        f"GFLOP/s: {how}; compiling and reading data are not counted"
    )
    for need in needs:
        if need.total > 0.9 * there:
            fits = "does not fit" if need.sure > there else "may not fit"
            print(f"{need.phase} {fits}: {memory.ways(recipe, need)}")


def largest(cells: Sequence[Cell]) -> list[Cell]:
    """Of each LLM the cell that needs most memory: that of most visual tokens."""
    most = {c.llm: c for c in sorted(cells, key=lambda cell: cell.training.model.compressor.tokens)}
    return list(most.values())


def memory_of(cells: Sequence[Cell]) -> str:
    """What the largest stage of these cells needs, in a line."""
    needs = [
        (memory.of_stage(cell.training, stage), cell.name)
        for cell in largest(cells)
        for stage in STAGES
        if cell.recipe.stage(stage).steps
    ]
    need, name = max(needs, key=lambda pair: pair[0].total)
    there, where = memory.available()
    return (
        f"memory: at most about {gigabytes(need.total)} on each device ({need.phase} of {name}: "
        f"{need}); {gigabytes(there)} are free {where}"
    )


def span(seconds: float) -> str:
    """A time of any length: by the second, and from four days on by the hour."""
    return duration(seconds) if seconds < 4 * 86400 else f"{seconds / 3600:,.0f} hours"


def remaining(
    done: Sequence[tuple[float, float]],
    evaluated: Sequence[float],
    left: Sequence[float],
    cells: int,
) -> float:
    """Seconds that what is left will take.

    A training takes a fixed time and some per FLOP, neither below zero, fitted to those that are
    done; an evaluation takes what those that are done took on average.

    Args:
      done: FLOPs and seconds of every model that was trained. evaluated: seconds of every
        evaluation, one at least. left: FLOPs of every model to train. cells: evaluations to make.
    """
    from scipy.optimize import nnls

    flops, seconds = np.array(done, float).T
    scale = flops.max()
    if len(set(flops)) > 1:
        (fixed, slope), _ = nnls(np.stack([np.ones_like(flops), flops / scale], 1), seconds)
    else:
        fixed, slope = seconds.mean(), 0.0
    training = sum(fixed + slope * each / scale for each in left)
    return float(training + cells * np.mean(evaluated))


def standing(cells: Sequence[Cell], rows: Mapping[str, Row], seconds: float) -> str:
    """How far a grid is, how long this command has worked, and about how long is left."""
    line = f"run: {len(rows)} of {len(cells)} cells, {duration(seconds)} so far"
    todo = [cell for cell in cells if cell.name not in rows]
    if not todo:
        return line
    models = {cell.model: rows[cell.name] for cell in cells if cell.name in rows}
    done = [(row.train["flops"], row.train["seconds"]) for row in models.values()]
    new = {cell.model: cell for cell in todo if cell.model not in models}
    left = remaining(
        done,
        [row.evaluate_seconds for row in rows.values()],
        [describe(cell)[2] for cell in new.values()],
        len(todo),
    )
    return f"{line}, about {duration(left)} to go by the cells that are done"
