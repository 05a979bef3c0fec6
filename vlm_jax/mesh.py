# SPDX-License-Identifier: Apache-2.0
"""The device mesh, the dimension names, and the one table that maps names to mesh axes."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# Dimension name -> mesh axes. Weights carry these names from birth; so do activations at einsums.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # the model width of a weight: sharded to save memory, gathered to compute
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "len": None,
    "feature": None,  # the width of an activation
    "head": None,
    "none": None,
}


def spec(*dims: str) -> P:
    """The PartitionSpec of an array whose dimensions carry these names.

    Raises:
      KeyError: for an unknown name. ValueError: where two dimensions would use one mesh axis.
    """
    if unknown := [d for d in dims if d not in RULES]:
        raise KeyError(f"unknown dimension {unknown}; mesh.RULES knows {sorted(RULES)}")
    rules = [RULES[d] for d in dims]
    axes = [axis for rule in rules for axis in ((rule,) if isinstance(rule, str) else rule or ())]
    if twice := sorted({axis for axis in axes if axes.count(axis) > 1}):
        raise ValueError(
            f"dimensions {dims} would use the mesh axis {', '.join(twice)} twice: an axis can "
            "split one dimension of an array; give the other a name without it, such as 'none'"
        )
    return P(*rules)


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """An explicit mesh (data, fsdp, tensor) over all devices; -1 takes what the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(
            f"mesh (data={data}, fsdp={fsdp}, tensor={tensor}): sizes are positive, "
            "and one of them may be -1 to take the remaining devices"
        )
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh (data={data}, fsdp={fsdp}, tensor={tensor}) does not fit {len(devices)} "
            f"devices: "
            f"the product of the axes must be {len(devices)}; use -1 for one axis to fill it"
        )
    explicit = (AxisType.Explicit,) * 3
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=explicit, devices=devices)
    except RuntimeError:
        # An axis takes a part of a side of the torus, such as 4 x 16 of 8 x 8 chips.
        order = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(order, AXES, axis_types=explicit)


def sizes(text: str | None) -> dict[str, int]:
    """The axes that a flag names, as "tensor=2" or "data=2,tensor=4"; none of None.

    Raises:
      ValueError: for anything else, an axis that there is not, and one that comes twice.
    """
    found: dict[str, int] = {}
    for part in text.split(",") if text is not None else []:
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.isdigit() or not int(size) or name in found:
            raise ValueError(
                f"--mesh={text}: give each axis its size once, of {', '.join(AXES)}, such as "
                "tensor=2 or data=2,tensor=4; data takes the devices that the others leave"
            )
        found[name] = int(size)
    return found


def sharding(mesh: Mesh, *dims: str) -> NamedSharding:
    """Where an array with these dimension names lives on `mesh`."""
    return NamedSharding(mesh, spec(*dims))


def spread(tree: Any, mesh: Mesh, *dims: str) -> Any:
    """Host arrays, the same in every process, on a mesh, their dimensions named as in `spec`."""
    where = sharding(mesh, *dims)
    if jax.process_count() == 1:
        return jax.device_put(tree, where)

    def one(x: Any) -> jax.Array:
        # device_put would first compare the numbers of all processes.
        return jax.make_array_from_callback(np.shape(x), where, np.asarray(x).__getitem__)

    return jax.tree.map(one, tree)


def check_split(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], dims: tuple[str, ...]) -> None:
    """Raises where a dimension of a weight does not split evenly over its mesh axis."""
    for size, name in zip(shape, dims, strict=True):
        axis = RULES[name]
        if axis in mesh.shape and size % mesh.shape[axis]:
            raise ValueError(
                f"{name!r} of {size} in a weight {shape} does not split over mesh.{axis}="
                f"{mesh.shape[axis]}: choose a mesh.{axis} that divides it"
            )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the batch is cut."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def platform() -> str:
    """What the current mesh is made of: "cpu", "gpu" or "tpu", also one that only compiles."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these options that the compiler behind the current mesh accepts: releases drop some.

    For options that change how a program is made or how fast it runs, never what it computes.
    """
    return {name: value for name, value in options.items() if _accepts(platform(), name, value)}


@functools.cache
def _accepts(platform: str, name: str, value: Any) -> bool:
    """Whether the smallest program compiles with an option; raises where none compiles at all."""
    del platform  # one answer for each
    program = jax.jit(lambda: jnp.zeros(())).lower()
    try:
        program.compile({name: value})
    except jax.errors.JaxRuntimeError:
        program.compile()
        return False
    return True
