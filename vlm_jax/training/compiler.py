# SPDX-License-Identifier: Apache-2.0
"""Compiler options of a training step by kind of device. They do not change what it computes."""

from typing import Any

import jax

from vlm_jax import cpu

# Gathers of weights overlap with matrix products: about half of them, by the compiled text
# (docs/pods.md, "Collectives"). The v5e compiler does so by default.
ASYNC_GATHERS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "TPU v5": ASYNC_GATHERS,  # v5p
    "TPU v6 lite": ASYNC_GATHERS,  # v6e
}


def step_options() -> dict[str, Any]:
    """Options for the current mesh; `mesh.known` drops those that its compiler does not accept."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind
    return cpu.step_options() | STEP_OPTIONS.get(kind, {})
