# SPDX-License-Identifier: Apache-2.0
"""A search over meshes, recomputation and micro-batches: what fits a slice, the fastest first."""

import itertools
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import progress
from vlm_jax.aot import report
from vlm_jax.aot.topology import Topology
from vlm_jax.layers import REMAT
from vlm_jax.training.recipe import Recipe

TENSOR = (1, 2, 4, 8)  # more makes matrices too thin for the matrix units


def possible(config: ConfigDict, mode: str, topology: Topology) -> list[dict[str, Any]]:
    """Fields to try, the likeliest first: state sharded over all devices, little recomputed."""
    recipe, devices = Recipe.of(config), topology.device_count
    training = mode in ("align", "finetune")
    rows = recipe.stage(mode).batch if training else config.evaluate.batch
    candidates = []
    for tensor, data in itertools.product(TENSOR, (1, 2, 4, 8)):
        if devices % (tensor * data) or recipe.model.llm.kv_heads % tensor:
            continue
        fsdp = devices // tensor // data
        shards = data * fsdp
        meshes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
        if not training:
            if rows % shards == 0:
                candidates.append(meshes)
            continue
        for remat, accumulate in itertools.product(sorted(REMAT), (1, 2, 4)):
            if rows % accumulate == 0 and (rows // accumulate) % shards == 0:
                candidates.append(meshes | {"remat": remat, f"{mode}.accumulate": accumulate})
    order = {"full": 0, "dots": 1, "none": 2}
    return sorted(
        candidates,
        key=lambda f: (
            f["mesh.data"] > 1,
            f["mesh.tensor"],
            f.get(f"{mode}.accumulate", 1),
            order.get(f.get("remat", ""), 0),
        ),
    )


def search(config: ConfigDict, mode: str, topology: Topology, *, most: int) -> dict[str, Any]:
    """Compiles the first `most` candidates; what fits comes first, by estimated time.

    A candidate that needs more memory than one that did not fit is not compiled.

    Raises:
      ValueError: if no mesh of the slice divides the batch.
    """
    every = possible(config, mode, topology)
    if not every:
        raise ValueError(
            f"no mesh of the {topology.device_count} devices of {topology.name} cuts the batch of "
            f"{mode} evenly: choose a batch that is a multiple of a divisor of "
            f"{topology.device_count}"
        )
    tried: list[dict[str, Any]] = []
    left = list(every)
    with progress.doing(f"--search of {mode}", min(most, len(every))) as task:
        while left and len(tried) < most:
            fields = left.pop(0)
            entry: dict[str, Any] = dict(fields=fields, fits=False)
            tried.append(entry)
            changed = config.copy_and_resolve_references()
            changed.update_from_flattened_dict(fields)
            try:
                result = report.of_config(changed, mode, topology)
            except ValueError as error:
                entry["error"] = str(error)
                continue
            entry |= {name: result[name] for name in ("fits", "hbm_share", "compile_seconds")}
            tried[-1] = entry
            if result["fits"]:
                entry |= {k: result["estimate"][k] for k in ("step_seconds", "mfu")}
            else:
                left = [other for other in left if not larger(other, fields, mode)]
            task.note(len(tried))
    tried.sort(key=lambda one: (not one["fits"], one.get("step_seconds", 0.0)))
    return dict(topology=topology.name, mode=mode, possible=len(every), tried=tried)


def larger(fields: dict[str, Any], than: dict[str, Any], mode: str) -> bool:
    """Whether `fields` cannot fit if `than` does not: the same mesh, and at least as much kept."""
    kept = {"full": 0, "dots": 1, "none": 2, "": 0}
    same = all(
        fields[f"mesh.{axis}"] == than[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")
    )
    accumulate = f"{mode}.accumulate"
    return (
        same
        and kept[fields.get("remat", "")] >= kept[than.get("remat", "")]
        and fields.get(accumulate, 1) <= than.get(accumulate, 1)
    )
