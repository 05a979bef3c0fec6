# SPDX-License-Identifier: Apache-2.0
"""What tells whether two runs of one configuration were trained alike, and on what machine.

A configuration and its data say what should be computed, not that it was: another compiler or
another processor adds up in another order.
"""

import hashlib
import json
import math
import os
import platform
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

from vlm_jax import files, hosts
from vlm_jax.training.optimizer import State

SMALL = 1 << 24  # numbers: to add up so many takes less time than to compile it
BEGAN = "began.json"  # in the folder of a stage
# Vector instructions that decide in which order XLA adds up on a CPU, the widest first.
VECTORS = ("avx512f", "avx2", "avx", "sve", "asimd")


def of_weights(tree: Any) -> str:
    """16 hexadecimal digits that depend on every bit of every array, however they are sharded.

    Two sums over the bits of each array are taken where it lies, exact in integers of 32 bits, so
    that a model larger than one host is not fetched. Small arrays are summed on the host, without a
    program to compile.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [x for _, x in leaves]
    if sum(x.size for x in arrays) <= SMALL and all(x.is_fully_addressable for x in arrays):
        pairs = [sums(np.asarray(x)) for x in arrays]
    else:
        pairs = jax.jit(lambda arrays: [sums(x) for x in arrays])(arrays)
    found = hashlib.sha256()
    for (path, x), pair in zip(leaves, pairs, strict=True):
        described = (jax.tree_util.keystr(path), x.shape, str(x.dtype), *map(int, pair))
        found.update(repr(described).encode())
    return found.hexdigest()[:16]


def sums(x: Any) -> tuple[Any, Any]:
    """The two sums over the bits of one array, of NumPy or of JAX, modulo 2^32."""
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype("uint32")
    return bits.sum(dtype="uint32"), (bits * (bits | 1)).sum(dtype="uint32")


class Beginning:
    """A fingerprint of a stage's first weights and the loss of its first batch, kept in a file."""

    def __init__(self, folder: PurePath, state: State):
        self.folder = folder
        self.fresh = int(state.step) == 0
        self.weights = of_weights((state.trained, state.frozen)) if self.fresh else ""

    def note(self, step: int, loss: float) -> None:
        """Writes the file when the first step has ended."""
        if self.fresh and step == 1 and hosts.is_writer():
            loss = loss if math.isfinite(loss) else None
            text = json.dumps({"weights": self.weights, "loss": loss})
            files.write_text(self.folder / BEGAN, text + "\n")


def of_run(folder: PurePath, stages: list[str]) -> dict[str, Any]:
    """initial_weights and first_loss of the first of these stages of a run, last_loss of the last.

    Empty for a run that began before there were fingerprints.
    """
    began = folder / stages[0] / BEGAN
    if not began.exists():
        return {}
    first = json.loads(began.read_text())
    *_, last = (folder / stages[-1] / "metrics.jsonl").read_text().splitlines()
    return dict(
        initial_weights=first["weights"],
        first_loss=first["loss"],
        last_loss=json.loads(last)["loss"],
    )


def processor() -> str:
    """The machine's processor as Linux names it, with its widest vector instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    words = set(fields.get("flags", fields.get("Features", "")).split())
    name = fields.get("model name", platform.machine())
    vectors = next((v for v in VECTORS if v in words), "")
    return ", ".join(x for x in (name, vectors, f"{os.cpu_count()} CPU cores") if x)
