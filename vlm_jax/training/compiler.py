# SPDX-License-Identifier: Apache-2.0
"""Compiler options of a training step by kind of device: how it runs, not what it computes."""

from typing import Any

import jax

from vlm_jax import cpu

# Gathers of weights run beside matrix products: by the compiler's own text about half of them
# (docs/pods.md, "Collectives"). A v5e does so by itself.
GATHERS_BESIDE = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "TPU v5": GATHERS_BESIDE,  # v5p
    "TPU v6 lite": GATHERS_BESIDE,  # v6e
}


def step_options() -> dict[str, Any]:
    """Those for the current mesh; `mesh.known` leaves out what its compiler does not take."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind
    return cpu.step_options() | STEP_OPTIONS.get(kind, {})
