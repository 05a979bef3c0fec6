# SPDX-License-Identifier: Apache-2.0
"""Chips at their best: peak FLOP/s, memory bytes and bytes per second, each with its source.

Dense bf16 for accelerators. No system reaches these: 90 % of peak and 83 % of bandwidth are
measured on v6e by tpu-recipes microbenchmarks; `roofline.calibrate` fits what your system reaches.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable

import numpy as np

from vlm_jax.cost.flops import Number

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, or several counted as one."""

    name: str
    peak_flops: Number  # per second
    hbm_bytes_per_s: Number
    hbm_bytes: Number  # what a program can use
    bytes_per_number: int  # of weights, activations and cache
    source: str

    def times(self, count: int) -> "Chip":
        """`count` of these chips as one, with free communication: a bound on what they reach."""
        if count < 1:
            raise ValueError(f"{count} chips: at least 1 is needed")
        if count == 1:
            return self
        return dataclasses.replace(
            self,
            name=f"{count} x {self.name}",
            peak_flops=count * self.peak_flops,
            hbm_bytes_per_s=count * self.hbm_bytes_per_s,
            hbm_bytes=count * self.hbm_bytes,
        )


def _bf16(name: str, teraflops: Number, gigabytes_per_s: Number, gib: Number, source: str) -> Chip:
    return Chip(name, teraflops * 1e12, gigabytes_per_s * 1e9, gib * GIB, 2, source)


_TPU = "docs.cloud.google.com/tpu/docs/"
_NVIDIA = "nvidia.com/en-us/data-center/"
CHIPS = {
    chip.name: chip
    for chip in (
        # Pages say 32 GB (v4, v6e) and 16 GB (v5e); their compilers leave a program less.
        _bf16("v4", 275, 1200, 30.75, _TPU + "v4"),
        _bf16("v5e", 197, 819, 15.75, _TPU + "v5e"),
        _bf16("v5p", 459, 2765, 95, _TPU + "v5p"),
        _bf16("v6e", 918, 1638, 31.25, _TPU + "v6e"),
        _bf16("v7", 2307, 7380, 192, _TPU + "tpu7x (Ironwood; two JAX devices per chip)"),
        # 1979 TFLOP/s on NVIDIA's data sheets is with sparsity: half of it without. The sheets
        # themselves were not at hand: the numbers are those that several pages quote from them
        # (bandwidth of the HBM3 and HBM3e SXM boards), and the 141 GB also NVIDIA's own MLPerf
        # submission (mlcommons/inference_results_v4.1, closed/NVIDIA/systems). GB are taken as
        # 1e9 bytes, the cautious reading.
        _bf16("h100", 989.4, 3350, 80e9 / GIB, _NVIDIA + "h100 (SXM)"),
        _bf16("h200", 989.4, 4800, 141e9 / GIB, _NVIDIA + "h200 (SXM)"),
    )
}


def named(name: str) -> Chip:
    """The chip called `name`; "cpu" measures this machine now."""
    if name == "cpu":
        return measure_cpu()
    if name not in CHIPS:
        raise ValueError(
            f"unknown chip {name!r}: choose one of {', '.join(CHIPS)}, or cpu (measured)"
        )
    return CHIPS[name]


def measure_cpu(*, side: int = 1024, copy_bytes: int = 2**27, repeats: int = 5) -> Chip:
    """This machine as a chip, float32: its best of `repeats` matrix products and array copies."""
    matrix = np.ones((side, side), np.float32)
    array = np.ones(copy_bytes // 8, np.float64)
    target = np.empty_like(array)
    product = _fastest(lambda: matrix @ matrix, repeats)
    copy = _fastest(lambda: np.copyto(target, array), repeats)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = f"measured: numpy {np.__version__}, {os.cpu_count()} cores, {platform.machine()}"
    # A copy reads and writes every byte.
    return Chip("cpu", 2 * side**3 / product, 2 * copy_bytes / copy, float(memory), 4, source)


def _fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one warm-up run."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
