# SPDX-License-Identifier: Apache-2.0
"""Compiles the programs of a mode for a topology and reports their needs as one JSON object.

Seconds are estimates without a TPU; `ESTIMATE` explains the method and its limits.
"""

import re
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import jax

from vlm_jax import mesh as meshes
from vlm_jax import progress
from vlm_jax.aot import arrays, counted, programs
from vlm_jax.aot.topology import Topology
from vlm_jax.cost import flops as cost
from vlm_jax.training.cells import stage_flops
from vlm_jax.training.fields import STAGES
from vlm_jax.training.recipe import Recipe

ESTIMATE = (
    "compute_seconds: the compiler's estimated cycles, loops multiplied, at the chip's clock, and "
    "kernels at the roofline of what they declare; element-wise operations come out about 2.5 "
    "times too slow. collective_seconds: bytes sent in a ring over all links of a chip at once, "
    "the best case. step_seconds: computing plus synchronous collectives, and of asynchronous ones "
    "what is longer than the computing. Nothing was timed on a TPU"
)
# Parts of a step by the named scopes of the model; an operation belongs to the first that matches.
PARTS = ("optimizer", "encoder", "compressor", "question", "prefusion", "condensing", "splice",
         "pruning", "embedding", "logits", "loss", "attention", "mlp")  # fmt: skip


def part_of(scope: str) -> str:
    """The part of a step that an operation belongs to."""
    return next((part for part in PARTS if part in scope), "other")


@dataclass(frozen=True)
class Serving:
    """What serving programs are compiled for: requests in a batch, and new tokens of each."""

    rows: int
    new_tokens: int


def compiled(lowered: Any) -> Any:
    """The executable, or the compiler's message if the program does not fit into memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if re.search(r"resource_exhausted|ran out of memory|exceeds available", text, re.I):
            return text
        raise


def of_program(program: programs.Program, topology: Topology) -> dict[str, Any]:
    """What one program needs on each device."""
    then = time.perf_counter()
    executable = compiled(program.traced.lower())
    seconds = time.perf_counter() - then
    if isinstance(executable, str):
        return too_large(program, executable, topology) | dict(compile_seconds=round(seconds, 1))
    facts = counted.facts(executable.as_text(), part_of)
    memory = executable.memory_analysis()
    hbm = hbm_of(program, memory, facts)
    cycles = sum(facts.cycles.values())
    kernels = max(
        facts.kernel_flops / topology.peak_flops, facts.kernel_bytes / topology.hbm_bytes_per_s
    )
    compute = cycles / topology.kind.clock + kernels
    sent = {
        now: sum(c.sent * c.times for c in facts.collectives if c.asynchronous == now)
        / topology.link_bytes_per_s
        for now in (False, True)
    }
    return dict(
        name=program.name,
        fits=hbm["total"] <= topology.hbm_bytes,
        hbm_bytes=hbm,
        donated_bytes=memory.alias_size_in_bytes,
        flops_per_device=facts.flops + facts.kernel_flops,
        kernel_flops_per_device=facts.kernel_flops,
        hbm_traffic_bytes=facts.hbm_bytes,
        cycles=dict(sorted(facts.cycles.items(), key=lambda item: -item[1])),
        collectives=by_kind(facts),
        largest=[asdict(tensor) for tensor in facts.largest[:8]],
        unread_loops=list(facts.unread_loops),
        estimate=dict(
            compute_seconds=compute,
            kernel_seconds=kernels,
            collective_seconds=sum(sent.values()),
            synchronous_seconds=sent[False],
            step_seconds=sent[False] + max(compute, sent[True]),
        ),
        compile_seconds=round(seconds, 1),
    )


def hbm_of(program: programs.Program, memory: Any, facts: counted.Facts) -> dict[str, int]:
    """Bytes of a device by kind; they add up to the compiler's own sum ("total")."""
    # Results that do not reuse a donated argument, and code, take memory too.
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    kinds = dict(program.inputs)
    room = memory.temp_size_in_bytes
    for name, size in (("activations", facts.saved_bytes), ("gradients", facts.gradient_bytes)):
        kinds[name] = min(size, room)
        room -= kinds[name]
    kinds["temporaries"] = room
    kinds["code"] = memory.generated_code_size_in_bytes
    # Padding to tiles, and results that are not donated.
    kinds["padding_and_results"] = total - sum(kinds.values())
    return kinds | dict(total=total)


def by_kind(facts: counted.Facts) -> list[dict[str, Any]]:
    """Collectives by kind, synchronous and asynchronous ones apart; bytes per device and step."""
    entries: dict[tuple[str, bool], dict[str, Any]] = {}
    for c in facts.collectives:
        entry = entries.setdefault(
            (c.kind, c.asynchronous),
            dict(kind=c.kind, asynchronous=c.asynchronous, count=0, bytes=0, sent_bytes=0.0),
        )
        entry["count"] += c.times
        entry["bytes"] += c.bytes * c.times
        entry["sent_bytes"] += c.sent * c.times
    return sorted(entries.values(), key=lambda entry: -entry["sent_bytes"])


def too_large(program: programs.Program, message: str, topology: Topology) -> dict[str, Any]:
    """What is known of a program that does not fit: its inputs, and the compiler's message."""
    needed = re.search(r"Used ([\d.]+)([KMGT]?) of|temporaries \(([\d.]+)([KMGT]?)\)", message)
    unit = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    total = None
    if needed:
        number, letter = needed[1] or needed[3], (needed[2] or needed[4]) or ""
        total = int(float(number) * 1024 ** unit[letter])
    inputs = program.inputs
    reasons = [line for line in message.splitlines() if "memory" in line.lower()]
    return dict(
        name=program.name,
        fits=False,
        hbm_bytes=inputs | dict(total=max(total or 0, sum(inputs.values()))),
        largest=arrays.largest(program.traced.jaxpr),
        message=(reasons or [message])[0][:400],
        estimate=None,
        collectives=[],
        unread_loops=[],
    )


def report(recipe: Recipe, mode: str, topology: Topology, serving: Serving) -> dict[str, Any]:
    """The programs of `mode`, compiled on the current mesh of `topology`."""
    results = []
    start = time.perf_counter()
    for trace in programs.programs(recipe, mode, rows=serving.rows, new_tokens=serving.new_tokens):
        with progress.doing(f"{mode}: tracing"):
            program = trace()
        with progress.doing(f"{program.name}: compiling for {topology.name}"):
            results.append(of_program(program, topology))
    seconds = time.perf_counter() - start
    worst = max(results, key=lambda one: one["hbm_bytes"]["total"])
    return dict(
        topology=topology.name,
        chip=topology.kind.chip,
        chips=topology.chips,
        devices=topology.device_count,
        mesh=dict(jax.sharding.get_mesh().shape),
        mode=mode,
        **(dict(visual_tokens=recipe.visual) if mode in STAGES and recipe.drawn else {}),
        fits=all(one["fits"] for one in results),
        hbm_bytes=worst["hbm_bytes"] | dict(usable=topology.hbm_bytes),
        hbm_share=worst["hbm_bytes"]["total"] / topology.hbm_bytes,
        flops=flops(recipe, mode, serving, results, topology),
        collectives=[dict(program=one["name"]) | c for one in results for c in one["collectives"]],
        estimate=estimate(recipe, mode, serving, results, topology),
        programs=results,
        compile_seconds=round(seconds, 1),
        versions={name: metadata.version(name) for name in ("jax", "libtpu")},
    )


def work(recipe: Recipe, mode: str, serving: Serving) -> tuple[int, int, float, float]:
    """Rows and tokens of one run of a mode, FLOPs that the model needs for it, and FLOPs that the
    programs execute (with recomputation and masked scores)."""
    model, rows = recipe.model, recipe.rows
    row = rows.text_length + rows.images_per_row * model.visual_tokens
    if mode in ("align", "finetune"):
        stage, row = recipe.stage(mode), recipe.row[2]
        # Where steps draw V, the program is that of the largest.
        one = stage_flops(recipe.largest, mode, cached=False) / stage.steps
        again = 0.0
        if model.remat == "full":
            again = stage.batch * cost.llm_flops(model.llm, row, logits=0)
        # About half of a row's scores are masked; by convention MFU counts only the others.
        pairs = stage.batch * cost.llm_flops(model.llm, row, logits=0)
        pairs -= stage.batch * row * cost.llm_flops(model.llm, 1, cached=-1, logits=0)
        return stage.batch, stage.batch * row, one - again - 3 * pairs / 2, one
    G = serving.new_tokens
    request = cost.request_flops(
        model.vit, model.compressor, model.llm, Q=rows.text_length, G=G,
        question=rows.question_length, pruning=model.pruning, frames=rows.images_per_row,
    )  # fmt: skip
    count = serving.rows
    read = count * float(request.total - request.decode)
    V = model.visual_tokens
    held = cost.cached_tokens(V, model.compressor, model.llm, model.pruning)
    behind = row + G // 2 - rows.images_per_row * (V - held)
    step = count * float(cost.llm_flops(model.llm, 1, cached=behind))
    if mode == "prefill":
        return count, count * row, read, read
    if mode == "decode":
        return count, count, step, step
    whole = read + max(G - 1, 0) * step
    return count, count * G, whole, whole


def flops(
    recipe: Recipe, mode: str, serving: Serving, results: list[dict[str, Any]], topology: Topology
) -> dict[str, Any]:
    """FLOPs of one run of a mode on all devices: the model's, our count of the program, and the
    compiler's count with loop bodies per trip."""
    _, _, needed, program = work(recipe, mode, serving)
    if not all("flops_per_device" in one for one in results):
        return dict(model=needed, program=program, compiler=None)
    read = sum(one["flops_per_device"] * runs(one, mode, serving) for one in results)
    return dict(model=needed, program=program, compiler=read * topology.device_count)


def runs(one: dict[str, Any], mode: str, serving: Serving) -> int:
    """How often a program runs in one run of its mode."""
    return max(serving.new_tokens - 1, 0) if mode == "evaluate" and one["name"] == "decode" else 1


def estimate(
    recipe: Recipe, mode: str, serving: Serving, results: list[dict[str, Any]], topology: Topology
) -> dict[str, Any] | None:
    """Seconds of one run of a mode, and rates computed from them; None if it does not fit."""
    if any(one["estimate"] is None for one in results):
        return None
    rows, tokens, needed, _ = work(recipe, mode, serving)

    def total(name: str) -> float:
        return sum(one["estimate"][name] * runs(one, mode, serving) for one in results)

    seconds, compute = total("step_seconds"), total("compute_seconds")
    peak = topology.peak_flops * topology.device_count
    return dict(
        step_seconds=seconds,
        compute_seconds=compute,
        kernel_seconds=total("kernel_seconds"),
        collective_seconds=total("collective_seconds"),
        synchronous_seconds=total("synchronous_seconds"),
        mfu=needed / (seconds * peak),
        mfu_without_communication=needed / (compute * peak),
        rows_per_second=rows / seconds,
        tokens_per_second=tokens / seconds,
        tokens_per_second_per_chip=tokens / seconds / topology.chips,
        how=ESTIMATE,
    )


def epoch(
    result: dict[str, Any], rows: int, per_run: int, dollars_per_chip_hour: float | None
) -> dict[str, Any]:
    """Hours and dollars for `rows` examples at `per_run` examples per step."""
    if result["estimate"] is None:
        return dict(rows=rows, steps=None, hours=None, chip_hours=None, dollars=None)
    steps = -(-rows // per_run)
    hours = steps * result["estimate"]["step_seconds"] / 3600
    paid = dollars_per_chip_hour
    return dict(
        rows=rows,
        steps=steps,
        hours=hours,
        chip_hours=hours * result["chips"],
        dollars_per_chip_hour=paid,
        dollars=None if paid is None else hours * result["chips"] * paid,
    )


def helps(recipe: Recipe, mode: str) -> list[str]:
    """Changes that make the programs of a mode smaller, the largest saving first."""
    mesh = jax.sharding.get_mesh()
    changes = []
    if mesh.shape["data"] > 1:
        changes.append(f"shard the state over all devices (mesh.data=1, mesh.fsdp={mesh.size})")
    if mode in ("align", "finetune"):
        stage = recipe.stage(mode)
        if recipe.model.remat != "full":
            changes.append("recompute activations (remat=full)")
        if stage.batch // stage.accumulate > meshes.batch_shards(mesh):
            changes.append(f"raise {mode}.accumulate")
        if mode == "finetune" and not recipe.lora.rank:
            changes.append("train adapters alone (lora.rank=16)")
        changes.append("lower data.text_length")
    else:
        changes.append("lower evaluate.batch, or raise mesh.tensor")
    return [*changes, "take a larger slice (--topology)"]


def of_config(
    config: Any,
    mode: str,
    topology: Topology,
    *,
    examples: int | None = None,
    dollars_per_chip_hour: float | None = None,
) -> dict[str, Any]:
    """What the programs of a configuration need on a slice, as `vlm-jax compile` prints it.

    Args:
      mode: one of programs.MODES.
      examples: rows of an epoch; None: steps x batch of the stage.
    Raises:
      ValueError: for a mesh that does not fit the slice, a batch that it does not divide evenly,
        and if libtpu is missing.
    """
    recipe = Recipe.of(config)
    serving = Serving(config.evaluate.batch, config.evaluate.max_new_tokens)
    devices = topology.devices()
    with jax.set_mesh(meshes.make(**config.mesh, devices=devices)):
        check(recipe, mode, serving)
        result = report(recipe, mode, topology, serving)
        result["helps"] = [] if result["fits"] else helps(recipe, mode)
    if mode in ("align", "finetune"):
        stage = recipe.stage(mode)
        rows, per_run = stage.steps * stage.batch, stage.batch
    else:
        rows, per_run = serving.rows, serving.rows
    result["epoch"] = epoch(result, examples or rows, per_run, dollars_per_chip_hour)
    return result


def check(recipe: Recipe, mode: str, serving: Serving) -> None:
    """Raises ValueError if the mesh does not divide the batch of a mode evenly."""
    shards = meshes.batch_shards(jax.sharding.get_mesh())
    rows, name = serving.rows, "evaluate.batch"
    if mode in ("align", "finetune"):
        stage = recipe.stage(mode)
        if not stage.steps:
            raise ValueError(
                f"{mode}.steps=0: this configuration has no such stage; set {mode}.steps, or "
                "choose another --mode"
            )
        if stage.batch % stage.accumulate:
            raise ValueError(f"{mode}.accumulate={stage.accumulate} does not divide {mode}.batch="
                             f"{stage.batch}")  # fmt: skip
        rows, name = stage.batch // stage.accumulate, f"{mode}.batch / {mode}.accumulate"
    if rows % shards:
        raise ValueError(
            f"{name}={rows} rows do not split over the {shards} parts into which the mesh cuts a "
            "batch (mesh.data x mesh.fsdp): choose a multiple, or cut weights by mesh.tensor too"
        )
