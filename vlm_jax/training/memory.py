# SPDX-License-Identifier: Apache-2.0
"""How much memory a model takes before any of it is allocated, and what is there.

Parameters, gradients and the optimizer's state are counted on shapes, each in its shard.
Activations are a formula (`working_set`), held to what compilers take (tests/test_working_set.py).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from vlm_jax import mesh as meshes
from vlm_jax.models import lora, vlm
from vlm_jax.training import optimizer, precision, working_set
from vlm_jax.training.objective import reader
from vlm_jax.training.recipe import Recipe

GB = 1e9
# Activations of which at least this share is sure to be needed: what is more than that is refused.
SURE = 0.6
PATCH_CLASSES = 100  # of the encoder's own pretraining: few, whatever the source


@dataclass(frozen=True)
class Need:
    """Bytes that one phase of a run needs on one device, by what they hold."""

    phase: str
    parameters: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def sure(self) -> int:
        """What is needed at the very least."""
        kept = self.parameters + self.gradients + self.optimizer
        return kept + round(SURE * self.activations)

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = dict(
            parameters=self.parameters,
            gradients=self.gradients,
            optimizer=self.optimizer,
            activations=self.activations,
        )
        return ", ".join(f"{name} {gigabytes(n)}" for name, n in parts.items() if n)


def gigabytes(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"


def in_shards(tree: Any) -> int:
    """Bytes of the arrays or shapes of a tree on one device of the current mesh."""
    axes = jax.sharding.get_abstract_mesh().shape
    total = 0
    for leaf in jax.tree.leaves(tree):
        spec = leaf.sharding.spec if getattr(leaf, "sharding", None) is not None else ()
        names = [n for part in spec if part for n in (part if isinstance(part, tuple) else (part,))]
        shards = math.prod(axes[name] for name in names)
        total += math.ceil(leaf.size / shards) * leaf.dtype.itemsize
    return total


def placed(tree: Any) -> Any:
    """Traced shapes on the current mesh: what has no place of its own is on every device."""
    mesh = jax.sharding.get_mesh()

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
        )

    return jax.tree.map(place, tree)


def state_of(recipe: Recipe, name: str) -> tuple[nnx.GraphDef, optimizer.State]:
    """The structure and the state that a stage of training begins with, as shapes."""
    tx, found = optimizer.optimizer(recipe.stage(name)), []

    def made() -> optimizer.State:
        if name == "encoder":
            model = reader(recipe.model, PATCH_CLASSES, seed=0)
        else:
            model = vlm.build(recipe.model, nnx.Rngs(0))
            if model.compressor.buckets:  # trained by as many tokens as it can give
                model = model.at(model.compressor.buckets[-1])
        if name == "finetune":
            model = lora.adapt(model, recipe.lora, seed=0)
        if name != "encoder":
            model = precision.narrowed(model, name, recipe.frozen_dtype)
        graph, state = optimizer.start(model, name, tx)
        found.append(graph)
        return state

    state = jax.eval_shape(made)
    return found[0], state


def of_stage(recipe: Recipe, name: str) -> Need:
    """What a stage of training needs on each device of the current mesh; nothing is allocated."""
    _, state = state_of(recipe, name)
    trained = in_shards(state.trained)
    return Need(
        name,
        parameters=trained + in_shards(state.frozen),
        # Micro-batches are added up.
        gradients=trained * (1 if recipe.stage(name).accumulate == 1 else 2),
        optimizer=in_shards(state.optimizer),
        activations=activations(recipe, name),
    )


def activations(recipe: Recipe, name: str) -> int:
    """Bytes that one device works in during a step of a stage, about: `working_set`.

    Of the encoder's own stage: what is kept of every block by `remat`, and what one block is
    computed from.
    """
    mesh, platform = jax.sharding.get_mesh(), meshes.platform()
    if name != "encoder":
        return working_set.of_step(recipe, name, mesh.shape, platform).total
    stage, vit = recipe.stage(name), recipe.model.vit
    rows = math.ceil(stage.batch / stage.accumulate / meshes.batch_shards(mesh)) * recipe.row[1]
    size = working_set.number_size(recipe, platform)
    patches = rows * vit.patches
    scores = working_set.FLOAT32 * patches * vit.patches * vit.heads
    kept = 2 * scores + size * patches * (4 * vit.mlp + 8 * vit.width)
    saved = vit.depth * kept * (recipe.model.remat != "full")
    return round(saved + working_set.encoder(recipe.model, rows, size))


def of_model(model: Any, phase: str) -> Need:
    """What the parameters of a model take on each device of the current mesh, from its shapes."""
    return Need(phase, in_shards(model))


def available() -> tuple[int, str]:
    """Bytes that one device of the current mesh may still take, and whose they are."""
    here = jax.process_index()
    devices = [d for d in jax.sharding.get_mesh().devices.flat if d.process_index == here]
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        return free, f"on each {devices[0].device_kind}"
    shared = f" for each of {len(devices)} devices" if len(devices) > 1 else ""
    return host() // len(devices), f"in this machine's memory{shared}"


def host(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that are free for this process: of the machine, or of its container."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in lines_of(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    # Of a container, in the second and in the first version of control groups.
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        found = [lines_of(cgroup / name)[:1] for name in (limit, used)]
        if all(found) and found[0][0].isdigit() and found[1][0].isdigit():
            free.append(int(found[0][0]) - int(found[1][0]) + cached(cgroup / limit))
    return max(min(free), 0)


def cached(limit: Path) -> int:
    """Bytes of files that a container's count holds and gives back when they are wanted."""
    for line in lines_of(limit.parent / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def lines_of(path: Path) -> list[str]:
    """The lines of a small file; none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def check(need: Need, advice: str, *, free: Callable[[], tuple[int, str]] = available) -> str:
    """A warning where `need` may not fit, "" where it does.

    Raises:
      ValueError: where it cannot, with the numbers and `advice`.
    """
    there, where = free()
    if need.sure > there:
        raise ValueError(
            f"{need.phase} needs about {gigabytes(need.total)} ({need}) and {gigabytes(there)} are "
            f"free {where}: {advice}"
        )
    if need.total > 0.9 * there:
        return (
            f"{need.phase} needs about {gigabytes(need.total)} ({need}) of the {gigabytes(there)} "
            f"that are free {where}, and may end for want of memory: {advice}"
        )
    return ""


def ways(recipe: Recipe, need: Need) -> str:
    """What makes a training smaller, the field that saves most first."""
    found = []
    learnt = need.gradients + need.optimizer
    if need.phase == "finetune" and not recipe.lora.rank and learnt > need.total / 8:
        found.append("train adapters alone (lora.rank=16)")
    if need.optimizer > need.total / 8 and recipe.stage(need.phase).moments == "float32":
        found.append(f"keep less of past gradients ({need.phase}.moments=bfloat16 or factored)")
    if need.activations > need.parameters and recipe.model.remat != "full":
        found.append("recompute activations (remat=full)")
    stage = recipe.stage(need.phase)
    if need.activations > need.parameters and stage.batch > stage.accumulate:
        found.append(f"raise {need.phase}.accumulate, or lower {need.phase}.batch")
    devices = jax.sharding.get_mesh().size
    if devices > 1 and jax.sharding.get_mesh().shape["fsdp"] < devices:
        found.append(f"spread it over the devices (mesh.data=1, mesh.fsdp={devices})")
    else:
        found.append("use more devices (mesh.fsdp, mesh.tensor)")
    return "; ".join([*found, "or choose a smaller llm"])


def check_training(recipe: Recipe) -> list[str]:
    """Warnings of the stages that may not fit on the current mesh; ValueError where one cannot."""
    needs = [of_stage(recipe, name) for name in ("encoder", "align", "finetune")
             if recipe.stage(name).steps]  # fmt: skip
    told = [check(need, ways(recipe, need)) for need in needs]
    return [line for line in told if line]
