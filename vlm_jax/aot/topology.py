# SPDX-License-Identifier: Apache-2.0
"""TPU topologies by name, and their devices without a TPU.

libtpu does not check the requested shape, so the shapes that exist are listed here.
Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x; GB/s between chips of
jax-ml/scaling-book (docs/tpus) and the same pages.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from vlm_jax.cost.chips import CHIPS

# Environment variables that libtpu needs before it is loaded on a machine without a TPU.
WITHOUT_TPU = dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several such processes at a time
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One generation of TPU, as JAX and the compiler see it.

    Attributes:
      chip: its name in cost/chips.py.
      devices: JAX devices per chip.
      clock: cycles per second, which turn the compiler's cycles into seconds: the published peak
        divided by the FLOPs of the matrix units per cycle.
      link_bytes_per_s: bytes that a chip sends to its neighbors per second, all links together,
        one direction.
      shapes: slices that exist. one: the shape of a single chip.
      settings: options of the topology besides its name.
    """

    chip: str
    devices: int
    clock: float
    link_bytes_per_s: float
    shapes: tuple[str, ...]
    one: str
    settings: tuple[tuple[str, Any], ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
          "8x16x16", "16x16x16")  # fmt: skip
KINDS = {
    "v4": Kind("v4", 1, 1.05e9, 6 * 45e9, _TORUS, "1x1x1", (("chip_config_name", "megacore"),)),
    "v5e": Kind("v5e", 1, 1.5e9, 4 * 45e9, _FLAT, "1x1"),
    "v5p": Kind("v5p", 1, 1.75e9, 6 * 90e9, _TORUS, "1x1x1"),
    "v6e": Kind("v6e", 1, 1.75e9, 4 * 90e9, _FLAT, "1x1"),
    "tpu7x": Kind("v7", 2, 2.2e9, 6 * 90e9, _TORUS, "1x1x1"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one slice."""

    name: str
    kind: Kind
    chips: int

    @property
    def device_count(self) -> int:
        """JAX devices of the slice."""
        return self.chips * self.kind.devices

    @property
    def peak_flops(self) -> float:
        """Peak bf16 FLOPs of one device per second."""
        return CHIPS[self.kind.chip].peak_flops / self.kind.devices

    @property
    def hbm_bytes(self) -> int:
        """HBM of one device that a program can use, in bytes."""
        return int(CHIPS[self.kind.chip].hbm_bytes / self.kind.devices)

    @property
    def hbm_bytes_per_s(self) -> float:
        """HBM bandwidth of one device, in bytes per second."""
        return CHIPS[self.kind.chip].hbm_bytes_per_s / self.kind.devices

    @property
    def link_bytes_per_s(self) -> float:
        """Bytes that one device sends to its neighbors per second, at best."""
        return self.kind.link_bytes_per_s / self.kind.devices

    def devices(self) -> Sequence[Any]:
        """JAX devices to compile for; none of them needs to exist.

        Raises:
          ValueError: if libtpu is not installed.
        """
        check_libtpu()
        from jax.experimental import topologies

        dims = self.name.partition(":")[2].split("x")
        settings = dict(self.kind.settings)
        if self.chips == 1:
            settings["chips_per_host_bounds"] = tuple(map(int, [*dims, "1"][:3]))
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=self.name, **settings
        ).devices
        if len(devices) != self.device_count:
            raise ValueError(
                f"libtpu gives {len(devices)} devices for {self.name}, not {self.device_count}: "
                "this release counts them differently; install the one that the extra aot names"
            )
        return devices


def named(name: str) -> Topology:
    """The topology "KIND:SHAPE", such as "v5p:4x4x4" (64 chips).

    Raises:
      ValueError: for a topology that does not exist, with the nearest that does.
    """
    kind, _, shape = name.partition(":")
    every = [f"{kind}:{shape}" for kind, known in KINDS.items() for shape in known.shapes]
    if name not in every:
        near = nearest(name, kind, shape, every)
        raise ValueError(
            f"--topology={name} is not a TPU slice: did you mean {near}? Kinds: "
            f"{', '.join(KINDS)}; shapes of {near.partition(':')[0]}: "
            f"{', '.join(KINDS[near.partition(':')[0]].shapes)}"
        )
    return Topology(name, KINDS[kind], math.prod(map(int, shape.split("x"))))


def nearest(name: str, kind: str, shape: str, every: Sequence[str]) -> str:
    """The topology that a wrong name may mean: the next larger one of its kind, or the one with the
    most similar name."""
    numbers = shape or name.partition("-")[2]
    called = {"v5lite": "v5e", "v7": "tpu7x", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "v4": "v4"}
    if kind not in KINDS:
        alike = [known for known in {**{k: k for k in KINDS}, **called} if name.startswith(known)]
        kind = called.get(alike[0], alike[0]) if alike else ""
    if not shape and kind in ("v4", "v5p") and numbers.isdigit():
        numbers = str(int(numbers) // 2)  # these names count cores, two of a chip
    parts = numbers.replace("X", "x").split("x")
    if kind and all(part.isdigit() and int(part) for part in parts):
        wanted = math.prod(map(int, parts))
        sizes = [(math.prod(map(int, s.split("x"))), s) for s in KINDS[kind].shapes]
        larger = [s for count, s in sizes if count >= wanted]
        return f"{kind}:{(larger or [sizes[-1][1]])[0]}"
    close = difflib.get_close_matches(name, every, 1, cutoff=0.0)
    return close[0]


def check_libtpu() -> None:
    """Raises ValueError if libtpu, the TPU compiler, is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu is not installed: it is the TPU compiler, also on a machine without a TPU: pip "
            "install 'vlm_jax[aot]'"
        )


def prepare() -> None:
    """Sets the environment in which libtpu compiles without a TPU. Call it before JAX starts its
    backends."""
    check_libtpu()
    os.environ.update(WITHOUT_TPU)
