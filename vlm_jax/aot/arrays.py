# SPDX-License-Identifier: Apache-2.0
"""The largest arrays of a traced program that does not compile, by the size of a device's shard.

The compiler fuses operations, so it may not allocate all of them.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax


def inner(value: Any) -> Iterator[Any]:
    """The programs in a parameter of an equation."""
    for part in value if isinstance(value, (tuple, list)) else [value]:
        program = getattr(part, "jaxpr", part)
        if hasattr(program, "eqns"):
            yield program


def on_device(aval: Any) -> int:
    """Bytes of an array's shard."""
    spec = getattr(getattr(aval, "sharding", None), "spec", None) or ()
    axes = jax.sharding.get_abstract_mesh().shape
    names = [n for part in spec if part for n in (part if isinstance(part, tuple) else (part,))]
    shards = math.prod(axes[name] for name in names if name in axes)
    return math.ceil(aval.size / shards) * aval.dtype.itemsize


def largest(jaxpr: Any, most: int = 8) -> list[dict[str, Any]]:
    """Type, bytes on a device and scope of the largest arrays that a program makes."""
    arrays: dict[tuple[str, str], dict[str, Any]] = {}

    def walk(program: Any, above: str) -> None:
        for equation in program.eqns:
            stack = str(equation.source_info.name_stack)
            scope = "/".join(part for part in (above, stack) if part)
            parts = [p for value in equation.params.values() for p in inner(value)]
            for part in parts:
                walk(part, scope)
            # The results of a call are already listed inside it; a loop stacks its own.
            if parts and equation.primitive.name not in ("scan", "while"):
                continue
            for out in equation.outvars:
                if not hasattr(out.aval, "dtype") or not hasattr(out.aval.dtype, "itemsize"):
                    continue
                named = out.aval.str_short(short_dtypes=True)
                size, at = on_device(out.aval), f"{scope}/{equation.primitive.name}".strip("/")
                arrays.setdefault((named, scope), dict(type=named, bytes=size, scope=at))

    walk(getattr(jaxpr, "jaxpr", jaxpr), "")
    return sorted(arrays.values(), key=lambda one: -one["bytes"])[:most]
