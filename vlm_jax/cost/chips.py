# SPDX-License-Identifier: Apache-2.0
"""Chips at their best: peak FLOP/s by type, memory, its bandwidth and the links, with sources.

Dense bf16 for accelerators. No system reaches these: 90 % of peak and 83 % of bandwidth are
measured on v6e by tpu-recipes microbenchmarks; `calibration.calibrate` fits what yours reaches.
Chips of your own: `catalog.py`.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping

import numpy as np

from vlm_jax.cost.flops import Number

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, or `count` of them that work on one batch together.

    `peaks` are FLOP/s of products in other types than bf16, by name. `link_bytes_per_s` is what one
    chip sends in a ring of its neighbors; 0 if it is not known.
    """

    name: str
    peak_flops: Number  # per second
    hbm_bytes_per_s: Number
    hbm_bytes: Number  # what a program can use
    bytes_per_number: int  # of weights, activations and cache
    source: str
    peaks: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    link_bytes_per_s: Number = 0.0
    price_per_hour: Number | None = None  # dollars for one chip
    count: int = 1

    def times(self, count: int) -> "Chip":
        """`count` of these chips; what they say to each other is counted by `roofline.seconds`.

        Raises ValueError if the speed of their links is not known.
        """
        if count < 1:
            raise ValueError(f"{count} chips: at least 1 is needed")
        if count == 1:
            return self
        if not self.link_bytes_per_s:
            raise ValueError(
                f"{count} x {self.name}: the speed of its links is not known; describe the chip in "
                "a file with link_gb_per_s (--catalog), or plan for one"
            )
        return dataclasses.replace(
            self,
            name=f"{count} x {self.name}",
            peak_flops=count * self.peak_flops,
            hbm_bytes_per_s=count * self.hbm_bytes_per_s,
            hbm_bytes=count * self.hbm_bytes,
            peaks={kind: count * peak for kind, peak in self.peaks.items()},
            count=count * self.count,
        )

    def peak(self, kind: str) -> Number:
        """FLOP/s of products in a type; "" is the chip's own. ValueError if it is not known."""
        if not kind or (kind == "bf16" and self.bytes_per_number == 2):
            return self.peak_flops
        if kind not in self.peaks:
            raise ValueError(
                f"{self.name} has no peak for {kind}: choose one of "
                f"{', '.join(['bf16', *self.peaks])}"
            )
        return self.peaks[kind]


def _bf16(
    name: str,
    teraflops: Number,
    gigabytes_per_s: Number,
    gib: Number,
    link: Number,
    source: str,
    **peaks: Number,
) -> Chip:
    others = {kind: peak * 1e12 for kind, peak in peaks.items()}
    return Chip(
        name, teraflops * 1e12, gigabytes_per_s * 1e9, gib * GIB, 2, source, others, link * 1e9
    )


_TPU = "docs.cloud.google.com/tpu/docs/"
_NVIDIA = "nvidia.com/en-us/data-center/"
_ADA = "NVIDIA's Ada architecture page and data sheet as other pages quote them"
_GB = 1e9 / GIB  # GB are taken as 1e9 bytes, the cautious reading
CHIPS = {
    chip.name: chip
    for chip in (
        # Links of TPUs: a ring uses two of them, 45 GB/s each and one way on v4 and v5e, 90 on v5p
        # and v6e, 100 on v7 (jax-ml.github.io/scaling-book).
        # Pages say 32 GB (v4, v6e) and 16 GB (v5e); their compilers leave a program less.
        _bf16("v4", 275, 1200, 30.75, 90, _TPU + "v4"),
        _bf16("v5e", 197, 819, 15.75, 90, _TPU + "v5e", int8=394),
        _bf16("v5p", 459, 2765, 95, 180, _TPU + "v5p", int8=918),
        _bf16("v6e", 918, 1638, 31.25, 180, _TPU + "v6e", int8=1836, fp8=918),
        _bf16("v7", 2307, 7380, 192, 200, _TPU + "tpu7x (Ironwood; two JAX devices per chip)",
              fp8=4614),
        # Teraflops on NVIDIA's data sheets are with sparsity: half of them without. The sheets
        # themselves were not at hand: the numbers are those that several pages quote from them, and
        # the 141 GB also NVIDIA's own MLPerf submission (mlcommons/inference_results_v4.1,
        # closed/NVIDIA/systems). NVLink is quoted in both directions together: half of it here.
        _bf16("a100", 312, 2039, 80 * _GB, 300, _NVIDIA + "a100 (SXM, 80 GB)", int8=624),
        _bf16("h100", 989.4, 3350, 80 * _GB, 450, _NVIDIA + "h100 (SXM)", int8=1979, fp8=1979),
        _bf16("h200", 989.4, 4800, 141 * _GB, 450, _NVIDIA + "h200 (SXM)", int8=1979, fp8=1979),
        # Cards on PCIe 4 x16, 32 GB/s one way; an RTX 4090 sends through the host's memory.
        _bf16("l4", 121, 300, 24 * _GB, 32, _NVIDIA + "l4", int8=242, fp8=242),
        _bf16("l40s", 362, 864, 48 * _GB, 32, _NVIDIA + "l40s", int8=733, fp8=733),
        _bf16("rtx4090", 165.2, 1008, 24 * _GB, 16, _ADA, int8=660.6, fp8=330.3),
        # Seven Infinity Fabric links of 128 GB/s, both directions together.
        _bf16("mi300x", 1307.4, 5300, 192 * _GB, 448,
              "amd.com/en/products/accelerators/instinct/mi300, as other pages quote it",
              int8=2614.9, fp8=2614.9),
    )
}  # fmt: skip


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
